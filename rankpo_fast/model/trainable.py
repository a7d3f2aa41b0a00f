"""An encoder as its training wants it: its layers, and of one that is loaded already the rest."""

import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.liger import use_liger


def fit_to_train(encoder: Encoder, config: ModelConfig, device: torch.device) -> Encoder:
    """The same encoder on `device`, changed as `config` says of what can still be changed."""
    use_liger(encoder.backbone, config.use_liger_kernel, device)
    encoder.to(device).bf16 = config.bf16 is True
    if config.save_dtype != "auto":
        encoder.save_dtype = getattr(torch, config.save_dtype)
    set_layers(encoder, config)
    return encoder


def set_layers(encoder: Encoder, config: ModelConfig) -> None:
    """Checkpointed, where "auto" is decided once texts are known; compiled."""
    if config.gradient_checkpointing is True:
        _check_checkpointing(encoder)
        encoder.layers.checkpoint()
    if config.torch_compile:
        encoder.layers.compile()


def _check_checkpointing(encoder: Encoder) -> None:
    if not encoder.layers.can_checkpoint:
        kind = encoder.backbone.config.model_type
        raise InputError(f"--gradient_checkpointing true: {kind} does not have it; give "
                         f"--gradient_checkpointing false")  # fmt: skip
