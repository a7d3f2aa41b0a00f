"""Kernels of losses that are sums over pairs of the batch: tiles of scores become their gradients
and leave sums of their rows, which `settle` adds up.

    x = scale (s - s_positive) + bias,  less the same of a reference;  SigLIP has no s_positive
    loss = sum over open pairs of softplus(x) - smoothing x,  or max(0, 1 + x);  d loss / d s

R rows, N columns, D dims.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.rows import Scale, number
from rankpo_kernels.triton.scores import (
    LOG2E,
    closed,
    column_factors,
    column_parts,
    dots,
    guide_similarity,
    holds_closed,
    row_factors,
    rows_of,
    tile_at,
    tile_of,
)
from rankpo_kernels.triton.slopes import sigmoid, softplus

# What the slopes of a stored row of fp16 sum up to: 1/N of it is a normal number, twice it fits.
SUM = tl.constexpr(2.0**14)
BLOCK_R, BLOCK_P = 32, 16  # rows and tiles that `settle` loads at once


class Numbers(NamedTuple):
    """Of the loss."""

    scale: Scale
    bias: Scale
    smoothing: float | None  # None for 0
    weight: float
    sft_weight: float
    sft_scale: float


class Sums(NamedTuple):
    """Over the open pairs of a row in one tile, [tiles, R] each."""

    loss: Tensor
    slope: Tensor  # d loss / d s
    moment: Tensor | None  # slope * s, for the scale's gradient
    top: Tensor  # the largest s
    wins: Tensor
    total: Tensor

    @staticmethod
    def empty(tiles: int, R: int, moment: bool, device: torch.device) -> "Sums":
        new = lambda: torch.empty(tiles, R, dtype=torch.float32, device=device)  # noqa: E731
        return Sums(new(), new(), new() if moment else None, new(), new(), new())


class Outcome(NamedTuple):
    """Of rows, [R] each."""

    loss_R: Tensor
    hardest_R: Tensor
    wins_R: Tensor
    total_R: Tensor
    d_scale_R: Tensor | None
    d_bias_R: Tensor | None
    by_R: Tensor | None  # what stored rows were multiplied by
    factor_R: Tensor | None  # what is left to multiply them by


@triton.jit
def tiles_kernel(
    a, b, reference_a, reference_b, masks, sums, positive_R, reference_R, weights_R, by_R,
    inverse_top, out,
    numbers, R, N, out_stride,
    HINGE: tl.constexpr, SIGLIP: tl.constexpr, SFT: tl.constexpr,
    DIMS: tl.constexpr, REFERENCE_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: row sums and, with `out`, d total / d dot of its open pairs."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < R
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    r_mn = None
    if reference_a.x is not None:
        tl.static_assert(PARTS == 1)
        r_mn = guide_similarity(
            reference_a, reference_b, safe_m, safe_n, offs_n, offs_n < N,
            REFERENCE_DIMS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    rare = holds_closed(masks, first_m, first_n, R, N, False, BLOCK_M, BLOCK_N)
    rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
    dots_mn = dots(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), a.x, rows_a * a.stride, a.stride_d,
        b.x, rows_b * b.stride, b.stride_d, 0, DIMS, BLOCK_K, PRECISION,
    )  # fmt: skip
    loss_m = tl.zeros([BLOCK_M], tl.float32)
    slope_m, moment_m, wins_m, total_m = loss_m, loss_m, loss_m, loss_m
    top_m = loss_m - float("inf")
    parts = column_parts(dots_mn, BLOCK_M, BLOCK_N, PARTS)
    for part in tl.static_range(PARTS):
        at_n = first_n + part * WIDTH
        part_n = at_n + tl.arange(0, WIDTH)
        by_n = column_factors(b, part_n, part_n < N, 0)
        g_mn, loss, slope, moment, top, wins, total = pairs_of_part(
            parts[part] * by_n[None, :], r_mn, a, rows_a, masks, sums, positive_R, reference_R,
            numbers, safe_m, rare, first_m, at_n, R, N, HINGE, SIGLIP, SFT, BLOCK_M, WIDTH,
        )  # fmt: skip
        loss_m, slope_m, moment_m = loss_m + loss, slope_m + slope, moment_m + moment
        top_m, wins_m, total_m = tl.maximum(top_m, top), wins_m + wins, total_m + total
        if out is not None:
            g_mn *= out_factors(a, rows_a, weights_R, by_R, numbers, safe_m, SFT)[:, None]
            if inverse_top is not None:  # relative: row factors and the largest |b|^-1 come later
                by_n *= 1.0 / tl.load(inverse_top)
            g_mn *= by_n[None, :]
            out_mn = tile_at(out, pid_m, pid_n * PARTS + part, out_stride, BLOCK_M, WIDTH)
            store_mn = mask_m[:, None] & (part_n < out_stride)[None, :]
            tl.store(out_mn, g_mn.to(out.dtype.element_ty), mask=store_mn)
    at_m = pid_n * R + offs_m
    tl.store(sums.loss + at_m, loss_m, mask=mask_m)
    tl.store(sums.slope + at_m, slope_m, mask=mask_m)
    if sums.moment is not None:
        tl.store(sums.moment + at_m, moment_m, mask=mask_m)
    tl.store(sums.top + at_m, top_m, mask=mask_m)
    tl.store(sums.wins + at_m, wins_m, mask=mask_m)
    tl.store(sums.total + at_m, total_m, mask=mask_m)


@triton.constexpr_function
def _log1p(place):
    """Coefficients of log1p(e) / e over [0, 1], the highest power first: off by 3e-8 of it, by
    Remez' algorithm."""
    return (
        0.0052326880395412445, -0.029505213722586632, 0.07822591066360474, -0.13663242757320404,
        0.19106005132198334, -0.2484298199415207, 0.3331909775733948, -0.4999949336051941,
        0.9999999403953552,
    )[place]  # fmt: skip


@triton.jit
def softplus_and_sigmoid(x):
    """(softplus in units of log 2, sigmoid) of x in units of log 2, by two exponentials and no
    division: log sigmoid(x) = x - softplus(x)."""
    e = tl.exp2(-tl.abs(x))
    log1p = tl.full(x.shape, _log1p(0) * LOG2E, tl.float32)
    for place in tl.static_range(1, 9):
        log1p = log1p * e + _log1p(place) * LOG2E
    f = tl.maximum(x, 0.0) + log1p * e
    return f, tl.exp2(x - f)


@triton.jit
def pairs_of_part(
    u_mn, r_mn, a, rows_a, masks, sums, positive_R, reference_R, numbers, rows,
    rare, first_m, first_n, R, N,
    HINGE: tl.constexpr, SIGLIP: tl.constexpr, SFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(d loss / d s, 0 where closed, less weight * scale unless there is SFT; sums over rows) of
    u = s |a|. x and losses are in units of log 2 until they are summed, but for the hinge's."""
    UNIT: tl.constexpr = 1.0 if HINGE else LOG2E
    scale = number(numbers.scale)
    inverse_m, positive_m = row_factors(a, rows_a, 0), tl.load(positive_R + rows)
    # what x is scale times of is s, for SigLIP, or s - s_positive; less the same of the reference
    offset_m = tl.zeros_like(positive_m) + number(numbers.bias)
    if not SIGLIP:
        offset_m -= scale * positive_m
    if r_mn is not None:
        offset_m += scale * tl.load(reference_R + rows)
    x_mn = u_mn * (scale * UNIT * inverse_m)[:, None] + (offset_m * UNIT)[:, None]
    if r_mn is not None:
        x_mn -= scale * UNIT * r_mn
    if rare:
        x_mn = closed(x_mn, masks, first_m, first_n, R, N, False, BLOCK_M, BLOCK_N)
        open_mn = x_mn != -float("inf")
        top_m = tl.max(tl.where(open_mn, u_mn, -float("inf")), 1)
        top_m = tl.where(top_m == -float("inf"), top_m, top_m * inverse_m)
        wins_m = tl.sum(tl.where(open_mn & (x_mn < 0), 1.0, 0.0), 1)
        total_m = tl.sum(tl.where(open_mn, x_mn, 0.0), 1)
    else:
        top_m = tl.max(u_mn, 1) * inverse_m
        wins_m = tl.sum(tl.where(x_mn < 0, 1.0, 0.0), 1)
        total_m = tl.sum(x_mn, 1)
    if HINGE:
        f_mn = tl.where(x_mn <= -1.0, 0.0, 1.0 + x_mn)  # NaN stays NaN
        g_mn = tl.where(x_mn > -1.0, 1.0, 0.0)
    else:
        f_mn, g_mn = softplus_and_sigmoid(x_mn)
        if numbers.smoothing is not None:
            open_mn = x_mn != -float("inf")
            f_mn = tl.where(open_mn, f_mn - numbers.smoothing * x_mn, 0.0)
            g_mn = tl.where(open_mn, g_mn - numbers.smoothing, 0.0)
    by = numbers.weight * scale  # of all slopes, so of their sums
    loss_m = tl.sum(f_mn, 1) * (numbers.weight / UNIT)
    if SFT:
        y_mn = u_mn * (inverse_m * (numbers.sft_scale * LOG2E))[:, None]
        y_mn -= (positive_m * (numbers.sft_scale * LOG2E))[:, None]
        y_mn = tl.where(x_mn == -float("inf"), -float("inf"), y_mn)
        sft_mn, slope_mn = softplus_and_sigmoid(y_mn)
        loss_m += tl.sum(sft_mn, 1) * (numbers.sft_weight / LOG2E)
        g_mn = by * g_mn + numbers.sft_weight * numbers.sft_scale * slope_mn
        by = 1.0
    slope_m = tl.sum(g_mn, 1) * by
    moment_m = tl.zeros_like(slope_m)
    if sums.moment is not None:  # a closed pair's g is 0
        moment_m = tl.sum(g_mn * u_mn, 1) * (by * inverse_m)
    return g_mn, loss_m, slope_m, moment_m, top_m, wins_m, total_m / UNIT


@triton.jit
def out_factors(a, rows_a, weights_R, by_R, numbers, rows, SFT: tl.constexpr):
    """[BLOCK_M]: of slopes on their way out."""
    by_m = tl.full(rows.shape, 1.0, tl.float32)
    if not SFT:
        by_m *= numbers.weight * number(numbers.scale)
    if by_R is not None:
        return by_m * tl.load(by_R + rows)
    else:
        by_m *= tl.load(weights_R + rows)
        if a.inverse_L is not None:
            by_m *= tl.load(a.inverse_L + rows_a)
        return by_m


@triton.jit(do_not_specialize=["n_parts", "N"])
def settle_kernel(
    sums, outcome, label_R, positive_R, weights_R, inverse_q, inverse_p, inverse_top, out,
    numbers, n_parts, R, N, out_stride,
    SIGLIP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows a program: what the tiles left, in one order, and the elements of the labels."""
    scale, bias = number(numbers.scale), number(numbers.bias)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    safe_r = tl.minimum(offs_r, R - 1)
    # several parts are loaded at once, and summed up at the end
    loss_pr = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    slope_pr, moment_pr, wins_pr, total_pr = loss_pr, loss_pr, loss_pr, loss_pr
    top_pr = loss_pr - float("inf")
    for start in range(0, n_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        at_pr = offs_p[:, None] * R + offs_r[None, :]
        mask_pr = (offs_p < n_parts)[:, None] & mask_r[None, :]
        loss_pr += tl.load(sums.loss + at_pr, mask=mask_pr, other=0.0)
        slope_pr += tl.load(sums.slope + at_pr, mask=mask_pr, other=0.0)
        wins_pr += tl.load(sums.wins + at_pr, mask=mask_pr, other=0.0)
        total_pr += tl.load(sums.total + at_pr, mask=mask_pr, other=0.0)
        part_pr = tl.load(sums.top + at_pr, mask=mask_pr, other=-float("inf"))
        top_pr = tl.maximum(top_pr, part_pr)
        if sums.moment is not None:
            moment_pr += tl.load(sums.moment + at_pr, mask=mask_pr, other=0.0)
    loss_r, slope_r, moment_r = tl.sum(loss_pr, 0), tl.sum(slope_pr, 0), tl.sum(moment_pr, 0)
    wins_r, total_r, top_r = tl.sum(wins_pr, 0), tl.sum(total_pr, 0), tl.max(top_pr, 0)
    positive_r = tl.load(positive_R + safe_r)
    element_r = -slope_r
    if SIGLIP:
        z_r = -(scale * positive_r + bias)
        loss_r += softplus(z_r)
        element_r = -scale * sigmoid(z_r)
    tl.store(outcome.loss_R + offs_r, loss_r, mask=mask_r)
    tl.store(outcome.hardest_R + offs_r, top_r, mask=mask_r)
    tl.store(outcome.wins_R + offs_r, wins_r, mask=mask_r)
    tl.store(outcome.total_R + offs_r, total_r, mask=mask_r)
    if weights_R is not None:
        weight_r = tl.load(weights_R + safe_r)
        if outcome.d_scale_R is not None:
            d_scale_r = weight_r * (moment_r + element_r * positive_r) / scale
            tl.store(outcome.d_scale_R + offs_r, d_scale_r, mask=mask_r)
        if outcome.d_bias_R is not None:
            d_bias_r = weight_r * (slope_r + element_r) / scale
            tl.store(outcome.d_bias_R + offs_r, d_bias_r, mask=mask_r)
        label_r = tl.load(label_R + safe_r)
        if outcome.by_R is not None:
            # at least half the sum of the slopes' sizes: each is above -smoothing
            size_r = tl.where(tl.abs(slope_r) > tl.abs(element_r), slope_r, element_r)
            size_r = tl.abs(size_r)
            if numbers.smoothing is not None:
                size_r += numbers.smoothing * numbers.weight * scale * N
            by_r = 1.0 / tl.where(size_r < 1e-30, 1e-30, size_r) * SUM  # NaN stays NaN
            tl.store(outcome.by_R + offs_r, by_r, mask=mask_r)
            tl.store(outcome.factor_R + offs_r, weight_r / by_r, mask=mask_r)
            element_r *= by_r
            if inverse_p is not None:
                element_r *= tl.load(inverse_p + label_r) / tl.load(inverse_top)
        else:
            element_r *= weight_r
            if inverse_p is not None:
                element_r *= tl.load(inverse_q + safe_r) * tl.load(inverse_p + label_r)
        if out is not None:
            at_r = out + offs_r.to(tl.int64) * out_stride + label_r
            tl.store(at_r, element_r.to(out.dtype.element_ty), mask=mask_r)
