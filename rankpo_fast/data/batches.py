"""Rows -> the batches of a step, as indices into tables of distinct texts.

Batch `index` of epoch `epoch` depends on (seed, epoch, index) and the rows alone, so a run can stop
anywhere and go on with the same batches. Every epoch has its own order of the rows and draws its
own positives and negatives. M rows of a contrastive batch, B pairs, U and N distinct query and
passage texts of the batch; all indices int64.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.moving import Movable
from rankpo_fast.data.rows import ContrastiveRow, PreferenceRow

ORDER, DRAW = 0, 1  # what a random stream is for, so that no two share one


@dataclass(frozen=True, eq=False)
class ContrastiveBatch(Movable):
    """M queries against N passages; the positive of row i is column labels[i]."""

    query_texts: Tensor  # [U] rows of the query table, distinct
    passage_texts: Tensor  # [N] rows of the passage table, distinct
    query_rows: Tensor  # [M] index into query_texts
    labels: Tensor  # [M] index into passage_texts
    excluded_offsets: Tensor  # [M + 1] row i's columns lie between offsets i and i + 1 of ...
    excluded_columns: Tensor  # [nnz] ... the further known positives of the rows' queries
    rows: Tensor  # [M] the data rows they come from

    @property
    def weight(self) -> float:
        """Of its rows in a mean."""
        return float(len(self.rows))

    def part(self, rows: slice) -> "ContrastiveBatch":
        """Some of its rows, against all its passages."""
        offsets = self.excluded_offsets[rows.start : rows.stop + 1]
        return replace(
            self,
            query_rows=self.query_rows[rows],
            labels=self.labels[rows],
            excluded_offsets=offsets - offsets[0],
            excluded_columns=self.excluded_columns[offsets[0] : offsets[-1]],
            rows=self.rows[rows],
        )


@dataclass(frozen=True, eq=False)
class PreferenceBatch(Movable):
    """B pairs of passages, of which one was chosen and one rejected for the query."""

    query_texts: Tensor  # [U] rows of the query table, distinct
    passage_texts: Tensor  # [N] rows of the passage table, distinct
    query_rows: Tensor  # [B] index into query_texts
    chosen_rows: Tensor  # [B] index into passage_texts
    rejected_rows: Tensor  # [B] index into passage_texts
    weights: Tensor  # [B] fp32
    reference_margins: Tensor | None  # [B] fp32
    rows: Tensor  # [B] the data rows they come from

    @property
    def weight(self) -> float:
        """Of its pairs in a mean."""
        return self.weights.double().sum().item()

    def part(self, rows: slice) -> "PreferenceBatch":
        """Some of its pairs."""
        margins = self.reference_margins
        return replace(
            self,
            query_rows=self.query_rows[rows],
            chosen_rows=self.chosen_rows[rows],
            rejected_rows=self.rejected_rows[rows],
            weights=self.weights[rows],
            reference_margins=None if margins is None else margins[rows],
            rows=self.rows[rows],
        )


class ContrastiveData:
    """Batches of queries with one positive and up to `num_negatives` negatives each.

    A positive of a query text in any row is known as such in all its rows: it is never drawn as a
    negative there, and where it stands in a batch it is excluded for that query. A row that has
    fewer negatives than asked gives those it has; `short_rows` counts such rows, `bare_rows` those
    that give none, `num_rows` all.
    """

    def __init__(
        self, rows: Sequence[ContrastiveRow], *, batch_size: int, num_negatives: int, seed: int
    ):
        self._schedule = _Schedule(len(rows), batch_size, seed)
        self.num_rows, self.num_negatives = len(rows), num_negatives
        queries, passages = _Texts(), _Texts()
        query_ids = [queries.id(row.query) for row in rows]
        positives = [passages.ids(row.positives) for row in rows]
        known: list[dict[int, None]] = [{} for _ in queries]  # per query an ordered set
        for query, ids in zip(query_ids, positives, strict=True):
            known[query].update(dict.fromkeys(ids))
        negatives = [
            [id for id in passages.ids(row.negatives) if id not in known[query]]
            for row, query in zip(rows, query_ids, strict=True)
        ]
        self._query_ids = np.array(query_ids)
        self._positives, self._negatives = _Lists(positives), _Lists(negatives)
        self._known = _Lists(known)
        self.query_texts: list[str] = list(queries)
        self.passage_texts: list[str] = list(passages)
        self.batch_size = self._schedule.batch_size
        self.batches_per_epoch = self._schedule.batches_per_epoch
        self.short_rows = sum(len(ids) < num_negatives for ids in negatives)
        self.bare_rows = sum(not ids or num_negatives == 0 for ids in negatives)

    def batch(self, epoch: int, index: int) -> ContrastiveBatch:
        """Batch `index` (0 to batches_per_epoch - 1) of `epoch`."""
        rows = self._schedule.rows(epoch, index)
        random = self._schedule.random(DRAW, epoch, index)
        positives = np.array([random.choice(self._positives[row]) for row in rows])
        negatives = [self._draw_negatives(row, random) for row in rows]
        queries = self._query_ids[rows]
        query_texts, query_rows = np.unique(queries, return_inverse=True)
        passage_texts = np.unique(np.concatenate([positives, *negatives]))
        labels = np.searchsorted(passage_texts, positives)

        known, counts = self._known.gather(queries)
        row_of_known = np.repeat(np.arange(len(rows)), counts)
        columns = np.searchsorted(passage_texts, known).clip(max=len(passage_texts) - 1)
        excluded = (passage_texts[columns] == known) & (columns != labels[row_of_known])
        excluded_counts = np.bincount(row_of_known[excluded], minlength=len(rows))
        return ContrastiveBatch(
            query_texts=torch.from_numpy(query_texts),
            passage_texts=torch.from_numpy(passage_texts),
            query_rows=torch.from_numpy(query_rows),
            labels=torch.from_numpy(labels),
            excluded_offsets=torch.from_numpy(_offsets(excluded_counts)),
            excluded_columns=torch.from_numpy(columns[excluded]),
            rows=torch.from_numpy(rows),
        )

    def _draw_negatives(self, row: int, random: np.random.Generator) -> np.ndarray:
        candidates = self._negatives[row]
        return random.choice(
            candidates, min(self.num_negatives, len(candidates)), replace=False, shuffle=False
        )


class PreferenceData:
    """Batches of preference pairs, with the margins of a reference model once they are known.

    `query_ids`, `chosen_ids`, `rejected_ids` [rows] are the rows' places in `query_texts` and
    `passage_texts`, in data order: what it takes to compute those margins.
    """

    def __init__(
        self,
        rows: Sequence[PreferenceRow],
        *,
        batch_size: int,
        seed: int,
        reference_margins: Tensor | None = None,
    ):
        self._schedule = _Schedule(len(rows), batch_size, seed)
        queries, passages = _Texts(), _Texts()
        self.query_ids = torch.tensor([queries.id(row.query) for row in rows])
        self.chosen_ids = torch.tensor([passages.id(row.chosen) for row in rows])
        self.rejected_ids = torch.tensor([passages.id(row.rejected) for row in rows])
        self.query_texts: list[str] = list(queries)
        self.passage_texts: list[str] = list(passages)
        self.batch_size = self._schedule.batch_size
        self.batches_per_epoch = self._schedule.batches_per_epoch
        self._weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        self._reference_margins: Tensor | None = None
        if reference_margins is not None:
            self._set_margins(reference_margins)

    def with_reference(self, margins: Tensor) -> "PreferenceData":
        """The same batches carrying `margins` [rows] (any float dtype, data order)."""
        data = copy.copy(self)
        data._set_margins(margins)
        return data

    def _set_margins(self, margins: Tensor) -> None:
        assert margins.shape == self.query_ids.shape, "one margin per row"
        self._reference_margins = margins.detach().to("cpu", torch.float32)

    def batch(self, epoch: int, index: int) -> PreferenceBatch:
        """Batch `index` (0 to batches_per_epoch - 1) of `epoch`."""
        rows = torch.from_numpy(self._schedule.rows(epoch, index))
        query_texts, query_rows = self.query_ids[rows].unique(return_inverse=True)
        pairs = torch.stack([self.chosen_ids[rows], self.rejected_ids[rows]])  # [2, B]
        passage_texts, pair_rows = pairs.unique(return_inverse=True)
        margins = self._reference_margins
        return PreferenceBatch(
            query_texts=query_texts,
            passage_texts=passage_texts,
            query_rows=query_rows,
            chosen_rows=pair_rows[0],
            rejected_rows=pair_rows[1],
            weights=self._weights[rows],
            reference_margins=None if margins is None else margins[rows],
            rows=rows,
        )


class _Schedule:
    """Which rows make which batch: a new order every epoch, and no short batch but an only one."""

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        assert num_rows > 0 and batch_size > 0 and seed >= 0
        self._num_rows, self._seed = num_rows, seed
        self.batch_size = min(batch_size, num_rows)
        self.batches_per_epoch = num_rows // self.batch_size
        # The epoch last asked for, and its order: one object, since two threads may ask.
        self._last = -1, np.empty(0, np.int64)

    def random(self, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng((purpose, self._seed, epoch, index))

    def rows(self, epoch: int, index: int) -> np.ndarray:
        assert 0 <= index < self.batches_per_epoch, f"no batch {index} in an epoch"
        last = self._last
        if last[0] != epoch:
            last = self._last = epoch, self.random(ORDER, epoch).permutation(self._num_rows)
        return last[1][index * self.batch_size : (index + 1) * self.batch_size]


class _Texts(dict[str, int]):
    """Distinct texts, numbered as they come; iterates in that order."""

    def id(self, text: str) -> int:
        return self.setdefault(text, len(self))

    def ids(self, texts: Collection[str]) -> list[int]:
        """The ids of the distinct ones among `texts`."""
        return list(dict.fromkeys(map(self.id, texts)))


class _Lists:
    """Many short lists of ids in one array: list i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, lists: Sequence[Collection[int]]):
        lengths = np.array([len(ids) for ids in lists], np.int64)
        self._values = np.fromiter(chain.from_iterable(lists), np.int64, lengths.sum())
        self._offsets = _offsets(lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._offsets[index] : self._offsets[index + 1]]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists `indices` one after the other, and the length of each."""
        parts = [self[index] for index in indices]
        return np.concatenate(parts), np.array([len(part) for part in parts])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
