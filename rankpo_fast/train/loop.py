"""The training loop of both stages.

    for each step:  gradient = sum of tasks' weight * mean of d loss over the step's batches
                    clip, check, update;  log, save, evaluate when due

A task gives the batches and their loss; everything random in a batch follows from (seed, epoch,
index), so that a run can stop after any step and go on bit by bit.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from signal import Signals
from typing import Any

from rankpo_fast.data.packing import one_token
from rankpo_fast.errors import TrainingStopped
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.trainable import in_training
from rankpo_fast.retrieval.evaluate import measure
from rankpo_fast.signals import Interrupted
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.allocator import freed_memory_kept
from rankpo_fast.train.budget import measure_memory
from rankpo_fast.train.callbacks import Callback, Callbacks
from rankpo_fast.train.card import model_card
from rankpo_fast.train.checkpointer import Checkpointer
from rankpo_fast.train.engine import Engine, engine_of
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.optim import Optimizer, describe_optimizer, learning_rate, make_optimizer
from rankpo_fast.train.prefetch import Prefetcher, pack_step
from rankpo_fast.train.profile import Profile
from rankpo_fast.train.result import TrainingResult
from rankpo_fast.train.resume import check_unchanged, compare_ranks
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule, StepSchedule
from rankpo_fast.train.signals import StopSignal
from rankpo_fast.train.step import train_step
from rankpo_fast.train.summary import introduce
from rankpo_fast.train.task import TrainingTask


def train(
    run: Run,
    encoder: Encoder,
    tasks: Sequence[TrainingTask[Any]],
    about: dict[str, str],
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train `encoder` in place and save it in the run's output directory.

    Args:
        tasks: what is minimised, weighted; steps and epochs are counted in the first one's rows.
        about: what the stage says of its rows and its loss, for the user.
        callbacks: called on the first rank.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as before that step.
        OSError: the model could not be saved; NotSaved: it was, but the last checkpoint could not.
        TrainingStopped: by a signal, once the step is finished and saved.
        RankLost: another rank is gone; the last checkpoint is there.
    """
    config, first = run.training, run.first_step
    done, measured_at = first, -1  # steps
    figures: dict[str, float] = {}  # of the last evaluation on the way
    schedule, saves = StepSchedule.of(config, tasks[0].data), SaveSchedule(config)
    total = schedule.total_steps
    profiled = config.profile_steps if run.ranks.first else 0
    profile = Profile(run.path / output.PROFILE, profiled, total - first)
    compare_ranks(run)
    run = replace(run, ranks=replace(run.ranks, lockstep=run.sharded))
    ranks = run.ranks
    engine = engine_of(encoder, ranks, config.shard, one_token(tasks[0].texts.table))
    introduce(run, encoder, about | _plans(run, tasks, schedule, saves))
    tasks = [task.ready(run, encoder) for task in tasks]
    check_unchanged(run)  # of models that have all been read now
    engine.settle()
    optimizer = _start(run, encoder, tasks)
    memory = measure_memory(run, encoder, [task.texts.table for task in tasks], engine)
    pack = partial(pack_step, tasks, encoder, ranks)
    heard = Callbacks(callbacks if ranks.first else ())
    with (
        output.opened(run) as reporters,  # now that nothing else speaks against it
        freed_memory_kept(encoder.device),
        Prefetcher(pack, map(schedule.batches, range(first, total)), memory) as steps,
        MetricsLog(
            run.path, config, reporters, first, total, callbacks=heard, silent=not ranks.first
        ) as log,
        profile,
        in_training(encoder),
        StopSignal() as signals,
    ):
        checkpointer = Checkpointer(run, encoder, optimizer, memory, saves, log, heard)
        for done in range(first + 1, total + 1):
            rate, clip = learning_rate(done - 1, total, config), config.max_grad_norm
            metrics = train_step(encoder, steps, optimizer, rate, clip, memory, ranks, engine)
            log.step(done, schedule.epochs(done), metrics)
            if (table := profile.step(metrics.tokens)) is not None:
                log.say(table)
            due = saves.due(done, ends_epoch=schedule.ends_epoch(done), last=done == total)
            agreed = signals.agreed(ranks, save=due, end=heard.ended)
            if agreed.save:
                checkpointer.save(done)
            last = agreed.end or done == total
            if agreed.stop is None and not last and _evaluation_is_due(run, done):
                log.settle()
                if (of_step := _evaluate(run, encoder, engine)) is not None:
                    figures, measured_at = of_step, done
                    log.evaluation(done, figures)
                agreed = signals.agreed(ranks, end=heard.ended)
            if agreed.stop is not None:
                checkpointer.save(done)
                said = f" after step {done}, which is saved; --resume continues"
                if checkpointer.trouble is not None:
                    said = f" after step {done}, which is not saved: {checkpointer.trouble}"
                raise _stopped(log, agreed.stop, done, said)
            if agreed.end:
                log.say(f"step {done} is the last: a callback asked for the end")
                break
        log.finish()
        measured = figures if measured_at == done else None
        _finish(run, encoder, about, log, signals, done, measured, engine)
    checkpointer.check()
    encoder.name = str(run.path)
    return TrainingResult.of(run.path, None if ranks.lockstep else encoder)


def _plans(
    run: Run,
    tasks: Sequence[TrainingTask[Any]],
    schedule: StepSchedule,
    saves: SaveSchedule,
) -> dict[str, str]:
    """Of what the run is made, for the user."""
    texts = {f"{task.prefix}texts": task.texts.summary() for task in tasks}
    return {
        **texts,
        "steps": schedule.summary(tasks[0].data.wanted_batch_size),
        "checkpoints": saves.summary(),
    }


def _start(run: Run, encoder: Encoder, tasks: Sequence[TrainingTask[Any]]) -> Optimizer:
    """The optimizer; it, the encoder and what is random as they are at the first step."""
    checkpoints.seed_random(run.training.seed + run.ranks.rank)  # so that dropout differs
    rates = {name: rate for task in tasks for name, rate in task.rates.items()}
    optimizer = make_optimizer(encoder, run.training, rates)
    run.ranks.say(f"  optimizer: {describe_optimizer(optimizer, run.training)}")
    if run.checkpoint is not None:
        checkpoints.restore(run.checkpoint, encoder, optimizer, run.ranks)
    return optimizer


def _evaluation_is_due(run: Run, step: int) -> bool:
    every = run.training.eval_steps
    return run.evaluation.asked and every is not None and step % every == 0


def _evaluate(run: Run, encoder: Encoder, engine: Engine) -> dict[str, float] | None:
    """The first rank has the figures, the others an empty dict; all encode. None where a signal
    ended it, of which all ranks then hear from each other."""
    figures = None
    with suppress(Interrupted):
        figures = measure(
            encoder,
            retrieval=run.evaluation_data.retrieval,
            preferences=run.evaluation_data.preferences,
            cutoffs=run.evaluation.cutoffs,
            max_tokens=run.compute.max_tokens_per_micro_batch,
            legacy=run.evaluation.legacy_metrics,
            cache_dir=run.compute.cache_path,
            ranks=run.ranks,
        ).figures
    engine.settle()
    run.ranks.meet()
    return figures


def _finish(
    run: Run,
    encoder: Encoder,
    about: dict[str, str],
    log: MetricsLog,
    signals: StopSignal,
    step: int,
    figures: dict[str, float] | None,
    engine: Engine,
) -> None:
    """Save the model, then measure it, unless `figures` are it: a failure there costs no training.
    TrainingStopped as `train`."""
    with engine.whole(encoder):
        if run.ranks.first:
            output.save_model(run.path, encoder, model_card(run, encoder, about))
    run.ranks.meet()
    log.say(f"model saved in {run.path}")
    stop = signals.agreed(run.ranks).stop
    if run.evaluation.asked and stop is None:
        if figures is None:
            figures = _evaluate(run, encoder, engine)
            if figures is not None:
                log.evaluation(step, figures)
        if run.ranks.first and figures is not None:
            output.write_card(run.path, model_card(run, encoder, about, figures))
        stop = signals.agreed(run.ranks).stop
    if stop is not None:
        raise _stopped(log, stop, step, "; the model is saved")


def _stopped(log: MetricsLog, stop: Signals, step: int, saved: str) -> TrainingStopped:
    """Says what is `saved` of the run."""
    said = f"stopped by {stop.name}{saved}"
    log.say(said)
    return TrainingStopped(said, stop, step)
