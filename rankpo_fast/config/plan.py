"""A plan: the GPU it is for, the batch, and what of the training is decided already."""

from dataclasses import dataclass
from typing import Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_above, check_at_least, check_names, flag


@dataclass(frozen=True)
class PlanConfig(Config):
    """What is planned. Settings that are not at their default stay as they are given."""

    _argument_group_name = "plan"

    gpu: str | None = flag(
        "24, 48, 80 or 141: the GB of an RTX 4090, L40S, H100 or H200; or any number of GB. "
        "[the one here]", None, metavar="GB",
    )  # fmt: skip
    method: Literal["full", "lora", "qlora"] | None = flag(
        "Train all weights, an adapter, or an adapter of 4-bit weights. [the first of them that "
        "fits]", None,
    )  # fmt: skip
    per_device_train_batch_size: int = flag("Rows per batch, of each process.", 32)
    num_negatives: int = flag("Of a row, besides its positive.", 5)
    optim: Literal["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8", "paged_adamw_8bit", "muon"] = (
        flag("As in a training; adamw: the plan may take adamw_8bit.", "adamw")
    )
    offload: list[Literal["activations", "optimizer"]] = flag(
        "As in a training; none: the plan may take either.", []
    )
    shard: Literal["none", "grad", "full"] = flag("As in a training.", "none")
    processes: int = flag("GPUs that train together.", 1)
    host_gb: float | None = flag(
        "Of the host's memory, for what is moved there. [twice the GPU's]", None, metavar="GB"
    )
    json: bool = flag("Print JSON.", False)
    picture: str | None = flag("Draw the memory of every way to train into this .png file.", None)

    def check(self) -> None:
        check_names(self, "gpu", "picture")
        check_at_least(self, 1, "per_device_train_batch_size", "processes")
        check_at_least(self, 0, "num_negatives")
        if self.host_gb is not None:
            check_above(self, 0, "host_gb")
        if self.shard != "none" and self.processes == 1:
            raise InputError(f"--shard {self.shard} shares between GPUs: give --processes")
        if self.picture is not None and not self.picture.endswith(".png"):
            raise InputError(f"--picture must be a .png file, got {self.picture}")
