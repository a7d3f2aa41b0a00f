"""Gradients of tiles of scores, and the elements of labels and further positives.

    G_ij = scale / (|a_i| |b_j|) * (soft_i exp(s_ij - lse_i) - flat_i, + the same of column j)

R rows of A, N rows of B (columns of S), L prefixes of D (DIMS).
"""

import triton
import triton.language as tl

from rankpo_kernels.triton.rows import number
from rankpo_kernels.triton.scores import (
    LOG2E,
    column_factors,
    column_parts,
    dots,
    finite,
    guide_similarity,
    holds_closed,
    row_factors,
    rows_of,
    scores,
    tile_at,
    tile_of,
)


@triton.jit
def softmax_slopes(t_mn, slopes, at, mask, AXIS: tl.constexpr):
    """soft exp2(t - lse) - flat: d total / d s of scores t in units of log 2, 0 where they are -inf
    but for `flat`."""
    other: tl.constexpr = None if mask is None else 0.0
    # -inf of a row without negatives beside closed pairs would be NaN
    lse = finite(tl.load(slopes.lse + at, mask=mask, other=other)) * LOG2E
    soft = tl.load(slopes.soft + at, mask=mask, other=other)
    if AXIS == 1:
        g_mn = soft[:, None] * tl.exp2(t_mn - lse[:, None])
    else:
        g_mn = soft[None, :] * tl.exp2(t_mn - lse[None, :])
    if slopes.flat is not None:
        flat = tl.load(slopes.flat + at, mask=mask, other=other)
        g_mn -= flat[:, None] if AXIS == 1 else flat[None, :]
    return g_mn


@triton.jit
def with_labels(g_mn, label_slope_R, masks, rows, first_n, BLOCK_N: tl.constexpr):
    """g with the elements of the labels, in tiles that hold one."""
    label_m = tl.load(masks.label_R + rows).to(tl.int32)
    here_m = (label_m >= first_n) & (label_m < first_n + BLOCK_N)
    if tl.max(here_m.to(tl.int32), 0) > 0:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        slope_m = tl.load(label_slope_R + rows)
        g_mn = tl.where(label_m[:, None] == offs_n[None, :], slope_m[:, None], g_mn)
    return g_mn


@triton.jit
def write_labels(
    out, label_slope_R, by_m, masks, b, inverse_top, level, rows, write_m,
    pid_m, pid_n, out_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The elements of the labels, behind the tile's own store: in the tile they would take as many
    registers as the gradients."""
    first_n = pid_n * BLOCK_N
    label_m = tl.load(masks.label_R + rows).to(tl.int32)
    here_m = (label_m >= first_n) & (label_m < first_n + BLOCK_N) & write_m
    tl.debug_barrier()
    slope_m = tl.load(label_slope_R + rows) * by_m
    if b.inverse_L is not None:
        inverse = b.inverse_L + level * b.inverse_stride + label_m
        inverse_m = tl.load(inverse, mask=here_m, other=0.0)
        if inverse_top is not None:
            inverse_m *= 1.0 / tl.load(inverse_top)
        slope_m *= inverse_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    at_m = out + offs_m.to(tl.int64) * out_stride + label_m
    tl.store(at_m, slope_m.to(out.dtype.element_ty), mask=here_m)


@triton.jit
def gradients_of_tile(
    a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR, inverse_top,
    out, along_rows, along_columns,
    scale, pid_m, pid_n, write_m, R, N, out_stride, level_stride, label_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write d total / d dot of the rows `write_m`, at each level the sum over it and longer
    prefixes."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
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
    rare = holds_closed(masks, first_m, first_n, R, N, False, BLOCK_M, BLOCK_N)
    rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
    dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for level in range(len(DIMS)):
        dots_mn = dots(
            dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
            level, DIMS, BLOCK_K, PRECISION,
        )  # fmt: skip
        to = out + tl.cast(level, tl.int64) * level_stride
        by_m = row_factors(a, rows_a, level) * scale
        if inverse_top is not None:  # relative: row factors and the largest |b|^-1 come later
            by_m = tl.full([BLOCK_M], 1.0, tl.float32)
        along_m = tl.zeros([BLOCK_M], tl.float32)
        parts = column_parts(dots_mn, BLOCK_M, BLOCK_N, PARTS)
        for part in tl.static_range(PARTS):
            at_n = first_n + part * WIDTH
            part_n = at_n + tl.arange(0, WIDTH)
            t_mn, h_mn = scores(
                parts[part], judge_mn, a, rows_a, b, masks, hardness, scale, level,
                rare, first_m, at_n, R, N, CURATED, False, BLOCK_M, WIDTH,
            )  # fmt: skip
            g_mn = tl.zeros_like(t_mn)  # d total / d s; of blocks that hold positives alone
            if row_slopes.lse is not None:
                at = level * row_slopes.stride + safe_m
                g_mn = softmax_slopes(h_mn, row_slopes, at, None, 1)
            if column_slopes.lse is not None:
                at = level * column_slopes.stride + part_n
                of_columns_mn = softmax_slopes(t_mn, column_slopes, at, part_n < N, 0)
                g_mn = of_columns_mn if row_slopes.lse is None else g_mn + of_columns_mn
            if row_slopes.flat is not None or column_slopes.flat is not None:
                g_mn = tl.where(t_mn == -float("inf"), 0.0, g_mn)
            if label_slope_LR is not None and along_rows is not None:
                slope_R = label_slope_LR + level * label_stride
                g_mn = with_labels(g_mn, slope_R, masks, safe_m, at_n, WIDTH)
            g_mn *= by_m[:, None]
            by_n = column_factors(b, part_n, part_n < N, level)
            if inverse_top is not None:
                by_n *= 1.0 / tl.load(inverse_top)
            g_mn *= by_n[None, :]
            rounded_mn = g_mn.to(out.dtype.element_ty)
            # rows are padded to their stride with zeros: whole vectors leave, and come back
            write_mn = write_m[:, None] & (part_n < out_stride)[None, :]
            out_mn = tile_at(to, pid_m, pid_n * PARTS + part, out_stride, BLOCK_M, WIDTH)
            tl.store(out_mn, rounded_mn, mask=write_mn)
            if along_rows is not None:
                # what the products will have along their rows, as it is rounded
                along_mn = rounded_mn.to(tl.float32) * parts[part]
                along_mn = tl.where(write_mn, along_mn, 0.0)
                along_m += tl.sum(along_mn, 1)
                at = (level * tiles_m + pid_m) * N + part_n
                tl.store(along_columns + at, tl.sum(along_mn, 0), mask=part_n < N)
        if along_rows is not None:
            tl.store(along_rows + (level * tiles_n + pid_n) * R + offs_m, along_m, mask=mask_m)
        elif label_slope_LR is not None:  # noqa: SIM102  a condition of compile time
            if rare:
                slope_R = label_slope_LR + level * label_stride
                write_labels(
                    to, slope_R, by_m, masks, b, inverse_top, level, safe_m, write_m,
                    pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    if len(DIMS) > 1:
        # A block of dims takes part in every prefix from its own on.
        tl.static_assert(PARTS == 1)
        tl.debug_barrier()
        write_mn = write_m[:, None] & (offs_n < out_stride)[None, :]
        past = out + len(DIMS) * tl.cast(level_stride, tl.int64)
        out_mn = tile_at(past, pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N)
        sum_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(len(DIMS)):
            out_mn -= level_stride
            sum_mn += tl.load(out_mn, mask=write_mn, other=0.0).to(tl.float32)
            tl.store(out_mn, sum_mn.to(out.dtype.element_ty), mask=write_mn)


@triton.jit
def gradients_kernel(
    a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR, inverse_top,
    out, along_rows, along_columns,
    scale, R, N, out_stride, level_stride, label_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of gradients a program."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    gradients_of_tile(
        a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR,
        inverse_top, out, along_rows, along_columns,
        number(scale), pid_m, pid_n, offs_m < R, R, N, out_stride, level_stride, label_stride,
        DIMS, GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
    )  # fmt: skip


@triton.jit
def rest_kernel(
    a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR, inverse_top,
    rest_R, out,
    scale, R, N, out_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tiles of BLOCK_M rows a program: of those rows whose `rest_R` is negative; without it, of
    those that have a slope, which `stored` exponentials could not hold. Mostly there are none."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if rest_R is None:
        rest_m = tl.load(row_slopes.soft + offs_m, mask=offs_m < R, other=0.0) != 0
    else:
        rest_m = tl.load(rest_R + offs_m, mask=offs_m < R, other=0.0) < 0
    if tl.max(rest_m.to(tl.int32), 0) > 0:
        for pid_n in range(0, tl.cdiv(N, BLOCK_N)):
            gradients_of_tile(
                a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR,
                inverse_top, out, None, None,
                number(scale), pid_m, pid_n, rest_m, R, N, out_stride, 0, 0,
                DIMS, GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "R", "K"])
def scatter_kernel(
    out, rows_K, columns_K, values_LK, first_row, R, K, out_stride, level_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[l, row - first_row, column] = value, for the pairs whose row is in this chunk."""
    level = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_K + offs, mask=offs < K, other=-1) - first_row
    column = tl.load(columns_K + offs, mask=offs < K, other=0)
    value = tl.load(values_LK + level * K + offs, mask=offs < K, other=0.0)
    to = out + level * level_stride + row * out_stride + column
    tl.store(to, value.to(out.dtype.element_ty), mask=(row >= 0) & (row < R))
