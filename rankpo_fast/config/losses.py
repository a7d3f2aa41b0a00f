"""The losses of both stages."""

import math
from dataclasses import dataclass
from typing import Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_above, check_at_least, check_names, flag, require


@dataclass(frozen=True)
class ContrastiveLossConfig(Config):
    """InfoNCE."""

    _argument_group_name = "loss"

    temperature: float = flag("Cosine similarities are divided by it.", 0.02)

    def check(self) -> None:
        check_above(self, 0, "temperature")


@dataclass(frozen=True)
class RankPOLossConfig(Config):
    """RankPO, or SimRankPO without a reference, or SFT with `--sft_weight 1 --rankpo_weight 0`."""

    _argument_group_name = "loss"

    beta: float = flag("Sharpness of the preference margin.", 2.0)
    temperature: float = flag("Cosine similarities are divided by it.", 0.1)
    gamma_beta_ratio: float = flag("Margin asked for, in units of cosine / temperature.", 0.0)
    loss_type: Literal["sigmoid", "hinge"] = flag("Shape of the preference loss.", "sigmoid")
    label_smoothing: float = flag("Share of wrong preferences to assume.", 0.0)
    sft_weight: float = flag("Of the cross entropy over chosen and rejected.", 0.0)
    rankpo_weight: float = flag("Of the preference loss.", 1.0)
    reference_free: bool = flag("False: margins count relative to a frozen model's.", True)
    reference_model_name_or_path: str | None = flag(
        "The frozen model. [the trained one, as it starts]", None
    )

    def check(self) -> None:
        check_above(self, 0, "beta", "temperature")
        check_at_least(self, 0, "sft_weight", "rankpo_weight")
        require(self, "gamma_beta_ratio", "finite", math.isfinite(self.gamma_beta_ratio))
        require(self, "label_smoothing", "in [0, 0.5)", 0 <= self.label_smoothing < 0.5)
        check_names(self, "reference_model_name_or_path")
        if self.sft_weight == 0 and self.rankpo_weight == 0:
            raise InputError("--sft_weight and --rankpo_weight are both 0: nothing to train on")
        if self.loss_type == "hinge" and self.label_smoothing > 0:
            raise InputError("--label_smoothing needs --loss_type sigmoid, got hinge")
        if self.reference_free and self.reference_model_name_or_path is not None:
            raise InputError("--reference_model_name_or_path needs --reference_free false")

    @property
    def uses_reference(self) -> bool:
        return not self.reference_free and self.rankpo_weight > 0
