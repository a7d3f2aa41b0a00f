"""What the trainers of transformers do to a model: look beneath its wrappers, set it to rest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def beneath(model: nn.Module) -> nn.Module:
    """Torch.compile and adapters."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


@contextmanager
def at_rest(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In eval mode on the device; afterwards as and where it was."""
    home, training = next(model.parameters()).device, {m: m.training for m in model.modules()}
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(home)
        for module, mode in training.items():
            module.training = mode


def drop_nothing(model: nn.Module) -> None:
    """Neither nn.Dropout nor attention, which has a float `attention_dropout`, as in Llama."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
