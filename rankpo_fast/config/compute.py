"""Where to compute, how much at once, where to keep what need not be computed twice."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_at_least, check_names, flag, require

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceConfig(Config):
    """Device and memory."""

    _argument_group_name = "compute"

    device: str = flag("auto, cpu, cuda or cuda:N.", "auto")
    max_tokens_per_micro_batch: int | None = flag(
        "Tokens through the model at once, padding included: speed and memory, not the batch. "
        "[found by trying on a GPU, 4096 on the CPU; the longest text in any case]", None,
        metavar="TOKENS",
    )  # fmt: skip

    def check(self) -> None:
        check_names(self, "device")
        check_at_least(self, 1, "max_tokens_per_micro_batch")

    def torch_device(self) -> "torch.device":
        """The device to compute on; InputError where there is no such device."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        known = re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name) is not None
        require(self, "device", "auto, cpu, cuda or cuda:N", known)
        kind, _, number = name.partition(":")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        return torch.device(name)


@dataclass(frozen=True)
class ComputeConfig(DeviceConfig):
    """Device, memory, and caches."""

    cache_dir: str = flag("Token ids and reference margins are kept here.", "~/.cache/rankpo-fast")
    no_cache: bool = flag("Keep neither, and read none that was kept.", False)
    rank_timeout: int = flag(
        "Of the processes of torchrun: all end when one has been silent so long; 0: never.", 60,
        metavar="SECONDS",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        check_at_least(self, 0, "rank_timeout")
        check_names(self, "cache_dir")

    @property
    def cache_path(self) -> Path | None:
        """None: nothing is kept, with --no_cache or where ~ is nobody's home."""
        path = os.path.expanduser(self.cache_dir)  # Path's own raises for an unknown ~user
        return None if self.no_cache or path.startswith("~") else Path(path)
