"""Products of a backbone's layers in 8 bits, both ways, by torchao on GPUs that have them.

Weights, gradients and states stay as they are; each product scales its two operands by their
largest value and rounds them to e4m3, gradients to e5m2.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.extras import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAPABILITY = (8, 9)
MULTIPLE = 16  # of both sides of a matrix that the instructions take


def use_float8(backbone: "PreTrainedModel", config: ModelConfig, device: torch.device) -> None:
    """Nothing unless --float8. InputError: no such GPU, or not installed."""
    if not config.float8:
        return
    require_extra("--float8", "lowbit")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise InputError(f"--float8: needs a GPU of compute capability {CAPABILITY[0]}."
                         f"{CAPABILITY[1]} or more, the device is {device}")  # fmt: skip
    convert(backbone)


def convert(backbone: "PreTrainedModel", *, emulate: bool = False) -> None:
    """In place; `emulate` rounds as the instructions do and multiplies otherwise, on any device."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(n % MULTIPLE for n in module.weight.shape)

    convert_to_float8_training(
        backbone, config=Float8LinearConfig(emulate=emulate), module_filter_fn=wanted
    )
