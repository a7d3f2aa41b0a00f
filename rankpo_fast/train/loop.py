"""The training loop of both stages.

    for each step:  gradient = sum of tasks' weight * mean of d loss over the step's batches
                    clip, check, AdamW;  log, save, evaluate when due

A task gives the batches and their loss; everything random in a batch follows from (seed, epoch,
index), so that a run can stop after any step and go on bit by bit.
"""

import random
from collections.abc import Sequence
from functools import partial
from signal import Signals
from typing import Any

import numpy as np
import torch

from rankpo_fast.model.encoder import Encoder
from rankpo_fast.retrieval.evaluate import evaluate
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.allocator import freed_memory_kept
from rankpo_fast.train.budget import measure_memory
from rankpo_fast.train.card import model_card
from rankpo_fast.train.checkpointer import Checkpointer
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.optim import AdamW, adamw, learning_rate
from rankpo_fast.train.prefetch import Prefetcher, pack_step
from rankpo_fast.train.profile import Profile
from rankpo_fast.train.resume import compare_ranks
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule, StepSchedule
from rankpo_fast.train.signals import EXIT_CODES, StopSignal
from rankpo_fast.train.step import train_step
from rankpo_fast.train.summary import introduce
from rankpo_fast.train.task import TrainingTask


def train(
    run: Run, encoder: Encoder, tasks: Sequence[TrainingTask[Any]], about: dict[str, str]
) -> None:
    """Train `encoder` in place and save it in the run's output directory.

    Args:
        tasks: what is minimised, weighted; steps and epochs are counted in the first one's rows.
        about: what the stage says of its rows and its loss, for the user.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as before that step.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, once the step is finished and saved.
    """
    config, ranks, first = run.training, run.ranks, run.first_step
    schedule, saves = StepSchedule.of(config, tasks[0].data), SaveSchedule(config)
    total = schedule.total_steps
    profiled = config.profile_steps if ranks.first else 0
    profile = Profile(run.path / output.PROFILE, profiled, total - first)
    introduce(run, encoder, about | _plans(run, tasks, schedule, saves))
    compare_ranks(run)
    optimizer = _start(run, encoder)
    memory = measure_memory(run, encoder, [task.texts.table for task in tasks])
    pack = partial(pack_step, tasks, encoder, ranks)
    with (
        output.opened(run) as reporters,  # now that nothing else speaks against it
        freed_memory_kept(encoder.device),
        Prefetcher(pack, map(schedule.batches, range(first, total)), memory) as steps,
        MetricsLog(run.path, config, reporters, first, total, silent=not ranks.first) as log,
        profile,
        StopSignal() as signals,
    ):
        checkpointer = Checkpointer(run, encoder, optimizer, memory, saves, log)
        for done in range(first + 1, total + 1):
            rate, clip = learning_rate(done - 1, total, config), config.max_grad_norm
            metrics = train_step(encoder, steps, optimizer, rate, clip, memory, ranks)
            log.step(done, schedule.epochs(done), metrics)
            if (table := profile.step(metrics.tokens)) is not None:
                log.say(table)
            due = saves.due(done, ends_epoch=schedule.ends_epoch(done), last=done == total)
            stop, save = signals.agreed(ranks, due)
            if save:
                checkpointer.save(done)
            if stop is None and done < total and _evaluation_is_due(run, done):
                log.settle()
                log.evaluation(done, _evaluate(run, encoder))
                stop, _ = signals.agreed(ranks)
            if stop is not None:
                checkpointer.save(done)
                raise _stopped(log, stop, f" after step {done}, which is saved; --resume continues")
        log.settle()
        _finish(run, encoder, about, log, signals)


def _plans(
    run: Run,
    tasks: Sequence[TrainingTask[Any]],
    schedule: StepSchedule,
    saves: SaveSchedule,
) -> dict[str, str]:
    """Of what the run is made, for the user."""
    batch_size = run.training.per_device_train_batch_size * run.ranks.size
    texts = {f"{task.prefix}texts": task.texts.summary() for task in tasks}
    return {**texts, "steps": schedule.summary(batch_size), "checkpoints": saves.summary()}


def _start(run: Run, encoder: Encoder) -> AdamW:
    """The optimizer; it, the encoder and what is random as they are at the first step."""
    seed = run.training.seed + run.ranks.rank  # so that dropout differs
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    optimizer = adamw(encoder, run.training)
    if run.checkpoint is not None:
        checkpoints.restore(run.checkpoint, encoder, optimizer, run.ranks)
    encoder.train()
    return optimizer


def _evaluation_is_due(run: Run, step: int) -> bool:
    every = run.training.eval_steps
    return run.evaluation.asked and every is not None and step % every == 0


def _evaluate(run: Run, encoder: Encoder) -> dict[str, float]:
    """The first rank has the figures, the others nothing; all encode."""
    figures = evaluate(
        encoder,
        retrieval=run.evaluation_data.retrieval,
        preferences=run.evaluation_data.preferences,
        cutoffs=run.evaluation.cutoffs,
        max_tokens=run.compute.max_tokens_per_micro_batch,
        legacy=run.evaluation.legacy_metrics,
        cache_dir=run.compute.cache_path,
        ranks=run.ranks,
    )
    run.ranks.meet()
    return figures


def _finish(
    run: Run, encoder: Encoder, about: dict[str, str], log: MetricsLog, signals: StopSignal
) -> None:
    """Save the model, then measure it: a failure there costs no training. SystemExit as `train`."""
    if run.ranks.first:
        output.save_model(run.path, encoder, model_card(run, encoder, about))
    run.ranks.meet()
    log.say(f"model saved in {run.path}")
    stop, _ = signals.agreed(run.ranks)
    if run.evaluation.asked and stop is None:
        figures = _evaluate(run, encoder)
        log.evaluation(log.total_steps, figures)
        if run.ranks.first:
            output.write_card(run.path, model_card(run, encoder, about, figures))
        stop, _ = signals.agreed(run.ranks)
    if stop is not None:
        raise _stopped(log, stop, "; the model is saved")


def _stopped(log: MetricsLog, stop: Signals, saved: str) -> SystemExit:
    """The end of the program; says what is `saved` of the run."""
    log.say(f"stopped by {stop.name}{saved}")
    return SystemExit(EXIT_CODES[stop])
