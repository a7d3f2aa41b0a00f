"""Tiles of scores S = scale * A B' / (|a| |b|), as the kernels of `statistics`, `gradients` and
`in_batch` take them: the records of their arguments, dot products, and which pairs are closed.

A score counts in units of log 2, s * log2(e), where exponentials are of base 2. What is no negative
of row i: its label, a column whose keys hold the row's class, or one whose similarity (or a
guide's) lies above the row's limit and that was not curated for the row. Its score is -inf. A mask
is decided by the same arithmetic in every kernel.

R rows of A, N rows of B (columns of S), D dims, L prefixes of D (DIMS). A tile of BLOCK_N columns
is finished in PARTS, one after the other: fewer numbers stand in registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from rankpo_kernels import relations
from rankpo_kernels.relations import Known
from rankpo_kernels.triton import tiles

EXEMPT, MASKED = 1, 2  # what a passage that was curated for the row is
APART = tl.constexpr(relations.APART)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


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


UNFENCED = tl.constexpr(tiles.UNFENCED)


@triton.jit
def proxy_fence(at):
    """Between copies to shared memory and the tensor cores that read it, in each loop that holds a
    product of 16 bits or less. Of a loop that Triton pipelines it stays behind the wait for the
    copies: `make aot` looks that it does. On sm_100 it cannot be pipelined: see `tiles`."""
    if UNFENCED:  # noqa: SIM102  a constexpr: what is inside is compiled for such alone
        if cuda_capability_geq(9) and not cuda_capability_geq(10):
            tl.inline_asm_elementwise(
                "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [at], tl.int32, False, 1
            )


@triton.jit
def dots(
    acc, a, a_row, stride_ad, b, b_row, stride_bd, level,
    DIMS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
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
        if x_mk.dtype.primitive_bitwidth <= 16:
            proxy_fence(start)
        # fp32 stays fp32: tf32 alone is 4e-2 off at temperature 0.01
        acc = tl.dot(x_mk, tl.trans(y_nk), acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_of(side, offs):
    """Where the rows start, in elements of x."""
    if side.index is not None:
        offs = tl.load(side.index + offs)
    return offs.to(tl.int64)


# --- factors: a cosine is dot * by_m * by_n ---


@triton.jit
def row_factors(a, rows, level):
    """[BLOCK_M]: 1 / |a|, 1 without norms."""
    if a.inverse_L is not None:
        return tl.load(a.inverse_L + level * a.inverse_stride + rows)
    else:
        return tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def column_factors(b, offs_n, mask_n, level):
    """[BLOCK_N]: 1 / |b|, 0 past the end. Masked, not held to the last column: neighbours load
    together."""
    if b.inverse_L is not None:
        inverse = b.inverse_L + level * b.inverse_stride + offs_n
        return tl.load(inverse, mask=mask_n, other=0.0)
    else:
        return tl.where(mask_n, 1.0, 0.0)


@triton.jit
def similarity(acc, a, rows, b, offs_n, mask_n, level):
    """Dot products to cosines; left as they are without norms."""
    if a.inverse_L is not None:
        by_m, by_n = row_factors(a, rows, level), column_factors(b, offs_n, mask_n, level)
        acc = acc * by_m[:, None] * by_n[None, :]
    return acc


# --- what is no negative: its score becomes -inf ---


@triton.jit
def holds_closed(
    masks, first_m, first_n, R, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile may hold pairs that `closed` closes: most do not, and are not looked through.

    ROWS: past the end of rows too, for sums along columns; others leave such rows unwritten."""
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    holds = first_n + BLOCK_N > N
    if ROWS:
        holds = holds | (first_m + BLOCK_M > R)
    if masks.label_R is not None:
        label_m = tl.load(masks.label_R + offs_m, mask=mask_m, other=-1).to(tl.int32)
        here_m = (label_m >= first_n) & (label_m < first_n + BLOCK_N)
        holds = holds | (tl.max(here_m.to(tl.int32), 0) > 0)
    if masks.keys is not None:
        class_m = tl.load(masks.class_R + offs_m, mask=mask_m, other=-1).to(tl.int32)
        least, most = tl.min(tl.where(mask_m, class_m, 2**31 - 1), 0), tl.max(class_m, 0)
        start_n = tl.load(masks.start_N + offs_n, mask=mask_n, other=0).to(tl.int32)
        stop_n = tl.load(masks.stop_N + offs_n, mask=mask_n, other=0).to(tl.int32)
        for step in range(0, tl.max(stop_n - start_n, 0)):
            at_n = start_n + step
            key_n = tl.load(masks.keys + at_n, mask=at_n < stop_n, other=-2).to(tl.int32)
            near_n = (key_n >= least) & (key_n <= most)
            holds = holds | (tl.max(near_n.to(tl.int32), 0) > 0)
    return holds


@triton.jit
def closed(
    s_mn, masks, first_m, first_n, R, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores, -inf past the end of columns, at the label and at what the row knows."""
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    open_mn = mask_n[None, :]
    if ROWS:
        open_mn = open_mn & mask_m[:, None]
    if masks.label_R is not None:
        label_m = tl.load(masks.label_R + offs_m, mask=mask_m, other=-1).to(tl.int32)
        open_mn = open_mn & (label_m[:, None] != offs_n[None, :])
    s_mn = tl.where(open_mn, s_mn, -float("inf"))
    if masks.keys is not None:
        class_m = tl.load(masks.class_R + offs_m, mask=mask_m, other=-1).to(tl.int32)
        start_n = tl.load(masks.start_N + offs_n, mask=mask_n, other=0).to(tl.int32)
        stop_n = tl.load(masks.stop_N + offs_n, mask=mask_n, other=0).to(tl.int32)
        # mostly none or one: a passage is a positive of few texts
        for step in range(0, tl.max(stop_n - start_n, 0)):
            at_n = start_n + step
            key_n = tl.load(masks.keys + at_n, mask=at_n < stop_n, other=-2).to(tl.int32)
            s_mn = tl.where(class_m[:, None] == key_n[None, :], -float("inf"), s_mn)
    return s_mn


@triton.jit
def _judged(s_mn, judge_mn, masks, offs_m, offs_n, mask_n, level, CURATED: tl.constexpr):
    """Scores, -inf above the row's limit and where curated pairs are no negatives."""
    if masks.limit_LR is not None or CURATED != 0:
        open_mn = tl.full(s_mn.shape, 1, tl.int1)
        if masks.limit_LR is not None:
            limit_m = tl.load(masks.limit_LR + level * masks.limit_stride + offs_m)
            close_mn = judge_mn > limit_m[:, None]
            if CURATED == 1:
                close_mn = close_mn & ~_curated(masks, offs_m, offs_n, mask_n)
            open_mn = open_mn & ~close_mn
        if CURATED == 2:
            owner_n = tl.load(masks.owner_N + offs_n, mask=mask_n, other=0).to(tl.int32)
            mine_mn = _curated(masks, offs_m, offs_n, mask_n)
            open_mn = open_mn & ~mine_mn & (owner_n != APART)[None, :]
        s_mn = tl.where(open_mn, s_mn, -float("inf"))
    return s_mn


@triton.jit
def _curated(masks, offs_m, offs_n, mask_n):
    """[BLOCK_M, BLOCK_N]: whether a passage was chosen for the row."""
    id_m = tl.load(masks.id_R + offs_m).to(tl.int32)
    owner_n = tl.load(masks.owner_N + offs_n, mask=mask_n, other=-1).to(tl.int32)
    return id_m[:, None] == owner_n[None, :]


@triton.jit
def guide_similarity(
    guide_a, guide_b, safe_m, safe_n, offs_n, mask_n,
    GUIDE_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of other embeddings: the guide's, or a reference's."""
    rows_a, rows_b = rows_of(guide_a, safe_m), rows_of(guide_b, safe_n)
    judge_mn = dots(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), guide_a.x, rows_a * guide_a.stride,
        guide_a.stride_d, guide_b.x, rows_b * guide_b.stride, guide_b.stride_d,
        0, GUIDE_DIMS, BLOCK_K, PRECISION,
    )  # fmt: skip
    return similarity(judge_mn, guide_a, rows_a, guide_b, offs_n, mask_n, 0)


@triton.jit
def _hardened(t_mn, similarity_mn, hardness, masks, offs_m, offs_n, mask_n):
    """The scores along rows, in units of log 2."""
    by = hardness.other * LOG2E
    if masks.owner_N is not None:
        mine_mn = _curated(masks, offs_m, offs_n, mask_n)
        by = tl.where(mine_mn, hardness.chosen * LOG2E, hardness.other * LOG2E)
    return t_mn + by * similarity_mn


@triton.jit
def scores(
    dots_mn, judge_mn, a, rows_a, b, masks, hardness, scale, level, rare, first_m, first_n, R, N,
    CURATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2, -inf where closed: (without hardness, with hardness); `rare`: of a
    tile that `holds_closed`. A guide's similarities `judge_mn`, or none, decide in place of the
    tile's own."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n, safe_m = offs_n < N, tl.minimum(first_m + tl.arange(0, BLOCK_M), R - 1)
    by_m = row_factors(a, rows_a, level) * (scale * LOG2E)
    by_n = column_factors(b, offs_n, mask_n, level)
    t_mn = dots_mn * by_n[None, :] * by_m[:, None]
    if rare:
        t_mn = closed(t_mn, masks, first_m, first_n, R, N, ROWS, BLOCK_M, BLOCK_N)
    similarity_mn = None
    if (judge_mn is None and masks.limit_LR is not None) or hardness.other is not None:
        similarity_mn = similarity(dots_mn, a, rows_a, b, offs_n, mask_n, level)
    if judge_mn is None:
        t_mn = _judged(t_mn, similarity_mn, masks, safe_m, offs_n, mask_n, level, CURATED)
    else:
        t_mn = _judged(t_mn, judge_mn, masks, safe_m, offs_n, mask_n, 0, CURATED)
    h_mn = t_mn
    if hardness.other is not None:
        h_mn = _hardened(t_mn, similarity_mn, hardness, masks, safe_m, offs_n, mask_n)
    return t_mn, h_mn


# --- where tiles are ---


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP tiles of rows, so that those that run together share columns."""
    in_group = GROUP * tiles_n
    first_m = tile // in_group * GROUP
    group = min(tiles_m - first_m, GROUP)
    return first_m + tile % in_group % group, tile % in_group // group


@triton.jit
def tile_at(out, pid_m, pid_n, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers of a tile: one in 64 bits, offsets from it in 32."""
    out += (pid_m * BLOCK_M).to(tl.int64) * stride + pid_n * BLOCK_N
    return out + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def column_parts(x_mn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The tile as a tuple of one, two or four tiles side by side."""
    if PARTS == 1:
        return (x_mn,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x_mn, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        return column_parts(left, BLOCK_M, BLOCK_N // 2, PARTS // 2) + column_parts(
            right, BLOCK_M, BLOCK_N // 2, PARTS // 2
        )


@triton.jit
def finite(x):
    """0 for -inf: exp(-inf - 0) = 0 where nothing is open."""
    return tl.where(x == -float("inf"), 0.0, x)
