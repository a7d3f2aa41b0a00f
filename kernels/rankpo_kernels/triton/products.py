"""Gradient products that cuBLAS has no form of: finished as they are, of chosen rows only, of fp32
as three of tf32, or over own rows only.

    finished   d q = G P, d p = G' Q, less their parts along q and p: both in one launch
    rows       d q_i = G_i P of all or chosen rows i of G; d p = sum over them of G_i' q_i
    own        d q_i += sum_h g_h n_h,  d n_h = g_h q_i,   h over the own negatives of query i

Large dense products belong to cuBLAS. M queries, N passages, D dims, H own negatives, L prefixes;
R rows of a chunk.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.rows import Scale, absent, block_d, sum_of_parts
from rankpo_kernels.triton.scores import proxy_fence
from rankpo_kernels.triton.tiles import FUSION, cdiv, product_tiles


class Product(NamedTuple):
    """One side's gradients: out = G b - (along / |x|^2) x, with G or its transpose."""

    stride_gr: int
    stride_gn: int
    g_rows: int  # of G as it is taken here, its padding included, which holds zeros
    g_columns: int
    b: Tensor
    stride_b: int
    stride_bd: int
    x: Tensor
    stride_x: int
    stride_xd: int
    inverse_R: Tensor | None
    along: Tensor | None  # parts of <G b, x> [parts, R]
    parts: int
    out: Tensor
    R: int
    N: int

    @staticmethod
    def of(
        g_MN: Tensor, x_RD: Tensor, b_ND: Tensor, inverse_LR: Tensor | None, along: Tensor | None,
        out_RD: Tensor | None, *, transpose: bool,
    ) -> "Product":  # fmt: skip
        """One level; rows of G are padded to their stride."""
        if out_RD is None:
            return absent(Product)
        width, parts = g_MN.stride(0), 0 if along is None else along.shape[1]
        of_g = (1, width, width, len(g_MN)) if transpose else (width, 1, len(g_MN), width)
        (stride_b, stride_bd), (stride_x, stride_xd) = b_ND.stride(), x_RD.stride()
        return Product(*of_g, b_ND, stride_b, stride_bd, x_RD, stride_x, stride_xd, inverse_LR,
                       along, parts, out_RD, len(x_RD), len(b_ND))  # fmt: skip


class Totals(NamedTuple):
    """Sums that one program more takes: of weighted losses, and of the scale's gradients."""

    loss_M: Tensor
    weights: Scale
    M: int
    total: Tensor
    d_scales: Tensor | None
    size: int
    d_scale: Tensor | None


@triton.jit
def _finished_tile(
    g, side, pid, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out [BLOCK_M rows, BLOCK_N dims]; programs side by side share their rows of G."""
    tiles_d = tl.cdiv(D, BLOCK_N)
    offs_r = pid // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid % tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_d = offs_r < side.R, offs_d < D
    # masked, not held to the last row: addresses side by side are what loads are made wide by
    row_r = offs_r.to(tl.int64)
    acc_rd = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, side.N, BLOCK_K):
        offs_n = start + tl.arange(0, BLOCK_K)
        at_rn = row_r[:, None] * side.stride_gr + offs_n.to(tl.int64)[None, :] * side.stride_gn
        mask_rn = (offs_r < side.g_rows)[:, None] & (offs_n < side.g_columns)[None, :]
        g_rn = tl.load(g + at_rn, mask=mask_rn, other=0.0)
        at_nd = offs_n.to(tl.int64)[:, None] * side.stride_b + offs_d[None, :] * side.stride_bd
        mask_nd = (offs_n < side.N)[:, None] & mask_d[None, :]
        b_nd = tl.load(side.b + at_nd, mask=mask_nd, other=0.0)
        if g_rn.dtype.primitive_bitwidth <= 16:
            proxy_fence(start)
        acc_rd = tl.dot(g_rn, b_nd, acc_rd, input_precision="ieee")
    write_rd = mask_r[:, None] & mask_d[None, :]
    if side.inverse_R is not None:
        along_r = sum_of_parts(side.along, side.parts, side.R, row_r, mask_r)
        inverse_r = tl.load(side.inverse_R + row_r, mask=mask_r, other=0.0)
        x_rd = side.x + row_r[:, None] * side.stride_x + offs_d[None, :] * side.stride_xd
        x = tl.load(x_rd, mask=write_rd, other=0.0).to(tl.float32)
        acc_rd -= (along_r * inverse_r)[:, None] * (x * inverse_r[:, None])
    to_rd = side.out + row_r[:, None] * D + offs_d[None, :]
    tl.store(to_rd, acc_rd.to(side.out.dtype.element_ty), mask=write_rd)


@triton.jit
def _summed(x, weights, size, BLOCK: tl.constexpr):
    """sum_i w_i x_i; without weights they are 1."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < size, other=0.0)
        if weights is not None:
            value *= tl.load(weights + offs, mask=offs < size, other=0.0)
        sums += value
    return tl.sum(sums)


@triton.jit
def finished_kernel(
    g, first, second, totals, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of the first side, then of the second, then the sums."""
    pid, tiles_d, of_first, of_second = tl.program_id(0), tl.cdiv(D, BLOCK_N), 0, 0
    if first.out is not None:
        of_first = tl.cdiv(first.R, BLOCK_M) * tiles_d
        if pid < of_first:
            _finished_tile(g, first, pid, D, BLOCK_M, BLOCK_N, BLOCK_K)
    if second.out is not None:
        of_second = tl.cdiv(second.R, BLOCK_M) * tiles_d
        if (pid >= of_first) & (pid < of_first + of_second):
            _finished_tile(g, second, pid - of_first, D, BLOCK_M, BLOCK_N, BLOCK_K)
    if pid == of_first + of_second:
        total = _summed(totals.loss_M, totals.weights.at, totals.M, BLOCK)
        if totals.weights.at is None:
            total *= totals.weights.value
        tl.store(totals.total, total)
        if totals.d_scale is not None:
            tl.store(totals.d_scale, _summed(totals.d_scales, None, totals.size, BLOCK))


def finished(g_MN: Tensor, first: Product, second: Product, totals: Totals) -> None:
    """Gradients of both sides (each may be absent) in their last form, and the sums."""
    D = next(side.x.shape[1] for side in (first, second) if side.out is not None)
    tiles = product_tiles(g_MN.dtype)
    rows = sum(cdiv(side.R, tiles.BLOCK_M) for side in (first, second) if side.R)
    finished_kernel[(rows * cdiv(D, tiles.BLOCK_N) + 1,)](
        g_MN, first, second, totals, D, tiles.BLOCK_M, tiles.BLOCK_N, tiles.BLOCK_K, 1024,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSION,
    )  # fmt: skip


class Chosen(NamedTuple):
    """Rows of a chunk whose gradients are not left out: the first of an order, on the device, so
    that nobody waits for their number. Absent: all."""

    order_R: Tensor
    size: Tensor  # int32, of one


@triton.jit
def _rows(chosen, offs, mask):
    if chosen.order_R is not None:
        return tl.load(chosen.order_R + offs, mask=mask, other=0)
    else:
        return offs.to(tl.int64)


@triton.jit
def rows_kernel(
    g, b, out, chosen, R, N, D, stride_g, stride_b, stride_bd, stride_out,
    TRANSPOSE: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out a program: [R, D] at the chosen rows, or with TRANSPOSE [N, D]; ADD adds."""
    tiles_d = tl.cdiv(D, BLOCK_N)
    count = R
    if chosen.size is not None:
        count = tl.load(chosen.size)
    offs_m = tl.program_id(0) // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    if TRANSPOSE:
        mask_m, steps = offs_m < N, count
        row_m = offs_m.to(tl.int64)
    else:
        mask_m = offs_m < count
        steps = tl.where(tl.max(mask_m.to(tl.int32), 0) > 0, N, 0)
        row_m = _rows(chosen, offs_m, mask_m)
    acc_md = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, steps, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < steps
        if TRANSPOSE:
            row_k = _rows(chosen, offs_k, mask_k)
            at_mk = row_k[None, :] * stride_g + row_m[:, None]
        else:
            row_k = offs_k.to(tl.int64)
            at_mk = row_m[:, None] * stride_g + row_k[None, :]
        g_mk = tl.load(g + at_mk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        at_kd = row_k[:, None] * stride_b + offs_d[None, :] * stride_bd
        b_kd = tl.load(b + at_kd, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        if g_mk.dtype.primitive_bitwidth <= 16:
            proxy_fence(start)
        acc_md = tl.dot(g_mk, b_kd, acc_md, input_precision=PRECISION)
    to_md = out + row_m[:, None] * stride_out + offs_d[None, :]
    write_md = mask_m[:, None] & mask_d[None, :]
    if ADD:
        acc_md += tl.load(to_md, mask=write_md, other=0.0)
    tl.store(to_md, acc_md, mask=write_md)


def of_rows(
    g_RN: Tensor, b: Tensor, out: Tensor, chosen: Chosen, add: bool, transpose: bool,
    precision: str,
) -> None:  # fmt: skip
    """out (fp32) (+)= g b at the chosen rows, 0 at the others; or (+)= g' b over the chosen rows of
    both."""
    (R, N), D, tiles = g_RN.shape, b.shape[1], product_tiles(g_RN.dtype, precision)
    if chosen.order_R is not None and not transpose:
        out.zero_()
    grid = cdiv(len(out), tiles.BLOCK_M) * cdiv(D, tiles.BLOCK_N)
    rows_kernel[(grid,)](
        g_RN, b, out, chosen, R, N, D, g_RN.stride(0), *b.stride(), out.stride(0), transpose, add,
        tiles.PRECISION, tiles.BLOCK_M, tiles.BLOCK_N, tiles.BLOCK_K,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "H"])
def own_kernel(
    q, own, inverse_q, inverse_own, offsets, g_LH, gs_LH, dq, d_own,
    M, H, stride_q, stride_qd, stride_o, stride_od, stride_dq, stride_do,
    NEED_Q: tl.constexpr, NEED_OWN: tl.constexpr, NORMALIZE: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query and one block of dims a program, over the query's own negatives."""
    i = tl.program_id(0).to(tl.int64)
    D: tl.constexpr = DIMS[len(DIMS) - 1]
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q_d = tl.load(q + i * stride_q + offs_d * stride_qd, mask=mask_d, other=0.0).to(tl.float32)
    dq_d = tl.zeros([BLOCK_D], tl.float32)
    for h in range(tl.load(offsets + i), tl.load(offsets + i + 1)):
        n_d = tl.load(own + h * stride_o + offs_d * stride_od, mask=mask_d, other=0.0)
        n_d = n_d.to(tl.float32)
        dn_d = tl.zeros([BLOCK_D], tl.float32)
        for level in tl.static_range(len(DIMS)):
            part = offs_d < DIMS[level]
            g = tl.load(g_LH + level * H + h)
            q_unit, n_unit = q_d, n_d
            if NORMALIZE:
                of_q = tl.load(inverse_q + level * M + i)
                of_n = tl.load(inverse_own + level * H + h)
                q_unit, n_unit = q_d * of_q, n_d * of_n
                tangent = (g * q_unit - tl.load(gs_LH + level * H + h) * n_unit) * of_n
                dq_d += tl.where(part, g * n_unit * of_q, 0.0)
                dn_d += tl.where(part, tangent, 0.0)
            else:
                dq_d += tl.where(part, g * n_d, 0.0)
                dn_d += tl.where(part, g * q_d, 0.0)
        if NEED_OWN:
            to = d_own + h * stride_do + offs_d
            tl.store(to, dn_d.to(d_own.dtype.element_ty), mask=mask_d)
    if NEED_Q:
        to = dq + i * stride_dq + offs_d
        tl.store(to, tl.load(to, mask=mask_d, other=0.0) + dq_d, mask=mask_d)


def own_gradients(
    q_MD: Tensor, own_HD: Tensor, inverse_q: Tensor | None, inverse_own: Tensor | None,
    offsets: Tensor, g_LH: Tensor, gs_LH: Tensor, dq_MD: Tensor | None, d_own_HD: Tensor | None,
    dims: tuple[int, ...],
) -> None:  # fmt: skip
    """dq_MD (fp32) += and d_own_HD = the gradients of own negatives.

    g_LH is d total / d cosine, gs_LH the same times the cosine. The projection of d q onto its
    tangent is left to `rows.finish`, d own is projected here."""
    (M, D), H = q_MD.shape, len(own_HD)
    block = block_d(D)
    own_kernel[(M, cdiv(D, block))](
        q_MD, own_HD, inverse_q, inverse_own, offsets, g_LH, gs_LH, dq_MD, d_own_HD,
        M, H, *q_MD.stride(), *own_HD.stride(), 0 if dq_MD is None else dq_MD.stride(0),
        0 if d_own_HD is None else d_own_HD.stride(0),
        dq_MD is not None, d_own_HD is not None, inverse_q is not None, tuple(dims), block,
        **FUSION,
    )  # fmt: skip
