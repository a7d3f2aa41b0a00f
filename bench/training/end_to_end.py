"""How long, and with how much energy, until what is learnt is good enough: the demo's world,
trained on until nDCG@20 of its held-out queries first reaches a target.

The time is a user's: from the files on disk on, with loading and tokenising. Evaluations, every few
steps, are not in it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..apart import in_a_process
from ..gpu import Readings, watching
from ..questions import NOT_REACHED, OURS, Question, Result, Settings, Shape
from .backbones import TINY
from .implementations import (
    Done,
    Implementation,
    Memory,
    Task,
    evaluator,
    hooks,
    rankpo_fast,
    sentence_transformers,
)
from .steps import Implementations, batches_of, compare, mean, rows_of, task_of

ASKS = "How soon does what was held out reach an nDCG@20?"


@dataclass(frozen=True)
class Reached:
    """seconds, and of the device joules, that training took; ndcg: at the end, after `steps`."""

    seconds: float
    steps: int
    ndcg: float
    peak: int
    watts: float | None = None
    joules: float | None = None
    throttled: str | None = None


class Trial:
    """Counts the time between evaluations, of a training that goes on until the target."""

    def __init__(self, task: Task, target: float, every: int):
        self.task, self.target, self.every = task, target, every
        self.steps, self.seconds, self.ndcg = 0, 0.0, 0.0
        self.memory, self.peak = Memory(task.device), 0
        self.readings: list[Readings] = []
        self.watch = contextlib.ExitStack()

    def resume(self) -> None:
        self.memory.settle()  # an evaluation is no part of a training
        self.readings.append(self.watch.enter_context(watching(self.task.device)))
        self.began = perf_counter()

    def pause(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += perf_counter() - self.began
        self.watch.close()
        if self.steps:
            self.peak = max(self.peak, self.memory.peak())

    def first_call(self, module: nn.Module) -> None:
        """Of the backbone or what holds it; the evaluation has one of its own, with its weights."""
        from transformers import PreTrainedModel

        self.pause()
        self.trained = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
        self.encoder, self.evaluate = evaluator(self.task.model, self.task)
        self.memory.start(module)
        self.resume()

    def updated(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self.memory.settle()
        if self.steps % self.every and self.steps < self.task.steps:
            return
        self.pause()
        self.encoder.backbone.load_state_dict(self.trained.state_dict())
        self.ndcg = self.evaluate()
        if self.ndcg >= self.target or self.steps == self.task.steps:
            raise Done
        self.resume()


def reach(target: float, every: int, implementation: Implementation, task: Task) -> Reached | str:
    """In a process of its own; a note if the steps do not suffice."""
    trial = Trial(task, target, every)
    trial.resume()
    with hooks(trial.first_call, trial.updated, trial.memory.made), contextlib.suppress(Done):
        implementation(task)
    if trial.ndcg < target:
        return f"{NOT_REACHED}: {trial.ndcg:.3f} of {target:g} after {trial.steps} steps"
    return Reached(
        trial.seconds, trial.steps, trial.ndcg, trial.peak, **_energy(trial.readings,
        trial.seconds),
    )  # fmt: skip


def _energy(readings: Sequence[Readings], seconds: float) -> dict[str, Any]:
    """Of all stretches together; nothing of a device that does not tell."""
    joules = [one.joules for one in readings if one.joules is not None]
    if len(joules) < len(readings):
        return {}
    throttled = next((one.throttled for one in readings if one.throttled), None)
    return {"joules": sum(joules), "watts": sum(joules) / seconds, "throttled": throttled}


def answer(shape: Shape, settings: Settings) -> Result:
    of, task = batches_of(shape), task_of(shape, settings.device)
    ask = partial(in_a_process, reach, shape["ndcg"], shape["every"])
    answers = compare(implementations(), ask, task, settings)

    def figures(implementation: str, given: Sequence[Reached]) -> dict[str, Any]:
        return {"joules": mean(one.joules for one in given)}

    steps = {name: [getattr(one, "steps", None) for one in said] for name, said in answers.items()}
    about = {**of.about, "steps": steps}
    rows = rows_of(answers, figures)
    return Result("end to end", "end to end", ASKS, shape, rows, flops=of.flops, about=about)


def implementations() -> Implementations:
    return {
        "sentence-transformers": partial(sentence_transformers),
        f"{OURS}, padded": partial(rankpo_fast, packing=False),
        OURS: partial(rankpo_fast),
    }


def shapes(device: str, level: str) -> list[Shape]:
    """steps: at most; every: between two evaluations. The targets are what an untrained model is
    far from (0.03 to 0.08), and what all reach in a third to two thirds of the steps."""
    quick: Shape = {
        "batch": 16,
        "negatives": 1,
        "steps": 100,
        "every": 5,
        "backbone": TINY,
        "ndcg": 0.12,
    }
    default: Shape = {**quick, "batch": 32, "ndcg": 0.15}
    more: Shape = {**quick, "batch": 64, "steps": 150, "ndcg": 0.3}
    return {"quick": [quick], "default": [default], "full": [default, more]}[level]


QUESTION = Question(
    "end to end", "end to end", ASKS, shapes, answer, lambda _: list(implementations())
)
