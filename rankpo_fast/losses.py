"""The losses as modules, for trainers that want an object; options as in the functions of
`rankpo_fast.ops`."""

import inspect
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rankpo_fast.ops.distillation import distill_kl_loss, margin_mse_loss
from rankpo_fast.ops.in_batch import in_batch_rankpo_loss, siglip_loss
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_fast.ops.options import (
    CommonOptions,
    DistillKLOptions,
    InBatchRankPOOptions,
    InfoNCELossOptions,
    MarginMSEOptions,
    RankPOGroupOptions,
    RankPOOptions,
)
from rankpo_fast.ops.rankpo import rankpo_loss
from rankpo_fast.ops.rankpo_group import rankpo_group_loss

R = TypeVar("R")


def _named(record: Callable[..., R], loss: Callable, options: dict[str, Any]) -> R:
    """Names what is wrong, and what belongs to other losses."""
    if unknown := options.keys() - inspect.signature(record).parameters.keys():
        raise TypeError(f"{loss.__name__} has no option {', '.join(sorted(unknown))}")
    return record(**options)


class InfoNCELoss(nn.Module):
    """`info_nce_loss` with its temperature; `learn_temperature` makes log(1 / temperature) a
    parameter, as CLIP does.

    options: what does not change with the batch, the fields of
    `rankpo_fast.ops.options.InfoNCELossOptions`. Wrong ones raise ValueError here.
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
        _named(InfoNCELossOptions, info_nce_loss, options)
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
            temperature: dict[str, Any] = {"temperature": self.temperature}
        else:
            temperature = {"scale": self.log_scale.exp()}
        given = cast(dict[str, Any], batch)
        return info_nce_loss(queries, passages, labels, **temperature, **self.options, **given)


class RankPOLoss(nn.Module):
    """`rankpo_loss` with its settings, the fields of `rankpo_fast.ops.options.RankPOOptions`. Wrong
    ones raise ValueError here."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = asdict(_named(RankPOOptions, rankpo_loss, options))

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
        rows: dict[str, Any] = {"reference_margins": reference_margins, "weights": weights}
        return rankpo_loss(queries, chosen, rejected, **self.options, **rows)


class RankPOGroupLoss(nn.Module):
    """`rankpo_group_loss` with its settings, the fields of
    `rankpo_fast.ops.options.RankPOGroupOptions`. Wrong ones raise ValueError here."""

    def __init__(self, **options: Any):
        super().__init__()
        _named(RankPOGroupOptions, rankpo_group_loss, options)
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
        rows: dict[str, Any] = {
            "reference_similarities": reference_similarities,
            "weights": weights,
        }
        return rankpo_group_loss(queries, passages, grades, **self.options, **rows)


class MarginMSELoss(nn.Module):
    """`margin_mse_loss` with its settings, the fields of
    `rankpo_fast.ops.options.MarginMSEOptions`. Wrong ones raise ValueError here."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = asdict(_named(MarginMSEOptions, margin_mse_loss, options))

    def forward(
        self, queries: Tensor, passages: Tensor, scores: Tensor, *, weights: Tensor | None = None
    ) -> Tensor:
        """queries [B, D], passages [B, K, D], a teacher's scores [B, K]; weights [B]."""
        return margin_mse_loss(queries, passages, scores, weights=weights, **self.options)


class DistillKLLoss(nn.Module):
    """`distill_kl_loss` with its settings, the fields of
    `rankpo_fast.ops.options.DistillKLOptions`. Wrong ones raise ValueError here."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = asdict(_named(DistillKLOptions, distill_kl_loss, options))

    def forward(
        self, queries: Tensor, passages: Tensor, scores: Tensor, *, weights: Tensor | None = None
    ) -> Tensor:
        """queries [B, D], passages [B, K, D], a teacher's scores [B, K]; weights [B]."""
        return distill_kl_loss(queries, passages, scores, weights=weights, **self.options)


class InBatchRankPOLoss(nn.Module):
    """`in_batch_rankpo_loss` with its settings.

    options: what does not change with the batch, the fields of
    `rankpo_fast.ops.options.InBatchRankPOOptions`. Wrong ones raise ValueError here, those of other
    losses TypeError.
    """

    def __init__(self, **options: Any):
        super().__init__()
        _named(InBatchRankPOOptions, in_batch_rankpo_loss, options)
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
        given = cast(dict[str, Any], batch)
        return in_batch_rankpo_loss(queries, passages, labels, **self.options, **given)


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
        _named(CommonOptions, siglip_loss, options)
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
        numbers: dict[str, Any] = {"scale": self.log_scale.exp(), "bias": self.bias}
        given = cast(dict[str, Any], batch)
        return siglip_loss(queries, passages, labels, **numbers, **self.options, **given)
