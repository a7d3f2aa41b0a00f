"""Between the passes: statistics of scores become losses and slopes, on numbers per row.

    loss_k = log(c + exp(lse_k - s_k))      of pair k = (i, a) with logit s_k, c times among the
                                            candidates, lse_k over its negatives
    d total / d s_ij = soft_i exp(s_ij - lse_i) - flat_i       of negatives, + the same of columns

What `objective.combine` is to the chunked form. A softmax comes in parts, of tiles or of chunks,
that are merged where they are needed. Sums over the pairs of a row or column walk a list, in one
order.

M queries, N passages, P positive pairs (the labels first), D dims, L prefixes.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.rows import absent, number
from rankpo_kernels.triton.scores import Partials, Slopes, finite
from rankpo_kernels.triton.statistics import SHIFT
from rankpo_kernels.triton.tiles import FUSION, cdiv

BLOCK = 32  # rows a program
PARTS = tl.constexpr(8)  # parts that are loaded at once
OVER = tl.constexpr(35.0)  # rows of larger gaps do not fit beside SHIFT


class Softmax(NamedTuple):
    """Of rows: their parts, [L, n_parts, rows] each."""

    parts: Partials
    n_parts: int

    @staticmethod
    def of(parts: Partials | None) -> "Softmax":
        return Softmax(absent(Partials), 0) if parts is None else Softmax(parts, parts.top.shape[1])


class Softmaxes(NamedTuple):
    """Of every direction: of queries, own negatives, passages, queries, pairs."""

    qp: Softmax
    own: Softmax
    pq: Softmax
    qq: Softmax
    pp: Softmax


class PairOutputs(NamedTuple):
    """What the pairs leave: losses, and without gradients no more."""

    loss_LM: Tensor
    hardest_M: Tensor  # of the last level
    slope_LP: Tensor | None  # d total / d s_k
    qp: Slopes
    qq: Slopes
    pp: Slopes
    pull_LP: Tensor | None  # what pair k adds to soft and flat of its column
    flat_LP: Tensor | None
    d_scale_LM: Tensor | None
    d_scale_stride: int
    factor_M: Tensor | None  # of a plain loss: its row was divided by it


class Stored(NamedTuple):
    """Exponentials that a plain loss keeps, and what is written beside them."""

    exponentials: Tensor  # [M, N]
    stride: int
    weighted_q: Tensor  # [M, D]: factor * q / |q|, for the product for passages
    q: Tensor
    stride_q: int
    stride_qd: int
    inverse_q: Tensor | None
    inverse_p: Tensor | None
    inverse_top: Tensor


@triton.jit
def softplus(x):
    """log(1 + exp(x)), all digits where it is tiny."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    # log1p: what rounding 1 + e lost comes back as a factor
    log1p = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _merged(softmax, level, R, rows):
    """(top, z, zs, sum, count, hardest) of rows (below R) over all their parts."""
    parts, n_parts = softmax.parts, softmax.n_parts
    # several parts are loaded at once, and summed up at the end
    none = tl.zeros([PARTS, rows.shape[0]], tl.float32)
    top, hardest = none - float("inf"), none - float("inf")
    for first in range(0, n_parts, PARTS):
        offs_p = first + tl.arange(0, PARTS)
        at = (level * n_parts + offs_p)[:, None] * R + rows[None, :]
        live = (offs_p < n_parts)[:, None]
        top = tl.maximum(top, tl.load(parts.top + at, mask=live, other=-float("inf")))
        if parts.hardest is not None:
            part = tl.load(parts.hardest + at, mask=live, other=-float("inf"))
            hardest = tl.maximum(hardest, part)
    top = tl.max(top, 0)
    hardest = top if parts.hardest is None else tl.max(hardest, 0)
    floor = finite(top)
    z, zs, total, count = none, none, none, none
    for first in range(0, n_parts, PARTS):
        offs_p = first + tl.arange(0, PARTS)
        at = (level * n_parts + offs_p)[:, None] * R + rows[None, :]
        live = (offs_p < n_parts)[:, None]
        by = tl.exp(tl.load(parts.top + at, mask=live, other=-float("inf")) - floor[None, :])
        z += tl.load(parts.z + at, mask=live, other=0.0) * by
        if parts.zs is not None:
            zs += tl.load(parts.zs + at, mask=live, other=0.0) * by
        if parts.sum is not None:
            total += tl.load(parts.sum + at, mask=live, other=0.0)
            count += tl.load(parts.count + at, mask=live, other=0.0)
    return top, tl.sum(z, 0), tl.sum(zs, 0), tl.sum(total, 0), tl.sum(count, 0), hardest


@triton.jit
def _union(a, b):
    """Of two disjoint sets of negatives."""
    top_a, z_a, zs_a, sum_a, count_a, hardest_a = a
    top_b, z_b, zs_b, sum_b, count_b, hardest_b = b
    top = tl.maximum(top_a, top_b)
    floor = finite(top)
    by_a, by_b = tl.exp(top_a - floor), tl.exp(top_b - floor)
    z, zs = z_a * by_a + z_b * by_b, zs_a * by_a + zs_b * by_b
    return top, z, zs, sum_a + sum_b, count_a + count_b, tl.maximum(hardest_a, hardest_b)


@triton.jit
def _lse(sums):
    top, z, _, _, _, _ = sums
    return tl.where(z == 0, -float("inf"), top + tl.log(tl.where(z == 0, 1.0, z)))


@triton.jit
def _mean(sums):
    _, z, zs, _, _, _ = sums
    return tl.where(z == 0, 0.0, zs / tl.where(z == 0, 1.0, z))


@triton.jit
def _pair(s, sums, whole, omega, smoothing, COPIES: tl.constexpr, JOINT: tl.constexpr):
    """(loss, d loss / d s, omega soft, omega flat) of pairs, whose negatives in one direction are
    of `sums`, and in all directions, where they share one softmax, of `whole`."""
    if not JOINT:
        whole = sums
    LOG: tl.constexpr = 0.6931471805599453 if COPIES == 2 else 0.0
    lse = _lse(whole)
    gap = lse - s - LOG
    loss, pull = softplus(gap) + LOG, sigmoid(gap)
    soft, slope = pull * tl.exp(_lse(sums) - finite(lse)), -pull
    flat = tl.zeros_like(pull)
    if smoothing is not None:  # a mean over all candidates, the positive among them
        _, _, _, total, count, _ = whole
        flat = smoothing / (count + COPIES)
        loss += flat * (count * s - total)
        slope += flat * count
    return loss, slope, omega * soft, omega * flat


@triton.jit
def _keep(slopes, level, offs, mask, lse, soft, flat):
    at = level * slopes.stride + offs
    tl.store(slopes.lse + at, lse, mask=mask)
    tl.store(slopes.soft + at, soft, mask=mask)
    if slopes.flat is not None:
        tl.store(slopes.flat + at, flat, mask=mask)


@triton.jit
def _along_scale(sums, soft, flat):
    """sum_j s_j d total / d s_j over negatives."""
    _, _, _, total, _, _ = sums
    return soft * _mean(sums) - flat * total


@triton.jit
def _row_sums(of, level, M, rows, nothing):
    """(of query_to_passage with own negatives, of query_to_query) of the queries."""
    sums, of_qq = nothing, nothing
    if of.qp.parts.top is not None:
        sums = _merged(of.qp, level, M, rows)
        if of.own.parts.top is not None:
            sums = _union(sums, _merged(of.own, level, M, rows))
    if of.qq.parts.top is not None:
        of_qq = _merged(of.qq, level, M, rows)
    return sums, of_qq


@triton.jit
def _level_weight(level, LEVELS: tl.constexpr):
    weight = LEVELS[0]
    for longer in tl.static_range(1, len(LEVELS)):
        weight = tl.where(level == longer, LEVELS[longer], weight)
    return weight


@triton.jit
def _joined(of, of_rows, of_qq, of_column, of_pair):
    """Over the directions there are, query_to_passage among them or empty."""
    whole = of_rows
    if of.qq.parts.top is not None:
        whole = _union(whole, of_qq)
    if of.pq.parts.top is not None:
        whole = _union(whole, of_column)
    if of.pp.parts.top is not None:
        whole = _union(whole, of_pair)
    return whole


@triton.jit
def _keep_pull(outputs, level, P, k, live_m, soft, flat):
    """What pair k adds to its column."""
    if outputs.pull_LP is not None:
        tl.store(outputs.pull_LP + level * P + k, soft, mask=live_m)
        if outputs.flat_LP is not None:
            tl.store(outputs.flat_LP + level * P + k, flat, mask=live_m)


@triton.jit
def _keep_slope(outputs, level, P, k, live_m, slope_k):
    """d total / d s_k."""
    if outputs.slope_LP is not None:
        kept_k = slope_k
        if outputs.factor_M is not None:  # divided out; NaN comes back with it
            kept_k = tl.where(slope_k != 0, -1.0, 0.0)
        tl.store(outputs.slope_LP + level * P + k, kept_k, mask=live_m)


@triton.jit
def _finish_stored(
    stored, columns_P, gap_m, omega_m, factor_m, offs_m, safe_m, mask_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Complete rows of stored exponentials: the label's element, and q times the row's factor for
    the product for passages. Returns (factor, soft): soft is 1 for rows whose exponentials did not
    fit, which the gradients kernel writes anew."""
    # soft exp(s - lse) = factor exp(s - s_positive + SHIFT); where that overflows the gradients
    # kernel stores exp(s - lse)
    fits_m = ~(gap_m > OVER)
    factor_m = tl.where(fits_m, omega_m * sigmoid(-gap_m) * tl.exp(-SHIFT), factor_m)
    soft_m = tl.where(fits_m, 0.0, 1.0)
    element_m = -tl.exp(tl.where(fits_m, gap_m + SHIFT, 0.0))
    label_m = tl.load(columns_P + safe_m)
    # apart from the factor: their product may underflow
    inverse_m = tl.full(factor_m.shape, 1.0, tl.float32)
    if stored.inverse_p is not None:
        element_m *= tl.load(stored.inverse_p + label_m) / tl.load(stored.inverse_top)
        inverse_m = tl.load(stored.inverse_q + safe_m)
    row_m = offs_m.to(tl.int64)
    element_m = element_m.to(stored.exponentials.dtype.element_ty)
    tl.store(stored.exponentials + row_m * stored.stride + label_m, element_m, mask=mask_m)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_md = mask_m[:, None] & (offs_d < D)[None, :]
        q_md = stored.q + row_m[:, None] * stored.stride_q + offs_d[None, :] * stored.stride_qd
        q = tl.load(q_md, mask=mask_md, other=0.0).to(tl.float32) * inverse_m[:, None]
        q *= factor_m[:, None]
        to_md = stored.weighted_q + row_m[:, None] * D + offs_d[None, :]
        tl.store(to_md, q.to(stored.weighted_q.dtype.element_ty), mask=mask_md)
    return factor_m, soft_m


@triton.jit(do_not_specialize=["M", "N", "P"])
def pairs_kernel(
    of, outputs, stored, columns_P, offsets, similarity_LP,
    weights, smoothing, scale, M, N, P, D: tl.constexpr,
    LEVELS: tl.constexpr, JOINT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK queries with all their pairs a program, at one level.

    Query i has the pairs i and M + offsets[i] : M + offsets[i + 1]."""
    QP: tl.constexpr = of.qp.parts.top is not None
    PQ: tl.constexpr = of.pq.parts.top is not None
    QQ: tl.constexpr = of.qq.parts.top is not None
    PP: tl.constexpr = of.pp.parts.top is not None
    DIRECTIONS: tl.constexpr = QP + PQ + QQ + PP
    COPIES: tl.constexpr = 2 if JOINT and (QP and PQ) else 1  # of the positive in a softmax
    PER_DIRECTION: tl.constexpr = 1.0 if JOINT else 1.0 / DIRECTIONS

    level = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_m = offs_m < M
    safe_m = tl.minimum(offs_m, M - 1)
    scale = number(scale)
    none = tl.zeros([BLOCK], tl.float32)
    nothing = (none - float("inf"), none, none, none, none, none - float("inf"))
    of_rows, of_qq = _row_sums(of, level, M, safe_m, nothing)

    omega_m = none + weights.value
    if weights.at is not None:
        omega_m = tl.load(weights.at + safe_m)
    weight = _level_weight(level, LEVELS)
    omega_m *= weight
    share_m, start_m, more_m = none + 1.0, offs_m * 0, offs_m * 0
    pairs = 1
    if offsets is not None:
        start_m = tl.load(offsets + safe_m)
        more_m = tl.load(offsets + safe_m + 1) - start_m
        share_m = 1.0 / (1.0 + more_m.to(tl.float32))
        pairs = 1 + tl.max(more_m)
    loss_m, d_scale_m = none, none
    soft_m, flat_m, soft_qq, flat_qq = none, none, none, none
    for step in range(0, pairs):
        live_m = mask_m & (step <= more_m)
        # rows with fewer pairs repeat their label's, with weight 0
        k = tl.where(live_m & (step > 0), M + start_m + step - 1, safe_m)
        s_k = scale * tl.load(similarity_LP + level * P + k)
        of_column, of_pair = nothing, of_rows
        if PQ:
            of_column = _merged(of.pq, level, N, tl.load(columns_P + k))
        if PP:
            of_pair = _merged(of.pp, level, P, k)
        whole = of_rows
        if JOINT:
            whole = _joined(of, of_rows, of_qq, of_column, of_pair)
        omega_k = tl.where(live_m, omega_m * share_m, 0.0)
        each_k = omega_k * PER_DIRECTION
        loss_k, slope_k = none, none
        if QP:
            loss, slope, soft, flat = _pair(s_k, of_rows, whole, each_k, smoothing, COPIES, JOINT)
            loss_k, slope_k = loss_k + loss, slope_k + slope
            soft_m, flat_m = soft_m + soft, flat_m + flat
        if QQ:
            loss, slope, soft, flat = _pair(s_k, of_qq, whole, each_k, smoothing, COPIES, JOINT)
            loss_k, slope_k = loss_k + loss, slope_k + slope
            soft_qq, flat_qq = soft_qq + soft, flat_qq + flat
        if PQ:
            loss, slope, soft, flat = _pair(s_k, of_column, whole, each_k, smoothing, COPIES, JOINT)
            loss_k, slope_k = loss_k + loss, slope_k + slope
            _keep_pull(outputs, level, P, k, live_m, soft, flat)
        if PP:
            loss, slope, soft, flat = _pair(s_k, of_pair, whole, each_k, smoothing, COPIES, JOINT)
            loss_k, slope_k = loss_k + loss, slope_k + slope
            if outputs.pp.lse is not None:
                _keep(outputs.pp, level, k, live_m, _lse(of_pair), soft, flat)
            d_scale_m += tl.where(live_m, _along_scale(of_pair, soft, flat), 0.0)
        loss_m += tl.where(live_m, share_m * loss_k / DIRECTIONS, 0.0)
        slope_k = omega_k * slope_k / DIRECTIONS
        d_scale_m += tl.where(live_m, slope_k * s_k, 0.0)
        _keep_slope(outputs, level, P, k, live_m, slope_k)

    tl.store(outputs.loss_LM + level * M + offs_m, weight * loss_m, mask=mask_m)
    if QP or QQ:
        _, _, _, _, _, top_m = of_rows if QP else of_qq
        rows_of_last = tl.where(level == len(LEVELS) - 1, M, 0)
        tl.store(outputs.hardest_M + offs_m, top_m / scale, mask=offs_m < rows_of_last)
    if outputs.d_scale_LM is not None:
        d_scale_m += _along_scale(of_rows, soft_m, flat_m) + _along_scale(of_qq, soft_qq, flat_qq)
        at = level * outputs.d_scale_stride + offs_m
        tl.store(outputs.d_scale_LM + at, d_scale_m / scale, mask=mask_m)
    if outputs.qq.lse is not None:
        _keep(outputs.qq, level, offs_m, mask_m, _lse(of_qq), soft_qq, flat_qq)
    factor_m = soft_m
    if outputs.factor_M is not None:
        soft_m = tl.where(factor_m != 0, 1.0, 0.0)
    if stored.exponentials is not None:
        gap_m = _lse(of_rows) - scale * tl.load(similarity_LP + safe_m)
        factor_m, soft_m = _finish_stored(
            stored, columns_P, gap_m, omega_m, factor_m, offs_m, safe_m, mask_m, D, BLOCK_D
        )
    if outputs.factor_M is not None:
        tl.store(outputs.factor_M + offs_m, factor_m, mask=mask_m)
    if outputs.qp.lse is not None:
        _keep(outputs.qp, level, offs_m, mask_m, _lse(of_rows), soft_m, flat_m)


@triton.jit(do_not_specialize=["N", "P", "d_scale_stride"])
def columns_kernel(
    of, columns_P, pull_LP, flat_LP, slopes, d_scale_LN, d_scale_stride, scale, N, P,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns a program, at one level: the sums over the pairs that have them."""
    level = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sums = _merged(of, level, N, tl.minimum(offs_n, N - 1))
    soft_n, flat_n = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        column_p = tl.load(columns_P + offs_p, mask=offs_p < P, other=-1)
        hit_pn = column_p[:, None] == offs_n[None, :]
        pull_p = tl.load(pull_LP + level * P + offs_p, mask=offs_p < P, other=0.0)
        soft_n += tl.sum(tl.where(hit_pn, pull_p[:, None], 0.0), 0)
        if flat_LP is not None:
            flat_p = tl.load(flat_LP + level * P + offs_p, mask=offs_p < P, other=0.0)
            flat_n += tl.sum(tl.where(hit_pn, flat_p[:, None], 0.0), 0)
    _keep(slopes, level, offs_n, mask_n, _lse(sums), soft_n, flat_n)
    if d_scale_LN is not None:
        at = level * d_scale_stride + offs_n
        tl.store(d_scale_LN + at, _along_scale(sums, soft_n, flat_n) / number(scale), mask=mask_n)


@triton.jit(do_not_specialize=["out_part", "out_parts", "R"])
def reduce_kernel(of, out, out_part, out_parts, R, BLOCK: tl.constexpr):
    """Many parts of a softmax to part `out_part` of `out`; one program BLOCK rows of a level."""
    level = tl.program_id(1)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < R
    top, z, zs, total, count, hardest = _merged(of, level, R, tl.minimum(offs, R - 1))
    to = (level * out_parts + out_part) * R + offs
    tl.store(out.top + to, top, mask=mask)
    tl.store(out.z + to, z, mask=mask)
    if out.zs is not None:
        tl.store(out.zs + to, zs, mask=mask)
    if out.sum is not None:
        tl.store(out.sum + to, total, mask=mask)
        tl.store(out.count + to, count, mask=mask)
    if out.hardest is not None:
        tl.store(out.hardest + to, hardest, mask=mask)


def reduce(parts: Partials, out: Partials, out_part: int = 0) -> Partials:
    """Sum the parts up to one part of `out`."""
    L, _, R = parts.top.shape
    reduce_kernel[(cdiv(R, BLOCK), L)](
        Softmax.of(parts), out, out_part, out.top.shape[1], R, BLOCK, **FUSION
    )
    return out
