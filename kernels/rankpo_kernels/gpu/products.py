"""Gradient products that walk a list instead of all there is: live tiles only, or own rows only.

    filtered   out_m = sum over live tiles n of G_mn B_n   (or G' A: then m and n change roles)
    own        d q_i += sum_h g_h n_h,  d n_h = g_h q_i,   h over the own negatives of query i

Dense products belong to cuBLAS; these are for what it cannot skip. M queries, N passages, D dims,
H own negatives, L prefixes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.gpu.rows import block_d
from rankpo_kernels.gpu.tiles import FUSION, Tiles

BLOCK_D = 128  # dims of a tile of a product


@triton.jit
def _filtered_kernel(
    g, b, out, order, counts, R, N, D, stride_gm, stride_gn, stride_b, stride_bd, max_tiles,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of out [R, D] a program; order[m] lists the live tiles of its rows, counts[m] says how
    many."""
    pid_m, pid_d = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < R, offs_d < D
    acc_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, tl.load(counts + pid_m)):
        tile = tl.load(order + pid_m * max_tiles + step)
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        at_mn = offs_m.to(tl.int64)[:, None] * stride_gm + offs_n.to(tl.int64)[None, :] * stride_gn
        g_mn = tl.load(g + at_mn, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        at_nd = offs_n.to(tl.int64)[:, None] * stride_b + offs_d[None, :] * stride_bd
        b_nd = tl.load(b + at_nd, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        acc_md = tl.dot(g_mn, b_nd, acc_md, input_precision="ieee")
    to_md = out + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    write_md = mask_m[:, None] & mask_d[None, :]
    if ADD:
        acc_md += tl.load(to_md, mask=write_md, other=0.0)
    tl.store(to_md, acc_md, mask=write_md)


def filtered(
    g_RN: Tensor, b_ND: Tensor, live: Tensor, out_RD: Tensor, add: bool, tiles: Tiles,
    row_block: int, column_block: int,
) -> None:  # fmt: skip
    """out [R, D] fp32 = (or +=) g b over the tiles of row_block x column_block that `live`
    [tiles of rows, tiles of columns] marks; the others are not read."""
    (R, N), D = g_RN.shape, b_ND.shape[1]
    counts = live.sum(1, dtype=torch.int32)
    order = live.argsort(dim=1, descending=True, stable=True).to(torch.int32).contiguous()
    _filtered_kernel[(live.shape[0], triton.cdiv(D, BLOCK_D))](
        g_RN, b_ND, out_RD, order, counts, R, N, D, *g_RN.stride(), *b_ND.stride(), live.shape[1],
        add, row_block, column_block, BLOCK_D,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FUSION,
    )  # fmt: skip


@triton.jit
def _own_kernel(
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
    _own_kernel[(M, triton.cdiv(D, block))](
        q_MD, own_HD, inverse_q, inverse_own, offsets, g_LH, gs_LH, dq_MD, d_own_HD,
        M, H, *q_MD.stride(), *own_HD.stride(), 0 if dq_MD is None else dq_MD.stride(0),
        0 if d_own_HD is None else d_own_HD.stride(0),
        dq_MD is not None, d_own_HD is not None, inverse_q is not None, tuple(dims), block,
        **FUSION,
    )  # fmt: skip
