"""Batches of other rows with a frozen model's vectors of their texts.

B rows of a batch, U and N distinct query and passage texts, G dims of the frozen model.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.data.group_batches import GroupData
from rankpo_fast.data.moving import Movable
from rankpo_fast.data.order import BatchData


@dataclass(frozen=True, eq=False)
class RetainedBatch(Movable):
    """A batch and the vectors, which move with it."""

    batch: Any  # one of ContrastiveBatch, PreferenceBatch, GroupBatch
    reference_queries: Tensor  # [B, G] of each row's query
    reference_passages: Tensor  # [N, G]

    @property
    def query_texts(self) -> Tensor:
        return self.batch.query_texts

    @property
    def passage_texts(self) -> Tensor:
        return self.batch.passage_texts

    @property
    def rows(self) -> Tensor:
        return self.batch.rows

    @property
    def weight(self) -> float:
        return self.batch.weight

    @property
    def row_weights(self) -> Tensor | None:
        """[B], None: all alike."""
        return getattr(self.batch, "weights", None)

    def part(self, rows: slice) -> "RetainedBatch":
        """Some of its rows, against all its passages."""
        queries = self.reference_queries[rows]
        return replace(self, batch=self.batch.part(rows), reference_queries=queries)


class RetainedData(BatchData):
    """The batches of `data`, carrying vectors [queries, G] and [passages, G] of its texts, whose
    rows alone are read from memory, or from a file that is mapped, when a batch wants them."""

    def __init__(
        self, data: ContrastiveData | PreferenceData | GroupData, queries: Tensor, passages: Tensor
    ):
        self._data, self._order = data, data._order
        self._queries, self._passages = queries, passages
        self.query_texts, self.passage_texts = data.query_texts, data.passage_texts

    @property
    def vector_bytes(self) -> int:
        return self._queries.nbytes + self._passages.nbytes

    def around(self, data: Any) -> "RetainedData":
        """The same vectors with other batches of the same texts."""
        return RetainedData(data, self._queries, self._passages)

    def without_texts(self) -> "RetainedData":
        bare = copy.copy(super().without_texts())
        bare._data = self._data.without_texts()
        return bare

    def batch(self, epoch: int, index: int) -> RetainedBatch:
        """Batch `index` (0 to batches_per_epoch - 1) of `epoch`."""
        batch = self._data.batch(epoch, index)
        queries = batch.query_texts[batch.query_rows]
        return RetainedBatch(batch, self._queries[queries], self._passages[batch.passage_texts])
