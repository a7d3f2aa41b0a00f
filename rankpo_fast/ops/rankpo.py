"""RankPO: preference optimisation of similarities (arXiv 2503.10723).

    margin_b = ((cos(q, c) - cos(q, r)) - reference_margin_b) / temperature - gamma_beta_ratio
    sigmoid: -(1 - e) logsigmoid(beta margin) - e logsigmoid(-beta margin),  e = label_smoothing
    hinge:   max(0, 1 - beta margin)
    sft:     -logsigmoid((cos(q, c) - cos(q, r)) / temperature), two-way cross entropy

B pairs, K passages of a query, D dims. The op reads the embeddings once and writes their gradients
in the same pass; it serves pairs and graded groups (`rankpo_fast.ops.rankpo_group`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.ops.checks import check_embeddings, widest_dtype
from rankpo_fast.ops.common import LossAndGrads, mean, row_weights, scaled_grads, unit_rows
from rankpo_fast.ops.options import RankPOCall, Reduction, takes
from rankpo_kernels.chunked import rankpo as chunked
from rankpo_kernels.problem import (
    LossType,
    RankPOProblem,
    RankPOResult,
    RankPOSettings,
    compute_dtype,
    gradient_dtype,
)


def pair_similarities_definition(
    q_BD: Tensor, c_BD: Tensor, r_BD: Tensor, normalize: bool = True
) -> Tensor:
    """Similarities [2, B] of chosen and rejected."""
    if normalize:
        q_BD, c_BD, r_BD = map(unit_rows, (q_BD, c_BD, r_BD))
    return torch.stack([(q_BD * c_BD).sum(1), (q_BD * r_BD).sum(1)])


def margin_loss(
    advantage: Tensor,
    *,
    reference_margins: Tensor | None = None,
    beta: float = 2.0,
    temperature: float = 0.1,
    gamma_beta_ratio: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    sft_weight: float = 0.0,
    rankpo_weight: float = 1.0,
) -> Tensor:
    """Losses of advantages = similarity of chosen minus that of rejected, of any shape, in plain
    torch: what the ops must equal."""
    over = advantage if reference_margins is None else advantage - reference_margins
    logit = beta * (over / temperature - gamma_beta_ratio)
    if loss_type == "hinge":
        loss = torch.relu(1 - logit)
    else:
        loss = -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)
    return rankpo_weight * loss - sft_weight * F.logsigmoid(advantage / temperature)


@torch.library.custom_op("rankpo_fast::rankpo", mutates_args=())
def _rankpo(
    q: Tensor, passages: list[Tensor], grades: Tensor | None, reference: Tensor | None,
    settings: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses [B] and similarities [B, K] of a `RankPOProblem`.

    The backward reads the embeddings once more.
    """
    result = _launch(q, passages, grades, reference, settings)
    return result.loss_B, result.similarity_BK


@torch.library.custom_op("rankpo_fast::rankpo_grads", mutates_args=())
def _rankpo_grads(
    q: Tensor, passages: list[Tensor], grades: Tensor | None, reference: Tensor | None,
    settings: str, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """sum_b weights_b loss_b, similarities, and gradients of queries and passages, in one pass;
    those not needed are empty.

    Gradients of fp16 come in fp32: a loss scale still to be multiplied in would find them
    underflowed.
    """
    result = _launch(q, passages, grades, reference, settings, weights, needs)
    empty = q.new_empty(0, dtype=gradient_dtype(q.dtype))
    grads = [empty.clone() if grad is None else grad for grad in result.grads]
    return (weights * result.loss_B).sum(), result.similarity_BK, grads


def _launch(
    q: Tensor, passages: list[Tensor], grades: Tensor | None, reference: Tensor | None,
    settings: str, weights: Tensor | None = None, needs: Sequence[bool] = (),
) -> RankPOResult:  # fmt: skip
    problem = RankPOProblem(q, passages, grades, reference, RankPOSettings.parse(settings))
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return launcher_of(problem)(problem, weights, needs)


def launcher_of(problem: RankPOProblem) -> Callable[..., RankPOResult]:
    """Triton on CUDA, except in fp64, for weights by nDCG and groups that do not fit a tile."""
    q = problem.q_BD
    if q.device.type != "cuda" or q.dtype == torch.float64 or problem.settings.by_ndcg:
        return chunked.rankpo
    from rankpo_kernels.triton import rankpo as triton  # Linux alone has it

    return triton.rankpo if problem.K <= triton.MOST_PASSAGES else chunked.rankpo


def _similarities(q: Tensor, passages: list[Tensor]) -> Tensor:
    K = sum([x.shape[1] if x.dim() == 3 else 1 for x in passages])
    return q.new_empty(q.shape[0], K, dtype=compute_dtype(q.dtype))


@_rankpo.register_fake
def _(q: Tensor, passages: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], dtype=compute_dtype(q.dtype)), _similarities(q, passages)


@_rankpo_grads.register_fake
def _(
    q: Tensor, passages: list[Tensor], grades: Tensor | None, reference: Tensor | None,
    settings: str, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    similarity_BK, dtype = _similarities(q, passages), gradient_dtype(q.dtype)
    grads = [
        q.new_empty(x.shape if need else (0,), dtype=dtype)
        for x, need in zip((q, *passages), needs, strict=True)
    ]
    return similarity_BK.new_empty(()), similarity_BK, grads


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    q, passages, grades, reference, ctx.settings = inputs
    ctx.save_for_backward(q, grades, reference, *passages)


def _grads(ctx: Any, loss_grads_B: Tensor | None, _: Any) -> tuple:
    """One more pass with the upstream gradients as weights."""
    q, grades, reference, *passages = ctx.saved_tensors
    if loss_grads_B is None:
        return None, [None] * len(passages), None, None, None
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    _, _, grads = _rankpo_grads(
        q, passages, grades, reference, ctx.settings, loss_grads_B.contiguous(), needs
    )
    dq, *dps = (
        grad.to(x.dtype) if need else None
        for x, grad, need in zip((q, *passages), grads, needs, strict=True)
    )
    return dq, dps, None, None, None


def _save_grads(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    q, passages, *_, ctx.needs = inputs
    ctx.dtypes = [x.dtype for x in (q, *passages)]
    ctx.save_for_backward(*output[2])


def _scaled_grads(ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple:
    if any(x is not None for x in torch.utils._pytree.tree_leaves(others)):
        raise RuntimeError("rankpo_loss has no second derivative")
    dq, *dps = scaled_grads(ctx.saved_tensors, grad_loss, ctx.needs, ctx.dtypes)
    return dq, dps, None, None, None, None, None


_rankpo.register_autograd(_grads, setup_context=_save)
_rankpo_grads.register_autograd(_scaled_grads, setup_context=_save_grads)


def check_ranking(
    queries: Tensor, passages: dict[str, Tensor], grades: Tensor | None,
    reference: tuple[str, Tensor | None], settings: RankPOSettings,
) -> RankPOProblem:  # fmt: skip
    """What all rankings need checked; names are for the messages."""
    embeddings = {"queries": queries} | passages
    check_embeddings(embeddings)
    dtype = widest_dtype(embeddings.values())
    name, values = reference
    if values is not None:
        *shape, _ = next(iter(passages.values())).shape
        if list(values.shape) != shape or values.device != queries.device:
            raise ValueError(
                f"{name} must be {shape} on {queries.device}, got {list(values.shape)} "
                f"on {values.device}"
            )
        values = values.detach().to(compute_dtype(dtype))
        values = values if values.dim() == 2 else values[:, None]
    cast = [x.to(dtype) for x in passages.values()]
    return RankPOProblem(queries.to(dtype), cast, grades, values, settings)


def crossing(problem: RankPOProblem) -> tuple:
    """The ops' arguments."""
    tensors = (problem.q_BD, problem.passages, problem.grades_BK, problem.reference_BC)
    return *tensors, problem.settings.text()


def ranking_loss(problem: RankPOProblem, weights: Tensor | None, reduction: Reduction) -> Tensor:
    q, leaves = problem.q_BD, [problem.q_BD, *problem.passages]
    needs = [torch.is_grad_enabled() and x.requires_grad for x in leaves]
    weights_B = row_weights(q, weights, len(q), reduction)
    # In one pass, unless on a GPU: what backward starts from is not known there, and gradients
    # times a number are read and written once more, where a second pass only reads.
    if reduction == "none" or not any(needs) or q.is_cuda:
        loss_B = _rankpo(*crossing(problem))[0] * weights_B
        return loss_B if reduction == "none" else loss_B.sum()
    return _rankpo_grads(*crossing(problem), weights_B, needs)[0]


def check_pairs(call: RankPOCall) -> RankPOProblem:
    queries, chosen, rejected = call.queries, call.chosen, call.rejected
    if queries.dim() != 2 or not queries.shape == chosen.shape == rejected.shape:
        shapes = [tuple(x.shape) for x in (queries, chosen, rejected)]
        raise ValueError(
            "queries, chosen and rejected must all be [B, D], got {}, {}, {}".format(*shapes)
        )
    settings = RankPOSettings.of(call, listwise=False, by_ndcg=False)
    passages = {"chosen": chosen, "rejected": rejected}
    reference = ("reference_margins", call.reference_margins)
    return check_ranking(queries, passages, None, reference, settings)


@torch.no_grad()
def pair_similarities(queries: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Cosine similarities [2, B] of chosen and rejected to the queries, in fp32 (fp64), without
    gradient: what reference margins are made of. Arguments as in `rankpo_loss`."""
    problem = check_pairs(RankPOCall(queries, chosen, rejected))
    return _rankpo(*crossing(problem))[1].T


@takes(RankPOCall)
def rankpo_loss(call: RankPOCall) -> Tensor:
    """RankPO loss of preference pairs (arXiv 2503.10723); defaults of the authors' script.

    Args:
        queries, chosen, rejected: [B, D] of fp64, fp32, bf16 or fp16, on one device; where dtypes
            differ, the widest one is taken. A zero vector has similarity and gradient 0.
        reference_margins: [B], similarity of chosen minus that of rejected under the frozen
            reference model, which receives no gradient. None is the reference-free form
            (SimRankPO).
        beta: > 0, how sharply the margin counts.
        temperature: > 0, similarities are divided by it.
        gamma_beta_ratio: a margin to be exceeded, in the units of margins.
        label_smoothing: in [0, 0.5), the share of preferences taken to be flipped. Without effect
            on the hinge, which warns.
        loss_type: "sigmoid" or "hinge".
        normalize: similarities are cosines, else dot products.
        reduction: "mean" (weighted by `weights`), "sum", or "none" for [B].
        weights: [B] >= 0, such as confidences.
        sft_weight, rankpo_weight: the loss is the weighted sum of the two-way cross entropy of
            chosen against rejected (the paper's SFT baseline, without reference) and RankPO.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, devices or options that do not fit.
    """
    return ranking_loss(check_pairs(call), call.weights, call.reduction)


class RankPOStats(NamedTuple):
    """What a training log wants to know of a batch; tensors on its device, no host sync. Each pair
    counts once, whatever its weight; of no pairs all are 0."""

    accuracy: Tensor  # share of pairs with a positive reward margin
    margin: Tensor  # mean of (cos(q, c) - cos(q, r)) - reference margin; times beta, of rewards
    chosen_similarity: Tensor
    rejected_similarity: Tensor

    def metrics(self, beta: float, reference: Tensor | float = 0.0) -> dict[str, Tensor]:
        """Means by their names in the original's log: scores are similarities, rewards
        beta * (score - reference), where `reference` is [2], of chosen and rejected."""
        scores = torch.stack([self.chosen_similarity, self.rejected_similarity])
        metrics = {"rewards/accuracies": self.accuracy}
        for name, values in (("rewards", beta * (scores - reference)), ("scores", scores)):
            metrics[f"{name}/chosen"], metrics[f"{name}/rejected"] = values
            metrics[f"{name}/margins"] = values[0] - values[1]
        return metrics


class RankPOGrads(NamedTuple):
    queries: Tensor  # [B, D] each
    chosen: Tensor
    rejected: Tensor


@takes(RankPOCall)
@torch.no_grad()
def rankpo_loss_and_grads(call: RankPOCall) -> LossAndGrads[RankPOGrads, RankPOStats]:
    """`rankpo_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        All are those of `rankpo_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, grads, stats): `RankPOGrads` in the dtypes of their inputs, and `RankPOStats`.
    """
    if call.reduction == "none":
        raise ValueError("rankpo_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    problem = check_pairs(call)
    weights_B = row_weights(problem.q_BD, call.weights, len(call.queries), call.reduction)
    loss, similarity_BK, grads = _rankpo_grads(*crossing(problem), weights_B, [True] * 3)
    chosen_B, rejected_B = similarity_BK.unbind(1)
    over_B = chosen_B - rejected_B
    if problem.reference_BC is not None:
        over_B = over_B - problem.reference_BC[:, 0]
    stats = RankPOStats(*map(mean, ((over_B > 0).float(), over_B, chosen_B, rejected_B)))
    inputs = (call.queries, call.chosen, call.rejected)
    cast = [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]
    return LossAndGrads(loss, RankPOGrads(*cast), stats)
