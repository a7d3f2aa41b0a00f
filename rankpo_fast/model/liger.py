"""Liger's Triton kernels in a backbone: rotary positions, norms and gated layers, on a GPU."""

from importlib import metadata
from typing import TYPE_CHECKING

import torch

from rankpo_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOOR = (0, 8, 2)


def use_liger(backbone: "PreTrainedModel", asked: bool | None, device: torch.device) -> None:
    """Give the backbone Liger's kernels, unless `asked` is False; None: where that is possible.

    Rotary positions and some layers are swapped in transformers itself, so a backbone of the same
    family that is built later in this process has them too, and then works on a GPU alone.

    Raises:
        InputError: asked for, and not possible.
    """
    if asked is False or (asked is None and _why_not(backbone, device)):
        return
    try:
        apply_liger(backbone, device)
    except ValueError as error:
        raise InputError(
            f"--use_liger_kernel true: {error}; give --use_liger_kernel false"
        ) from None


def apply_liger(backbone: "PreTrainedModel", device: torch.device) -> None:
    """The same, or ValueError that says why not."""
    if (reason := _why_not(backbone, device)) is not None:
        raise ValueError(reason)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Its defaults replace the forward of a language model's head, which an encoder does not have.
    _apply_liger_kernel_to_instance(
        model=backbone, fused_linear_cross_entropy=False, cross_entropy=False
    )


def _why_not(backbone: "PreTrainedModel", device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels need a GPU, and the device is {device}"
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < FLOOR:
        return f"liger-kernel {version} is older than {'.'.join(map(str, FLOOR))}"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = backbone.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has none for {kind}"
