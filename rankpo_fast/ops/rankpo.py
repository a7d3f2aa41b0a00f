"""RankPO: preference optimisation of similarities (arXiv 2503.10723).

    margin_b = ((cos(q, c) - cos(q, r)) - reference_margin_b) / temperature - gamma_beta_ratio
    sigmoid: -(1 - e) logsigmoid(beta margin) - e logsigmoid(-beta margin),  e = label_smoothing
    hinge:   max(0, 1 - beta margin)
    sft:     -logsigmoid((cos(q, c) - cos(q, r)) / temperature), two-way cross entropy

B pairs, K passages of a query, D dims. The op reads the embeddings once and writes their gradients
in the same pass; it serves pairs and graded groups (`rankpo_fast.ops.rankpo_group`).
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.ops.common import (
    Reduction,
    check_embeddings,
    mean,
    row_weights,
    scaled_grads,
    unit_rows,
)
from rankpo_kernels import pairs
from rankpo_kernels.norms import compute_dtype
from rankpo_kernels.objective import gradient_dtype
from rankpo_kernels.pairs import Result, Rule

LossType = Literal["sigmoid", "hinge"]


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
    rule: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses [B] and similarities [B, K]; the arguments are those of `rankpo_kernels.pairs.ranked`.

    The backward reads the embeddings once more.
    """
    return _launch(q, passages, grades, reference, rule)[:2]


@torch.library.custom_op("rankpo_fast::rankpo_grads", mutates_args=())
def _rankpo_grads(
    q: Tensor, passages: list[Tensor], grades: Tensor | None, reference: Tensor | None,
    rule: list[float], weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """sum_b weights_b loss_b, similarities, and gradients of queries and passages, in one pass;
    those not needed are empty.

    Gradients of fp16 come in fp32: a loss scale still to be multiplied in would find them
    underflowed.
    """
    result = _launch(q, passages, grades, reference, rule, weights, needs)
    empty = q.new_empty(0, dtype=gradient_dtype(q.dtype))
    grads = [empty.clone() if grad is None else grad for grad in result.grads]
    return (weights * result.loss_B).sum(), result.similarity_BK, grads


def _launch(q, passages, grades, reference, rule, weights=None, needs=()) -> Result:
    launcher = _launcher(q, pairs.count(passages))
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return launcher(q, passages, grades, reference, Rule(*rule), weights, needs)


def _launcher(q: Tensor, K: int) -> Callable[..., Result]:
    """Triton on CUDA, except in fp64 and for groups that do not fit a tile."""
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return pairs.ranked
    from rankpo_kernels.gpu import pairs as gpu  # triton: Linux alone has it

    return gpu.ranked if K <= gpu.MOST_PASSAGES else pairs.ranked


def _similarities(q: Tensor, passages: list[Tensor]) -> Tensor:
    return q.new_empty(q.shape[0], pairs.count(passages), dtype=compute_dtype(q.dtype))


@_rankpo.register_fake
def _(q, passages, *rest):
    return q.new_empty(q.shape[0], dtype=compute_dtype(q.dtype)), _similarities(q, passages)


@_rankpo_grads.register_fake
def _(q, passages, grades, reference, rule, weights, needs):
    similarity_BK, dtype = _similarities(q, passages), gradient_dtype(q.dtype)
    grads = [
        q.new_empty(x.shape if need else (0,), dtype=dtype)
        for x, need in zip((q, *passages), needs, strict=True)
    ]
    return similarity_BK.new_empty(()), similarity_BK, grads


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    q, passages, grades, reference, ctx.rule = inputs
    ctx.save_for_backward(q, grades, reference, *passages)


def _grads(ctx, loss_grads_B, _):
    """One more pass with the upstream gradients as weights."""
    q, grades, reference, *passages = ctx.saved_tensors
    if loss_grads_B is None:
        return None, [None] * len(passages), None, None, None
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    _, _, grads = _rankpo_grads(
        q, passages, grades, reference, ctx.rule, loss_grads_B.contiguous(), needs
    )
    dq, *dps = (
        grad.to(x.dtype) if need else None
        for x, grad, need in zip((q, *passages), grads, needs, strict=True)
    )
    return dq, dps, None, None, None


def _save_grads(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    q, passages, *_, ctx.needs = inputs
    ctx.dtypes = [x.dtype for x in (q, *passages)]
    ctx.save_for_backward(*output[2])


def _scaled_grads(ctx, grad_loss, *others):
    if any(x is not None for x in torch.utils._pytree.tree_leaves(others)):
        raise RuntimeError("rankpo_loss has no second derivative")
    dq, *dps = scaled_grads(ctx.saved_tensors, grad_loss, ctx.needs, ctx.dtypes)
    return dq, dps, None, None, None, None, None


_rankpo.register_autograd(_grads, setup_context=_save)
_rankpo_grads.register_autograd(_scaled_grads, setup_context=_save_grads)


class Ranking(NamedTuple):
    """The ops' arguments."""

    queries: Tensor
    passages: list[Tensor]  # [B, D] or [B, K, D] each, of one dtype
    grades: Tensor | None
    reference: Tensor | None  # [B, C]
    rule: list[float]

    @staticmethod
    def of(
        queries: Tensor, passages: dict[str, Tensor], grades: Tensor | None,
        reference: tuple[str, Tensor | None], rule: Rule,
    ) -> "Ranking":  # fmt: skip
        """With what all rankings need checked; names are for the messages."""
        check_embeddings({"queries": queries} | passages)
        dtypes = [x.dtype for x in (queries, *passages.values())]
        dtype = functools.reduce(torch.promote_types, dtypes)
        name, values = reference
        if values is not None:
            first = next(iter(passages.values()))
            shape = first.shape[:-1]
            if values.shape != shape or values.device != queries.device:
                raise ValueError(
                    f"{name} must be {list(shape)} on {queries.device}, got {list(values.shape)} "
                    f"on {values.device}"
                )
            values = values.detach().to(compute_dtype(dtype))
            values = values if values.dim() == 2 else values[:, None]
        return Ranking(
            queries.to(dtype), [x.to(dtype) for x in passages.values()], grades, values,
            [float(number) for number in rule],
        )  # fmt: skip

    def loss(self, weights: Tensor | None, reduction: Reduction) -> Tensor:
        leaves = [self.queries, *self.passages]
        needs = [torch.is_grad_enabled() and x.requires_grad for x in leaves]
        weights_B = row_weights(self.queries, weights, len(self.queries), reduction)
        # In one pass, unless on a card: what backward starts from is not known there, and gradients
        # times a number are read and written once more, where a second pass only reads.
        if reduction == "none" or not any(needs) or self.queries.is_cuda:
            loss_B = _rankpo(*self)[0] * weights_B
            return loss_B if reduction == "none" else loss_B.sum()
        return _rankpo_grads(*self, weights_B, needs)[0]


@dataclass(frozen=True)
class MarginOptions:
    """What stays from batch to batch, as `rankpo_loss` takes it; wrong values are named when it is
    made."""

    beta: float = 2.0
    temperature: float = 0.1
    gamma_beta_ratio: float = 0.0
    label_smoothing: float = 0.0
    loss_type: LossType = "sigmoid"
    sft_weight: float = 0.0
    rankpo_weight: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                raise ValueError(f"{name} must be a number: as a tensor it would get no gradient")
        for name in ("beta", "temperature"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not -math.inf < self.gamma_beta_ratio < math.inf:
            raise ValueError(f"gamma_beta_ratio must be finite, got {self.gamma_beta_ratio}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.loss_type not in ("sigmoid", "hinge"):
            raise ValueError(f"loss_type must be 'sigmoid' or 'hinge', got {self.loss_type!r}")
        sft, rankpo = self.sft_weight, self.rankpo_weight
        if not (sft >= 0 and rankpo >= 0 and 0 < sft + rankpo < math.inf):
            raise ValueError(
                f"sft_weight and rankpo_weight must be >= 0 and not both 0, got {sft} and {rankpo}"
            )
        if self.loss_type == "hinge" and self.rankpo_weight and self.label_smoothing:
            _warn(f"label_smoothing={self.label_smoothing} has no effect with loss_type='hinge'")

    def rule(self, normalize: bool, listwise: bool = False) -> Rule:
        """As kernels take it."""
        return Rule(
            self.beta, self.temperature, self.gamma_beta_ratio, self.label_smoothing,
            self.sft_weight, self.rankpo_weight, self.loss_type == "hinge", listwise, normalize,
        )  # fmt: skip


def _warn(message: str) -> None:
    """Of the line that called this package, however deep in it the reason is found."""
    if torch.compiler.is_compiling():
        return
    frame, level, inside = sys._getframe(), 1, ("rankpo_fast.", "torch.")
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _pairs(
    queries: Tensor, chosen: Tensor, rejected: Tensor, reference_margins: Tensor | None = None,
    *, normalize: bool = True, **margin: Any,
) -> Ranking:  # fmt: skip
    """`margin` are the fields of `MarginOptions`."""
    if queries.dim() != 2 or not queries.shape == chosen.shape == rejected.shape:
        shapes = [tuple(x.shape) for x in (queries, chosen, rejected)]
        raise ValueError(
            "queries, chosen and rejected must all be [B, D], got {}, {}, {}".format(*shapes)
        )
    rule = MarginOptions(**margin).rule(normalize)
    passages = {"chosen": chosen, "rejected": rejected}
    return Ranking.of(queries, passages, None, ("reference_margins", reference_margins), rule)


@torch.no_grad()
def pair_similarities(queries: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Cosine similarities [2, B] of chosen and rejected to the queries, in fp32 (fp64), without
    gradient: what reference margins are made of. Arguments as in `rankpo_loss`."""
    return _rankpo(*_pairs(queries, chosen, rejected))[1].T


def rankpo_loss(
    queries: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    reference_margins: Tensor | None = None,
    beta: float = 2.0,
    temperature: float = 0.1,
    gamma_beta_ratio: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    normalize: bool = True,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    sft_weight: float = 0.0,
    rankpo_weight: float = 1.0,
) -> Tensor:
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
    ranking = _pairs(
        queries, chosen, rejected, reference_margins, beta=beta, temperature=temperature,
        gamma_beta_ratio=gamma_beta_ratio, label_smoothing=label_smoothing, loss_type=loss_type,
        sft_weight=sft_weight, rankpo_weight=rankpo_weight, normalize=normalize,
    )  # fmt: skip
    return ranking.loss(weights, reduction)


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


@torch.no_grad()
def rankpo_loss_and_grads(
    queries: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    reference_margins: Tensor | None = None,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, RankPOStats]:
    """`rankpo_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        options: all others are those of `rankpo_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, d_queries, d_chosen, d_rejected, stats), gradients in the dtypes of their inputs.
    """
    if reduction == "none":
        raise ValueError("rankpo_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    ranking = _pairs(queries, chosen, rejected, reference_margins, **options)
    weights_B = row_weights(ranking.queries, weights, len(queries), reduction)
    loss, similarity_BK, grads = _rankpo_grads(*ranking, weights_B, [True] * 3)
    chosen_B, rejected_B = similarity_BK.unbind(1)
    over_B = chosen_B - rejected_B
    if ranking.reference is not None:
        over_B = over_B - ranking.reference[:, 0]
    stats = RankPOStats(*map(mean, ((over_B > 0).float(), over_B, chosen_B, rejected_B)))
    dtypes = [x.dtype for x in (queries, chosen, rejected)]
    return loss, *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), stats
