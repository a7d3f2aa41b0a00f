"""Rows of scores a chunk and a slab at a time: how many, and how to add to the vectors they came
from.

R rows of a chunk, r rows of a slab, C columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.relations import Known

# Fewer rows make the GEMMs slower, more buy nothing on a CPU: at 4096 x 24576 x 384 the three take
# 1.03 of the unchunked ones with 586 rows and 1.00 with 1024 (bench/cases/info_nce.py).
CPU_ROWS = 1024
# Elements that the torch form works on at a time: few enough for the cache, many enough for CUDA.
SLAB = {"cpu": 1 << 18, "cuda": 1 << 24}
ALL = slice(None)


def row_chunks(
    rows: int, columns: int, buffers: int, like: Tensor, workspace_bytes: int
) -> Iterator[slice]:
    """Slices of rows, about equal, whose buffers fit the workspace; the first is the longest."""
    row_bytes = max(1, buffers * columns * like.element_size())
    if (most := workspace_bytes // row_bytes) < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for one row of {columns} columns: "
            f"it takes {row_bytes}"
        )
    if like.device.type == "cpu":
        most = min(most, CPU_ROWS)
    return slices(rows, -(-rows // max(1, -(-rows // most))))


def slices(rows: int, most: int) -> Iterator[slice]:
    return (slice(at, min(at + most, rows)) for at in range(0, rows, max(1, most)))


def slab_rows(x_RC: Tensor) -> int:
    return max(1, SLAB[x_RC.device.type] // max(1, x_RC.shape[1]))


def add_rows(target: Tensor, rows: slice | Tensor, values: Tensor, part: slice = ALL) -> None:
    """target[rows[part]] += values; rows may repeat."""
    if isinstance(rows, slice):
        target[rows][part] += values
        return
    rows = rows[part]
    if target.device.type == "cpu":
        target.index_add_(0, rows, values)
    else:
        target.index_put_((rows,), values, accumulate=True)  # sorts: index_add would use atomics


class Lists(NamedTuple):
    """Columns that are no negatives of a query, without expansion: texts first_M[i] : last_M[i] are
    known to query i, and columns[start_E[e] : stop_E[e]] have text e."""

    first_M: Tensor
    last_M: Tensor
    start_E: Tensor
    stop_E: Tensor
    columns: Tensor

    def rows(self, rows: slice) -> "Lists":
        """Those of a chunk of queries."""
        return self._replace(first_M=self.first_M[rows], last_M=self.last_M[rows])

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(position in `queries`, column) of all that are listed for them."""
        row, text = _ranges(self.first_M[queries], self.last_M[queries])
        at, place = _ranges(self.start_E[text], self.stop_E[text])
        return row[at], self.columns[place]


def _ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """(k, x) for all x in start_k : stop_k."""
    counts = stop - start
    owner = torch.repeat_interleave(counts)
    first = start - (counts.cumsum(0) - counts)
    return owner, first[owner] + torch.arange(len(owner), device=start.device)


def column_lists(known: Known, passage_C: Tensor | slice = ALL) -> Lists:
    """The keys, which go from a passage to the classes that know it, turned round; a column has
    the text of the passage `passage_C`."""
    used = int(known.stop_N.max()) if len(known.stop_N) else 0
    classes, keys = known.keys[:used].sort(stable=True)
    starts = known.start_N.sort().values
    text = starts[torch.searchsorted(starts, keys, right=True) - 1]  # the first key of its text
    start_C = known.start_N.masked_fill(known.start_N == known.stop_N, -1)[passage_C]
    texts, columns = start_C.sort(stable=True)
    return Lists(
        torch.searchsorted(classes, known.class_M),
        torch.searchsorted(classes, known.class_M, right=True),
        torch.searchsorted(texts, text),
        torch.searchsorted(texts, text, right=True),
        columns,
    )
