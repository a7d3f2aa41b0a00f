"""Score kernels: tiles of S = scale * A B' / (|a| |b|), summed up or turned into gradients, never
stored whole.

    statistics   per row (or column): logsumexp, softmax mean, top of the unmasked scores
    gradients    G_ij = scale / (|a_i| |b_j|) * (soft_i exp(s_ij - lse_i) - flat_i, + the same of j)

Both recompute a tile by `_tile`, so a mask is decided by the same arithmetic in both. What is no
negative of row i: a column whose keys hold the row's class, or one whose similarity (or a guide's)
lies above the row's limit and that was not curated for the row.

R rows of A, N rows of B (columns of S), D dims, L prefixes of D (DIMS), W walks over a row's tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.gpu.rows import number

EXEMPT, MASKED = 1, 2  # what a passage that was curated for the row is


class Side(NamedTuple):
    """Rows of one side of the scores; `index` picks them from the tensors, None takes all."""

    x: Tensor
    stride: int
    stride_d: int
    index: Tensor | None
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


class Partials(NamedTuple):
    """Of the softmax over a part of a row (or column): [L, parts, rows] each."""

    top: Tensor
    z: Tensor  # sum of exp(s - top)
    zs: Tensor | None  # sum of exp(s - top) * s, for the scale's gradient
    sum: Tensor | None  # of s, for label smoothing
    count: Tensor | None


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
def _dots(
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
def _rows_of(side, offs):
    """Where the rows start, in elements of x."""
    if side.index is not None:
        offs = tl.load(side.index + offs)
    return offs.to(tl.int64)


@triton.jit
def _similarity(acc, a, rows, b, columns, level):
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
        open_mn = open_mn & (id_m[:, None] != owner_n[None, :])
    return open_mn


@triton.jit
def _unrelated(
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
        rows_a, rows_b = _rows_of(guide_a, offs_m), _rows_of(guide_b, offs_n)
        judge_mn = _dots(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), guide_a.x, rows_a * guide_a.stride,
            guide_a.stride_d, guide_b.x, rows_b * guide_b.stride, guide_b.stride_d,
            0, GUIDE_DIMS, BLOCK_K,
        )  # fmt: skip
        judge_mn = _similarity(judge_mn, guide_a, rows_a, guide_b, rows_b, 0)
        open_mn = _judged(open_mn, judge_mn, masks, offs_m, offs_n, 0, CURATED)
    return open_mn


@triton.jit
def _part(s_mn, open_mn, partials, at, AXIS: tl.constexpr, mask):
    """Store the partial statistics of a tile along an axis, at offset `at` of each array; returns
    the largest scores and the exponentials beside them, 0 where closed."""
    masked_mn = tl.where(open_mn, s_mn, -float("inf"))
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


class Plain(NamedTuple):
    """What a row of the plain loss needs to find its own slopes, and what it leaves behind."""

    parts: Partials  # [n_parts, R]
    positive_R: Tensor  # similarity of the label
    weights_R: Tensor | None
    loss_R: Tensor
    hardest_R: Tensor
    d_scale_R: Tensor | None
    factor_R: Tensor | None  # what was divided out of a stored row


SHIFT = tl.constexpr(30.0)  # exp(s - s_positive + SHIFT) is stored; bf16 has fp32's range, e^+-87,
OVER = tl.constexpr(35.0)  # so rows of gaps below OVER fit, and their e^-65 beside weights too


@triton.jit
def _tile_of(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Programs in groups of GROUP tiles of rows, so that those that run together share columns."""
    pid = tl.program_id(0)
    in_group = GROUP * tiles_n
    first_m = pid // in_group * GROUP
    group = min(tiles_m - first_m, GROUP)
    return first_m + pid % in_group % group, pid % in_group // group


@triton.jit
def _tile_at(out, pid_m, pid_n, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers of a tile: one in 64 bits, offsets from it in 32."""
    out += (pid_m * BLOCK_M).to(tl.int64) * stride + pid_n * BLOCK_N
    return out + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def _gap(plain, offs_m, R, n_parts, scale):
    """(lse, gap = lse - s_positive, top, softmax mean) of rows, from their parts."""
    top = tl.full(offs_m.shape, -float("inf"), tl.float32)
    for part in range(0, n_parts):
        top = tl.maximum(top, tl.load(plain.parts.top + part * R + offs_m))
    floor = tl.where(top == -float("inf"), 0.0, top)
    z = tl.zeros(offs_m.shape, tl.float32)
    zs = tl.zeros(offs_m.shape, tl.float32)
    for part in range(0, n_parts):
        at = part * R + offs_m
        by = tl.exp(tl.load(plain.parts.top + at) - floor)
        z += tl.load(plain.parts.z + at) * by
        if plain.parts.zs is not None:
            zs += tl.load(plain.parts.zs + at) * by
    alone = z == 0
    lse = tl.where(alone, -float("inf"), top + tl.log(z))
    mean = tl.where(alone, 0.0, zs / z)
    return lse, lse - scale * tl.load(plain.positive_R + offs_m), top, mean


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), all digits where it is tiny."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    # log1p: what rounding 1 + e lost comes back as a factor
    log1p = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _leave(plain, offs_m, mask, gap, top, mean, scale):
    """Store a row's loss and statistics, and return its weighted pull = -d total / d s_positive."""
    pull = _sigmoid(gap)
    s_positive = scale * tl.load(plain.positive_R + offs_m)
    tl.store(plain.loss_R + offs_m, _softplus(gap), mask=mask)
    tl.store(plain.hardest_R + offs_m, top / scale, mask=mask)
    if plain.weights_R is not None:
        pull *= tl.load(plain.weights_R + offs_m)
        if plain.d_scale_R is not None:
            tl.store(plain.d_scale_R + offs_m, pull * (mean - s_positive) / scale, mask=mask)
    return pull


@triton.jit
def _statistics_kernel(
    a, b, guide_a, guide_b, masks, rows, columns, positive_R, inverse_top, stored,
    scale, R, N, stored_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: partial statistics along rows and columns; `stored` keeps
    exp(s - s_positive + SHIFT) |b|-wise scaled, for gradients that need no second look."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = _tile_of(tiles_m, tiles_n, GROUP)
    scale = number(scale)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    open_mn = _unrelated(
        masks, guide_a, guide_b, safe_m, safe_n,
        GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows_a, rows_b = _rows_of(a, safe_m), _rows_of(b, safe_n)
    dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for level in range(len(DIMS)):  # not unrolled: that would take the registers of all levels
        dots_mn = _dots(
            dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
            level, DIMS, BLOCK_K,
        )  # fmt: skip
        similarity_mn = _similarity(dots_mn, a, rows_a, b, rows_b, level)
        left_mn = open_mn
        if guide_a.x is None:
            left_mn = _judged(open_mn, similarity_mn, masks, safe_m, safe_n, level, CURATED)
        s_mn = scale * similarity_mn
        if rows.top is not None:
            at = (level * tiles_n + pid_n) * R + offs_m
            top_m, e_mn = _part(s_mn, left_mn & mask_n[None, :], rows, at, 1, mask_m)
            if stored is not None:
                # a tile far below the row's largest score may underflow: it is nothing beside it
                by_m = tl.exp(top_m - scale * tl.load(positive_R + safe_m) + SHIFT)
                if b.inverse_L is not None:
                    relative_n = tl.load(b.inverse_L + rows_b) * (1.0 / tl.load(inverse_top))
                    e_mn *= relative_n[None, :]
                e_mn *= tl.where(top_m == -float("inf"), 0.0, by_m)[:, None]
                to_mn = _tile_at(stored, pid_m, pid_n, stored_stride, BLOCK_M, BLOCK_N)
                e_mn = e_mn.to(stored.dtype.element_ty)
                tl.store(to_mn, e_mn, mask=mask_m[:, None] & mask_n[None, :])
        if columns.top is not None:
            at = (level * tiles_m + pid_m) * N + offs_n
            _part(s_mn, left_mn & mask_m[:, None], columns, at, 0, mask_n)


@triton.jit
def _rows_kernel(
    plain, label_R, q, inverse_q, inverse_p, inverse_top, stored, weighted_q,
    scale, n_parts, R, stride_q, stride_qd, stored_stride,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows a program: their losses from the parts and, where exponentials are stored, their
    factors, the elements of their positives, and the rows of factor * q that the product for
    passages takes."""
    scale = number(scale)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    safe_r = tl.minimum(offs_r, R - 1)
    lse, gap, top, mean = _gap(plain, safe_r, R, n_parts, scale)
    pull = _leave(plain, safe_r, mask_r, gap, top, mean, scale)
    if stored is not None:
        # soft exp(s - lse) = factor exp(s - s_positive + SHIFT), and where that overflows the
        # gradients kernel stores exp(s - lse)
        fits = ~(gap > OVER)
        weight = tl.load(plain.weights_R + safe_r)
        factor = tl.where(fits, weight * _sigmoid(-gap) * tl.exp(-SHIFT), pull)
        element = -tl.exp(tl.where(fits, gap + SHIFT, 0.0))
        label = tl.load(label_R + safe_r)
        by = factor
        if inverse_p is not None:
            element *= tl.load(inverse_p + label) / tl.load(inverse_top)
            by *= tl.load(inverse_q + safe_r)
        row_r = offs_r.to(tl.int64)
        element = element.to(stored.dtype.element_ty)
        tl.store(stored + row_r * stored_stride + label, element, mask_r)
        tl.store(plain.factor_R + offs_r, factor, mask=mask_r)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_rd = mask_r[:, None] & (offs_d < D)[None, :]
            x_rd = q + row_r[:, None] * stride_q + offs_d[None, :] * stride_qd
            x = tl.load(x_rd, mask=mask_rd, other=0.0).to(tl.float32) * by[:, None]
            to_rd = weighted_q + row_r[:, None] * D + offs_d[None, :]
            tl.store(to_rd, x.to(weighted_q.dtype.element_ty), mask=mask_rd)


@triton.jit
def _gradients_kernel(
    a, b, guide_a, guide_b, masks, plain, row_slopes, column_slopes, label_slope_LR, inverse_top,
    tile_parts, live, out, along_rows, along_columns,
    scale, filter_mass, n_parts, R, N, out_stride, level_stride,
    DIMS: tl.constexpr, GUIDE_DIMS: tl.constexpr, CURATED: tl.constexpr, ONLY_OVER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of d total / d dot a program, at each level the sum over it and longer prefixes.

    plain: slopes are found here, and kept by the programs of the first column of tiles.
    ONLY_OVER: only rows that `stored` exponentials could not hold.
    live: tiles without any row of mass above filter_mass are marked 0 and left unwritten.
    """
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = _tile_of(tiles_m, tiles_n, GROUP)
    scale = number(scale)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)

    write_m = mask_m
    lse_m = tl.zeros([BLOCK_M], tl.float32)
    pull_m = lse_m
    work = True
    if plain.loss_R is not None:
        lse_m, gap_m, top_m, mean_m = _gap(plain, safe_m, R, n_parts, scale)
        keep_m = offs_m < tl.where(pid_n == 0, R, 0)
        pull_m = _leave(plain, safe_m, keep_m, gap_m, top_m, mean_m, scale)
        if ONLY_OVER:
            write_m = mask_m & (gap_m > OVER)
            work = tl.max(write_m.to(tl.int32)) > 0
        elif plain.factor_R is not None:
            tl.store(plain.factor_R + safe_m, pull_m, mask=keep_m)
        if live is not None:
            at = pid_n * R + safe_m
            mass_m = tl.load(tile_parts.z + at) * tl.exp(tl.load(tile_parts.top + at) - lse_m)
            label_m = tl.load(masks.label_R + safe_m)
            holds_label = (label_m // BLOCK_N == pid_n) & (pull_m != 0)
            heavy_m = ((mass_m > filter_mass) & (pull_m != 0)) | holds_label
            # NaN compares false and must not be filtered away
            heavy_m = heavy_m | (mass_m != mass_m)
            work = tl.max((heavy_m & mask_m).to(tl.int32)) > 0
            tl.store(live + pid_m * tiles_n + pid_n, work.to(tl.int32))
    if work:
        open_mn = _unrelated(
            masks, guide_a, guide_b, safe_m, safe_n,
            GUIDE_DIMS, CURATED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows_a, rows_b = _rows_of(a, safe_m), _rows_of(b, safe_n)
        write_mn = write_m[:, None] & mask_n[None, :]
        out_mn = _tile_at(out, pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N)
        dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for level in range(len(DIMS)):
            dots_mn = _dots(
                dots_mn, a.x, rows_a * a.stride, a.stride_d, b.x, rows_b * b.stride, b.stride_d,
                level, DIMS, BLOCK_K,
            )  # fmt: skip
            similarity_mn = _similarity(dots_mn, a, rows_a, b, rows_b, level)
            left_mn = open_mn
            if guide_a.x is None:
                left_mn = _judged(open_mn, similarity_mn, masks, safe_m, safe_n, level, CURATED)
            s_mn = scale * similarity_mn

            g_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # d total / d s
            if plain.loss_R is not None:
                g_mn = tl.exp(s_mn - lse_m[:, None])
                if plain.factor_R is None:
                    g_mn *= pull_m[:, None]
            if row_slopes.lse is not None:
                at_m = level * row_slopes.stride + safe_m
                g_mn += tl.load(row_slopes.soft + at_m)[:, None] * tl.exp(
                    s_mn - tl.load(row_slopes.lse + at_m)[:, None]
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
            if label_slope_LR is not None or plain.loss_R is not None:
                if plain.loss_R is not None:
                    at_label_m = -pull_m
                    if plain.factor_R is not None:  # divided out; NaN comes back with it
                        at_label_m = tl.where(pull_m != 0, -1.0, 0.0)
                else:
                    at_label_m = tl.load(label_slope_LR + level * R + safe_m)
                label_mn = tl.load(masks.label_R + safe_m)[:, None] == offs_n[None, :]
                g_mn = tl.where(label_mn, at_label_m[:, None], g_mn)
            if along_rows is not None:
                gs_mn = tl.where(write_mn, g_mn * s_mn, 0.0)
                at_m = (level * tiles_n + pid_n) * R + offs_m
                tl.store(along_rows + at_m, tl.sum(gs_mn, 1), mask=mask_m)
                at_n = (level * tiles_m + pid_m) * N + offs_n
                tl.store(along_columns + at_n, tl.sum(gs_mn, 0), mask=mask_n)
            if inverse_top is not None:  # relative: row factors and the largest |b|^-1 come later
                if b.inverse_L is not None:
                    relative_n = tl.load(b.inverse_L + rows_b) / tl.load(inverse_top)
                    g_mn *= relative_n[None, :]
            else:
                g_mn = _similarity(scale * g_mn, a, rows_a, b, rows_b, level)
            tl.store(out_mn, g_mn.to(out.dtype.element_ty), mask=write_mn)
            out_mn += level_stride  # not level * level_stride: that may not fit 32 bits
        if len(DIMS) > 1:
            # A block of dims takes part in every prefix from its own on.
            tl.debug_barrier()
            sum_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for _ in range(len(DIMS)):
                out_mn -= level_stride
                sum_mn += tl.load(out_mn, mask=write_mn, other=0.0).to(tl.float32)
                tl.store(out_mn, sum_mn.to(out.dtype.element_ty), mask=write_mn)


@triton.jit
def _reduce_kernel(
    parts, out, n_parts, out_part, out_parts, R, BLOCK: tl.constexpr
):  # fmt: skip
    """Many parts of a softmax to part `out_part` of `out`; one program BLOCK rows of a level."""
    level = tl.program_id(1)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < R
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for part in range(0, n_parts):
        at = (level * n_parts + part) * R + offs
        top = tl.maximum(top, tl.load(parts.top + at, mask=mask, other=-float("inf")))
    floor = tl.where(top == -float("inf"), 0.0, top)
    z = tl.zeros([BLOCK], tl.float32)
    zs = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for part in range(0, n_parts):
        at = (level * n_parts + part) * R + offs
        by = tl.exp(tl.load(parts.top + at, mask=mask, other=0.0) - floor)
        z += tl.load(parts.z + at, mask=mask, other=0.0) * by
        if parts.zs is not None:
            zs += tl.load(parts.zs + at, mask=mask, other=0.0) * by
        if parts.sum is not None:
            total += tl.load(parts.sum + at, mask=mask, other=0.0)
            count += tl.load(parts.count + at, mask=mask, other=0.0)
    to = (level * out_parts + out_part) * R + offs
    tl.store(out.top + to, top, mask=mask)
    tl.store(out.z + to, z, mask=mask)
    if parts.zs is not None:
        tl.store(out.zs + to, zs, mask=mask)
    if parts.sum is not None:
        tl.store(out.sum + to, total, mask=mask)
        tl.store(out.count + to, count, mask=mask)


@triton.jit
def _scatter_kernel(
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
