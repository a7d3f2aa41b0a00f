"""Losses of passages ranked for a query, and their gradients, from one read of the embeddings.

    s_k = <q, p_k> / (|q| |p_k|),   d s_k/dq = (p_k/|p_k| - s_k q/|q|) / |q|,  d s_k/dp_k likewise
    pair(a, b) = rankpo_weight f(x_ab) + sft_weight softplus(-(s_a - s_b) / T)
    x_ab = beta (((s_a - s_b) - (ref_a - ref_b)) / T - gamma_beta_ratio)
    f(x) = (1 - e) softplus(-x) + e softplus(x),  e = label_smoothing;   hinge: max(0, 1 - x)
    pairs:          mean of pair(a, b) over the pairs of which a has the higher grade
    plackett_luce:  sum over a of softplus(logsumexp of r_b, b of lower grade, - r_a),
                    r = beta (s - ref) / T, over the a that have a lower-graded b
    lambda:         sum of w_ab pair(a, b), w_ab the change in nDCG if a and b swapped their places

B queries, K passages of each, D dims. On the CPU the native library takes a row at a time, in fp32,
bf16 and fp16; fp64, lambda, and CUDA without Triton, is torch, a slab of rows at a time.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.norms import inverse_norms
from rankpo_kernels.objective import softplus
from rankpo_kernels.problem import (
    RankPOProblem,
    RankPOResult,
    RankPOSettings,
)

SLAB = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements of the torch form's temporaries


def rankpo(
    problem: RankPOProblem, weights_B: Tensor | None = None, needs: Sequence[bool] = ()
) -> RankPOResult:
    """Losses and similarities and, given weights, the gradients of sum_b w_b loss_b that `needs`
    names, for queries and each of the passages."""
    problem, weights_B, result = problem.prepared(weights_B, needs, native.new_empty)
    q_BD, on_cpu = problem.q_BD, problem.q_BD.device.type == "cpu"
    plain = problem.K <= native.MOST_PASSAGES and not problem.settings.by_ndcg
    if on_cpu and q_BD.dtype in native.TYPES and plain and native.usable():
        q_BD, *passages = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (q_BD, *problem.passages)
        )
        dq, *dps = result.grads
        each = [of for x, dx in zip(passages, dps, strict=True) for of in _each(x, dx)]
        rows, grads = zip(*each, strict=True)
        native.rankpo_rows(
            q_BD, rows, grads, problem.grades_BK, problem.reference_BC, weights_B,
            result.loss_B, result.similarity_BK, dq, problem.settings,
        )  # fmt: skip
    else:
        _in_slabs(problem, weights_B, result)
    return result


def _each(x: Tensor, dx: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """[B, D] of every passage of a query, with its gradient."""
    if x.dim() == 2:
        return [(x, dx)]
    return list(zip(x.unbind(1), [None] * x.shape[1] if dx is None else dx.unbind(1), strict=True))


def _in_slabs(problem: RankPOProblem, weights_B: Tensor | None, result: RankPOResult) -> None:
    q_BD, passages, grades_BK, reference_BC, settings = problem
    (B, D), K, dtype = q_BD.shape, problem.K, result.loss_B.dtype
    size = max(1, SLAB[q_BD.device.type] // max(1, K * max(K, D)))  # [K, D] and [K, K] a query
    for rows in (slice(start, start + size) for start in range(0, B, size)):
        parts = [x[rows] if x.dim() == 3 else x[rows, None] for x in passages]
        q_R1D, p_RKD = q_BD[rows, None].to(dtype), torch.cat(parts, 1).to(dtype)
        grades_RK, reference_RC = (
            None if x is None else x[rows] for x in (grades_BK, reference_BC)
        )
        absent_RK = None if grades_RK is None else grades_RK.isnan()
        if absent_RK is not None:
            p_RKD = p_RKD.masked_fill(absent_RK[:, :, None], 0)
        inverse_q: Tensor | float = 1.0
        inverse_p: Tensor | None = None
        if settings.normalize:
            inverse_q = inverse_norms(q_R1D[:, 0], dtype)[:, None, None]
            inverse_p = inverse_norms(p_RKD.flatten(0, 1), dtype).view(-1, K, 1)
            q_R1D, p_RKD = q_R1D * inverse_q, p_RKD * inverse_p
        s_RK = (q_R1D * p_RKD).sum(2)
        loss_R, slope_RK = loss_and_slopes(s_RK, grades_RK, reference_RC, settings)
        result.loss_B[rows], result.similarity_BK[rows] = loss_R, s_RK
        if weights_B is None:
            continue
        slope_RK = (slope_RK * weights_B[rows, None])[:, :, None]
        along_RK = slope_RK * s_RK[:, :, None] if settings.normalize else torch.zeros_like(slope_RK)
        dq, *dps = result.grads
        if dq is not None:
            sum_RD = (slope_RK * p_RKD).sum(1, keepdim=True) - along_RK.sum(1, keepdim=True) * q_R1D
            dq[rows] = (inverse_q * sum_RD)[:, 0].to(dq.dtype)
        first = 0
        for part, dp in zip(parts, dps, strict=True):
            k = slice(first, first := first + part.shape[1])
            if dp is not None:
                dp_RkD = slope_RK[:, k] * q_R1D - along_RK[:, k] * p_RKD[:, k]
                if inverse_p is not None:
                    dp_RkD *= inverse_p[:, k]
                dp[rows] = dp_RkD.view_as(dp[rows]).to(dp.dtype)


def loss_and_slopes(
    s_RK: Tensor, grades_RK: Tensor | None, reference_RC: Tensor | None, settings: RankPOSettings
) -> tuple[Tensor, Tensor]:
    """Losses [R] of similarities, and d loss/d s [R, K]."""
    R, K = s_RK.shape
    if grades_RK is None:
        above_RKK = torch.ones(2, 2, dtype=torch.bool, device=s_RK.device).triu(1)
    else:
        above_RKK = grades_RK[:, :, None] > grades_RK[:, None, :]
    ref_RK = torch.zeros_like(s_RK)
    if reference_RC is not None:
        ref_RK = F.pad(reference_RC, (0, K - reference_RC.shape[1]))
    if settings.listwise:
        r_RK = settings.beta / settings.temperature * (s_RK - ref_RK)
        lower_RKK = r_RK[:, None].masked_fill(~above_RKK, -torch.inf)
        lse_RK1 = lower_RKK.logsumexp(2, keepdim=True)
        counts_RK = above_RKK.any(2)
        gap_RK = lse_RK1[:, :, 0] - r_RK
        pull_RK = gap_RK.sigmoid().where(counts_RK, 0)
        push_RKK = (pull_RK[:, :, None] * (lower_RKK - lse_RK1).exp()).where(above_RKK, 0)
        slope_RK = settings.beta / settings.temperature * (push_RKK.sum(1) - pull_RK)
        return softplus(gap_RK).where(counts_RK, 0).sum(1), slope_RK
    advantage_RKK = s_RK[:, :, None] - s_RK[:, None]
    over_RKK = advantage_RKK - (ref_RK[:, :, None] - ref_RK[:, None])
    loss_RKK, slope_RKK = torch.zeros_like(over_RKK), torch.zeros_like(over_RKK)
    if settings.rankpo_weight:
        x = settings.beta * (over_RKK / settings.temperature - settings.gamma_beta_ratio)
        if settings.hinge:
            loss, slope = (1 - x).relu(), torch.where(x < 1, -1.0, 0.0 * x)  # NaN stays NaN
        else:
            loss = softplus(-x) + settings.label_smoothing * x
            slope = settings.label_smoothing - (-x).sigmoid()
        loss_RKK += settings.rankpo_weight * loss
        slope_RKK += settings.rankpo_weight * settings.beta / settings.temperature * slope
    if settings.sft_weight:
        x = advantage_RKK / settings.temperature
        loss_RKK += settings.sft_weight * softplus(-x)
        slope_RKK -= settings.sft_weight / settings.temperature * (-x).sigmoid()
    share: Tensor | float = 1.0
    if settings.by_ndcg and grades_RK is not None:
        changes_RKK = ndcg_changes(s_RK, grades_RK)
        loss_RKK, slope_RKK = changes_RKK * loss_RKK, changes_RKK * slope_RKK
    else:
        share = 1 / above_RKK.sum((-2, -1)).clamp(min=1).to(s_RK.dtype)[..., None]
    slope_RKK = slope_RKK.where(above_RKK, 0)
    slope_RK = slope_RKK.sum(2) - slope_RKK.sum(1)
    loss_R1 = loss_RKK.where(above_RKK, 0).sum((1, 2))[:, None]
    return (share * loss_R1)[:, 0], share * slope_RK


def ndcg_changes(s_RK: Tensor, grades_RK: Tensor) -> Tensor:
    """|nDCG as ranked by s - nDCG with a and b in each other's places| [R, K, K]; of equal s the
    earlier ranks higher. Gains are 2^grade - 1, of a grade below 0 none."""
    K = s_RK.shape[1]
    there_RK = ~grades_RK.isnan()
    grades_RK = grades_RK.where(there_RK, 0).clamp(min=0)
    # Divided by 2^highest, as large grades would overflow; it cancels against the ideal's.
    top_R1 = grades_RK.amax(1, keepdim=True)
    gain_RK = (grades_RK - top_R1).exp2() - (-top_R1).exp2()
    places_K = torch.arange(K, device=s_RK.device)
    discount_K = 1 / (places_K + 2).to(s_RK.dtype).log2()
    ideal_R1 = (gain_RK.sort(1, descending=True).values * discount_K).sum(1, keepdim=True)
    ahead_RKK = s_RK[:, None] > s_RK[:, :, None]  # b of a
    ahead_RKK |= (s_RK[:, None] == s_RK[:, :, None]) & (places_K < places_K[:, None])
    discount_RK = discount_K[(ahead_RKK & there_RK[:, None]).sum(2)]
    gain_RK = gain_RK / ideal_R1.masked_fill(ideal_R1 == 0, torch.inf)
    between = [(x[:, :, None] - x[:, None]).abs() for x in (gain_RK, discount_RK)]
    return between[0] * between[1]
