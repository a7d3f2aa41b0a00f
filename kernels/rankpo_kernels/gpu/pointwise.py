"""Losses that are sums over pairs (`rankpo_kernels.pointwise` has the formulas) on a GPU.

    fp32, bf16    prepare | tiles, settle, 2 products a chunk of rows | finish                  6MND
    fp16          prepare | tiles, settle, tiles, settle, 2 products a chunk | finish           8MND

A tile of scores becomes its gradients in one look, and leaves sums of its rows; `settle` adds them
up and writes the element of each label, whose slope is the others' with the other sign. fp16 looks
twice: a row is stored divided by its slopes, whose sum the first look finds, so that neither small
gradients of converged rows underflow nor the label's element, a sum of N, overflows.

M queries, N passages, D dims; R rows of a chunk.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.gpu import rows
from rankpo_kernels.gpu.blocks import (
    Block,
    add_relative,
    addressable,
    as_number,
    chunks_of,
    largest_inverse,
    padded,
    product,
)
from rankpo_kernels.gpu.rows import Rows, Scale, absent, number
from rankpo_kernels.gpu.scores import (
    Masks,
    Side,
    _dots,
    _rows_of,
    _similarity,
    _tile_at,
    _tile_of,
    _unrelated,
)
from rankpo_kernels.gpu.slopes import sigmoid, softplus
from rankpo_kernels.gpu.tiles import FULL, FUSION, SLIM, SMALL, Tiles
from rankpo_kernels.objective import HINGE, SIGLIP, Known, PairSettings, Relations, gradient_dtype
from rankpo_kernels.pointwise import PairResult

# What the slopes of a stored row of fp16 sum up to: 1/N of it is a normal number, twice it fits.
SUM = tl.constexpr(2.0**14)
BLOCK_R, BLOCK_P = 32, 16  # rows and tiles that `settle` loads at once


class Numbers(NamedTuple):
    """Of the loss."""

    scale: Scale
    bias: Scale
    smoothing: float
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
def _tiles_kernel(
    a, b, reference_a, reference_b, no_guide, masks, sums, positive_R, reference_R, weights_R, by_R,
    inverse_top, out,
    numbers, R, N, out_stride,
    HINGE: tl.constexpr, SIGLIP: tl.constexpr, SFT: tl.constexpr,
    DIMS: tl.constexpr, REFERENCE_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: row sums and, with `out`, d total / d dot of its open pairs."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = _tile_of(tiles_m, tiles_n, GROUP)
    scale, bias = number(numbers.scale), number(numbers.bias)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    open_mn = _unrelated(
        masks, no_guide, no_guide, safe_m, safe_n, (), 0, BLOCK_M, BLOCK_N, BLOCK_K
    )
    write_mn = mask_m[:, None] & mask_n[None, :]
    open_mn = open_mn & write_mn  # so rows are padded with zeros
    positive_m = tl.load(positive_R + safe_m)
    if reference_a.x is not None:
        rows_a, rows_b = _rows_of(reference_a, safe_m), _rows_of(reference_b, safe_n)
        r_mn = _dots(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), reference_a.x, rows_a * reference_a.stride,
            reference_a.stride_d, reference_b.x, rows_b * reference_b.stride, reference_b.stride_d,
            0, REFERENCE_DIMS, BLOCK_K,
        )  # fmt: skip
        r_mn = _similarity(r_mn, reference_a, rows_a, reference_b, rows_b, 0)
        r_mn -= tl.load(reference_R + safe_m)[:, None]
    rows_a, rows_b = _rows_of(a, safe_m), _rows_of(b, safe_n)
    s_mn = _dots(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), a.x, rows_a * a.stride, a.stride_d,
        b.x, rows_b * b.stride, b.stride_d, 0, DIMS, BLOCK_K,
    )  # fmt: skip
    s_mn = _similarity(s_mn, a, rows_a, b, rows_b, 0)
    over_mn = s_mn  # what x is scale times of
    if not SIGLIP:
        over_mn -= positive_m[:, None]
    if reference_a.x is not None:
        over_mn -= r_mn
    x_mn = scale * over_mn + bias
    at_m = pid_n * R + offs_m
    tl.store(sums.top + at_m, tl.max(tl.where(open_mn, s_mn, -float("inf")), 1), mask=mask_m)
    tl.store(sums.wins + at_m, tl.sum(tl.where(open_mn & (x_mn < 0), 1.0, 0.0), 1), mask=mask_m)
    tl.store(sums.total + at_m, tl.sum(tl.where(open_mn, x_mn, 0.0), 1), mask=mask_m)
    if HINGE:
        f_mn = tl.where(x_mn <= -1.0, 0.0, 1.0 + x_mn)  # NaN stays NaN
        g_mn = tl.where(x_mn > -1.0, 1.0, 0.0)
    else:
        f_mn = softplus(x_mn) - numbers.smoothing * x_mn
        g_mn = sigmoid(x_mn) - numbers.smoothing
    f_mn *= numbers.weight
    g_mn *= numbers.weight * scale
    if SFT:
        y_mn = numbers.sft_scale * (s_mn - positive_m[:, None])
        f_mn += numbers.sft_weight * softplus(y_mn)
        g_mn += numbers.sft_weight * numbers.sft_scale * sigmoid(y_mn)
    tl.store(sums.loss + at_m, tl.sum(tl.where(open_mn, f_mn, 0.0), 1), mask=mask_m)
    g_mn = tl.where(open_mn, g_mn, 0.0)
    tl.store(sums.slope + at_m, tl.sum(g_mn, 1), mask=mask_m)
    if sums.moment is not None:
        moment_m = tl.sum(tl.where(open_mn, g_mn * s_mn, 0.0), 1)
        tl.store(sums.moment + at_m, moment_m, mask=mask_m)
    if out is not None:
        if by_R is not None:  # relative: row factors and the largest |b|^-1 come later
            g_mn *= tl.load(by_R + safe_m)[:, None]
            if b.inverse_L is not None:
                g_mn *= (tl.load(b.inverse_L + rows_b) / tl.load(inverse_top))[None, :]
        else:
            g_mn = _similarity(g_mn * tl.load(weights_R + safe_m)[:, None], a, rows_a, b, rows_b, 0)
        out_mn = _tile_at(out, pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N)
        store_mn = mask_m[:, None] & (offs_n < out_stride)[None, :]
        tl.store(out_mn, g_mn.to(out.dtype.element_ty), mask=store_mn)


@triton.jit(do_not_specialize=["n_parts", "N"])
def _settle_kernel(
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
            size_r = tl.abs(size_r) + numbers.smoothing * numbers.weight * scale * N
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


def pair_losses(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor, bias: Tensor, relations: Relations,
    known: Known | None, settings: PairSettings, weights_M: Tensor | None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4, *, tiles: Tiles | None = None,
) -> PairResult:  # fmt: skip
    """Row sums and gradients as `pointwise.pair_losses`; `tiles` overrides the table."""
    q_MD, p_ND = addressable(q_MD), addressable(p_ND)
    (M, D), N, dtype, normalize = q_MD.shape, len(p_ND), q_MD.dtype, settings.normalize
    need_q, need_p, need_scale, need_bias = needs if weights_M is not None else (False,) * 4
    products_needed = need_q or need_p
    relative = products_needed and dtype == torch.float16
    block, positive_M, reference_M = _block(q_MD, p_ND, relations, known, normalize)
    inverse_q, inverse_p = block.inverse_a, block.inverse_b
    if tiles is None:
        tiles = _tiles(dtype, reference_M is not None or settings.sft_weight > 0 or need_scale)
    numbers = Numbers(
        as_number(scale), as_number(bias), settings.label_smoothing, settings.rankpo_weight,
        settings.sft_weight, settings.sft_scale,
    )  # fmt: skip
    constants = {
        "HINGE": settings.kind == HINGE, "SIGLIP": settings.kind == SIGLIP,
        "SFT": settings.sft_weight > 0, "DIMS": (D,),
        "REFERENCE_DIMS": () if block.guide is None else (block.guide[0].shape[1],),
    }  # fmt: skip

    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q_MD.device)  # noqa: E731,E501
    wanted = (True,) * 4 + (need_scale, need_bias, relative, relative)
    outcome = Outcome(*[new(M) if want else None for want in wanted])
    dq_MD = new(M, D, dtype=gradient_dtype(dtype)) if need_q else None
    dp_out = new(N, D, dtype=gradient_dtype(dtype)) if need_p else None
    if need_p and not M:
        dp_out.zero_()
    tiles_n = triton.cdiv(N, tiles.BLOCK_N)
    row_bytes = 24 * tiles_n + (padded(N) * q_MD.element_size() if products_needed else 0)
    chunks = chunks_of(M, N, row_bytes, settings.workspace_bytes, tiles.BLOCK_M) if M else []
    R0 = chunks[0].stop if chunks else 0
    dq_RD, dp_ND = new(R0, D) if need_q else None, new(N, D) if need_p else None
    out_RN = new(R0, padded(N), dtype=dtype) if products_needed else None
    top = largest_inverse(inverse_p, p_ND) if relative else None
    for part in chunks:
        R, first = part.stop - part.start, part.start == 0
        a, b, *references, masks = block.chunk(part)
        sums = [new(tiles_n, R) if of != "moment" or need_scale else None for of in Sums._fields]
        sums, of_part = Sums(*sums), Outcome(*[None if x is None else x[part] for x in outcome])
        of_rows = positive_M[part], None if weights_M is None else weights_M[part]
        for look in range(1 + relative):
            out = out_RN[:R] if products_needed and look == relative else None
            sizes = (R, N, 0 if out is None else out.stride(0))
            _tiles_kernel[(triton.cdiv(R, tiles.BLOCK_M) * tiles_n,)](
                a, b, *references, absent(Side), masks, sums, of_rows[0],
                None if reference_M is None else reference_M[part], of_rows[1],
                of_part.by_R if look else None, top, out, numbers, *sizes,
                **constants, **asdict(tiles), **FUSION,
            )  # fmt: skip
            _settle_kernel[(triton.cdiv(R, BLOCK_R),)](
                sums, of_part, masks.label_R, *of_rows,
                None if inverse_q is None else inverse_q[0, part],
                None if inverse_p is None else inverse_p[0],
                top, out, numbers, tiles_n, *sizes, constants["SIGLIP"], BLOCK_R, BLOCK_P, **FUSION,
            )  # fmt: skip
        ready = []
        out = None if out is None else out[:, :N]
        q_RD, inverse = q_MD[part], None if inverse_q is None else inverse_q[:, part]
        if need_q:
            product(out, p_ND, dq_RD[:R], False)
            ready.append(Rows.of(dq_RD[:R], q_RD, inverse, of_part.factor_R, None, dq_MD[part]))
        if need_p and relative:
            of_rows = (of_part.factor_R, None if inverse is None else inverse[0])
            add_relative(out, q_RD, *of_rows, dp_ND, first)
        elif need_p:
            product(out, q_RD, dp_ND, not first, transpose=True)
        if need_p and part.stop == M:
            ready.append(Rows.of(dp_ND, p_ND, inverse_p, None, None, dp_out))
        rows.finish(ready, (D,), top, Scale(1.0, None))
    loss_M, hardest_M, wins_M, total_M, *of_numbers = outcome[:6]
    d_scale, d_bias = (None if x is None else x.sum() for x in of_numbers)
    return PairResult(
        loss_M, positive_M, hardest_M, wins_M, total_M, dq_MD, dp_out, d_scale, d_bias
    )


def _block(
    q_MD: Tensor, p_ND: Tensor, relations: Relations, known: Known | None, normalize: bool
) -> tuple[Block, Tensor, Tensor | None]:
    """The scores, and the similarities of labels under the model and the reference."""
    labels_M = relations.labels_M.contiguous()
    reference = [x if x is None else addressable(x) for x in relations[-2:]]
    inverses = rows.prepare(q_MD, p_ND, None, labels_M, (q_MD.shape[1],), normalize)
    guide, reference_M = None, None
    if reference[0] is not None:
        *of_guide, (reference_M,) = rows.prepare(
            *reference, None, labels_M, (reference[0].shape[1],), normalize
        )
        guide = (reference[0], of_guide[0], reference[1], of_guide[1])
    keys = (None,) * 4
    if known is not None:
        keys = (known.class_M, known.start_N, known.stop_N, known.keys)
    masks = Masks(labels_M, *keys, None, 0, None, None)
    inverse_q, inverse_p, (positive_M,) = inverses
    block = Block(q_MD, inverse_q, None, p_ND, inverse_p, guide, masks, 0, None, None)
    return block, positive_M, reference_M


def _tiles(dtype: torch.dtype, more: bool) -> Tiles:
    """`more`: what stands in registers beside the scores and x, which spill in tiles twice as wide:
    a reference, SFT or the scale's moment."""
    if dtype == torch.float32:
        return FULL
    return SMALL if more else SLIM
