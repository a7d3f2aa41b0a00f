"""Losses that are sums over pairs, on chunks of rows, on any device: GEMMs and a row pass between
them, never M x N.

    x_ij = scale * (s_ij - r_ij - a_i) + bias,   a_i = s_i,label - r_i,label
    sigmoid  softplus(x) - e x,  e = label_smoothing      hinge  max(0, 1 + x)
    sft      softplus(sft_scale * (s_ij - s_i,label))
    siglip   softplus(x) with a = r = 0, and softplus(-x) for the label

x is -beta * margin of RankPO, r the similarities of a reference (the guide of `Relations`). The sum
of a row is over the passages that are not known to its query: a slope d loss_i / d s_ij depends on
s_ij and s_i,label alone, so one pass over a score gives its loss and its gradient, 6MND flops.

M queries, N passages, D dims; R rows of a chunk, r rows of a slab.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.chunks import Lists, column_lists, row_chunks, slab_rows, slices
from rankpo_kernels.chunked.norms import inverse_norms, tangent_
from rankpo_kernels.objective import on_device, softplus
from rankpo_kernels.problem import (
    HINGE,
    SIGLIP,
    InBatchProblem,
    InBatchResult,
    InBatchSettings,
    compute_dtype,
    gradient_dtype,
)
from rankpo_kernels.relations import Known


def in_batch(
    problem: InBatchProblem, known: Known | None, weights_M: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
) -> InBatchResult:  # fmt: skip
    """Row sums and, given weights, the gradients of sum_i w_i loss_i that `needs` (q, p, scale,
    bias) names. known=None: a query knows its label alone."""
    q_MD, p_ND, scale, bias, relations, settings = problem
    (M, D), N, dtype = q_MD.shape, len(p_ND), compute_dtype(q_MD.dtype)
    if weights_M is None:
        needs = (False,) * 4
        weights_M = q_MD.new_zeros(M, dtype=dtype)
    weights_M = weights_M.to(dtype).contiguous()
    need_q, need_p, *_ = needs
    labels_M = relations.labels_M.contiguous()
    p_gemm_ND, inverse_p_N = _columns(p_ND, dtype, settings.normalize)
    reference = relations.guide
    if reference is not None:
        r_gemm_ND, inverse_r_N = _columns(reference[1], dtype, settings.normalize)
    buffers = 1 + (reference is not None)
    lists = None if known is None else column_lists(known)

    rows_7M = q_MD.new_empty(7, M, dtype=dtype)
    dq_MD = q_MD.new_empty(M, D, dtype=dtype) if need_q else None
    # The first chunk of rows overwrites dp, the others add to it; without rows it is zero.
    dp_ND = q_MD.new_empty(N, D, dtype=dtype) if need_p else None
    if dp_ND is not None and not M:
        dp_ND.zero_()
    numbers: list[Any] = [on_device(x, q_MD.device, dtype) for x in (scale, bias)]
    memory, row_pass = None, cast(Callable[..., None], _torch_rows)
    if native.usable(rows_7M):
        row_pass, numbers = native.in_batch_rows, [x.item() for x in numbers]
    for rows in row_chunks(M, N, buffers, rows_7M, settings.workspace(q_MD.device)):
        unit_RD, inverse_q_R = _unit(q_MD[rows], dtype, settings.normalize)
        R = len(unit_RD)
        if memory is None:
            memory = q_MD.new_empty(buffers, R, N, dtype=dtype)
        scores_RN, reference_RN = memory[0, :R], None
        torch.mm(unit_RD, p_gemm_ND.T, out=scores_RN)
        if reference is not None:
            unit_r_RD, _ = _unit(reference[0][rows], dtype, settings.normalize)
            torch.mm(unit_r_RD, r_gemm_ND.T, out=memory[1, :R])
            reference_RN = (memory[1, :R], inverse_r_N)
        row_pass(
            scores_RN, inverse_p_N, labels_M[rows],
            lists and lists.rows(rows),
            reference_RN, weights_M[rows], [x[rows] for x in rows_7M], *numbers, settings,
        )  # fmt: skip
        grad_RN = scores_RN  # d(sum_i w_i loss_i) / d<unit_i, p_j>
        if dq_MD is not None:
            torch.mm(grad_RN, p_gemm_ND, out=dq_MD[rows])
            if inverse_q_R is not None:
                tangent_(dq_MD[rows], q_MD[rows], inverse_q_R, inverse_q_R)
        if dp_ND is not None:
            dp_ND.addmm_(grad_RN.T, unit_RD, beta=0 if rows.start == 0 else 1)
    if dp_ND is not None and settings.normalize:
        tangent_(dp_ND, p_gemm_ND, inverse_p_N)  # the scores' gradient has 1 / |p| already
    *statistics, d_scale_M, d_bias_M = rows_7M
    loss_M, positive_M, hardest_M, wins_M, total_M = statistics
    dq, dp = (
        None if grad is None else grad.to(gradient_dtype(x.dtype))
        for x, grad in ((q_MD, dq_MD), (p_ND, dp_ND))
    )
    _, _, need_scale, need_bias = needs
    d_scale, d_bias = d_scale_M.sum() if need_scale else None, d_bias_M.sum() if need_bias else None
    return InBatchResult(loss_M, positive_M, hardest_M, wins_M, total_M, dq, dp, d_scale, d_bias)


def _columns(x_ND: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor]:
    """x and what makes its dot products similarities."""
    ones = x_ND.new_ones(len(x_ND), dtype=dtype)
    return x_ND.to(dtype), inverse_norms(x_ND, dtype) if normalize else ones


def _unit(x_RD: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    x_RD = x_RD.to(dtype)
    if not normalize:
        return x_RD, None
    inverse_R = inverse_norms(x_RD, dtype)
    return x_RD * inverse_R[:, None], inverse_R


def _torch_rows(
    scores_RN: Tensor, column_scale_N: Tensor, labels_R: Tensor, lists: Lists | None,
    reference: tuple[Tensor, Tensor] | None, weights_R: Tensor, out_7R: list[Tensor],
    scale: Tensor, bias: Tensor, settings: InBatchSettings,
) -> None:  # fmt: skip
    """One chunk of rows, in place: dot products become the gradients of them. Filled are the rows
    of loss, positive, hardest, wins, total of x and the gradients of scale and bias."""
    siglip = settings.kind == SIGLIP
    for rows in slices(len(scores_RN), slab_rows(scores_RN)):
        s_rN, label_r1 = scores_RN[rows].mul_(column_scale_N), labels_R[rows, None]
        positive_r1, weights_r1 = s_rN.gather(1, label_r1), weights_R[rows, None]
        over_rN = s_rN if siglip else s_rN - positive_r1
        sft_rN = settings.sft_scale * over_rN if settings.sft_weight else None
        if reference is not None:
            r_rN = reference[0][rows].mul_(reference[1])
            over_rN = over_rN - (r_rN - r_rN.gather(1, label_r1))
        closed_rN = torch.zeros_like(s_rN, dtype=torch.bool).scatter_(1, label_r1, True)
        if lists is not None:
            closed_rN[lists.pairs(torch.arange(len(labels_R), device=s_rN.device)[rows])] = True
        x_rN = scale * over_rN + bias
        loss_rN, slope_rN = _pair(x_rN, settings)
        slope_rN = slope_rN.mul_(scale)
        if sft_rN is not None:
            loss_rN += settings.sft_weight * softplus(sft_rN)
            slope_rN += settings.sft_weight * settings.sft_scale * sft_rN.sigmoid_()
        loss_r = loss_rN.masked_fill_(closed_rN, 0).sum(1)
        slope_rN.masked_fill_(closed_rN, 0)
        label_slope_r1 = -slope_rN.sum(1, keepdim=True)
        d_scale_r: Tensor | int = 0
        d_bias_r: Tensor | int = 0
        if siglip:
            z_r1 = x_rN.gather(1, label_r1)
            loss_r += softplus(-z_r1)[:, 0]
            label_slope_r1 = -scale * (-z_r1).sigmoid()
        slope_rN.scatter_(1, label_r1, label_slope_r1).mul_(weights_r1)
        if siglip:
            d_scale_r, d_bias_r = (slope_rN * s_rN).sum(1) / scale, slope_rN.sum(1) / scale
        hardest_r = s_rN.masked_fill(closed_rN, -torch.inf).amax(1)
        wins_r = ((x_rN < 0) & ~closed_rN).sum(1)
        total_r = x_rN.masked_fill_(closed_rN, 0).sum(1)
        values: tuple[Tensor | int, ...] = (
            loss_r, positive_r1[:, 0], hardest_r, wins_r, total_r, d_scale_r, d_bias_r,
        )  # fmt: skip
        for out_R, value_r in zip(out_7R, values, strict=True):
            out_R[rows] = value_r
        torch.mul(slope_rN, column_scale_N, out=s_rN)


def _pair(x: Tensor, settings: InBatchSettings) -> tuple[Tensor, Tensor]:
    """(losses, slopes) of pairs."""
    if settings.kind == HINGE:
        loss, slope = torch.relu(1 + x), (x > -1).to(x.dtype)
    else:
        smooth = settings.label_smoothing
        loss, slope = softplus(x) - smooth * x, x.sigmoid() - smooth
    return loss.mul_(settings.rankpo_weight), slope.mul_(settings.rankpo_weight)
