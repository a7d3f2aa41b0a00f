"""The losses as modules, for trainers that want an object; options as in the functions of
`rankpo_fast.ops`."""

import math

import torch
from torch import Tensor, nn

from rankpo_fast.ops.common import Reduction
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_fast.ops.rankpo import LossType, rankpo_loss


class InfoNCELoss(nn.Module):
    """`info_nce_loss` with its temperature; `learn_temperature` makes log(1 / temperature) a
    parameter, as CLIP does."""

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        learn_temperature: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        workspace_bytes: int | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature
        self.log_scale = (
            nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        )
        self.options = {
            "normalize": normalize,
            "reduction": reduction,
            "workspace_bytes": workspace_bytes,
        }

    def forward(
        self, queries: Tensor, passages: Tensor, labels: Tensor | None = None, **rows: Tensor
    ) -> Tensor:
        """queries [M, D], passages [N, D]; `rows`: weights, query_ids, passage_ids, excluded of
        this batch."""
        if self.log_scale is None:
            return info_nce_loss(
                queries, passages, labels, temperature=self.temperature, **self.options, **rows
            )
        scale = self.log_scale.exp()
        return info_nce_loss(queries, passages, labels, scale=scale, **self.options, **rows)


class RankPOLoss(nn.Module):
    """`rankpo_loss` with its settings."""

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
