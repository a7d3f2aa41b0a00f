"""The losses as modules, for trainers that want an object; options as in the functions of
`rankpo_fast.ops`."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankpo_fast.ops.batch import InfoNCEOptions
from rankpo_fast.ops.common import Reduction
from rankpo_fast.ops.in_batch import in_batch_rankpo_loss, siglip_loss, split_margin
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_fast.ops.rankpo import LossType, MarginOptions, rankpo_loss
from rankpo_fast.ops.rankpo_group import rankpo_group_loss


def _check_names(loss: Callable, options: dict[str, Any]) -> None:
    """What a loss shares with others does not make it take all that they take."""
    if unknown := options.keys() - inspect.signature(loss).parameters.keys():
        raise TypeError(f"{loss.__name__} has no option {', '.join(sorted(unknown))}")


class InfoNCELoss(nn.Module):
    """`info_nce_loss` with its temperature; `learn_temperature` makes log(1 / temperature) a
    parameter, as CLIP does.

    options: what does not change with the batch (`rankpo_fast.ops.batch.InfoNCEOptions`):
    normalize, reduction, label_smoothing, directions, partition, false_negative_margin,
    margin_type, matryoshka_dims, matryoshka_weights, hardness_mode, hardness_strength,
    gradient_filter, workspace_bytes, backend, process_group, exchange.
    Wrong ones raise ValueError here.
    """

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        learn_temperature: bool = False,
        **options: Any,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature
        self.log_scale = (
            nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        )
        InfoNCEOptions(**options)  # names what is wrong
        self.options = options

    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        labels: Tensor | None = None,
        **batch: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """queries [M, D], passages [N, D]; `batch`: weights, query_ids, passage_ids, excluded,
        positives, own_negatives, own_offsets, curated, guide of this batch."""
        if self.log_scale is None:
            temperature = {"temperature": self.temperature}
        else:
            temperature = {"scale": self.log_scale.exp()}
        return info_nce_loss(queries, passages, labels, **temperature, **self.options, **batch)


class RankPOLoss(nn.Module):
    """`rankpo_loss` with its settings. Wrong ones raise ValueError here."""

    def __init__(
        self,
        *,
        beta: float = 2.0,
        temperature: float = 0.1,
        gamma_beta_ratio: float = 0.0,
        label_smoothing: float = 0.0,
        loss_type: LossType = "sigmoid",
        normalize: bool = True,
        reduction: Reduction = "mean",
        sft_weight: float = 0.0,
        rankpo_weight: float = 1.0,
    ):
        super().__init__()
        self.options = {
            "beta": beta,
            "temperature": temperature,
            "gamma_beta_ratio": gamma_beta_ratio,
            "label_smoothing": label_smoothing,
            "loss_type": loss_type,
            "normalize": normalize,
            "reduction": reduction,
            "sft_weight": sft_weight,
            "rankpo_weight": rankpo_weight,
        }
        rankpo_loss(*torch.zeros(3, 1, 1), **self.options)  # names what is wrong

    def forward(
        self,
        queries: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        *,
        reference_margins: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """queries, chosen, rejected [B, D]; reference_margins and weights [B] of this batch."""
        rows = {"reference_margins": reference_margins, "weights": weights}
        return rankpo_loss(queries, chosen, rejected, **self.options, **rows)


class RankPOGroupLoss(nn.Module):
    """`rankpo_group_loss` with its settings: form, beta, temperature, gamma_beta_ratio,
    label_smoothing, loss_type, normalize, reduction."""

    def __init__(self, **options: Any):
        super().__init__()
        one = torch.zeros(1, 1)
        rankpo_group_loss(one, one[:, None], one, **options)  # names what is wrong
        self.options = options

    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        grades: Tensor,
        *,
        reference_similarities: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """queries [B, D], passages [B, K, D], grades [B, K]; reference_similarities [B, K] and
        weights [B] of this batch."""
        rows = {"reference_similarities": reference_similarities, "weights": weights}
        return rankpo_group_loss(queries, passages, grades, **self.options, **rows)


class InBatchRankPOLoss(nn.Module):
    """`in_batch_rankpo_loss` with its settings.

    options: what does not change with the batch: those of `RankPOLoss`, workspace_bytes, backend,
    process_group. Wrong ones raise ValueError here, those of other losses TypeError.
    """

    def __init__(self, **options: Any):
        super().__init__()
        _check_names(in_batch_rankpo_loss, options)
        margin, others = split_margin(options)
        MarginOptions(**margin), InfoNCEOptions(**others)  # name what is wrong
        self.options = options

    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        labels: Tensor | None = None,
        **batch: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """queries [M, D], passages [N, D]; `batch`: reference_queries, reference_passages, weights,
        query_ids, passage_ids, excluded of this batch."""
        return in_batch_rankpo_loss(queries, passages, labels, **self.options, **batch)


class SigLIPLoss(nn.Module):
    """`siglip_loss` with a learnt scale and bias, which start where the paper starts.

    options: normalize, reduction, workspace_bytes, backend, process_group. Wrong ones raise
    ValueError here, those of other losses TypeError.
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0, **options: Any):
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be > 0 and finite, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        _check_names(siglip_loss, options)
        InfoNCEOptions(**options)  # names what is wrong
        self.options = options

    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        labels: Tensor | None = None,
        **batch: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """queries [M, D], passages [N, D]; `batch`: weights, query_ids, passage_ids, excluded of
        this batch."""
        numbers = {"scale": self.log_scale.exp(), "bias": self.bias}
        return siglip_loss(queries, passages, labels, **numbers, **self.options, **batch)
