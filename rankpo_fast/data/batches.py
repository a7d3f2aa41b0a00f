"""Rows -> the batches of a step, as indices into tables of distinct texts.

Batch `index` of epoch `epoch` depends on (seed, epoch, index) and the rows alone, so a run can stop
anywhere and go on with the same batches. Every epoch has its own order of the rows and draws its
own positives and negatives. M rows of a contrastive batch, B pairs, U and N distinct query and
passage texts of the batch; all indices int64.

Texts are distinct as strings until their token ids are known, `merged` then makes one of those
with equal ids: it is what the encoder sees that decides what a query, a positive or a twin is.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.distinct import DistinctTexts, first_places
from rankpo_fast.data.moving import Movable
from rankpo_fast.data.order import DRAW, BatchData, RowOrder
from rankpo_fast.data.rows import ContrastiveRow, PreferenceRow
from rankpo_fast.data.shares import Share
from rankpo_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class ContrastiveBatch(Movable):
    """M queries against C candidates; the positive of row i is column labels[i]. C is N, but where
    a row's negatives are its own, when candidates are the rows' positives alone."""

    query_texts: Tensor  # [U] rows of the query table, distinct
    passage_texts: Tensor  # [N] rows of the passage table, distinct
    query_rows: Tensor  # [M] index into query_texts
    candidates: Tensor | None  # [C] index into passage_texts; None: all of them
    labels: Tensor  # [M] index into candidates
    excluded_offsets: Tensor  # [M + 1] row i's columns lie between offsets i and i + 1 of ...
    excluded_columns: Tensor  # [nnz] ... the further known positives of the rows' queries
    negative_offsets: Tensor  # [M + 1] likewise of ...
    negatives: Tensor  # [H] ... what was drawn for them alone, index into passage_texts
    chosen_for: Tensor  # [C] the first row for which a candidate was drawn as negative, or -1
    rows: Tensor  # [M] the data rows they come from
    guide_queries: Tensor | None = None  # [M, G] vectors by another model
    guide_passages: Tensor | None = None  # [N, G]

    @property
    def weight(self) -> float:
        """Of its rows in a mean."""
        return float(len(self.rows))

    def part(self, rows: slice) -> "ContrastiveBatch":
        """Some of its rows, against all its candidates."""
        excluded = self.excluded_offsets[rows.start : rows.stop + 1]
        drawn = self.negative_offsets[rows.start : rows.stop + 1]
        inside = (rows.start <= self.chosen_for) & (self.chosen_for < rows.stop)
        return replace(
            self,
            query_rows=self.query_rows[rows],
            labels=self.labels[rows],
            excluded_offsets=excluded - excluded[0],
            excluded_columns=self.excluded_columns[excluded[0] : excluded[-1]],
            negative_offsets=drawn - drawn[0],
            negatives=self.negatives[drawn[0] : drawn[-1]],
            chosen_for=torch.where(inside, self.chosen_for - rows.start, -1),
            rows=self.rows[rows],
            guide_queries=None if self.guide_queries is None else self.guide_queries[rows],
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


class ContrastiveData(BatchData):
    """Batches of queries with one positive and up to `num_negatives` negatives each.

    A positive of a query in any row is known as such in all its rows, and so is the query itself
    among the passages: it is never drawn as a negative there, and where it stands in a batch it is
    excluded for that query. A row that has fewer negatives than asked gives those it has.

    num_rows: all; short_rows: those with fewer negatives than asked; bare_rows: those without any;
    known_negatives: negatives left out since they are known positives, or the query itself.
    """

    def __init__(
        self,
        rows: Sequence[ContrastiveRow],
        *,
        batch_size: int,
        num_negatives: int,
        seed: int,
        own_negatives: bool = False,
        shares: Sequence[Share] | None = None,
    ):
        """
        Args:
            own_negatives: whether what is drawn for a row is a negative of no other.
            shares: which rows come how often; None: each once an epoch.
        """
        self._order = RowOrder(np.arange(len(rows)), batch_size, seed, shares)
        self.num_rows, self.num_negatives = len(rows), num_negatives
        self._own_negatives = own_negatives
        self._guide: tuple[Tensor, Tensor] | None = None
        self.known_negatives = 0
        queries, passages = DistinctTexts(), DistinctTexts()
        query_ids = [queries.id(row.query) for row in rows]
        positives = [passages.ids(row.positives) for row in rows]
        negatives = [passages.ids(row.negatives) for row in rows]
        self.query_texts = list(queries)
        self.passage_texts = list(passages)
        own = [(id, passages[query]) for query, id in queries.items() if query in passages]
        self._fill(query_ids, positives, negatives, own)

    def _fill(
        self,
        query_ids: list[int],
        positives: list[list[int]],
        negatives: list[list[int]],
        own: list[tuple[int, int]],
    ) -> None:
        """Tell negatives from known positives; `own` are queries that are passages, as both."""
        known: list[dict[int, None]] = [{} for _ in self.query_texts]  # per query an ordered set
        for query, ids in zip(query_ids, positives, strict=True):
            known[query].update(dict.fromkeys(ids))
        for query, passage in own:
            known[query][passage] = None
        given = sum(map(len, negatives))
        negatives = [
            [id for id in ids if id not in known[query]]
            for ids, query in zip(negatives, query_ids, strict=True)
        ]
        self.known_negatives += given - sum(map(len, negatives))
        self._own = own
        self._query_ids = np.array(query_ids)
        self._positives, self._negatives = _Lists(positives), _Lists(negatives)
        self._known = _Lists(known)
        self.short_rows = sum(len(ids) < self.num_negatives for ids in negatives)
        self.bare_rows = sum(not ids or self.num_negatives == 0 for ids in negatives)

    def merged(
        self, query_rows: Tensor, passage_rows: Tensor, own_rows: Tensor
    ) -> "ContrastiveData":
        """The same rows, with texts of equal token ids as one: the first of them.

        Args:
            query_rows: [queries] number of each query text's ids among all that are distinct.
            passage_rows: [passages] and of each passage text's.
            own_rows: [queries] and of each query text's as a passage; one that no passage has if
                it is none.
        """
        queries, passages = first_places(query_rows), first_places(passage_rows)
        passage_of = dict(zip(passage_rows.tolist(), passages, strict=True))
        own = [
            (queries[id], passage_of[row])
            for id, row in enumerate(own_rows.tolist())
            if row in passage_of
        ]
        distinct = all(ids == list(range(len(ids))) for ids in (queries, passages))
        if distinct and own == self._own:
            return self
        data = copy.copy(self)
        data._fill(
            [queries[id] for id in self._query_ids.tolist()],
            [list(dict.fromkeys(passages[id] for id in ids)) for ids in self._positives],
            [list(dict.fromkeys(passages[id] for id in ids)) for ids in self._negatives],
            own,
        )
        return data

    def with_guide(self, queries: Tensor, passages: Tensor) -> "ContrastiveData":
        """The same batches carrying another model's vectors [queries, G] and [passages, G]."""
        data = copy.copy(self)
        data._guide = queries, passages
        return data

    def without_texts(self) -> "ContrastiveData":
        data = super().without_texts()
        data._own = []
        return data

    def batch(self, epoch: int, index: int) -> ContrastiveBatch:
        """Batch `index` (0 to batches_per_epoch - 1) of `epoch`."""
        rows = self._order.rows(epoch, index)
        random = self._order.random(DRAW, epoch, index)
        positives = np.array([random.choice(self._positives[row]) for row in rows])
        drawn = [self._draw_negatives(row, random) for row in rows]
        negatives = np.concatenate([positives[:0], *drawn])
        drawn_for = np.repeat(np.arange(len(rows)), [*map(len, drawn)])
        queries = self._query_ids[rows]
        query_texts, query_rows = np.unique(queries, return_inverse=True)
        passage_texts = np.unique(np.concatenate([positives, negatives]))
        candidates = np.unique(positives) if self._own_negatives else passage_texts
        labels = np.searchsorted(candidates, positives)

        known, counts = self._known.gather(queries)
        row_of_known = np.repeat(np.arange(len(rows)), counts)
        columns = np.searchsorted(candidates, known).clip(max=len(candidates) - 1)
        excluded = (candidates[columns] == known) & (columns != labels[row_of_known])
        # A negative that all rows meet, as another's positive, is not one a second time.
        met = np.isin(negatives, candidates)
        chosen_for = np.full(len(candidates), -1)
        # In reverse, so that of several rows the first stays.
        chosen_for[np.searchsorted(candidates, negatives[met])[::-1]] = drawn_for[met][::-1]
        batch = ContrastiveBatch(
            query_texts=torch.from_numpy(query_texts),
            passage_texts=torch.from_numpy(passage_texts),
            query_rows=torch.from_numpy(query_rows),
            candidates=torch.from_numpy(np.searchsorted(passage_texts, candidates))
            if self._own_negatives
            else None,
            labels=torch.from_numpy(labels),
            excluded_offsets=_offsets_of(row_of_known[excluded], len(rows)),
            excluded_columns=torch.from_numpy(columns[excluded]),
            negative_offsets=_offsets_of(drawn_for[~met], len(rows)),
            negatives=torch.from_numpy(np.searchsorted(passage_texts, negatives[~met])),
            chosen_for=torch.from_numpy(chosen_for),
            rows=torch.from_numpy(rows),
        )
        if self._guide is None:
            return batch
        of_queries, of_passages = self._guide
        return replace(
            batch,
            guide_queries=of_queries[torch.from_numpy(queries)],
            guide_passages=of_passages[batch.passage_texts],
        )

    def _draw_negatives(self, row: int, random: np.random.Generator) -> np.ndarray:
        candidates = self._negatives[row]
        return random.choice(
            candidates, min(self.num_negatives, len(candidates)), replace=False, shuffle=False
        )


class PreferenceData(BatchData):
    """Batches of preference pairs, with the margins of a reference model once they are known.

    `query_ids`, `chosen_ids`, `rejected_ids` [rows] are the rows' places in `query_texts` and
    `passage_texts`, in data order: what it takes to compute those margins. Pairs of one and the
    same passage, once texts are `merged`, are in no batch: `equal_pairs` of `num_rows`.
    """

    def __init__(
        self,
        rows: Sequence[PreferenceRow],
        *,
        batch_size: int,
        seed: int,
        reference_margins: Tensor | None = None,
        shares: Sequence[Share] | None = None,
    ):
        """`shares`: which rows come how often; None: each once an epoch."""
        self._order = RowOrder(np.arange(len(rows)), batch_size, seed, shares)
        self.num_rows = len(rows)
        queries, passages = DistinctTexts(), DistinctTexts()
        self.query_ids = torch.tensor([queries.id(row.query) for row in rows])
        self.chosen_ids = torch.tensor([passages.id(row.chosen) for row in rows])
        self.rejected_ids = torch.tensor([passages.id(row.rejected) for row in rows])
        self.query_texts = list(queries)
        self.passage_texts = list(passages)
        self.equal_pairs = 0
        self._weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        self._reference_margins: Tensor | None = None
        if reference_margins is not None:
            self._set_margins(reference_margins)

    def merged(self, query_rows: Tensor, passage_rows: Tensor) -> "PreferenceData":
        """The same pairs, with texts of equal token ids as one: the first of them.

        Args:
            query_rows: [queries] number of each query text's ids among all that are distinct.
            passage_rows: [passages] and of each passage text's.

        Raises:
            InputError: the two passages of every pair are equal.
        """
        both = (query_rows, passage_rows)
        queries, passages = (torch.tensor(first_places(rows)) for rows in both)
        data = copy.copy(self)
        data.query_ids = queries[self.query_ids]
        data.chosen_ids, data.rejected_ids = passages[self.chosen_ids], passages[self.rejected_ids]
        differ = data.chosen_ids != data.rejected_ids
        data.equal_pairs = int((~differ).sum())
        if not differ.any():
            raise InputError(
                "the two passages of every pair have the same tokens, so none is preferred: what "
                "tells them apart may lie beyond --max_passage_length"
            )
        if data.equal_pairs:
            data._order = self._order.of(differ.numpy())
        return data

    def compared(self) -> tuple[Tensor, Tensor]:
        """Places [2 rows] in `query_texts` and `passage_texts`: of the chosen, of the rejected."""
        return self.query_ids.repeat(2), torch.cat([self.chosen_ids, self.rejected_ids])

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
        rows = torch.from_numpy(self._order.rows(epoch, index))
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


class _Lists:
    """Many short lists of ids in one array: list i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, lists: Sequence[Collection[int]]):
        lengths = np.array([len(ids) for ids in lists], np.int64)
        self._values = np.fromiter(chain.from_iterable(lists), np.int64, lengths.sum())
        self._offsets = _offsets(lengths)

    def __iter__(self) -> Iterator[list[int]]:
        values = self._values.tolist()
        for start, stop in pairwise(self._offsets.tolist()):
            yield values[start:stop]

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._offsets[index] : self._offsets[index + 1]]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists `indices` one after the other, and the length of each."""
        parts = [self[index] for index in indices]
        return np.concatenate(parts), np.array([len(part) for part in parts])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _offsets_of(rows: np.ndarray, count: int) -> Tensor:
    """[count + 1] of entries that belong to `rows`, in their order."""
    return torch.from_numpy(_offsets(np.bincount(rows, minlength=count)))
