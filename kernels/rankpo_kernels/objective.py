"""What InfoNCE is made of besides the scores: its settings, which pairs are related, and the row of
arithmetic between the pass that sums the scores' exponentials and the pass that writes gradients.

A block of scores S = A B' is read along its rows, its columns, or both:

    query_to_passage    rows of q p'       passage_to_query    columns of q p'
    query_to_query      rows of q q'       passage_to_passage  rows of p[positives] p'

For a positive pair k = (i, a) with logit s_k and lse_k over its negatives in all directions, c of
which list the pair itself:

    loss_k = log(c + exp(lse_k - s_k)),   loss_i = mean of its loss_k,   total = sum_i w_i loss_i

With hardness a negative of query_to_passage, of similarity s, has the logit scale s + h s there,
the second s a constant: what follows from logits (lse) has it, what goes along gradients has not.

M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

QP, PQ = "query_to_passage", "passage_to_query"
QQ, PP = "query_to_query", "passage_to_passage"
DIRECTIONS = (QP, PQ, QQ, PP)
IN_BATCH, HARD, ALL_NEGATIVES = HARDNESS_MODES = (
    "in_batch_negatives", "hard_negatives", "all_negatives",
)  # fmt: skip
APART = -2  # in curated: chosen for no query, and in no sum of passage_to_passage

DEFAULT_WORKSPACE = {"cpu": 90 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Settings:
    """Everything about a loss that is no tensor; travels through the ops as text."""

    normalize: bool
    workspace_bytes: int
    directions: tuple[str, ...] = (QP,)
    joint: bool = True  # one partition of all directions, or the mean of one each
    label_smoothing: float = 0.0
    margin: float | None = None  # of similarity, above positive minus which nothing is a negative
    relative_margin: bool = False
    dims: tuple[int, ...] = ()  # prefixes, ascending; () is D alone
    dim_weights: tuple[float, ...] = ()
    gradient_filter: float = 0.0
    backend: str | None = None
    # Of several ranks: the process group whose queries all count in a column; and the rows of q
    # that are a rank's own where q (with its labels and guide) holds the queries of all.
    group: str | None = None
    window: tuple[int, int] | None = None
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    @property
    def hardness(self) -> tuple[float, float]:
        """(of negatives that were chosen for the query, of others): what is added to a logit of
        query_to_passage, per similarity."""
        strength = self.hardness_strength
        return (
            0.0 if self.hardness_mode == IN_BATCH else strength,
            0.0 if self.hardness_mode == HARD else strength,
        )

    def text(self) -> str:
        """In steps that torch.compile can trace, which json's encoder is not."""
        items = [f'"{name}": {_json(value)}' for name, value in asdict(self).items()]
        return "{" + ", ".join(items) + "}"

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> Self:
        fields = json.loads(text)
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields | lists)

    def levels(self, D: int) -> list[tuple[int, float]]:
        """(prefix, weight) of each level."""
        return list(zip(self.dims, self.dim_weights, strict=True)) if self.dims else [(D, 1.0)]


def _json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(element) for element in value]) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


SIGMOID, HINGE, SIGLIP = KINDS = ("sigmoid", "hinge", "siglip")


@dataclass(frozen=True)
class PairSettings(Settings):
    """Of a loss that is a sum over pairs, see `pointwise`."""

    kind: str = SIGMOID
    rankpo_weight: float = 1.0
    sft_weight: float = 0.0
    sft_scale: float = 0.0


class Relations(NamedTuple):
    """Who belongs to whom, in O(M + N) integers. Lists per query are (offsets [M + 1], columns)."""

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


def own_rows(relations: Relations, settings: Settings) -> Relations:
    """The relations of the queries that have a loss."""
    if settings.window is None:
        return relations
    own, guide = slice(*settings.window), relations.guide_queries
    return relations._replace(
        labels_M=relations.labels_M[own], guide_queries=None if guide is None else guide[own]
    )


class Result(NamedTuple):
    """What one pass gives; gradients are of sum_i w_i loss_i, None where none were asked for."""

    loss_M: Tensor  # unweighted
    positive_M: Tensor  # similarity of the label
    hardest_M: Tensor  # similarity of the hardest negative, -inf if there is none
    dq_MD: Tensor | None = None
    dp_ND: Tensor | None = None
    d_own_HD: Tensor | None = None
    d_scale: Tensor | None = None
    total: Tensor | None = None  # sum_i w_i loss_i, where it came along


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus overflows to its threshold form."""
    return torch.logaddexp(x, torch.zeros_like(x))


def gradient_dtype(stored: torch.dtype) -> torch.dtype:
    """The inputs' dtype, but fp32 for fp16, in which unscaled gradients underflow."""
    return torch.float32 if stored == torch.float16 else stored


def is_plain(relations: Relations, settings: Settings) -> bool:
    """One softmax per query over one block of scores: a row knows all it needs by itself."""
    return (
        settings.directions == (QP,)
        and not settings.dims
        and settings.label_smoothing == 0
        and relations.positive_offsets is None
        and relations.own_offsets is None
    )


class Pairs(NamedTuple):
    """All positive pairs: the labels first, then the further positives."""

    rows_P: Tensor
    columns_P: Tensor
    share_P: Tensor  # 1 / number of positives of the query


def positive_pairs(relations: Relations, dtype: torch.dtype) -> Pairs:
    labels_M, offsets, columns = relations[:3]
    M = len(labels_M)
    rows_M = torch.arange(M, device=labels_M.device)
    if offsets is None:
        return Pairs(rows_M, labels_M, torch.ones(M, dtype=dtype, device=labels_M.device))
    more_M = offsets.diff()
    rows_P = torch.cat([rows_M, expand(more_M, len(columns))])
    return Pairs(rows_P, torch.cat([labels_M, columns]), (1 / (1 + more_M).to(dtype))[rows_P])


def on_device(number: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One on the CPU is filled in: a copy of it would make the host wait."""
    if number.device.type == "cpu" and device.type != "cpu":
        return torch.full((), number.item(), dtype=dtype, device=device)
    return number.to(device, dtype)


def of_rows(weights: Tensor, M: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[M] of [M], or of a weight of all rows."""
    weights = weights.to(device, dtype) if weights.dim() else on_device(weights, device, dtype)
    return weights.expand(M).contiguous()


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
    for offsets, of_queries in (relations[1:3], relations[5:7]):
        if offsets is not None:
            classes.append(class_M[expand(offsets.diff(), len(of_queries))])
            columns.append(of_queries)
    return torch.cat(classes), torch.cat(columns)


def known(relations: Relations, N: int) -> Known:
    """Sorts of M + N integers; no host sync."""
    labels_M, query_ids, passage_ids = relations.labels_M, *relations[3:5]
    M, device = len(labels_M), labels_M.device
    class_M = torch.arange(M, device=device) if query_ids is None else query_ids.contiguous()
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


def limits(positive: Tensor, settings: Settings) -> Tensor:
    """The similarity above which a passage is taken for a positive that nobody marked."""
    reach = positive.abs() * settings.margin if settings.relative_margin else settings.margin
    return positive - reach


class Stats(NamedTuple):
    """Of the negatives of each row of a block (or each column): no negatives give lse = top = -inf
    and zeros. Hardness is in lse and in the softmax."""

    lse: Tensor
    mean: Tensor  # mean logit under the softmax
    sum: Tensor  # of the logits
    count: Tensor
    top: Tensor  # largest logit


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of the union of two disjoint sets of negatives."""
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    mean = (a.lse - finite).exp() * a.mean + (b.lse - finite).exp() * b.mean
    return Stats(lse, mean, a.sum + b.sum, a.count + b.count, torch.maximum(a.top, b.top))


def of_all_ranks(stats: Stats, settings: Settings) -> Stats:
    """Statistics of columns over the queries of all ranks, from those over a rank's own."""
    if settings.group is None:
        return stats
    lse, top = _reduced(torch.stack([stats.lse, stats.top]), "MAX", settings.group)
    share = (stats.lse - lse.masked_fill(lse == -torch.inf, 0)).exp()
    parts = [share, share * stats.mean, stats.sum, stats.count]
    e, weighted, total, count = _reduced(torch.stack(parts), "SUM", settings.group)
    return Stats(lse + e.log(), weighted / e.masked_fill(e == 0, 1), total, count, top)


def add_ranks_(of_columns: Tensor, settings: Settings) -> Tensor:
    """In place: what the pairs of all ranks add to columns, from what a rank's own do."""
    if settings.group is None:
        return of_columns
    return _reduced(of_columns, "SUM", settings.group)


def _reduced(x: Tensor, how: str, group: str) -> Tensor:
    c10d.all_reduce(x, getattr(c10d.ReduceOp, how), c10d._resolve_process_group(group))
    return x


class Slopes(NamedTuple):
    """d total / d s of a negative: soft * exp(s - lse) - flat, of its row (or column)."""

    soft: Tensor
    flat: Tensor | None  # with label smoothing


def combine(
    pairs: Pairs, s_P: Tensor, stats: dict[str, Stats], weights_M: Tensor, scale: Tensor,
    settings: Settings, need_scale: bool,
) -> tuple[Tensor, dict[str, Slopes], Tensor, Tensor | None]:  # fmt: skip
    """(loss_M, slopes per direction, d total / d s_P, d total / d scale if needed) from the
    statistics of each direction: rows of the block are queries, for passage_to_passage they are
    pairs; columns are passages."""
    # Each step is a launch on a GPU, where 4096 rows take no longer than one: none in vain.
    labels_alone = len(s_P) == len(weights_M)
    rows_P = None if labels_alone else pairs.rows_P
    row_of = {QP: rows_P, PQ: pairs.columns_P, QQ: rows_P, PP: None}
    slopes = {}
    parts = [tuple(stats)] if settings.joint else [(direction,) for direction in stats]
    omega_P = weights_M if labels_alone else weights_M[rows_P] * pairs.share_P
    omega_P = omega_P / len(parts)
    loss_P, slope_P = 0.0, 0.0
    for part in parts:
        listed = max(1, (QP in part) + (PQ in part))  # how often a joint softmax has the positive
        lse_of = {d: _at(stats[d].lse, row_of[d]) for d in part}
        alone = len(part) == 1
        lse_P = lse_of[part[0]] if alone else torch.logsumexp(torch.stack([*lse_of.values()]), 0)
        gap_P = lse_P - s_P - math.log(listed)
        loss_P += softplus(gap_P) + math.log(listed)
        pull_P = omega_P * gap_P.sigmoid()
        slope_P -= pull_P
        finite_P = None if alone else lse_P.masked_fill(lse_P == -torch.inf, 0)
        for direction in part:
            share_P = pull_P if alone else pull_P * (lse_of[direction] - finite_P).exp()
            rows, size = row_of[direction], len(stats[direction].lse)
            slopes[direction] = Slopes(_summed(share_P, rows, size), None)
        if settings.label_smoothing:  # a mean over all candidates, the positive among them
            count_P, sum_P = (
                sum(_at(getattr(stats[d], of), row_of[d]) for d in part) for of in ("count", "sum")
            )
            smooth_P = settings.label_smoothing / (count_P + listed)
            loss_P += smooth_P * (count_P * s_P - sum_P)
            slope_P += omega_P * smooth_P * count_P
            for direction in part:
                rows, size = row_of[direction], len(stats[direction].lse)
                flat = _summed(omega_P * smooth_P, rows, size)
                slopes[direction] = slopes[direction]._replace(flat=flat)
    loss_P = loss_P / len(parts)
    loss_M = loss_P if labels_alone else _summed(loss_P * pairs.share_P, rows_P, len(weights_M))
    if not need_scale:
        return loss_M, slopes, slope_P, None
    d_logits = (slope_P * s_P).sum()
    for direction, (soft, flat) in slopes.items():
        d_logits = d_logits + (soft * stats[direction].mean).sum()
        if flat is not None:
            d_logits = d_logits - (flat * stats[direction].sum).sum()
    return loss_M, slopes, slope_P, d_logits / scale


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _summed(values_P: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """Per row, the sum of its pairs' values."""
    if rows is None:
        return values_P
    out = values_P.new_zeros(size)
    if values_P.device.type == "cpu":
        return out.index_add_(0, rows, values_P)
    return out.index_put_((rows,), values_P, accumulate=True)  # sorts: index_add would use atomics
