"""What holds stage 2 to what the model was: its rankings, its weights."""

from dataclasses import dataclass
from typing import Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_above, check_at_least, flag


@dataclass(frozen=True)
class RetentionConfig(Config):
    """Terms of stage 2's loss that hold the model near where it starts; 0: none.

    The loss of a step is stage 2's + retention_weight * the mean over queries of KL(reference's
    softmax over all passages of the batch || the model's) + elastic_weight / 2 * sum over weights
    of importance * (weight - where it started)^2.
    """

    _argument_group_name = "retention"

    retention_weight: float = flag(
        "Of the divergence from a frozen reference's ranking of the passages of a batch. The "
        "reference is --reference_model_name_or_path, else the model as it starts.", 0.0
    )  # fmt: skip
    retention_rows: Literal["stage2", "replay"] | None = flag(
        "Of whose batches: those of stage 2 (of --train_data, else of grades, else of a teacher), "
        "or those of --replay_data. [replay where it is given]", None
    )  # fmt: skip
    retention_temperature: float = flag("Cosines of both models are divided by it.", 0.02)
    elastic_weight: float = flag(
        "Of half the squared distance of all trained weights from where they started.", 0.0
    )
    elastic_fisher_batches: int = flag(
        "Batches of --replay_data whose squared gradients, before the first step, say how much "
        "each weight counts (elastic weight consolidation); 0: all alike (L2-SP).", 0
    )  # fmt: skip

    def check(self) -> None:
        check_above(self, 0, "retention_temperature")
        check_at_least(self, 0, "retention_weight", "elastic_weight", "elastic_fisher_batches")
        changed = self.changed()
        for name in ("retention_rows", "retention_temperature"):
            if name in changed and not self.retention_weight:
                raise InputError(f"--{name} needs --retention_weight above 0", name)
        if self.elastic_fisher_batches and not self.elastic_weight:
            name = "elastic_fisher_batches"
            raise InputError(f"--{name} needs --elastic_weight above 0", name)


NO_RETENTION = RetentionConfig()
