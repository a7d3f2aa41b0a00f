"""Losses that are sums over pairs (`chunked.in_batch` has the formulas) on a GPU.

    fp32, bf16    prepare | tiles, settle, 2 products a chunk of rows | finish                  6MND
    fp16          prepare | tiles, settle, tiles, settle, 2 products a chunk | finish           8MND

A tile of scores becomes its gradients in one pass, and leaves sums of its rows; `settle` adds them
up and writes the element of each label, whose slope is the others' with the other sign. fp16 takes
two passes: a row is stored divided by its slopes, whose sum the first pass finds, so that neither
small gradients of converged rows underflow nor the label's element, a sum of N, overflows.

M queries, N passages, D dims; R rows of a chunk.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.problem import (
    HINGE,
    SIGLIP,
    InBatchProblem,
    InBatchResult,
    InBatchSettings,
    gradient_dtype,
)
from rankpo_kernels.relations import Known
from rankpo_kernels.triton import rows
from rankpo_kernels.triton.blocks import (
    Block,
    Guide,
    add_relative,
    addressable,
    as_number,
    chunks_of,
    largest_inverse,
    padded,
    product,
)
from rankpo_kernels.triton.rows import Rows, Scale, absent, number
from rankpo_kernels.triton.scores import (
    Masks,
    Side,
    dots,
    rows_of,
    similarity,
    tile_at,
    tile_of,
    unrelated,
)
from rankpo_kernels.triton.slopes import sigmoid, softplus
from rankpo_kernels.triton.tiles import FULL, FUSION, SLIM, SMALL, Tiles

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
    a, b, reference_a, reference_b, no_guide, masks, sums, positive_R, reference_R, weights_R, by_R,
    inverse_top, out,
    numbers, R, N, out_stride,
    HINGE: tl.constexpr, SIGLIP: tl.constexpr, SFT: tl.constexpr,
    DIMS: tl.constexpr, REFERENCE_DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of scores a program: row sums and, with `out`, d total / d dot of its open pairs."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tiles_m, tiles_n, GROUP)
    scale, bias = number(numbers.scale), number(numbers.bias)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    # the last row stands in for those past the end, which are masked where results leave
    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)
    open_mn = unrelated(masks, no_guide, no_guide, safe_m, safe_n, (), 0, BLOCK_M, BLOCK_N, BLOCK_K)
    write_mn = mask_m[:, None] & mask_n[None, :]
    open_mn = open_mn & write_mn  # so rows are padded with zeros
    positive_m = tl.load(positive_R + safe_m)
    if reference_a.x is not None:
        rows_a, rows_b = rows_of(reference_a, safe_m), rows_of(reference_b, safe_n)
        r_mn = dots(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), reference_a.x, rows_a * reference_a.stride,
            reference_a.stride_d, reference_b.x, rows_b * reference_b.stride, reference_b.stride_d,
            0, REFERENCE_DIMS, BLOCK_K,
        )  # fmt: skip
        r_mn = similarity(r_mn, reference_a, rows_a, reference_b, rows_b, 0)
        r_mn -= tl.load(reference_R + safe_m)[:, None]
    rows_a, rows_b = rows_of(a, safe_m), rows_of(b, safe_n)
    s_mn = dots(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), a.x, rows_a * a.stride, a.stride_d,
        b.x, rows_b * b.stride, b.stride_d, 0, DIMS, BLOCK_K,
    )  # fmt: skip
    s_mn = similarity(s_mn, a, rows_a, b, rows_b, 0)
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
            g_mn = similarity(g_mn * tl.load(weights_R + safe_m)[:, None], a, rows_a, b, rows_b, 0)
        out_mn = tile_at(out, pid_m, pid_n, out_stride, BLOCK_M, BLOCK_N)
        store_mn = mask_m[:, None] & (offs_n < out_stride)[None, :]
        tl.store(out_mn, g_mn.to(out.dtype.element_ty), mask=store_mn)


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


def in_batch(
    problem: InBatchProblem, known: Known | None, weights_M: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4, *, tiles: Tiles | None = None,
) -> InBatchResult:  # fmt: skip
    """Row sums and gradients as `chunked.in_batch`; `tiles` overrides the table."""
    q_MD, p_ND = addressable(problem.q_MD), addressable(problem.p_ND)
    problem = problem._replace(q_MD=q_MD, p_ND=p_ND)
    settings, (M, D), N, dtype = problem.settings, q_MD.shape, len(p_ND), q_MD.dtype
    need_q, need_p, need_scale, need_bias = needs if weights_M is not None else (False,) * 4
    products_needed = need_q or need_p
    relative = products_needed and dtype == torch.float16
    block, positive_M, reference_M = _block(problem, known)
    inverse_q, inverse_p = block.inverse_a, block.inverse_b
    if tiles is None:
        tiles = _tiles(dtype, reference_M is not None or settings.sft_weight > 0 or need_scale)
    kernels = ChunkKernels.of(problem, block, tiles, weights_M)

    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q_MD.device)  # noqa: E731,E501
    wanted = (True,) * 4 + (need_scale, need_bias, relative, relative)
    outcome = Outcome._make(new(M) if want else None for want in wanted)
    dq_MD = new(M, D, dtype=gradient_dtype(dtype)) if need_q else None
    dp_out = new(N, D, dtype=gradient_dtype(dtype)) if need_p else None
    if dp_out is not None and not M:
        dp_out.zero_()
    row_bytes = 24 * kernels.tiles_n + (padded(N) * q_MD.element_size() if products_needed else 0)
    workspace = settings.workspace(q_MD.device)
    chunks = chunks_of(M, N, row_bytes, workspace, tiles.BLOCK_M) if M else []
    R0 = chunks[0].stop if chunks else 0
    dq_RD, dp_ND = new(R0, D) if need_q else None, new(N, D) if need_p else None
    out_RN = new(R0, padded(N), dtype=dtype) if products_needed else None
    top = largest_inverse(inverse_p, p_ND) if relative else None
    for part in chunks:
        R, first = part.stop - part.start, part.start == 0
        local = Outcome._make(None if x is None else x[part] for x in outcome)
        reference_R = None if reference_M is None else reference_M[part]
        sums = Sums.empty(kernels.tiles_n, R, need_scale, q_MD.device)
        for look in range(1 + relative):
            kernels.tiles_and_settle(
                part, sums, local, positive_M[part], reference_R, top,
                None if out_RN is None or look != relative else out_RN[:R], again=look > 0,
            )  # fmt: skip
        ready = []
        out = None if out_RN is None else out_RN[:R, :N]
        q_RD, inverse = q_MD[part], None if inverse_q is None else inverse_q[:, part]
        if dq_MD is not None and dq_RD is not None and out is not None:
            product(out, p_ND, dq_RD[:R], False)
            ready.append(Rows.of(dq_RD[:R], q_RD, inverse, local.factor_R, None, dq_MD[part]))
        if dp_ND is not None and out is not None and relative:
            assert local.factor_R is not None
            inverse_R = None if inverse is None else inverse[0]
            add_relative(out, q_RD, local.factor_R, inverse_R, dp_ND, first)
        elif dp_ND is not None and out is not None:
            product(out, q_RD, dp_ND, not first, transpose=True)
        if dp_ND is not None and dp_out is not None and part.stop == M:
            ready.append(Rows.of(dp_ND, p_ND, inverse_p, None, None, dp_out))
        rows.finish(ready, (D,), top, Scale(1.0, None))
    return InBatchResult(
        outcome.loss_R, positive_M, outcome.hardest_R, outcome.wins_R, outcome.total_R, dq_MD,
        dp_out, *(None if x is None else x.sum() for x in (outcome.d_scale_R, outcome.d_bias_R)),
    )  # fmt: skip


class ChunkKernels(NamedTuple):
    """The two kernels with what is the same for every chunk."""

    block: Block
    tiles: Tiles
    numbers: Numbers
    settings: InBatchSettings
    weights_M: Tensor | None

    @staticmethod
    def of(
        problem: InBatchProblem, block: Block, tiles: Tiles, weights_M: Tensor | None
    ) -> "ChunkKernels":
        settings = problem.settings
        numbers = Numbers(
            as_number(problem.scale), as_number(problem.bias), settings.label_smoothing,
            settings.rankpo_weight, settings.sft_weight, settings.sft_scale,
        )  # fmt: skip
        return ChunkKernels(block, tiles, numbers, settings, weights_M)

    @property
    def tiles_n(self) -> int:
        return triton.cdiv(len(self.block.b), self.tiles.BLOCK_N)

    def tiles_and_settle(
        self, part: slice, sums: Sums, outcome: Outcome, positive_R: Tensor,
        reference_R: Tensor | None, top: Tensor | None, out: Tensor | None, *, again: bool,
    ) -> None:  # fmt: skip
        """One pass over a chunk's scores; `again`: with what the first pass found."""
        block, tiles, settings = self.block, self.tiles, self.settings
        a, b, *references, masks = block.chunk(part)
        R, siglip = part.stop - part.start, settings.kind == SIGLIP
        weights_R = None if self.weights_M is None else self.weights_M[part]
        sizes = (R, len(block.b), 0 if out is None else out.stride(0))
        tiles_kernel[(triton.cdiv(R, tiles.BLOCK_M) * self.tiles_n,)](
            a, b, *references, absent(Side), masks, sums, positive_R, reference_R, weights_R,
            outcome.by_R if again else None, top, out, self.numbers, *sizes,
            HINGE=settings.kind == HINGE, SIGLIP=siglip, SFT=settings.sft_weight > 0,
            DIMS=(block.a.shape[1],), REFERENCE_DIMS=block.guide_dims,
            **asdict(tiles), **FUSION,
        )  # fmt: skip
        settle_kernel[(triton.cdiv(R, BLOCK_R),)](
            sums, outcome, masks.label_R, positive_R, weights_R,
            None if block.inverse_a is None else block.inverse_a[0, part],
            None if block.inverse_b is None else block.inverse_b[0],
            top, out, self.numbers, self.tiles_n, *sizes, siglip, BLOCK_R, BLOCK_P, **FUSION,
        )  # fmt: skip


def _block(problem: InBatchProblem, known: Known | None) -> tuple[Block, Tensor, Tensor | None]:
    """The scores, and the similarities of labels under the model and the reference."""
    q_MD, p_ND, normalize = problem.q_MD, problem.p_ND, problem.settings.normalize
    labels_M = problem.relations.labels_M.contiguous()
    inverse_q, inverse_p, (positive_M,) = rows.prepare(
        q_MD, p_ND, None, labels_M, (q_MD.shape[1],), normalize
    )
    guide, reference_M = None, None
    if problem.relations.guide is not None:
        gq, gp = map(addressable, problem.relations.guide)
        inverse_gq, inverse_gp, (reference_M,) = rows.prepare(
            gq, gp, None, labels_M, (gq.shape[1],), normalize
        )
        guide = Guide(gq, inverse_gq, gp, inverse_gp)
    masks = Masks.of(labels_M, known, None, None, None)
    block = Block(q_MD, inverse_q, None, p_ND, inverse_p, guide, masks, 0, None, None)
    return block, positive_M, reference_M


def _tiles(dtype: torch.dtype, more: bool) -> Tiles:
    """`more`: what stands in registers beside the scores and x, which spill in tiles twice as wide:
    a reference, SFT or the scale's moment."""
    if dtype == torch.float32:
        return FULL
    return SMALL if more else SLIM
