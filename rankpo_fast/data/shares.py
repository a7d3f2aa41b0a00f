"""Several files of rows: how often those of each come in an epoch.

Of n rows of weight w an epoch has all int(w) times, and round((w - int(w)) * n) of them once more;
of each file at least one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rankpo_fast.data.memory import Source
from rankpo_fast.data.sources import place

Row = TypeVar("Row")


@dataclass(frozen=True)
class Share:
    """The rows of one file, which follow those of the file before."""

    path: str
    rows: int
    weight: float = 1.0

    @property
    def copies(self) -> int:
        """How often every row comes in an epoch."""
        return int(self.weight)

    @property
    def drawn(self) -> int:
        """How many rows come once more, others in every epoch."""
        least = 1 if self.rows and not self.copies else 0
        return max(round((self.weight - self.copies) * self.rows), least)

    @property
    def per_epoch(self) -> int:
        return self.copies * self.rows + self.drawn

    def of(self, rows: int) -> "Share":
        """The same with fewer rows."""
        return replace(self, rows=rows)


def read_shares(
    read: Callable[[Source], list[Row]], paths: Sequence[Source], weights: Sequence[float] | None
) -> tuple[list[Row], list[Share]]:
    """The rows of all files in order, and which are whose; weight 1 where none are given."""
    rows: list[Row] = []
    shares = []
    for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
        part = read(path)
        rows += part
        shares.append(Share(place(path), len(part), weight))
    return rows, shares


def describe_shares(shares: Sequence[Share]) -> str:
    """Of which files an epoch is made; nothing where each row comes once."""
    if all(share.weight == 1 for share in shares):
        return ""
    parts = [f"{s.per_epoch:,} of {s.path} ({s.rows:,} x {s.weight:g})" for s in shares]
    return f"; an epoch has {' + '.join(parts)}"
