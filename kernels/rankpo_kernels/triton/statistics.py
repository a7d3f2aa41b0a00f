"""Sums of the softmax over tiles of scores, never stored whole.

    per row (or column)    logsumexp, softmax mean, top of the unmasked scores
    stored                 besides, exp(s - s_positive + SHIFT) of every pair

Along the rows of query_to_passage hardness adds its share of the similarity to the scores, in
exponentials alone.

R rows of A, N rows of B (columns of S), L prefixes of D (DIMS).
"""

import triton
import triton.language as tl

from rankpo_kernels.triton.rows import number
from rankpo_kernels.triton.scores import (
    LN2,
    LOG2E,
    column_factors,
    column_parts,
    dots,
    finite,
    guide_similarity,
    holds_closed,
    rows_of,
    scores,
    tile_at,
    tile_of,
)

# exp(s - s_positive + SHIFT) is stored; bf16 has fp32's range, e^+-87: rows of gaps below 35 fit,
# and their e^-65 beside weights too
SHIFT = tl.constexpr(30.0)


@triton.jit
def beside_positive(top_m, positive_R, scale, offs_m, mask_m):
    """[BLOCK_M]: what turns exp2(t - top) into exp(s - s_positive + SHIFT). A tile far below the
    row's largest score may underflow: it is nothing beside it."""
    positive_m = tl.load(positive_R + offs_m, mask=mask_m, other=0.0)
    by_m = tl.exp2(top_m - (scale * positive_m - SHIFT) * LOG2E)
    return tl.where(top_m == -float("inf"), 0.0, by_m)


@triton.jit
def weighted_sums(e_mn, t_mn, beside, partials, AXIS: tl.constexpr):
    """(sum of e t, of t, number of t) of open pairs along an axis, 0 where nobody reads them;
    `beside` is near the largest t. In units of log 2."""
    expand = beside[:, None] if AXIS == 1 else beside[None, :]
    zs, total, count = tl.zeros_like(beside), tl.zeros_like(beside), tl.zeros_like(beside)
    if partials.zs is not None:
        # -inf times exp(-inf) would be NaN; where this cuts off the exponential is 0
        under_mn = tl.maximum(t_mn - expand, -1e4, propagate_nan=tl.PropagateNan.ALL)
        zs = tl.sum(e_mn * under_mn, AXIS) + tl.sum(e_mn, AXIS) * beside
    if partials.sum is not None:
        open_mn = t_mn != -float("inf")
        total = tl.sum(tl.where(open_mn, t_mn, 0.0), AXIS)
        count = tl.sum(open_mn.to(tl.float32), AXIS)
    return zs, total, count


@triton.jit
def keep_sums(partials, at, top, z, zs, total, count, mask):
    """Store them, scores in their own units."""
    tl.store(partials.top + at, top * LN2, mask=mask)
    tl.store(partials.z + at, z, mask=mask)
    if partials.zs is not None:
        tl.store(partials.zs + at, zs * LN2, mask=mask)
    if partials.sum is not None:
        tl.store(partials.sum + at, total * LN2, mask=mask)
        tl.store(partials.count + at, count, mask=mask)


@triton.jit
def column_sums(t_mn, columns, at, mask_n):
    top_n = tl.max(t_mn, 0)
    e_mn = tl.exp2(t_mn - finite(top_n)[None, :])
    zs_n, total_n, count_n = weighted_sums(e_mn, t_mn, finite(top_n), columns, 0)
    keep_sums(columns, at, top_n, tl.sum(e_mn, 0), zs_n, total_n, count_n, mask_n)


@triton.jit
def statistics_kernel(
    a, b, guide_a, guide_b, masks, hardness, rows, columns, positive_R, inverse_top, stored,
    scale, R, N, stored_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: partial statistics along rows and columns; `stored` keeps
    exp(s - s_positive + SHIFT) |b|-wise scaled, for gradients that need no second pass."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    scale = number(scale)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    judge_mn = None
    if guide_a.x is not None:
        tl.static_assert(PARTS == 1)
        judge_mn = guide_similarity(
            guide_a, guide_b, safe_m, safe_n, offs_n, mask_n,
            GUIDE_DIMS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    rare = holds_closed(masks, first_m, first_n, R, N, columns.top is not None, BLOCK_M, BLOCK_N)
    rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
    dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for level in range(len(DIMS)):  # not unrolled: that would take the registers of all levels
        dots_mn = dots(
            dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
            level, DIMS, BLOCK_K, PRECISION,
        )  # fmt: skip
        parts = column_parts(dots_mn, BLOCK_M, BLOCK_N, PARTS)
        t, h = (), ()  # scores of the parts, and with hardness
        top_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        hardest_m = top_m
        for part in tl.static_range(PARTS):
            at_n = first_n + part * WIDTH
            t_mn, h_mn = scores(
                parts[part], judge_mn, a, rows_a, b, masks, hardness, scale, level,
                rare, first_m, at_n, R, N, CURATED, columns.top is not None, BLOCK_M, WIDTH,
            )  # fmt: skip
            part_n = at_n + tl.arange(0, WIDTH)
            if columns.top is not None:
                at = (level * tiles_m + pid_m) * N + part_n
                column_sums(t_mn, columns, at, part_n < N)
            if hardness.other is not None:
                hardest_m = tl.maximum(hardest_m, tl.max(t_mn, 1))
            top_m = tl.maximum(top_m, tl.max(h_mn, 1))
            t, h = t + (t_mn,), h + (h_mn,)  # type: ignore[assignment]
        if rows.top is not None:
            beside_m = finite(top_m)
            z_m = tl.zeros([BLOCK_M], tl.float32)
            zs_m, total_m, count_m = z_m, z_m, z_m
            if stored is not None:
                by_m = beside_positive(top_m, positive_R, scale, safe_m, mask_m)
            for part in tl.static_range(PARTS):
                e_mn = tl.exp2(h[part] - beside_m[:, None])
                zs, total, count = weighted_sums(e_mn, t[part], beside_m, rows, 1)
                z_m, zs_m = z_m + tl.sum(e_mn, 1), zs_m + zs
                total_m, count_m = total_m + total, count_m + count
                if stored is not None:
                    e_mn *= by_m[:, None]
                    part_n = first_n + part * WIDTH + tl.arange(0, WIDTH)
                    if b.inverse_L is not None:
                        # loaded again: so many registers less in between
                        by_n = column_factors(b, part_n, part_n < N, level)
                        e_mn *= (by_n * (1.0 / tl.load(inverse_top)))[None, :]
                    to_mn = tile_at(
                        stored, pid_m, pid_n * PARTS + part, stored_stride, BLOCK_M, WIDTH
                    )
                    write_mn = mask_m[:, None] & (part_n < stored_stride)[None, :]
                    tl.store(to_mn, e_mn.to(stored.dtype.element_ty), mask=write_mn)  # 0 past N
            at = (level * tiles_n + pid_n) * R + offs_m
            keep_sums(rows, at, top_m, z_m, zs_m, total_m, count_m, mask_m)
            if hardness.other is not None:
                tl.store(rows.hardest + at, hardest_m * LN2, mask=mask_m)
