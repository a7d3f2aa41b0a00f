"""The arithmetic of InfoNCE between the pass that sums the scores' exponentials and the pass that
writes gradients.

A block of scores S = A B' is read along its rows, its columns, or both:

    query_to_passage    rows of q p'       passage_to_query    columns of q p'
    query_to_query      rows of q q'       passage_to_passage  rows of p[positives] p'

For a positive pair k = (i, a) with logit s_k and lse_k over its negatives in all directions, c of
which list the pair itself:

    loss_k = log(c + exp(lse_k - s_k)),   loss_i = mean of its loss_k,   total = sum_i w_i loss_i

With hardness a negative of query_to_passage, of similarity s, has the logit scale s + h s there,
the second s a constant: what follows from logits (lse) has it, what goes along gradients has not.

M queries, N passages, P positive pairs.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from rankpo_kernels.problem import PP, PQ, QP, QQ, InfoNCEOptions, InfoNCESettings
from rankpo_kernels.relations import Pairs


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus overflows to its threshold form."""
    return torch.logaddexp(x, torch.zeros_like(x))


def on_device(number: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One on the CPU is filled in: a copy of it would make the host wait."""
    if number.device.type == "cpu" and device.type != "cpu":
        return torch.full((), number.item(), dtype=dtype, device=device)
    return number.to(device, dtype)


def expanded_weights(weights: Tensor, M: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[M] of [M], or of a weight of all rows."""
    weights = weights.to(device, dtype) if weights.dim() else on_device(weights, device, dtype)
    return weights.expand(M).contiguous()


def limits(positive: Tensor, settings: InfoNCEOptions) -> Tensor:
    """The similarity above which a passage is taken for a positive that nobody marked.

    A passage with the positive's text is as similar, not more, whatever rounding says: two ways to
    sum a product differ by less than eight units.
    """
    margin = settings.false_negative_margin
    assert margin is not None
    reach = positive.abs() * margin if settings.margin_type == "relative" else margin
    rounding = 8 * torch.finfo(positive.dtype).eps * positive.abs().clamp(min=1)
    return positive - reach + rounding


class Stats(NamedTuple):
    """Of the negatives of each row of a block (or each column): no negatives give lse = top = -inf
    and zeros. Hardness is in lse and in the softmax."""

    lse: Tensor
    mean: Tensor  # mean logit under the softmax
    sum: Tensor  # of the logits
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks
    top: Tensor  # largest logit


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of the union of two disjoint sets of negatives."""
    lse = torch.logaddexp(a.lse, b.lse)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    mean = (a.lse - finite).exp() * a.mean + (b.lse - finite).exp() * b.mean
    return Stats(lse, mean, a.sum + b.sum, a.count + b.count, torch.maximum(a.top, b.top))


def of_all_ranks(stats: Stats, settings: InfoNCESettings) -> Stats:
    """Statistics of columns over the queries of all ranks, from those over a rank's own."""
    if settings.group is None:
        return stats
    lse, top = _reduced(torch.stack([stats.lse, stats.top]), "MAX", settings.group)
    share = (stats.lse - lse.masked_fill(lse == -torch.inf, 0)).exp()
    parts = [share, share * stats.mean, stats.sum, stats.count]
    e, weighted, total, count = _reduced(torch.stack(parts), "SUM", settings.group)
    return Stats(lse + e.log(), weighted / e.masked_fill(e == 0, 1), total, count, top)


def add_ranks_(of_columns: Tensor, settings: InfoNCESettings) -> Tensor:
    """In place: what the pairs of all ranks add to columns, from what a rank's own do."""
    if settings.group is None:
        return of_columns
    return _reduced(of_columns, "SUM", settings.group)


def _reduced(x: Tensor, how: str, group: str) -> Tensor:
    c10d.all_reduce(x, getattr(c10d.ReduceOp, how), c10d._resolve_process_group(cast(Any, group)))
    return x


STEPS = 2**40  # of a sum that is exact in any order, as one of floats is not


def by_pull(loss_R: Tensor, weights_R: Tensor | float, share: float) -> tuple[Tensor, Tensor]:
    """(rows, those with the largest pull first; how many of them are kept): the others' pulls sum
    to at most this share of all. Of one softmax per row, and without a wait for the device.

    pull_i = |w_i| (1 - p_i), p_i being the positive's share of the softmax. d total / d s_i is
    -pull_i for the positive, and sums to pull_i over the negatives.
    """
    pull_R = (weights_R * torch.expm1(-loss_R.double())).abs()
    share_R = pull_R / pull_R.sum().clamp(min=torch.finfo(torch.float64).tiny)
    share_R = torch.where(share_R >= 0, share_R, 1.0)  # NaN stays in
    share_R, rows_R = share_R.sort(descending=True, stable=True)
    above_R = (share_R * STEPS).ceil().long().flip(0).cumsum(0) > share * STEPS
    return rows_R, above_R.sum(dtype=torch.int32)


class Slopes(NamedTuple):
    """d total / d s of a negative: soft * exp(s - lse) - flat, of its row (or column)."""

    soft: Tensor
    flat: Tensor | None  # with label smoothing


def combine(
    pairs: Pairs, s_P: Tensor, stats: dict[str, Stats], weights_M: Tensor, scale: Tensor,
    settings: InfoNCESettings, need_scale: bool,
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
    loss_P, slope_P = cast(Tensor, 0.0), cast(Tensor, 0.0)  # until there is a sum
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
            share_P = pull_P
            if finite_P is not None:
                share_P = pull_P * (lse_of[direction] - finite_P).exp()
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
                flat_R = _summed(omega_P * smooth_P, rows, size)
                slopes[direction] = slopes[direction]._replace(flat=flat_R)
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
