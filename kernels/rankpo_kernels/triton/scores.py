"""Score kernels: tiles of S = scale * A B' / (|a| |b|), summed up or turned into gradients, never
stored whole.

    statistics   per row (or column): logsumexp, softmax mean, top of the unmasked scores
    gradients    G_ij = scale / (|a_i| |b_j|) * (soft_i exp(s_ij - lse_i) - flat_i, + the same of j)

Both recompute a tile by `dots` and `similarity`, so a mask is decided by the same arithmetic in
both. What is no negative of row i: a column whose keys hold the row's class, or one whose
similarity (or a guide's) lies above the row's limit and that was not curated for the row. Along the
rows of query_to_passage hardness adds its share of the similarity to the scores, in exponentials
alone.

R rows of A, N rows of B (columns of S), D dims, L prefixes of D (DIMS), W walks over a row's tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels import relations
from rankpo_kernels.relations import Known
from rankpo_kernels.triton.rows import number

EXEMPT, MASKED = 1, 2  # what a passage that was curated for the row is
APART = tl.constexpr(relations.APART)


class Side(NamedTuple):
    """Rows of one side of the scores; `index` picks them from the tensors, None takes all."""

    x: Tensor
    stride: int
    stride_d: int
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody asks
    inverse_L: Tensor | None  # [L, rows of x], or none
    inverse_stride: int


class Masks(NamedTuple):
    """Per row: label, class, limit, id; per column: range of keys, owner. None where not used."""

    label_R: Tensor | None  # its column is no negative; with `keys` it is among them
    class_R: Tensor | None
    start_N: Tensor | None
    stop_N: Tensor | None
    keys: Tensor | None
    limit_LR: Tensor | None
    limit_stride: int
    id_R: Tensor | None
    owner_N: Tensor | None

    @staticmethod
    def of(
        label_R: Tensor | None, known: Known | None, limit_LR: Tensor | None,
        id_R: Tensor | None, owner_N: Tensor | None,
    ) -> "Masks":  # fmt: skip
        """Of all rows, whose classes are those of `known`."""
        masks = Masks(label_R, None, None, None, None, limit_LR, 0, id_R, owner_N)
        if known is None:
            return masks
        return masks._replace(
            class_R=known.class_M, start_N=known.start_N, stop_N=known.stop_N, keys=known.keys
        )


class Hardness(NamedTuple):
    """What is added to a score per similarity: of columns that were curated for the row, of others;
    without owners it is `other` for all."""

    chosen: float
    other: float


class Partials(NamedTuple):
    """Of the softmax over a part of a row (or column): [L, parts, rows] each."""

    top: Tensor
    z: Tensor  # sum of exp(s - top)
    zs: Tensor | None  # sum of exp(s - top) * s, for the scale's gradient
    sum: Tensor | None  # of s, for label smoothing
    count: Tensor | None  # type: ignore[assignment]  # as above, tuple.count
    hardest: Tensor | None  # largest s where, with hardness, top is not it


class Slopes(NamedTuple):
    """Of rows or columns, [L, rows] each: soft * exp(s - lse) - flat."""

    lse: Tensor
    soft: Tensor
    flat: Tensor | None
    stride: int


@triton.constexpr_function
def _whole(dims, block):
    """Whether no block of dims needs a mask."""
    return all(dim % block == 0 for dim in dims)


@triton.jit
def dots(
    acc, a, a_row, stride_ad, b, b_row, stride_bd, level, DIMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] += A B' over the dims that the prefix of this level adds."""
    first, last = 0, DIMS[0]
    for longer in tl.static_range(1, len(DIMS)):
        first = tl.where(level == longer, DIMS[longer - 1], first)
        last = tl.where(level == longer, DIMS[longer], last)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a_mk = a + a_row[:, None] + offs_k[None, :] * stride_ad
        b_nk = b + b_row[:, None] + offs_k[None, :] * stride_bd
        if _whole(DIMS, BLOCK_K):
            x_mk = tl.load(a_mk)  # [BLOCK_M, BLOCK_K]
            y_nk = tl.load(b_nk)  # [BLOCK_N, BLOCK_K]
        else:
            x_mk = tl.load(a_mk, mask=offs_k[None, :] < last, other=0.0)
            y_nk = tl.load(b_nk, mask=offs_k[None, :] < last, other=0.0)
        # fp32 stays fp32: tf32 is 4e-2 off at temperature 0.01
        acc = tl.dot(x_mk, tl.trans(y_nk), acc, input_precision="ieee")
    return acc


@triton.jit
def rows_of(side, offs):
    """Where the rows start, in elements of x."""
    if side.index is not None:
        offs = tl.load(side.index + offs)
    return offs.to(tl.int64)


@triton.jit
def similarity(acc, a, rows, b, columns, level):
    """Dot products to cosines; left as they are without norms."""
    if a.inverse_L is not None:
        inverse_m = tl.load(a.inverse_L + level * a.inverse_stride + rows)
        inverse_n = tl.load(b.inverse_L + level * b.inverse_stride + columns)
        acc = acc * inverse_m[:, None] * inverse_n[None, :]
    return acc


@triton.jit
def _judged(open_mn, judge_mn, masks, offs_m, offs_n, level, CURATED: tl.constexpr):
    """What remains open once pairs above the row's limit are closed, and curated ones treated."""
    if masks.limit_LR is not None:
        limit_m = tl.load(masks.limit_LR + level * masks.limit_stride + offs_m)
        close_mn = judge_mn > limit_m[:, None]
        if CURATED == 1:
            owner_n = tl.load(masks.owner_N + offs_n)
            id_m = tl.load(masks.id_R + offs_m)
            close_mn = close_mn & (id_m[:, None] != owner_n[None, :])
        open_mn = open_mn & ~close_mn
    if CURATED == 2:
        owner_n = tl.load(masks.owner_N + offs_n)
        id_m = tl.load(masks.id_R + offs_m)
        open_mn = open_mn & (id_m[:, None] != owner_n[None, :]) & (owner_n != APART)[None, :]
    return open_mn


@triton.jit
def _hardened(s_mn, similarity_mn, hardness, masks, offs_m, offs_n):
    """The scores along rows."""
    if hardness.other is not None:
        by = hardness.other
        if masks.owner_N is not None:
            id_m, owner_n = tl.load(masks.id_R + offs_m), tl.load(masks.owner_N + offs_n)
            mine_mn = id_m[:, None] == owner_n[None, :]
            by = tl.where(mine_mn, hardness.chosen, hardness.other)
        s_mn += by * similarity_mn
    return s_mn


@triton.jit
def unrelated(
    masks, guide_a, guide_b, offs_m, offs_n,
    GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: neither the label nor known to the row, nor found close by a guide."""
    open_mn = tl.full([BLOCK_M, BLOCK_N], 1, tl.int1)
    if masks.label_R is not None:
        open_mn = open_mn & (tl.load(masks.label_R + offs_m)[:, None] != offs_n[None, :])
    if masks.keys is not None:
        class_m = tl.load(masks.class_R + offs_m)
        start_n = tl.load(masks.start_N + offs_n)
        stop_n = tl.load(masks.stop_N + offs_n)
        # mostly none or one: a passage is a positive of few texts
        for step in range(0, tl.max(stop_n - start_n)):
            at_n = start_n + step
            key_n = tl.load(masks.keys + at_n, mask=at_n < stop_n, other=0)
            same_mn = class_m[:, None] == key_n[None, :]
            open_mn = open_mn & ~(same_mn & (at_n < stop_n)[None, :])
    if guide_a.x is not None:
        rows_a, rows_b = rows_of(guide_a, offs_m), rows_of(guide_b, offs_n)
        judge_mn = dots(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), guide_a.x, rows_a * guide_a.stride,
            guide_a.stride_d, guide_b.x, rows_b * guide_b.stride, guide_b.stride_d,
            0, GUIDE_DIMS, BLOCK_K,
        )  # fmt: skip
        judge_mn = similarity(judge_mn, guide_a, rows_a, guide_b, rows_b, 0)
        open_mn = _judged(open_mn, judge_mn, masks, offs_m, offs_n, 0, CURATED)
    return open_mn


@triton.jit
def _part(s_mn, hard_mn, open_mn, partials, at, AXIS: tl.constexpr, mask):
    """Store the partial statistics of a tile along an axis, at offset `at` of each array; returns
    the largest scores and the exponentials beside them, 0 where closed. `hard_mn`: with hardness.
    """
    if partials.hardest is not None:
        hardest = tl.max(tl.where(open_mn, s_mn, -float("inf")), AXIS)
        tl.store(partials.hardest + at, hardest, mask=mask)
    masked_mn = tl.where(open_mn, hard_mn, -float("inf"))
    top = tl.max(masked_mn, AXIS)
    floor = tl.where(top == -float("inf"), 0.0, top)  # nothing is open: exp(-inf - 0) = 0
    e_mn = tl.exp(masked_mn - (floor[:, None] if AXIS == 1 else floor[None, :]))
    tl.store(partials.top + at, top, mask=mask)
    tl.store(partials.z + at, tl.sum(e_mn, AXIS), mask=mask)
    if partials.zs is not None:
        tl.store(partials.zs + at, tl.sum(tl.where(open_mn, e_mn * s_mn, 0.0), AXIS), mask=mask)
    if partials.sum is not None:
        tl.store(partials.sum + at, tl.sum(tl.where(open_mn, s_mn, 0.0), AXIS), mask=mask)
        tl.store(partials.count + at, tl.sum(open_mn.to(tl.float32), AXIS), mask=mask)
    return top, e_mn


# exp(s - s_positive + SHIFT) is stored; bf16 has fp32's range, e^+-87: rows of gaps below 35 fit,
# and their e^-65 beside weights too
SHIFT = tl.constexpr(30.0)


@triton.jit
def tile_of(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Programs in groups of GROUP tiles of rows, so that those that run together share columns."""
    pid = tl.program_id(0)
    in_group = GROUP * tiles_n
    first_m = pid // in_group * GROUP
    group = min(tiles_m - first_m, GROUP)
    return first_m + pid % in_group % group, pid % in_group // group


@triton.jit
def tile_at(out, pid_m, pid_n, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers of a tile: one in 64 bits, offsets from it in 32."""
    out += (pid_m * BLOCK_M).to(tl.int64) * stride + pid_n * BLOCK_N
    return out + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def statistics_kernel(
    a, b, guide_a, guide_b, masks, hardness, rows, columns, positive_R, inverse_top, stored,
    scale, R, N, stored_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: partial statistics along rows and columns; `stored` keeps
    exp(s - s_positive + SHIFT) |b|-wise scaled, for gradients that need no second pass."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tiles_m, tiles_n, GROUP)
    scale = number(scale)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    open_mn = unrelated(
        masks, guide_a, guide_b, safe_m, safe_n,
        GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
    dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for level in range(len(DIMS)):  # not unrolled: that would take the registers of all levels
        dots_mn = dots(
            dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
            level, DIMS, BLOCK_K,
        )  # fmt: skip
        similarity_mn = similarity(dots_mn, a, rows_a, b, rows_b, level)
        left_mn = open_mn
        if guide_a.x is None:
            left_mn = _judged(open_mn, similarity_mn, masks, safe_m, safe_n, level, CURATED)
        s_mn = scale * similarity_mn
        if rows.top is not None:
            at = (level * tiles_n + pid_n) * R + offs_m
            hard_mn = _hardened(s_mn, similarity_mn, hardness, masks, safe_m, safe_n)
            top_m, e_mn = _part(s_mn, hard_mn, left_mn & mask_n[None, :], rows, at, 1, mask_m)
            if stored is not None:
                # a tile far below the row's largest score may underflow: it is nothing beside it
                by_m = tl.exp(top_m - scale * tl.load(positive_R + safe_m) + SHIFT)
                if b.inverse_L is not None:
                    relative_n = tl.load(b.inverse_L + rows_b) * (1.0 / tl.load(inverse_top))
                    e_mn *= relative_n[None, :]
                e_mn *= tl.where(top_m == -float("inf"), 0.0, by_m)[:, None]
                to_mn = tile_at(stored, pid_m, pid_n, stored_stride, BLOCK_M, BLOCK_N)
                e_mn = e_mn.to(stored.dtype.element_ty)  # 0 past N
                tl.store(to_mn, e_mn, mask=mask_m[:, None] & (offs_n < stored_stride)[None, :])
        if columns.top is not None:
            at = (level * tiles_m + pid_m) * N + offs_n
            _part(s_mn, s_mn, left_mn & mask_m[:, None], columns, at, 0, mask_n)


@triton.jit
def _heavy(
    row_slopes, tile_parts, masks, pid_n, rows, R, filter_mass, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Rows with a pull of which the tile of columns holds the label, or more of the softmax's mass
    than may be left out."""
    at_m = pid_n * R + rows
    lse_m, pulls_m = tl.load(row_slopes.lse + rows), tl.load(row_slopes.soft + rows) != 0
    mass_m = tl.load(tile_parts.z + at_m) * tl.exp(tl.load(tile_parts.top + at_m) - lse_m)
    holds_label = tl.load(masks.label_R + rows) // BLOCK_N == pid_n
    # NaN compares false and must not be filtered away
    return (((mass_m > filter_mass) | holds_label) & pulls_m) | (mass_m != mass_m)


@triton.jit
def gradients_kernel(
    a, b, guide_a, guide_b, masks, hardness, row_slopes, column_slopes, label_slope_LR, inverse_top,
    tile_parts, live, out, along_rows, along_columns,
    scale, filter_mass, R, N, out_stride, level_stride, label_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr, ONLY_OVER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of d total / d dot a program, at each level the sum over it and longer prefixes.

    ONLY_OVER: only rows with a slope, those that `stored` exponentials could not hold.
    live: tiles without any row of mass above filter_mass are marked 0 and left unwritten.
    """
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tiles_m, tiles_n, GROUP)
    scale = number(scale)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)

    write_m = mask_m
    work = True
    if ONLY_OVER:
        write_m = mask_m & (tl.load(row_slopes.soft + safe_m) != 0)
        work = tl.max(write_m.to(tl.int32)) > 0
    if live is not None:
        heavy_m = _heavy(row_slopes, tile_parts, masks, pid_n, safe_m, R, filter_mass, BLOCK_N)
        work = tl.max((heavy_m & mask_m).to(tl.int32)) > 0
        tl.store(live + pid_m * tiles_n + pid_n, work.to(tl.int32))
    if work:
        open_mn = unrelated(
            masks, guide_a, guide_b, safe_m, safe_n,
            GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
        # rows are padded to their stride with zeros: whole vectors are stored, and loaded later
        write_mn = write_m[:, None] & (offs_n < out_stride)[None, :]
        out_mn = tile_at(out, pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N)
        dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for level in range(len(DIMS)):
            dots_mn = dots(
                dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
                level, DIMS, BLOCK_K,
            )  # fmt: skip
            similarity_mn = similarity(dots_mn, a, rows_a, b, rows_b, level)
            left_mn = open_mn
            if guide_a.x is None:
                left_mn = _judged(open_mn, similarity_mn, masks, safe_m, safe_n, level, CURATED)
            s_mn = scale * similarity_mn

            g_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # d total / d s
            if row_slopes.lse is not None:
                at_m = level * row_slopes.stride + safe_m
                hard_mn = _hardened(s_mn, similarity_mn, hardness, masks, safe_m, safe_n)
                g_mn += tl.load(row_slopes.soft + at_m)[:, None] * tl.exp(
                    hard_mn - tl.load(row_slopes.lse + at_m)[:, None]
                )
                if row_slopes.flat is not None:
                    g_mn -= tl.load(row_slopes.flat + at_m)[:, None]
            if column_slopes.lse is not None:
                at_n = level * column_slopes.stride + safe_n
                g_mn += tl.load(column_slopes.soft + at_n)[None, :] * tl.exp(
                    s_mn - tl.load(column_slopes.lse + at_n)[None, :]
                )
                if column_slopes.flat is not None:
                    g_mn -= tl.load(column_slopes.flat + at_n)[None, :]
            g_mn = tl.where(left_mn, g_mn, 0.0)
            if label_slope_LR is not None:
                at_label_m = tl.load(label_slope_LR + level * label_stride + safe_m)
                label_mn = tl.load(masks.label_R + safe_m)[:, None] == offs_n[None, :]
                g_mn = tl.where(label_mn, at_label_m[:, None], g_mn)
            if inverse_top is not None:  # relative: row factors and the largest |b|^-1 come later
                if b.inverse_L is not None:
                    relative_n = tl.load(b.inverse_L + rows_b) / tl.load(inverse_top)
                    g_mn *= relative_n[None, :]
            else:
                g_mn = similarity(scale * g_mn, a, rows_a, b, rows_b, level)
            g_mn = tl.where(mask_n[None, :], g_mn, 0.0)
            rounded_mn = g_mn.to(out.dtype.element_ty)
            tl.store(out_mn, rounded_mn, mask=write_mn)
            if along_rows is not None:
                # what the products will have along their rows, as it is rounded
                along_mn = tl.where(write_mn, rounded_mn.to(tl.float32) * dots_mn, 0.0)
                at_m = (level * tiles_n + pid_n) * R + offs_m
                tl.store(along_rows + at_m, tl.sum(along_mn, 1), mask=mask_m)
                at_n = (level * tiles_m + pid_m) * N + offs_n
                tl.store(along_columns + at_n, tl.sum(along_mn, 0), mask=mask_n)
            out_mn += level_stride  # not level * level_stride: that may not fit 32 bits
        if len(DIMS) > 1:
            # A block of dims takes part in every prefix from its own on.
            tl.debug_barrier()
            sum_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for _ in range(len(DIMS)):
                out_mn -= level_stride
                sum_mn += tl.load(out_mn, mask=write_mn, other=0.0).to(tl.float32)
                tl.store(out_mn, sum_mn.to(out.dtype.element_ty), mask=write_mn)


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
