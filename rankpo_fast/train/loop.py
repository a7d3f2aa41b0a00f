"""The training loop of both stages.

    for each step:  gradient = mean over the step's batches of d loss(batch)
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
from time import perf_counter
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.log import MetricsLog, StepRecord
from rankpo_fast.train.optim import adamw, clip_gradients, learning_rate, set_learning_rate
from rankpo_fast.train.run import Run
from rankpo_fast.train.texts import Batch, Texts

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Stage(Protocol):
    """What differs between the stages."""

    data: ContrastiveData | PreferenceData
    texts: Texts

    def step_loss(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-dim, with its graph) and metrics (0-dim, detached, on the device) of a batch."""


@dataclass(frozen=True)
class Plan:
    """Which batches make which optimizer step; epochs follow each other without a seam."""

    rows_per_batch: int
    batches_per_epoch: int
    batches_per_step: int
    total_batches: int

    @classmethod
    def of(cls, config: TrainingConfig, batches_per_epoch: int) -> "Plan":
        per_step = config.gradient_accumulation_steps
        total = max(1, round(config.num_train_epochs * batches_per_epoch))
        if config.max_steps is not None:
            total = config.max_steps * per_step
        return cls(config.per_device_train_batch_size, batches_per_epoch, per_step, total)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_batches / self.batches_per_step)

    def batches(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of the batches of a step, counted from 0; the last step may have fewer."""
        first = step * self.batches_per_step
        last = min(first + self.batches_per_step, self.total_batches)
        return [divmod(number, self.batches_per_epoch) for number in range(first, last)]

    def epochs(self, steps: int) -> float:
        """Epochs done after so many steps."""
        return min(steps * self.batches_per_step, self.total_batches) / self.batches_per_epoch

    def summary(self) -> str:
        rows = f"{self.batches_per_step} x {self.rows_per_batch} rows"
        return f"{self.total_steps:,} of {rows}, {self.epochs(self.total_steps):.4g} epochs"


def train(run: Run, encoder: Encoder, stage: Stage, about: dict[str, str]) -> None:
    """Train `encoder` in place and save it in the run's output directory.

    Args:
        about: what the stage says of its rows and its loss, for the user.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as before that step.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, once the step is finished and saved.
    """
    config = run.training
    plan = Plan.of(config, stage.data.batches_per_epoch)
    run.introduce(encoder, {**about, "texts": stage.texts.summary(), "steps": plan.summary()})
    run.open_output()
    _seed(config.seed)
    optimizer = adamw(encoder, config)
    first_step = 0
    if run.checkpoint is not None:
        checkpoints.restore(run.checkpoint, encoder, optimizer)
        first_step = run.checkpoint.step
    encoder.train()
    with (
        MetricsLog(run.path, config, run.settings, first_step, plan.total_steps) as log,
        _StopSignal() as stop,
    ):
        for step in range(first_step, plan.total_steps):
            done = step + 1
            log.step(done, train_step(encoder, stage, optimizer, plan, config, step))
            saved = _due(done, config.save_steps)
            if saved:
                run.save_checkpoint(done, encoder, optimizer)
            due = run.evaluation.asked and _due(done, config.eval_steps)
            if due and done < plan.total_steps and stop.requested is None:
                log.evaluation(done, run.evaluate(encoder))
            if stop.requested is not None:
                if not saved:
                    run.save_checkpoint(done, encoder, optimizer)
                name = stop.requested.name
                log.say(f"stopped by {name} after step {done}, which is saved; --resume continues")
                raise SystemExit(EXIT_CODES[stop.requested])
        run.save_model(encoder)  # before the evaluation, whose failure then costs no training
        log.say(f"model saved in {run.path}")
        if run.evaluation.asked and stop.requested is None:
            log.evaluation(plan.total_steps, run.evaluate(encoder))
        if stop.requested is not None:
            log.say(f"stopped by {stop.requested.name}; the model is saved")
            raise SystemExit(EXIT_CODES[stop.requested])


def train_step(
    encoder: Encoder,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    config: TrainingConfig,
    step: int,
) -> StepRecord:
    """Optimizer step number `step`, counted from 0. Raises FloatingPointError before an update."""
    began = perf_counter()
    batches = [stage.data.batch(*place) for place in plan.batches(step)]
    losses, metrics = [], []
    for batch in batches:
        loss, batch_metrics = stage.step_loss(encoder, batch)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        metrics.append(batch_metrics)
    norm = clip_gradients(encoder, config.max_grad_norm)
    *losses, norm = torch.stack([*losses, norm]).tolist()  # the step's one wait for the device
    _check_finite(step + 1, losses, norm, batches)
    rate = learning_rate(step, plan.total_steps, config)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepRecord(
        epoch=plan.epochs(step + 1),
        loss=sum(losses) / len(losses),
        learning_rate=rate,
        grad_norm=norm,
        metrics=metrics,
        tokens=sum(map(stage.texts.tokens, batches)),
        queries=sum(len(batch.rows) for batch in batches),
        seconds=perf_counter() - began,
    )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_finite(step: int, losses: list[float], norm: float, batches: list[Batch]) -> None:
    if all(map(math.isfinite, [*losses, norm])):
        return
    guilty = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    rows = sorted({int(row) + 1 for batch in guilty or batches for row in batch.rows})
    raise FloatingPointError(
        f"step {step}: loss {sum(losses) / len(losses)}, gradient norm {norm}; stopped before the "
        f"update. Rows of --train_data in it, counted from 1: {', '.join(map(str, rows))}"
    )


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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # reentrant
            signal.signal(number, self._previous[self.requested])
