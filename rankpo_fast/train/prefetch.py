"""The batches of a step, packed into micro-batches in the background while another step is taken.

U and N distinct query and passage texts of a batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rankpo_fast.data.moving import Movable, pinned
from rankpo_fast.data.packing import MicroBatch, one_token, pack
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Batch
from rankpo_fast.ranks import Ranks, deal
from rankpo_fast.threads import background_thread
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.task import TrainingTask

STEPS_EARLY = 2


@dataclass(frozen=True, eq=False)
class PackedBatch(Movable):
    """A batch of one task: this rank's texts in micro-batches, this rank's rows of the loss."""

    task: TrainingTask[Any]
    weight: float  # of its loss in the step's
    own: Batch  # this rank's rows of it, or all where the loss is no sum over rows
    micro_batches: list[MicroBatch]
    order: Tensor  # places of the rank's texts, as dealt, among the vectors of its micro-batches
    query_places: Tensor  # [U] among the vectors of all ranks
    passage_places: Tensor  # [N]
    counts: list[int]  # vectors of each rank
    rows: tuple[int, ...]  # of the data, of all ranks
    loss_share: float  # the rank's part of the batch's loss, 1 of one that is alone
    row_share: float  # and of its rows
    tokens: int  # of all ranks
    empty: MicroBatch | None = None  # one token, for a rank that others wait for: see step.py


def pack_step(
    tasks: Sequence[TrainingTask[Any]],
    encoder: Encoder,
    ranks: Ranks,
    numbers: range,
    max_tokens: int,
) -> list[PackedBatch]:
    """The batches `numbers` of every task, which make a step; pinned if they go to a GPU."""
    batches = [
        _pack_batch(task, number, task.weight / len(numbers), encoder, max_tokens, ranks)
        for task in tasks
        for number in numbers
    ]
    return pinned(batches) if encoder.device.type == "cuda" else batches


def _pack_batch(
    task: TrainingTask[Any],
    number: int,
    weight: float,
    encoder: Encoder,
    max_tokens: int,
    ranks: Ranks,
) -> PackedBatch:
    batch = task.data.batch(*divmod(number, task.data.batches_per_epoch))
    texts, table = task.texts.of(batch), task.texts.table
    lengths = table.lengths[texts.rows]
    # Attention among l tokens costs l / (6 D) of what a layer's matrices cost.
    dealt = deal(lengths * (1 + lengths / (6 * encoder.dim)), ranks.size)
    own = dealt[ranks.rank]
    groups = encoder.plan(lengths[own], max_tokens)
    place = torch.cat(dealt).argsort()  # of each text among the vectors of all ranks
    part = batch.part(ranks.rows(len(batch.rows))) if task.by_rows else batch
    share = 1 / ranks.size  # of what all ranks compute
    return PackedBatch(
        task=task,
        weight=weight,
        own=part,
        micro_batches=[pack(table, texts.rows[own[group]]) for group in groups],
        order=torch.cat([own[:0], *groups]).argsort(),
        query_places=place[texts.query_places],
        passage_places=place[texts.passage_places],
        counts=list(map(len, dealt)),
        rows=tuple(batch.rows.tolist()),
        loss_share=_share(part.weight, batch.weight) if task.by_rows else share,
        row_share=len(part.rows) / len(batch.rows) if task.by_rows else share,
        tokens=int(lengths.sum()),
        empty=one_token(table) if ranks.size > 1 else None,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, eq=False)
class _Packing:
    numbers: range
    max_tokens: int
    batches: Future[list[PackedBatch]]


class Prefetcher:
    """The batches of each step, for the budget as it stands; some early and in the background."""

    def __init__(
        self, pack: Callable[[range, int], list[PackedBatch]], steps: Iterable[range],
        memory: Memory,
    ):  # fmt: skip
        """`steps`: the numbers of the batches of each; pack(numbers, max_tokens)."""
        self._pack, self._steps, self._memory = pack, iter(steps), memory
        self._thread = background_thread()
        self._waiting: deque[_Packing] = deque()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> list[PackedBatch]:
        budget = self._memory.max_tokens
        for numbers in islice(self._steps, 1 + STEPS_EARLY - len(self._waiting)):
            future = self._thread.submit(self._pack, numbers, budget)
            self._waiting.append(_Packing(numbers, budget, future))
        if not self._waiting:
            raise StopIteration
        packing = self._waiting.popleft()
        self._numbers = packing.numbers
        batches = packing.batches.result()
        return batches if packing.max_tokens == budget else self.repacked()

    def repacked(self) -> list[PackedBatch]:
        """The last step's once more, packed for the budget as it is now."""
        return self._pack(self._numbers, self._memory.max_tokens)
