"""The losses of both stages."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_above, check_at_least, check_names, flag, require

OPTIONS = (  # arguments of `info_nce_loss` that stay from batch to batch, but the temperature
    "label_smoothing", "directions", "partition", "false_negative_margin", "margin_type",
    "matryoshka_dims", "matryoshka_weights", "hardness_mode", "hardness_strength",
    "gradient_filter",
)  # fmt: skip


@dataclass(frozen=True)
class ContrastiveLossConfig(Config):
    """InfoNCE, by the names of `rankpo_fast.info_nce_loss`, which says more of each."""

    _argument_group_name = "loss"

    temperature: float = flag("Cosine similarities are divided by it.", 0.02)
    temperature_learning_rate: float | None = flag(
        "Peak rate at which the temperature is learnt as well, as its logarithm; it does not fall "
        "below 0.01, or where it starts if that is less. [it is fixed]", None, metavar="RATE",
    )  # fmt: skip
    label_smoothing: float = flag("Share of the target on all candidates alike.", 0.0)
    directions: list[str] = flag(
        "Whose similarities compete with the positive: query_to_passage, passage_to_query, "
        "query_to_query, passage_to_passage; all four are GTE's loss.", ["query_to_passage"]
    )  # fmt: skip
    partition: Literal["joint", "per_direction"] = flag(
        "One softmax over all directions, or the mean of one each (of both first: CLIP's).", "joint"
    )
    own_negatives: bool = flag("A row's negatives are negatives of its own query alone.", False)
    false_negative_margin: float | None = flag(
        "Leave out passages of other rows that are more similar than the positive less this.", None
    )
    margin_type: Literal["absolute", "relative"] = flag(
        "Relative: the margin is a share of the positive's similarity.", "absolute"
    )
    guide_model_name_or_path: str | None = flag(
        "A frozen model whose similarities decide about --false_negative_margin, as in GISTEmbed. "
        "[the model in training]", None,
    )  # fmt: skip
    matryoshka_dims: list[int] | None = flag(
        "Also train the vectors cut to these lengths; the full one counts if it is named.", None
    )
    matryoshka_weights: list[float] | None = flag("Of the loss at each of them. [1 each]", None)
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = flag(
        "Which negatives weigh more the more similar they are: those of other rows, a row's own, "
        "or all. [none]", None,
    )  # fmt: skip
    hardness_strength: float = flag("How much more; a similarity times this is added.", 0.0)
    gradient_filter: float = flag(
        "Leave out the queries with the least to learn, to save time: those with together this "
        "share of all that is to learn. 0.004 is how bf16 rounds; 0: exact.",
        0.0,
    )

    def check(self) -> None:
        check_above(self, 0, "temperature")
        check_names(self, "guide_model_name_or_path", "directions")
        if self.temperature_learning_rate is not None:
            check_above(self, 0, "temperature_learning_rate")
        if self.guide_model_name_or_path is not None and self.false_negative_margin is None:
            raise InputError("--guide_model_name_or_path needs --false_negative_margin")
        if self.own_negatives and self.gradient_filter:
            raise InputError("--gradient_filter and --own_negatives do not go together")
        if self.own_negatives and "query_to_passage" not in self.directions:
            raise InputError("--own_negatives needs query_to_passage among --directions")
        if self.changed().keys().isdisjoint(OPTIONS):
            return
        from rankpo_kernels.problem import InfoNCEOptions  # imports torch

        try:
            InfoNCEOptions(**self.options())
        except ValueError as error:
            raise InputError(f"--{error}") from None

    def options(self) -> dict[str, Any]:
        """Arguments of `info_nce_loss` that stay from batch to batch, but the temperature."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def one_directional(self) -> bool:
        """Whether a query's loss needs no other query."""
        return self.directions == ["query_to_passage"]

    @property
    def tells_chosen(self) -> bool:
        """Whether it matters for which row a negative was chosen."""
        margin, hardness = self.false_negative_margin is not None, self.hardness_mode is not None
        return margin or hardness or "passage_to_passage" in self.directions


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
