"""Distillation: similarities of K passages to a query follow a teacher's scores of them.

    s = cos(q, p) / temperature,  t = score / teacher_temperature,  d = s - t
    margin_mse: mean over pairs (a, b) of (d_a - d_b)^2, the squared error of the margin s_a - s_b
    kl:         sum_k P_k (log P_k - log softmax(s)_k),  P = softmax(t)

Hofstaetter et al. 2020; Hinton et al. 2015. B queries, K passages of each, D dims: plain torch, as
nothing is larger than the embeddings themselves.
"""

import torch
from torch import Tensor

from rankpo_fast.ops.checks import check_embeddings, widest_dtype
from rankpo_fast.ops.common import row_weights, unit_rows
from rankpo_fast.ops.options import (
    DistillationCall,
    DistillKLCall,
    MarginMSECall,
    takes,
)
from rankpo_kernels.problem import compute_dtype


def margin_mse_definition(s_BK: Tensor, t_BK: Tensor, pairs: str = "all") -> Tensor:
    """Losses [B] of scaled similarities and scores, a pair at a time."""
    loss_B = []
    for s_K, t_K in zip(s_BK, t_BK, strict=True):
        s_K, t_K = s_K[~t_K.isnan()], t_K[~t_K.isnan()]
        last = len(t_K) if pairs == "all" else min(1, len(t_K))
        errors = [
            ((s_K[a] - s_K[b]) - (t_K[a] - t_K[b])) ** 2
            for a in range(last)
            for b in range(a + 1, len(t_K))
        ]
        loss_B.append(torch.stack(errors).mean() if errors else 0 * s_K.sum())
    return torch.stack(loss_B)


def distill_kl_definition(s_BK: Tensor, t_BK: Tensor) -> Tensor:
    """Losses [B] of scaled similarities and scores, a query at a time."""
    loss_B = []
    for s_K, t_K in zip(s_BK, t_BK, strict=True):
        s_K, t_K = s_K[~t_K.isnan()], t_K[~t_K.isnan()]
        log_p, log_q = t_K.log_softmax(0), s_K.log_softmax(0)
        loss_B.append((log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(loss_B)


@takes(MarginMSECall)
def margin_mse_loss(call: MarginMSECall) -> Tensor:
    """Squared error of similarity margins against a teacher's margins (MarginMSE, Hofstaetter et
    al. 2020).

    Args:
        queries: [B, D] of fp64, fp32, bf16 or fp16. A zero vector has similarity and gradient 0.
        passages: [B, K, D], same device; where dtypes differ, the wider one is taken.
        scores: [B, K], a teacher's; without gradient. NaN is padding: no passage, whatever its
            embedding.
        pairs: "all", or "first": the first passage that is there against each other, as where it is
            the positive. A query's loss is their mean, 0 if there is none.
        temperature: > 0, similarities are divided by it.
        teacher_temperature: > 0, scores are divided by it.
        normalize: similarities are cosines, else dot products.
        reduction: "mean" (weighted by `weights`), "sum", or "none" for [B].
        weights: [B] >= 0, the importance of each query.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, devices or options that do not fit.
    """
    s_BK, t_BK = _scaled(call)
    there_BK = ~t_BK.isnan()
    # Padding goes before the difference, as NaN * 0 in its gradient would be NaN.
    d_BK = s_BK.where(there_BK, 0) - t_BK.where(there_BK, 0)
    count_B1 = there_BK.sum(1, keepdim=True)
    if call.pairs == "first":
        first_BK = there_BK & (there_BK.cumsum(1) == 1)
        middle_B1 = d_BK.where(first_BK, 0).sum(1, keepdim=True)
        pairs_B1 = count_B1 - 1
    else:  # the sum over pairs is K times that around the mean
        middle_B1 = d_BK.sum(1, keepdim=True) / count_B1.clamp(min=1)
        pairs_B1 = (count_B1 - 1) / 2
    squares_BK = (d_BK - middle_B1).where(there_BK, 0).square()
    return _reduced(call, squares_BK.sum(1) / pairs_B1[:, 0].clamp(min=0.5))


@takes(DistillKLCall)
def distill_kl_loss(call: DistillKLCall) -> Tensor:
    """KL divergence of a query's distribution over its passages from a teacher's, which is 0 where
    both are the same.

    Args:
        All are those of `margin_mse_loss`, which has `pairs` besides. Gradients are not multiplied
        by temperatures.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, devices or options that do not fit.
    """
    s_BK, t_BK = _scaled(call)
    there_BK = ~t_BK.isnan()
    # A number far below all others, not -inf: that less itself is NaN where nothing is there.
    least = torch.finfo(s_BK.dtype).min
    log_p_BK = t_BK.where(there_BK, least).log_softmax(1)
    log_q_BK = s_BK.where(there_BK, least).log_softmax(1)
    parts_BK = log_p_BK.exp() * (log_p_BK - log_q_BK)
    return _reduced(call, parts_BK.where(there_BK, 0).sum(1))


def similarities(queries: Tensor, passages: Tensor, normalize: bool = True) -> Tensor:
    """[B, K] of [B, D] and [B, K, D], in fp32 (fp64)."""
    dtype = compute_dtype(widest_dtype((queries, passages)))
    q_BD, p_BKD = queries.to(dtype), passages.to(dtype)
    if normalize:
        q_BD, p_BKD = _unit(q_BD), _unit(p_BKD.flatten(0, 1)).view(p_BKD.shape)
    return (q_BD[:, None] * p_BKD).sum(2)


def _unit(x_ND: Tensor) -> Tensor:
    """`unit_rows`, of rows divided by their largest elements, whose squares stay in range."""
    top_N1 = torch.linalg.vector_norm(x_ND.detach(), ord=torch.inf, dim=1, keepdim=True)
    return unit_rows(x_ND / top_N1.masked_fill(top_N1 == 0, 1))


def _scaled(call: DistillationCall) -> tuple[Tensor, Tensor]:
    """Similarities and scores [B, K], divided by their temperatures."""
    queries, passages, scores = call.queries, call.passages, call.scores
    if queries.dim() != 2 or passages.dim() != 3 or not passages.shape[1]:
        raise ValueError(
            f"queries and passages must be [B, D] and [B, K, D], got {tuple(queries.shape)}, "
            f"{tuple(passages.shape)}"
        )
    (B, D), (_, K, _) = queries.shape, passages.shape
    if passages.shape != (B, K, D):
        raise ValueError(f"passages must be [{B}, K, {D}], got {tuple(passages.shape)}")
    if scores.shape != (B, K) or scores.device != queries.device:
        raise ValueError(
            f"scores must be {[B, K]} on {queries.device}, got {list(scores.shape)} on "
            f"{scores.device}"
        )
    check_embeddings({"queries": queries, "passages": passages})
    with torch.autocast(queries.device.type, enabled=False):
        dtype = compute_dtype(widest_dtype((queries, passages)))
        passages = passages.masked_fill(scores.isnan()[:, :, None], 0)
        s_BK = similarities(queries, passages, call.normalize) / call.temperature
        return s_BK, scores.detach().to(dtype) / call.teacher_temperature


def _reduced(call: DistillationCall, loss_B: Tensor) -> Tensor:
    loss_B = loss_B * row_weights(loss_B, call.weights, len(loss_B), call.reduction)
    return loss_B if call.reduction == "none" else loss_B.sum()
