"""Losses of every pair of a batch by itself: RankPO of each query's positive against every other
passage, and SigLIP's sigmoid loss.

    margin_ij = ((s_i,label - s_ij) - (r_i,label - r_ij)) / temperature - gamma_beta_ratio
    RankPO: loss_i = mean over j of the pair loss of `rankpo`
    SigLIP: loss_i = -sum over j of logsigmoid(z_ij (scale s_ij + bias)),  z = -1, for the label 1

j are the passages that are not known to query i, for SigLIP with its label; s are similarities, r
those of a frozen reference model.
M queries, N passages, D dims, G dims of the reference. The M x N scores are never stored: a pair's
gradient needs its own score and the positive's, so one pass over chunks of them has it all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankpo_fast.ops.checks import (
    as_scale,
    check_embeddings,
    check_precision,
    check_relations,
    check_sides,
    check_values,
    check_workspace,
    group_labels,
    guide_sides,
    in_one_dtype,
    known_definition,
    one_number,
    relations_of,
    takes_triton,
    widest_dtype,
)
from rankpo_fast.ops.common import (
    LossAndGrads,
    batch_weights,
    called,
    crossing,
    in_own_memory,
    loss_op,
    mean,
    register_gradients,
    unit_rows,
    weighted_sum,
)
from rankpo_fast.ops.options import InBatchRankPOCall, Reduction, SigLIPCall, takes
from rankpo_fast.ops.rankpo import margin_loss
from rankpo_fast.ops.ranks import across_ranks
from rankpo_kernels.chunked import in_batch as chunked
from rankpo_kernels.objective import expanded_weights, softplus
from rankpo_kernels.problem import (
    SIGLIP,
    InBatchProblem,
    InBatchResult,
    InBatchSettings,
    compute_dtype,
    gradient_dtype,
)
from rankpo_kernels.relations import Relations, count_others, known


def in_batch_rankpo_definition(
    q_MD: Tensor, p_ND: Tensor, relations: Relations, normalize: bool = True, **margin: Any
) -> Tensor:
    """Losses [M]: what the op must equal; the reference is the relations' guide. Stores M x N."""
    unit, labels_M1 = unit_rows if normalize else Tensor.clone, relations.labels_M[:, None]

    def advantage(q: Tensor, p: Tensor) -> Tensor:
        s_MN = unit(q) @ unit(p).T
        return s_MN.gather(1, labels_M1) - s_MN

    reference = None
    if relations.guide is not None:
        reference = advantage(*(x.to(q_MD.dtype) for x in relations.guide))
    loss_MN = margin_loss(advantage(q_MD, p_ND), reference_margins=reference, **margin)
    known_MN = known_definition(relations, len(p_ND))
    return loss_MN.masked_fill(known_MN, 0).sum(1) / (~known_MN).sum(1).clamp(min=1)


def siglip_definition(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor | float, bias: Tensor | float, relations: Relations,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Losses [M]: what the op must equal. Stores M x N."""
    unit, labels_M1 = unit_rows if normalize else Tensor.clone, relations.labels_M[:, None]
    x_MN = scale * (unit(q_MD) @ unit(p_ND).T) + bias
    known_MN = known_definition(relations, len(p_ND))
    loss_M = softplus(x_MN).masked_fill(known_MN, 0).sum(1)
    return loss_M + softplus(-x_MN.gather(1, labels_M1))[:, 0]


@loss_op("in_batch")
def _in_batch(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor, relations: list[Tensor | None], settings: str
) -> Tensor:
    """Losses [M] in 2MND flops; their backward recomputes the scores (8MND in all)."""
    return in_own_memory(_launch(q, p, scale, bias, relations, settings)[0].loss_M)[0]


@loss_op("in_batch_grads")
def _in_batch_grads(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor,
    relations: list[Tensor | None], settings: str, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_i weights_i loss_i, losses, similarities of the positives, statistics [4, M] (hardest,
    wins, total x, pairs), and the gradients of (q, p, scale, bias); those not needed are empty."""
    result, count_M = _launch(q, p, scale, bias, relations, settings, weights, tuple(needs))
    stats_4M = torch.stack([result.hardest_M, result.wins_M, result.total_M, count_M])
    made = (result.dq_MD, result.dp_ND, result.d_scale, result.d_bias)
    grads = [
        empty if grad is None else grad.to(empty.device)
        for grad, empty in zip(made, _no_grads(q, scale, bias), strict=True)
    ]
    total = (weights * result.loss_M).sum()
    (loss_M, positive_M), (dq, dp, d_scale, d_bias) = (
        in_own_memory(result.loss_M, result.positive_M), grads,
    )  # fmt: skip
    return total, loss_M, positive_M, stats_4M, dq, dp, d_scale, d_bias


def _launch(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor, relations: list[Tensor | None],
    settings: str, weights: Tensor | None = None, needs: Sequence[bool] = (False,) * 4,
) -> tuple[InBatchResult, Tensor]:  # fmt: skip
    """What a row's sum is divided by joins its weight: kernels know sums alone. With it the number
    of pairs [M]."""
    problem = InBatchProblem(
        q, p, scale, bias, Relations._make(relations), InBatchSettings.parse(settings)
    )
    if q.device.type == "cpu":
        check_values(problem.relations, len(p), 0)
    keys, dtype = None, compute_dtype(q.dtype)
    count_M = q.new_full((len(q),), len(p) - 1, dtype=dtype)
    if not problem.relations.labels_alone:
        keys = known(problem.relations, len(p))
        count_M = count_others(keys).to(dtype)
    share: Tensor | float = 1.0  # of a pair in its row's loss: a number where all rows have as many
    if problem.settings.kind != SIGLIP:
        share = 1 / max(len(p) - 1, 1) if keys is None else 1 / count_M.clamp(min=1)
    if weights is not None:
        weights = expanded_weights(weights, len(q), q.device, dtype) * share
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        result = launcher_of(problem)(problem, keys, weights, needs)
    return result._replace(loss_M=result.loss_M * share), count_M


def launcher_of(problem: InBatchProblem) -> Callable[..., InBatchResult]:
    if not takes_triton(problem.q_MD, problem.settings):
        return chunked.in_batch
    from rankpo_kernels.triton import in_batch as triton  # Linux alone has it

    return triton.in_batch


def _no_grads(q: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    """Empty tensors of the gradients' dtypes and devices; scale and bias may live on the CPU."""
    embeddings = [q.new_empty(0, dtype=gradient_dtype(q.dtype)) for _ in range(2)]
    return embeddings + [x.new_empty(0, dtype=compute_dtype(q.dtype)) for x in (scale, bias)]


@_in_batch.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], dtype=compute_dtype(q.dtype))


@_in_batch_grads.register_fake
def _(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor, relations: list, settings: str,
    weights: Tensor, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = [q.new_empty(*size, q.shape[0], dtype=compute_dtype(q.dtype)) for size in ((), (), (4,))]
    grads = [
        empty.new_empty(x.shape) if need else empty
        for empty, x, need in zip(
            _no_grads(q, scale, bias), (q, p, scale, bias), needs, strict=True
        )
    ]
    return rows[0].new_empty(()), *rows, *grads


register_gradients(_in_batch, _in_batch_grads)


def _reduced(problem: InBatchProblem, weights: Tensor, reduction: Reduction) -> Tensor:
    needs = [torch.is_grad_enabled() and x.requires_grad for x in problem.leaves]
    if reduction == "none" or not any(needs):
        arguments = crossing(problem)
        loss_M = _in_batch(*arguments) if any(needs) else called(_in_batch, *arguments)
        loss_M = loss_M * weights
        return loss_M if reduction == "none" else loss_M.sum()
    return weighted_sum(_in_batch_grads, problem, weights, needs)


@takes(InBatchRankPOCall)
def in_batch_rankpo_loss(call: InBatchRankPOCall) -> Tensor:
    """RankPO (arXiv 2503.10723) with the positive of each query preferred to every other passage of
    the batch; the loss of a query is the mean over these pairs.

    Args:
        queries, passages, labels: [M, D], [N, D] and [M] as in `info_nce_loss`.
        reference_queries, reference_passages: [M, G] and [N, G], embeddings of the frozen reference
            model, which receive no gradient. None is the reference-free form (SimRankPO).
        beta, temperature, gamma_beta_ratio, label_smoothing, loss_type, sft_weight, rankpo_weight:
            as in `rankpo_loss`.
        normalize, reduction, weights, query_ids, passage_ids, excluded, workspace_bytes, backend,
            precision, process_group: as in `info_nce_loss`; who is no negative there makes no pair
            here.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). A query without any pair has loss 0.

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    part = across_ranks(call, check_in_batch_rankpo)
    return _reduced(part.problem, part.weights_M, call.reduction)


class InBatchRankPOStats(NamedTuple):
    """What a training log wants to know of a batch; tensors on its device, no host sync. Of no
    queries all are 0."""

    accuracy: Tensor  # share of pairs with a margin above 0
    margin: Tensor  # mean over pairs
    positive_similarity: Tensor  # mean over queries
    hardest_negative_similarity: Tensor  # mean over the queries that have a pair


class InBatchRankPOGrads(NamedTuple):
    queries: Tensor  # [M, D]
    passages: Tensor  # [N, D]


@takes(InBatchRankPOCall)
@torch.no_grad()
def in_batch_rankpo_loss_and_grads(
    call: InBatchRankPOCall,
) -> LossAndGrads[InBatchRankPOGrads, InBatchRankPOStats]:
    """`in_batch_rankpo_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        All are those of `in_batch_rankpo_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, grads, stats): `InBatchRankPOGrads` in the dtypes of their inputs, and
        `InBatchRankPOStats` of a rank's own queries.
    """
    part = across_ranks(call, check_in_batch_rankpo)
    if call.reduction == "none":  # told after the ranks have agreed on it
        raise ValueError("in_batch_rankpo_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    loss, _, positive_M, (hardest_M, wins_M, total_M, count_M), dq, dp, *_ = called(
        _in_batch_grads, *crossing(part.problem), part.weights_M, [True, True, False, False]
    )
    dq, dp = part.home(dq, dp)
    pairs, has_pair_M = count_M.sum().clamp(min=1), count_M > 0
    stats = InBatchRankPOStats(
        wins_M.sum() / pairs,
        -total_M.sum() / pairs / call.beta,
        mean(positive_M),
        hardest_M.masked_fill(~has_pair_M, 0).sum() / has_pair_M.sum().clamp(min=1),
    )
    grads = InBatchRankPOGrads(dq.to(call.queries.dtype), dp.to(call.passages.dtype))
    return LossAndGrads(loss, grads, stats)


@takes(SigLIPCall)
def siglip_loss(call: SigLIPCall) -> Tensor:
    """Sigmoid loss of every pair of the batch (Zhai et al. 2023, SigLIP), summed over the passages
    of each query.

    Args:
        queries, passages, labels: [M, D], [N, D] and [M] as in `info_nce_loss`.
        scale, bias: of the similarities; as a tensor of one number each receives a gradient. The
            defaults are what the paper starts from.
        normalize, reduction, weights, query_ids, passage_ids, excluded, workspace_bytes, backend,
            precision, process_group: as in `info_nce_loss`; who is no negative there is left out
            here. Across ranks the gradients of scale and bias are those of the own loss: their mean
            over ranks, which DDP takes, is the gradient of one process (of reduction "sum" their
            sum).

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    part = across_ranks(call, check_siglip)
    return _reduced(part.problem, part.weights_M, call.reduction)


def check_in_batch_rankpo(call: InBatchRankPOCall) -> tuple[InBatchProblem, Tensor]:
    """x = -beta * margin, see `rankpo_kernels.chunked.in_batch`."""
    reference = _both(call.reference_queries, call.reference_passages)
    scale, bias = call.beta / call.temperature, call.beta * call.gamma_beta_ratio
    settings = InBatchSettings.of(call, kind=call.loss_type, sft_scale=1 / call.temperature)
    return _check(call, reference, scale, bias, settings)


def check_siglip(call: SigLIPCall) -> tuple[InBatchProblem, Tensor]:
    settings = InBatchSettings(
        normalize=bool(call.normalize), workspace_bytes=call.workspace_bytes,
        backend=call.backend, precision=call.precision, kind=SIGLIP,
    )  # fmt: skip
    return _check(call, None, call.scale, call.bias, settings)


def _check(
    call: InBatchRankPOCall | SigLIPCall, reference: tuple[Tensor, Tensor] | None,
    scale: float | Tensor, bias: float | Tensor, settings: InBatchSettings,
) -> tuple[InBatchProblem, Tensor]:  # fmt: skip
    """The problem and the weights of its rows."""
    check_sides(call)
    M, N, device = len(call.queries), len(call.passages), call.queries.device
    embeddings = {"queries": call.queries, "passages": call.passages}
    check_embeddings(embeddings | guide_sides("reference", reference, M, N))
    dtype = widest_dtype(embeddings.values())
    q, p = call.queries.to(dtype), call.passages.to(dtype)
    check_workspace(call, N, q)
    check_precision(call, q)
    labels = call.labels
    if labels is None:
        labels, _ = group_labels(M, N, device)
    relations = relations_of(call, labels, in_one_dtype(reference, dtype))
    check_relations(relations, call)
    weights = batch_weights(q, call.weights, call.reduction)
    numbers = as_scale(None, scale, "cpu", device), _as_bias(bias, device)
    return InBatchProblem(q, p, *numbers, relations, settings), weights


def _both(
    reference_queries: Tensor | None, reference_passages: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if reference_queries is not None and reference_passages is not None:
        return reference_queries, reference_passages
    if reference_queries is None and reference_passages is None:
        return None
    missing = "queries" if reference_queries is None else "passages"
    raise ValueError(f"a reference needs both its embeddings: reference_{missing} are missing")


def _as_bias(bias: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(bias, Tensor):
        return one_number("bias", bias, device)
    if not -math.inf < bias < math.inf:
        raise ValueError(f"bias must be finite, got {bias}")
    return torch.full((), bias, dtype=torch.float64)
