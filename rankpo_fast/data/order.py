"""Which rows make which batch, in every epoch in a new order that (seed, epoch) alone decide."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from rankpo_fast.data.shares import Share

ORDER, DRAW = 0, 1  # what a random stream is for, so that no two share one


class _Epoch(NamedTuple):
    number: int
    rows: np.ndarray  # in its order


class BatchData:
    """Rows as batches, and the distinct texts of all rows."""

    query_texts: list[str]
    passage_texts: list[str]
    _order: "RowOrder"

    def without_texts(self) -> Self:
        """The same batches, where nobody needs the texts any more, nor merges them."""
        data = copy.copy(self)
        data.query_texts, data.passage_texts = [], []
        return data

    @property
    def batch_size(self) -> int:
        return self._order.batch_size

    @property
    def wanted_batch_size(self) -> int:
        """Rows that a batch would have, if there were so many."""
        return self._order.wanted

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    @property
    def shares(self) -> list[Share]:
        """The files of the rows that come, and how often they do."""
        return self._order.shares


class RowOrder:
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
        self._rows, self._seed, self.wanted = rows, seed, batch_size
        self.shares = [Share("", len(rows))] if shares is None else list(shares)
        assert sum(share.rows for share in self.shares) == len(rows)
        per_epoch = sum(share.per_epoch for share in self.shares)
        self.batch_size = min(batch_size, per_epoch)
        self.batches_per_epoch = per_epoch // self.batch_size
        # That last asked for: one object, since two threads may ask.
        self._last = _Epoch(-1, np.empty(0, np.int64))

    def of(self, kept: np.ndarray) -> "RowOrder":
        """Of the rows [n] marked in `kept` alone."""
        parts = np.split(kept, self._starts[1:])
        shares = [share.of(int(p.sum())) for share, p in zip(self.shares, parts, strict=True)]
        return RowOrder(self._rows[kept], self.wanted, self._seed, shares)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(share.rows for share in self.shares[:-1])])

    def random(self, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng((purpose, self._seed, epoch, index))

    def rows(self, epoch: int, index: int) -> np.ndarray:
        assert 0 <= index < self.batches_per_epoch, f"no batch {index} in an epoch"
        last = self._last
        if last.number != epoch:
            last = self._last = _Epoch(epoch, self._drawn(epoch))
        return last.rows[index * self.batch_size : (index + 1) * self.batch_size]

    def _drawn(self, epoch: int) -> np.ndarray:
        random = self.random(ORDER, epoch)
        parts = []
        for share, rows in zip(self.shares, np.split(self._rows, self._starts[1:]), strict=True):
            parts += [rows] * share.copies
            if share.drawn:
                parts.append(random.choice(rows, share.drawn, replace=False))
        return random.permutation(np.concatenate(parts))
