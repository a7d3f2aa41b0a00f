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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.moving import Movable
from rankpo_fast.data.rows import ContrastiveRow, PreferenceRow
from rankpo_fast.data.shares import Share
from rankpo_fast.errors import InputError

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
        shares: Sequence[Share] | None = None,
    ):
        """`shares`: which rows come how often; None: each once an epoch."""
        self._schedule = _Schedule(np.arange(len(rows)), batch_size, seed, shares)
        self.num_rows, self.num_negatives = len(rows), num_negatives
        self.known_negatives = 0
        queries, passages = _Texts(), _Texts()
        query_ids = [queries.id(row.query) for row in rows]
        positives = [passages.ids(row.positives) for row in rows]
        negatives = [passages.ids(row.negatives) for row in rows]
        self.query_texts: list[str] = list(queries)
        self.passage_texts: list[str] = list(passages)
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
        queries, passages = _firsts(query_rows), _firsts(passage_rows)
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

    @property
    def batch_size(self) -> int:
        return self._schedule.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self._schedule.batches_per_epoch

    @property
    def shares(self) -> list[Share]:
        """The files of the rows that come, and how often they do."""
        return self._schedule.shares

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
    `passage_texts`, in data order: what it takes to compute those margins. Pairs of one and the
    same passage, once texts are `merged`, are in no batch: `equal_pairs` counts them.
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
        self._schedule = _Schedule(np.arange(len(rows)), batch_size, seed, shares)
        queries, passages = _Texts(), _Texts()
        self.query_ids = torch.tensor([queries.id(row.query) for row in rows])
        self.chosen_ids = torch.tensor([passages.id(row.chosen) for row in rows])
        self.rejected_ids = torch.tensor([passages.id(row.rejected) for row in rows])
        self.query_texts: list[str] = list(queries)
        self.passage_texts: list[str] = list(passages)
        self.equal_pairs = 0
        self._weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        self._reference_margins: Tensor | None = None
        if reference_margins is not None:
            self._set_margins(reference_margins)

    @property
    def batch_size(self) -> int:
        return self._schedule.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self._schedule.batches_per_epoch

    @property
    def shares(self) -> list[Share]:
        """The files of the rows that come, and how often they do."""
        return self._schedule.shares

    def merged(self, query_rows: Tensor, passage_rows: Tensor) -> "PreferenceData":
        """The same pairs, with texts of equal token ids as one: the first of them.

        Args:
            query_rows: [queries] number of each query text's ids among all that are distinct.
            passage_rows: [passages] and of each passage text's.

        Raises:
            InputError: the two passages of every pair are equal.
        """
        queries, passages = (torch.tensor(_firsts(rows)) for rows in (query_rows, passage_rows))
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
            data._schedule = self._schedule.of(differ.numpy())
        return data

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


class _Epoch(NamedTuple):
    number: int
    rows: np.ndarray  # in its order


class _Schedule:
    """Which rows make which batch: a new order every epoch, and no short batch but an only one."""

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        shares: Sequence[Share] | None = None,
    ):
        """`rows` [n] are numbers of rows, `shares` the files they come from."""
        assert len(rows) > 0 and batch_size > 0 and seed >= 0
        self._rows, self._seed, self._wanted = rows, seed, batch_size
        self.shares = [Share("", len(rows))] if shares is None else list(shares)
        assert sum(share.rows for share in self.shares) == len(rows)
        per_epoch = sum(share.per_epoch for share in self.shares)
        self.batch_size = min(batch_size, per_epoch)
        self.batches_per_epoch = per_epoch // self.batch_size
        # That last asked for: one object, since two threads may ask.
        self._last = _Epoch(-1, np.empty(0, np.int64))

    def of(self, kept: np.ndarray) -> "_Schedule":
        """Of the rows [n] marked in `kept` alone."""
        parts = np.split(kept, self._starts[1:])
        shares = [share.of(int(p.sum())) for share, p in zip(self.shares, parts, strict=True)]
        return _Schedule(self._rows[kept], self._wanted, self._seed, shares)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(share.rows for share in self.shares[:-1])])

    def random(self, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng((purpose, self._seed, epoch, index))

    def rows(self, epoch: int, index: int) -> np.ndarray:
        assert 0 <= index < self.batches_per_epoch, f"no batch {index} in an epoch"
        last = self._last
        if last.number != epoch:
            last = self._last = _Epoch(epoch, self._order(epoch))
        return last.rows[index * self.batch_size : (index + 1) * self.batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        random = self.random(ORDER, epoch)
        parts = []
        for share, rows in zip(self.shares, np.split(self._rows, self._starts[1:]), strict=True):
            parts += [rows] * share.copies
            if share.drawn:
                parts.append(random.choice(rows, share.drawn, replace=False))
        return random.permutation(np.concatenate(parts))


def _firsts(rows: Tensor) -> list[int]:
    """For each text the first one with the same row: its own place if that is itself."""
    first: dict[int, int] = {}
    return [first.setdefault(row, place) for place, row in enumerate(rows.tolist())]


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
