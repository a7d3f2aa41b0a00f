"""Rows of several passages -> the batches of a step, as indices into tables of distinct texts.

As in `batches.py`, a batch depends on (seed, epoch, index) and the rows alone. B queries of a batch
with K passages each, U and N distinct query and passage texts; E passages of all rows, one row's
after the other's.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.distinct import DistinctTexts, first_places
from rankpo_fast.data.groups import GroupRow
from rankpo_fast.data.moving import Movable
from rankpo_fast.data.order import DRAW, BatchData, RowOrder
from rankpo_fast.data.shares import Share
from rankpo_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class GroupBatch(Movable):
    """B queries with up to K passages each; where there are fewer, values are NaN."""

    query_texts: Tensor  # [U] rows of the query table, distinct
    passage_texts: Tensor  # [N] rows of the passage table, distinct
    query_rows: Tensor  # [B] index into query_texts
    passage_rows: Tensor  # [B, K] index into passage_texts, 0 where there is none
    values: Tensor  # [B, K] fp32
    reference: Tensor | None  # [B, K] fp32, similarities
    weights: Tensor  # [B] fp32
    rows: Tensor  # [B] the data rows they come from

    @property
    def weight(self) -> float:
        """Of its queries in a mean."""
        return self.weights.double().sum().item()

    def part(self, rows: slice) -> "GroupBatch":
        """Some of its queries."""
        names = ("query_rows", "passage_rows", "values", "weights", "rows")
        parts = {name: getattr(self, name)[rows] for name in names}
        reference = None if self.reference is None else self.reference[rows]
        return replace(self, **parts, reference=reference)


class GroupData(BatchData):
    """Batches of queries with up to `group_size` of their passages each, drawn anew every epoch.

    Of passages of a row that are equal the first counts. Rows that are left with less than there is
    to compare are in no batch.

    num_rows: all; left_out: those in no batch; equal_passages: those equal to an earlier one.
    """

    def __init__(
        self,
        rows: Sequence[GroupRow],
        *,
        batch_size: int,
        group_size: int,
        seed: int,
        shares: Sequence[Share] | None = None,
        graded: bool,
    ):
        """
        Args:
            shares: which rows come how often; None: each once an epoch.
            graded: only different values compare, and what is drawn has such; else a row's first
                passage is always among what is drawn.
        """
        self._whole = RowOrder(np.arange(len(rows)), batch_size, seed, shares)
        self._group_size, self._graded = group_size, graded
        self.num_rows = len(rows)
        queries, passages = DistinctTexts(), DistinctTexts()
        query_ids = np.array([queries.id(row.query) for row in rows])
        passage_ids = np.array([passages.id(text) for row in rows for text in row.passages])
        self.query_texts, self.passage_texts = list(queries), list(passages)
        self._starts = np.cumsum([0, *(len(row.passages) for row in rows)])
        self._values = np.array([x for row in rows for x in row.values], np.float32)  # [E]
        self._weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        self._reference: Tensor | None = None
        self._fill(query_ids, passage_ids)

    def _fill(self, query_ids: np.ndarray, passage_ids: np.ndarray) -> None:
        """`passage_ids` [E]. InputError where no row is left."""
        self._query_ids, self._passage_ids = query_ids, passage_ids
        row_of = np.repeat(np.arange(self.num_rows), np.diff(self._starts))
        _, firsts = np.unique(row_of * len(self.passage_texts) + passage_ids, return_index=True)
        self._kept = np.zeros(len(passage_ids), bool)
        self._kept[firsts] = True
        self.equal_passages = len(passage_ids) - len(firsts)
        starts = self._starts[:-1]
        usable = np.add.reduceat(self._kept, starts, dtype=np.int64) > 1
        if self._graded:
            values = np.where(self._kept, self._values, np.nan)
            usable &= np.fmin.reduceat(values, starts) < np.fmax.reduceat(values, starts)
        self.left_out = self.num_rows - int(usable.sum())
        if self.left_out == self.num_rows:
            which, grade = (
                ("graded", ", or those that differ have one grade")
                if self._graded
                else ("teacher's", "")
            )
            raise InputError(
                f"the passages of every {which} row have the same tokens{grade}: what tells them "
                f"apart may lie beyond --max_passage_length"
            )
        self._order = self._whole.of(usable) if self.left_out else self._whole

    def merged(self, query_rows: Tensor, passage_rows: Tensor) -> "GroupData":
        """The same rows, with texts of equal token ids as one: the first of them.

        Args:
            query_rows: [queries] number of each query text's ids among all that are distinct.
            passage_rows: [passages] and of each passage text's.

        Raises:
            InputError: no row has anything left to compare.
        """
        queries, passages = (np.array(first_places(x)) for x in (query_rows, passage_rows))
        data = copy.copy(self)
        data._fill(queries[self._query_ids], passages[self._passage_ids])
        return data

    def compared(self) -> tuple[Tensor, Tensor]:
        """Places [E] in `query_texts` and `passage_texts`, of each passage of each row."""
        queries = np.repeat(self._query_ids, np.diff(self._starts))
        return torch.from_numpy(queries), torch.from_numpy(self._passage_ids)

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    def with_reference(self, similarities: Tensor) -> "GroupData":
        """The same batches carrying `similarities` [E] by another model."""
        assert similarities.shape == self._passage_ids.shape, "one for each passage of each row"
        data = copy.copy(self)
        data._reference = similarities.detach().to("cpu", torch.float32)
        return data

    def batch(self, epoch: int, index: int) -> GroupBatch:
        """Batch `index` (0 to batches_per_epoch - 1) of `epoch`."""
        rows = self._order.rows(epoch, index)
        random = self._order.random(DRAW, epoch, index)
        drawn = [self._drawn(row, random) for row in rows]
        places = np.zeros((len(rows), max(map(len, drawn))), np.int64)  # [B, K] of all E
        there = np.arange(places.shape[1]) < np.array([*map(len, drawn)])[:, None]
        places[there] = np.concatenate(drawn)
        query_texts, query_rows = np.unique(self._query_ids[rows], return_inverse=True)
        passage_texts, of_passages = np.unique(
            self._passage_ids[places[there]], return_inverse=True
        )
        passage_rows = np.zeros_like(places)
        passage_rows[there] = of_passages
        reference = self._reference
        return GroupBatch(
            query_texts=torch.from_numpy(query_texts),
            passage_texts=torch.from_numpy(passage_texts),
            query_rows=torch.from_numpy(query_rows),
            passage_rows=torch.from_numpy(passage_rows),
            values=torch.from_numpy(np.where(there, self._values[places], np.float32(np.nan))),
            reference=None if reference is None else reference[torch.from_numpy(places)],
            weights=self._weights[torch.from_numpy(rows)],
            rows=torch.from_numpy(rows),
        )

    def _drawn(self, row: int, random: np.random.Generator) -> np.ndarray:
        """Places among all E, ascending."""
        places = np.arange(self._starts[row], self._starts[row + 1])
        places = places[self._kept[places]]
        if len(places) <= self._group_size:
            return places
        always, others = np.split(places, [0 if self._graded else 1])
        drawn = random.choice(others, self._group_size - len(always), replace=False)
        values = self._values[drawn]
        if self._graded and values.min() == values.max():
            drawn[-1] = random.choice(places[self._values[places] != values[0]])
        return np.sort(np.concatenate([always, drawn]))
