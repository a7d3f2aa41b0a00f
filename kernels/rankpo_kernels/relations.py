"""Who belongs to whom in a batch: labels, further positives, texts that are equal, exclusions.

All of it is O(M + N) integers; no M x N mask is made of them. M queries, N passages, P positive
pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

APART = -2  # in curated: chosen for no query, and in no sum of passage_to_passage


class Relations(NamedTuple):
    """Lists per query are (offsets [M + 1], columns)."""

    labels_M: Tensor
    positive_offsets: Tensor | None = None  # positives besides the label
    positive_columns: Tensor | None = None
    query_ids_M: Tensor | None = None  # equal ids are the same text
    passage_ids_N: Tensor | None = None
    excluded_offsets: Tensor | None = None
    excluded_columns: Tensor | None = None
    own_offsets: Tensor | None = None  # own negatives of query i: rows offsets[i] : offsets[i + 1]
    curated_N: Tensor | None = None  # the query a passage was chosen for, -1 if none, or APART
    guide_queries: Tensor | None = None  # [M, G], whose similarities decide the margin
    guide_passages: Tensor | None = None  # [N, G]

    @property
    def labels_alone(self) -> bool:
        """A query knows no text but that of its label, and its label at that place alone."""
        more = (
            self.positive_offsets, self.query_ids_M, self.passage_ids_N, self.excluded_offsets,
        )  # fmt: skip
        return all(x is None for x in more)

    @property
    def guide(self) -> tuple[Tensor, Tensor] | None:
        if self.guide_queries is None or self.guide_passages is None:
            return None
        return self.guide_queries, self.guide_passages

    def with_guide(self, change: Callable[[Tensor], Tensor]) -> "Relations":
        """The guide's embeddings changed, or none as before."""
        if self.guide is None:
            return self
        queries, passages = map(change, self.guide)
        return self._replace(guide_queries=queries, guide_passages=passages)

    def with_integers(self, change: Callable[[Tensor], Tensor]) -> "Relations":
        """All but the guide changed."""
        integers = {
            name: change(x)
            for name, x in self._asdict().items()
            if x is not None and not name.startswith("guide_")
        }
        return self._replace(**integers)

    def rows(self, window: tuple[int, int] | None) -> "Relations":
        """Those of the queries `window` of all; the lists are theirs already."""
        if window is None:
            return self
        own, guide = slice(*window), self.guide_queries
        return self._replace(
            labels_M=self.labels_M[own], guide_queries=None if guide is None else guide[own]
        )


class Pairs(NamedTuple):
    """All positive pairs: the labels first, then the further positives."""

    rows_P: Tensor
    columns_P: Tensor
    share_P: Tensor  # 1 / number of positives of the query


def positive_pairs(relations: Relations, dtype: torch.dtype) -> Pairs:
    labels_M, offsets = relations.labels_M, relations.positive_offsets
    M = len(labels_M)
    rows_M = torch.arange(M, device=labels_M.device)
    if offsets is None or (columns := relations.positive_columns) is None:
        return Pairs(rows_M, labels_M, torch.ones(M, dtype=dtype, device=labels_M.device))
    more_M = offsets.diff()
    rows_P = torch.cat([rows_M, expand(more_M, len(columns))])
    return Pairs(rows_P, torch.cat([labels_M, columns]), (1 / (1 + more_M).to(dtype))[rows_P])


def expand(counts_M: Tensor, total: int) -> Tensor:
    """0 0 0 1 2 2 ...: row i as often as its count; `total` spares the device a sync."""
    return torch.repeat_interleave(counts_M, output_size=total)


class Known(NamedTuple):
    """Pairs that are no negatives of each other, as keys: query i and column j are known to each
    other iff class i is among keys[start_j : stop_j], the classes that know the text of j.

    A class is a query text, and it knows the texts of the positives and exclusions of every query
    of that text; so a passage equal to any positive of any equal query is no negative.
    """

    class_M: Tensor
    text_N: Tensor
    start_N: Tensor
    stop_N: Tensor
    keys: Tensor


def listed(relations: Relations, class_M: Tensor) -> tuple[Tensor, Tensor]:
    """(class, column) of every label, further positive and exclusion."""
    classes, columns = [class_M], [relations.labels_M]
    for offsets, of_queries in (
        (relations.positive_offsets, relations.positive_columns),
        (relations.excluded_offsets, relations.excluded_columns),
    ):
        if offsets is not None and of_queries is not None:
            classes.append(class_M[expand(offsets.diff(), len(of_queries))])
            columns.append(of_queries)
    return torch.cat(classes), torch.cat(columns)


def _numbered(ids_M: Tensor) -> Tensor:
    """Equal ids as equal numbers below M, which fit 32 bits in a kernel; no host sync."""
    ids, order = ids_M.sort(stable=True)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    return torch.empty_like(ids_M).scatter_(0, order, new.cumsum(0) - 1)


def known(relations: Relations, N: int) -> Known:
    """Sorts of M + N integers; no host sync."""
    M, device = len(relations.labels_M), relations.labels_M.device
    query_ids, passage_ids = relations.query_ids_M, relations.passage_ids_N
    class_M = torch.arange(M, device=device) if query_ids is None else _numbered(query_ids)
    text_N = torch.arange(N, device=device) if passage_ids is None else passage_ids.contiguous()
    keys, columns = listed(relations, class_M)
    text_of_key = text_N[columns]
    order = keys.argsort(stable=True)
    order = order[text_of_key[order].argsort(stable=True)]  # by text, then by class
    keys, text_of_key = keys[order], text_of_key[order]
    # Equal entries are dropped without a sync: the first of each run moves to the run's number,
    # and what lies past the last run sorts behind every text.
    new = torch.ones_like(keys, dtype=torch.bool)
    new[1:] = (keys[1:] != keys[:-1]) | (text_of_key[1:] != text_of_key[:-1])
    run = new.cumsum(0) - 1
    keys = torch.zeros_like(keys).scatter_(0, run, keys)
    text_of_run = torch.full_like(text_of_key, torch.iinfo(torch.int64).max)
    text_of_run = text_of_run.scatter_(0, run, text_of_key)
    start_N = torch.searchsorted(text_of_run, text_N)
    stop_N = torch.searchsorted(text_of_run, text_N, right=True)
    return Known(class_M, text_N, start_N, stop_N, keys)


def count_others(known: Known) -> Tensor:
    """[M]: how many columns are not known to each query; no host sync, no M x N mask."""
    class_M, text_N, start_N, stop_N, keys = known
    ones_N = torch.ones_like(start_N)
    edges = keys.new_zeros(len(keys) + 1)  # columns start_j : stop_j of the keys know column j
    edges = edges.scatter_add(0, start_N, ones_N).scatter_add(0, stop_N, -ones_N)
    classes, order = keys.sort()
    columns = F.pad(edges.cumsum(0)[:-1][order].cumsum(0), (1, 0))
    first_M = torch.searchsorted(classes, class_M)
    last_M = torch.searchsorted(classes, class_M, right=True)
    return len(text_N) - (columns[last_M] - columns[first_M])
