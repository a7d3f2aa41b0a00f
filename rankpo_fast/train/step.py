"""One optimizer step: what it is made of, packed ahead of it, and what it does.

    for each batch:  vectors through the gradient cache -> loss and gradients -> backward
    one AdamW step, clipped and checked on the device

U and N distinct query and passage texts of a batch, n distinct texts in all, D dims.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.data.moving import Movable, pinned, to_device
from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.cache import CachedVectors
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import update
from rankpo_fast.train.texts import Batch, Texts


class BatchLoss(NamedTuple):
    """What an objective says of a batch; all on the device, without a graph."""

    loss: Tensor  # 0-dim
    d_queries: Tensor  # [U, D]
    d_passages: Tensor  # [N, D]
    metrics: dict[str, Tensor]  # 0-dim


class Stage(Protocol):
    """What differs between the stages."""

    data: ContrastiveData | PreferenceData
    texts: Texts

    def loss(self, queries: Tensor, passages: Tensor, batch: Batch) -> BatchLoss:
        """Of the vectors [U, D] and [N, D] of the batch's texts, not normalised."""


@dataclass(frozen=True, eq=False)
class Objective:
    """A stage's loss with its weight in the whole; the prefix tells its metrics from others'."""

    stage: Stage
    weight: float = 1.0
    prefix: str = ""


@dataclass(frozen=True, eq=False)
class Work(Movable):
    """A batch of one objective, packed."""

    objective: Objective
    share: float  # of its loss in the step's
    batch: Batch
    groups: list[MicroBatch]
    query_places: Tensor  # [U] among the vectors of all groups
    passage_places: Tensor  # [N]


def pack_step(
    objectives: list[Objective], numbers: range, encoder: Encoder, memory: Memory
) -> list[Work]:
    """The batches `numbers` of every objective, which make a step; pinned if they go to a card."""
    works = []
    for objective in objectives:
        data, texts = objective.stage.data, objective.stage.texts
        for number in numbers:
            batch = data.batch(*divmod(number, data.batches_per_epoch))
            rows, queries, passages = texts.of(batch)
            groups = encoder.plan(texts.table.lengths[rows], memory.max_tokens)
            place = torch.cat(groups).argsort()  # of each text among the vectors
            works.append(
                Work(
                    objective,
                    objective.weight / len(numbers),
                    batch,
                    [pack(texts.table, rows[group]) for group in groups],
                    place[queries],
                    place[passages],
                )
            )
    return pinned(works) if encoder.device.type == "cuda" else works


def ahead(make: Callable[[int], list[Work]], steps: Iterable[int]) -> Iterator[list[Work]]:
    """make(step) for each step, two of them early and in the background."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque = deque()
        try:
            for step in steps:
                waiting.append(thread.submit(make, step))
                if len(waiting) > 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step says of itself, which the device may still be computing."""

    numbers: Tensor  # losses of the works, and the gradient's norm before clipping; on the host
    arrived: torch.cuda.Event | None  # after which `numbers` hold
    metrics: list[dict[str, Tensor]]  # of each work, 0-dim
    works: list[Work]
    learning_rate: float
    began: float  # by perf_counter

    def read(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm; waits for this step, and for nothing after it.

        Raises:
            FloatingPointError: one is not finite; the weights are as before the step.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        *losses, norm = self.numbers.tolist()
        if not all(map(math.isfinite, [*losses, norm])):
            raise FloatingPointError(self._complaint(step, losses, norm))
        return self._total(losses), norm

    @property
    def tokens(self) -> int:
        return sum(sum(group.lengths) for work in self.works for group in work.groups)

    @property
    def queries(self) -> int:
        return sum(len(work.batch.rows) for work in self.works)

    def _total(self, losses: list[float]) -> float:
        return sum(work.share * loss for work, loss in zip(self.works, losses, strict=True))

    def _complaint(self, step: int, losses: list[float], norm: float) -> str:
        guilty = [w for w, x in zip(self.works, losses, strict=True) if not math.isfinite(x)]
        rows = {int(row) + 1 for work in guilty or self.works for row in work.batch.rows}
        return (
            f"step {step}: loss {self._total(losses)}, gradient norm {norm}; stopped before the "
            f"update. Rows of --train_data in it, counted from 1: "
            f"{', '.join(map(str, sorted(rows)))}"
        )


def train_step(
    encoder: Encoder,
    steps: Iterator[list[Work]],
    optimizer: torch.optim.AdamW,
    rate: float,
    max_grad_norm: float,
    memory: Memory,
) -> StepResult:
    """Take the next of `steps`; nothing waits for the device.

    Args:
        rate: the learning rate.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
    """
    began = perf_counter()
    with record_function("data"):
        works = next(steps)
    losses, metrics = [], []
    for work in works:
        with record_function("data"):
            work = to_device(work, encoder.device)
        with record_function("forward"):
            cached = CachedVectors(encoder, work.groups, kept=memory.kept(work.groups))
        with record_function("loss"):
            vectors = cached.vectors  # [n, D]
            queries, passages = vectors[work.query_places], vectors[work.passage_places]
            result = work.objective.stage.loss(queries, passages, work.batch)
            sides = (work.query_places, result.d_queries), (work.passage_places, result.d_passages)
            gradient = summed(len(vectors), *sides) * work.share
        with record_function("backward"):
            cached.backward(gradient)
        losses.append(result.loss)
        metrics.append({work.objective.prefix + k: v for k, v in result.metrics.items()})
    with record_function("optimizer"):
        norm = update(optimizer, losses, rate, max_grad_norm)
    return StepResult(*_to_host(torch.stack([*losses, norm])), metrics, works, rate, began)


def summed(n: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Zeros [n, D] plus rows [k, D] at places [k] of each part; the order of sums is fixed."""
    total = parts[0][1].new_zeros(n, parts[0][1].shape[1])
    for places, rows in parts:
        total.index_put_((places,), rows, accumulate=True)
    return total


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if not numbers.is_cuda:
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
