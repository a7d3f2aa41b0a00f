"""One optimizer step: what it is made of, packed ahead of it, and what it does.

    for each batch:  vectors through the gradient cache -> loss and gradients -> backward
    one AdamW step, clipped and checked on the device

U and N distinct query and passage texts of a batch, n distinct texts in all, D dims.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.data.moving import Movable, pinned, to_device
from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.cache import CachedVectors, random_states, set_random_states
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.meters import release
from rankpo_fast.train.optim import update
from rankpo_fast.train.ranks import OutOfMemory, Ranks, deal
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
    flag: str = "--train_data"  # where its rows come from


@dataclass(frozen=True, eq=False)
class Work(Movable):
    """A batch of one objective, packed."""

    objective: Objective
    share: float  # of its loss in the step's
    batch: Batch  # with this rank's rows of it
    groups: list[MicroBatch]
    order: Tensor  # places of the rank's texts, as they were dealt, among the vectors of its groups
    query_places: Tensor  # [U] among the vectors of all ranks
    passage_places: Tensor  # [N]
    counts: list[int]  # vectors of each rank
    rows: tuple[int, ...]  # of the data, of all ranks
    of_loss: float  # the rank's part of the batch's loss, 1 of one that is alone
    of_rows: float  # and of its rows
    tokens: int  # of all ranks


def pack_step(
    objectives: list[Objective], numbers: range, encoder: Encoder, max_tokens: int, ranks: Ranks
) -> list[Work]:
    """The batches `numbers` of every objective, which make a step; pinned if they go to a card."""
    works = []
    for objective in objectives:
        data, texts = objective.stage.data, objective.stage.texts
        for number in numbers:
            batch = data.batch(*divmod(number, data.batches_per_epoch))
            rows, queries, passages = texts.of(batch)
            lengths = texts.table.lengths[rows]
            # Attention among l tokens costs l / (6 D) of what a layer's matrices cost.
            dealt = deal(lengths * (1 + lengths / (6 * encoder.dim)), ranks.size)
            own = dealt[ranks.rank]
            groups = encoder.plan(lengths[own], max_tokens)
            place = torch.cat(dealt).argsort()  # of each text among the vectors of all ranks
            part = batch.part(ranks.rows(len(batch.rows)))
            works.append(
                Work(
                    objective,
                    objective.weight / len(numbers),
                    part,
                    [pack(texts.table, rows[own[group]]) for group in groups],
                    torch.cat([own[:0], *groups]).argsort(),
                    place[queries],
                    place[passages],
                    list(map(len, dealt)),
                    tuple(batch.rows.tolist()),
                    part.weight / batch.weight if batch.weight else 0.0,
                    len(part.rows) / len(batch.rows),
                    int(lengths.sum()),
                )
            )
    return pinned(works) if encoder.device.type == "cuda" else works


class Ahead:
    """make(step, memory.max_tokens) for each step, two of them early and in the background."""

    def __init__(
        self, make: Callable[[int, int], list[Work]], steps: Iterable[int], memory: Memory
    ):
        self._make, self._steps, self._memory = make, iter(steps), memory
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, int, Future]] = deque()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> list[Work]:
        budget = self._memory.max_tokens
        for step in islice(self._steps, 3 - len(self._waiting)):
            self._waiting.append((step, budget, self._thread.submit(self._make, step, budget)))
        if not self._waiting:
            raise StopIteration
        self._step, packed_for, future = self._waiting.popleft()
        works = future.result()
        return works if packed_for == budget else self.again()

    def again(self) -> list[Work]:
        """The last step's once more, packed for the budget as it is now."""
        return self._make(self._step, self._memory.max_tokens)


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step says of itself, which the device may still be computing."""

    numbers: Tensor  # the gradient's norm before clipping, losses and metrics of the works; on host
    arrived: torch.cuda.Event | None  # after which `numbers` hold
    names: list[list[str]]  # of each work's metrics
    works: list[Work]
    learning_rate: float
    began: float  # by perf_counter
    notes: list[str]  # what was done to make it fit into memory, if that ran out

    def read(self, step: int) -> tuple[float, float, list[dict[str, float]]]:
        """Loss, gradient norm and each work's metrics; waits for this step, for nothing after it.

        Raises:
            FloatingPointError: loss or norm is not finite; the weights are as before the step.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        norm, *values = self.numbers.tolist()
        losses, values = values[: len(self.works)], iter(values[len(self.works) :])
        if not all(map(math.isfinite, [*losses, norm])):
            raise FloatingPointError(self._complaint(step, losses, norm))
        metrics = [{name: next(values) for name in of_work} for of_work in self.names]
        return self._total(losses), norm, metrics

    @property
    def tokens(self) -> int:
        return sum(work.tokens for work in self.works)

    @property
    def queries(self) -> int:
        return sum(len(work.rows) for work in self.works)

    def _total(self, losses: list[float]) -> float:
        return sum(work.share * loss for work, loss in zip(self.works, losses, strict=True))

    def _complaint(self, step: int, losses: list[float], norm: float) -> str:
        guilty = [w for w, x in zip(self.works, losses, strict=True) if not math.isfinite(x)]
        rows: dict[str, set[int]] = {}  # by the flag that gave them
        for work in guilty or self.works:
            rows.setdefault(work.objective.flag, set()).update(row + 1 for row in work.rows)
        named = (
            f". Rows of {flag} in it, counted from 1: {', '.join(map(str, sorted(numbers)))}"
            for flag, numbers in rows.items()
        )
        return (
            f"step {step}: loss {self._total(losses)}, gradient norm {norm}; stopped before the "
            f"update{''.join(named)}"
        )


def train_step(
    encoder: Encoder,
    steps: Ahead,
    optimizer: torch.optim.AdamW,
    rate: float,
    max_grad_norm: float,
    memory: Memory,
    ranks: Ranks,
) -> StepResult:
    """Take the next of `steps`; nothing waits for the device.

    Out of memory, on whatever rank, the step is done again with less of it: the batches, their loss
    and the random numbers are the same.

    Args:
        rate: the learning rate.
        max_grad_norm: gradients are scaled down to this norm; 0: never.

    Raises:
        InputError: memory does not suffice for the longest text; the weights are as before.
    """
    began, random, notes = perf_counter(), random_states(encoder.device), []
    with record_function("data"):
        works = next(steps)
    while True:
        try:
            losses, metrics = _gradients(encoder, works, memory, ranks)
            break
        except OutOfMemory as error:
            here = error.here  # and its traceback, with all that it holds, is gone
        optimizer.zero_grad(set_to_none=True)
        release(encoder.device)
        notes += _shrink(memory, works, ranks, here)
        set_random_states(random, encoder.device)
        works = steps.again()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses, metrics = ranks.total(parameters, losses, metrics)
    with record_function("optimizer"):
        norm = update(optimizer, losses, rate, max_grad_norm)
    values = [norm, *losses, *(value for of_work in metrics for value in of_work.values())]
    numbers = _to_host(torch.stack([value.to(norm.dtype) for value in values]))
    return StepResult(*numbers, list(map(list, metrics)), works, rate, began, notes)


def _shrink(memory: Memory, works: list[Work], ranks: Ranks, here: bool) -> list[str]:
    """Less of it for the ranks that ran out, of tokens for all; says what, of every rank."""
    note = memory.shrink([work.groups for work in works]) if here else None
    told = ranks.objects((note, memory.max_tokens))
    memory.max_tokens = min(tokens for _, tokens in told)
    if ranks.size > 1:
        return [f"{note} (rank {rank})" for rank, (note, _) in enumerate(told) if note is not None]
    return [note]


def _gradients(
    encoder: Encoder, works: list[Work], memory: Memory, ranks: Ranks
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Add the gradient of all works to that of the parameters; losses and metrics, 0-dim.

    Raises:
        OutOfMemory: on all ranks, none of which waits in a collective then.
    """
    losses, metrics = [], []
    for work in works:
        with ranks.together():
            with record_function("data"):
                work = to_device(work, encoder.device)
            with record_function("forward"):
                cached = CachedVectors(encoder, work.groups, kept=memory.kept(work.groups))
                vectors = cached.vectors[work.order]
        vectors = ranks.gathered(vectors, work.counts)  # [n, D]
        with ranks.together(), record_function("loss"):
            queries, passages = vectors[work.query_places], vectors[work.passage_places]
            result = work.objective.stage.loss(queries, passages, work.batch)
            sides = (work.query_places, result.d_queries), (work.passage_places, result.d_passages)
            gradient = summed(len(vectors), *sides) * (work.share * work.of_loss)
            losses.append(result.loss * work.of_loss)
            metrics.append(_named(work, result))
        gradient = ranks.owned(gradient, work.counts)
        with ranks.together(), record_function("backward"):
            cached.backward(summed(len(gradient), (work.order, gradient)))
    return losses, metrics


def summed(n: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Zeros [n, D] plus rows [k, D] at places [k] of each part; the order of sums is fixed."""
    total = parts[0][1].new_zeros(n, parts[0][1].shape[1])
    for places, rows in parts:
        total.index_put_((places,), rows, accumulate=True)
    return total


def _named(work: Work, result: BatchLoss) -> dict[str, Tensor]:
    """The rank's part of a batch's metrics; with a prefix its loss too, as the log's is all's."""
    prefix, own = work.objective.prefix, {}
    if prefix:
        own = {f"{prefix}loss": result.loss * work.of_loss}
    return own | {prefix + name: value * work.of_rows for name, value in result.metrics.items()}


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if not numbers.is_cuda:
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
