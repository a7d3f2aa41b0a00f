"""The training loop of both stages.

    for each step:  gradient = sum of objectives' weight * mean of d loss over the step's batches
                    clip, check, AdamW;  log, save, evaluate when due

A stage gives the batches and their loss; everything random in a batch follows from (seed, epoch,
index), so that a run can stop after any step and go on bit by bit.
"""

import math
import os
import random
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.allocator import freed_memory_kept
from rankpo_fast.train.card import model_card
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.optim import adamw, learning_rate
from rankpo_fast.train.profile import Profile
from rankpo_fast.train.ranks import Ranks
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule
from rankpo_fast.train.step import Ahead, Objective, Work, pack_step, train_step

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass(frozen=True)
class Plan:
    """Which batches make which optimizer step; epochs follow each other without a seam."""

    rows_per_batch: int
    batches_per_epoch: int
    batches_per_step: int
    total_batches: int

    @classmethod
    def of(cls, config: TrainingConfig, data: ContrastiveData | PreferenceData) -> "Plan":
        per_step = config.gradient_accumulation_steps
        total = max(1, round(config.num_train_epochs * data.batches_per_epoch))
        if config.max_steps is not None:
            total = config.max_steps * per_step
        return cls(data.batch_size, data.batches_per_epoch, per_step, total)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_batches / self.batches_per_step)

    def batches(self, step: int) -> range:
        """Numbers of the batches of a step, all counted from 0; the last step may have fewer."""
        first = step * self.batches_per_step
        return range(first, min(first + self.batches_per_step, self.total_batches))

    def epochs(self, steps: int) -> float:
        """Epochs done after so many steps."""
        return min(steps * self.batches_per_step, self.total_batches) / self.batches_per_epoch

    def ends_epoch(self, steps: int) -> bool:
        """Whether the last of so many steps has the last batch of an epoch, or the first of the
        next one."""
        return math.floor(self.epochs(steps)) > math.floor(self.epochs(steps - 1))

    def summary(self, batch_size: int) -> str:
        """For the user, who asked for batches of that size."""
        rows = f"{self.batches_per_step} x {self.rows_per_batch} rows"
        if self.rows_per_batch < batch_size:
            rows += f" (all there are, of {batch_size:,} that a batch may have)"
        return f"{self.total_steps:,} of {rows}, {self.epochs(self.total_steps):.4g} epochs"


def train(run: Run, encoder: Encoder, objectives: list[Objective], about: dict[str, str]) -> None:
    """Train `encoder` in place and save it in the run's output directory.

    Args:
        objectives: what is minimised, weighted; steps and epochs are counted in the first's rows.
        about: what the stage says of its rows and its loss, for the user.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as before that step.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, once the step is finished and saved.
    """
    config, ranks = run.training, run.ranks
    plan = Plan.of(config, objectives[0].stage.data)
    first_step = 0 if run.checkpoint is None else run.checkpoint.step
    left = plan.total_steps - first_step
    profile_steps = config.profile_steps if ranks.first else 0
    profiled = Profile(run.path / output.PROFILE, profile_steps, left)
    texts = {f"{each.prefix}texts": each.stage.texts.summary() for each in objectives}
    schedule = SaveSchedule(config)
    asked = config.per_device_train_batch_size * ranks.size
    plans = {"steps": plan.summary(asked), "checkpoints": schedule.summary()}
    run.introduce(encoder, {**about, **texts, **plans})
    run.compare_ranks()
    _seed(config.seed + ranks.rank)  # so that dropout differs
    optimizer = adamw(encoder, config)
    if run.checkpoint is not None:
        checkpoints.restore(run.checkpoint, encoder, optimizer, ranks)
    encoder.train()
    memory = run.measure_memory(encoder, [objective.stage.texts.table for objective in objectives])
    ranks.say(f"  memory: {memory.summary()}")
    steps = range(first_step, plan.total_steps)

    def make(step: int, max_tokens: int) -> list[Work]:
        return pack_step(objectives, plan.batches(step), encoder, max_tokens, ranks)

    with (
        run.output_opened(first_step) as reporters,  # now that nothing else speaks against it
        freed_memory_kept(encoder.device),
        Ahead(make, steps, memory) as works,
        MetricsLog(
            run.path, config, reporters, first_step, plan.total_steps, silent=not ranks.first
        ) as log,
        profiled as profile,
        _StopSignal() as signals,
    ):
        for step in steps:
            done, rate = step + 1, learning_rate(step, plan.total_steps, config)
            result = train_step(
                encoder, works, optimizer, rate, config.max_grad_norm, memory, ranks
            )
            if result.notes:
                log.say(f"step {done}: out of memory, done again with {'; '.join(result.notes)}")
            with record_function("logging"):
                log.step(done, plan.epochs(done), result)
            if (table := profile.step(result.tokens)) is not None:
                log.say(table)
            save = schedule.due(
                done, ends_epoch=plan.ends_epoch(done), last=done == plan.total_steps
            )
            stop, saved = signals.agreed(ranks, save)
            if saved:
                log.settle()
                run.save_checkpoint(done, encoder, optimizer, memory)
                schedule.saved()
            due = run.evaluation.asked and _due(done, config.eval_steps)
            if due and done < plan.total_steps and stop is None:
                log.settle()
                log.evaluation(done, run.evaluate(encoder))
                stop, _ = signals.agreed(ranks)
            if stop is not None:
                log.settle()
                if not saved:
                    run.save_checkpoint(done, encoder, optimizer, memory)
                log.say(
                    f"stopped by {stop.name} after step {done}, which is saved; --resume continues"
                )
                raise SystemExit(EXIT_CODES[stop])
        log.settle()
        run.save_model(
            encoder, model_card(run, encoder, about)
        )  # before the evaluation, whose failure then costs no training
        log.say(f"model saved in {run.path}")
        stop, _ = signals.agreed(ranks)
        if run.evaluation.asked and stop is None:
            figures = run.evaluate(encoder)
            log.evaluation(plan.total_steps, figures)
            run.write_card(model_card(run, encoder, about, figures))
            stop, _ = signals.agreed(ranks)
        if stop is not None:
            log.say(f"stopped by {stop.name}; the model is saved")
            raise SystemExit(EXIT_CODES[stop])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _StopSignal:
    """Turns SIGTERM and Ctrl-C into a request to stop after the step; a second Ctrl-C acts at once.

    Signals that are ignored stay so, and runs in other threads are left alone.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def agreed(self, ranks: Ranks, save: bool = False) -> tuple[signal.Signals | None, bool]:
        """What any rank was asked for, since all stop after the same step; and whether the first
        one is for `save`, since clocks differ."""
        number, save = ranks.highest([self.requested or 0, save and ranks.first])
        return signal.Signals(number) if number else None, bool(save)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # reentrant
            signal.signal(number, self._previous[self.requested])
