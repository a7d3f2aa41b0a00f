"""RankPO: preference optimisation of similarities (arXiv 2503.10723).

    margin_b = ((cos(q, c) - cos(q, r)) - reference_margin_b) / temperature - gamma_beta_ratio
    sigmoid: -(1 - e) logsigmoid(beta margin) - e logsigmoid(-beta margin),  e = label_smoothing
    hinge:   max(0, 1 - beta margin)
    sft:     -logsigmoid((cos(q, c) - cos(q, r)) / temperature), two-way cross entropy

B pairs, D dims. The op reads the [B, D] embeddings once forward and once backward; the margins are
[B] and plain torch.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.ops.common import Reduction, row_weights, unit_rows
from rankpo_kernels import pairs
from rankpo_kernels.norms import compute_dtype

LossType = Literal["sigmoid", "hinge"]


def pair_similarities_definition(
    q_BD: Tensor, c_BD: Tensor, r_BD: Tensor, normalize: bool = True
) -> Tensor:
    """Similarities [2, B] of chosen and rejected: what the op must equal."""
    if normalize:
        q_BD, c_BD, r_BD = map(unit_rows, (q_BD, c_BD, r_BD))
    return torch.stack([(q_BD * c_BD).sum(1), (q_BD * r_BD).sum(1)])


@torch.library.custom_op("rankpo_fast::pair_similarities", mutates_args=())
def _pair_similarities(q: Tensor, c: Tensor, r: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Similarities [2, B] and the inverse norms [3, B] that the backward needs."""
    with torch.autocast(q.device.type, enabled=False):
        return pairs.pair_forward(q, c, r, normalize)


@torch.library.custom_op("rankpo_fast::pair_similarities_backward", mutates_args=())
def _pair_similarities_backward(
    q: Tensor, c: Tensor, r: Tensor, normalize: bool,
    similarities: Tensor, inverse_norms: Tensor, similarity_grads: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        return pairs.pair_backward(
            q, c, r, normalize, similarities, inverse_norms, similarity_grads
        )


@_pair_similarities.register_fake
def _(q, c, r, normalize):
    dtype = compute_dtype(q.dtype)
    return q.new_empty(2, q.shape[0], dtype=dtype), q.new_empty(3, q.shape[0], dtype=dtype)


@_pair_similarities_backward.register_fake
def _(q, c, r, *rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, c, r))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors, *output)


def _grads(ctx, similarity_grads, _):
    if similarity_grads is None:
        return None, None, None, None
    q, c, r, similarities, inverse_norms = ctx.saved_tensors
    dq, dc, dr = _pair_similarities_backward(
        q, c, r, ctx.normalize, similarities, inverse_norms, similarity_grads
    )
    return dq, dc, dr, None


_pair_similarities.register_autograd(_grads, setup_context=_save)


def pair_similarities(
    queries: Tensor, chosen: Tensor, rejected: Tensor, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosine similarities (chosen [B], rejected [B]) to the queries, in fp32 (fp64 for fp64
    inputs).

    queries, chosen, rejected [B, D], floating point, on one device; a zero vector has similarity
    and gradient 0.
    normalize=False gives dot products. Raises ValueError on shapes that differ.
    """
    if queries.dim() != 2 or not queries.shape == chosen.shape == rejected.shape:
        shapes = [tuple(x.shape) for x in (queries, chosen, rejected)]
        raise ValueError(
            "queries, chosen and rejected must all be [B, D], got {}, {}, {}".format(*shapes)
        )
    if not queries.device == chosen.device == rejected.device:
        devices = (queries.device, chosen.device, rejected.device)
        raise ValueError("queries, chosen and rejected are on {}, {}, {}".format(*devices))
    dtype = torch.promote_types(torch.promote_types(queries.dtype, chosen.dtype), rejected.dtype)
    if not all(x.is_floating_point() for x in (queries, chosen, rejected)):
        dtypes = (queries.dtype, chosen.dtype, rejected.dtype)
        raise ValueError("embeddings must be floating point, got {}, {}, {}".format(*dtypes))
    tensors = (x.to(dtype) for x in (queries, chosen, rejected))
    similarities_2B, _ = _pair_similarities(*tensors, normalize)
    return similarities_2B[0], similarities_2B[1]


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
    """Losses [B] of advantages [B] = similarity of chosen minus that of rejected; options as in
    `rankpo_loss`."""
    MarginOptions(
        beta, temperature, gamma_beta_ratio, label_smoothing, loss_type, sft_weight, rankpo_weight
    )
    if reference_margins is not None:
        if (
            reference_margins.shape != advantage.shape
            or reference_margins.device != advantage.device
        ):
            raise ValueError(
                f"reference_margins must be {list(advantage.shape)} on {advantage.device}, got "
                f"{list(reference_margins.shape)} on {reference_margins.device}"
            )
        reference_margins = reference_margins.to(advantage.dtype)
    loss = torch.zeros_like(advantage)
    if rankpo_weight:
        over = advantage if reference_margins is None else advantage - reference_margins
        logit = beta * (over / temperature - gamma_beta_ratio)
        if loss_type == "hinge":
            rankpo = torch.relu(1 - logit)
        else:
            rankpo = -(1 - label_smoothing) * F.logsigmoid(logit)
            if label_smoothing:
                rankpo = rankpo - label_smoothing * F.logsigmoid(-logit)
        loss = loss + rankpo_weight * rankpo
    if sft_weight:
        loss = loss - sft_weight * F.logsigmoid(advantage / temperature)
    return loss


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
        for name in ("beta", "temperature"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not math.isfinite(self.gamma_beta_ratio):
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
            warnings.warn(
                f"label_smoothing={self.label_smoothing} has no effect with loss_type='hinge'",
                stacklevel=5,
            )


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
        queries, chosen, rejected: [B, D] of fp64, fp32, bf16 or fp16, on one device.
        reference_margins: [B], similarity of chosen minus that of rejected under the frozen
            reference model. None is the reference-free form (SimRankPO).
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
    chosen_B, rejected_B = pair_similarities(queries, chosen, rejected, normalize)
    loss_B = margin_loss(
        chosen_B - rejected_B,
        reference_margins=reference_margins,
        beta=beta,
        temperature=temperature,
        gamma_beta_ratio=gamma_beta_ratio,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        sft_weight=sft_weight,
        rankpo_weight=rankpo_weight,
    )
    loss_B = loss_B * row_weights(loss_B, weights, loss_B.shape[0], reduction)
    return loss_B if reduction == "none" else loss_B.sum()
