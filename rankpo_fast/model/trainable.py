"""An encoder as its training wants it: its layers, and of one that is loaded already the rest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.check import selective_is_exact
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import Checkpointing
from rankpo_fast.model.liger import use_liger


def fit_to_train(encoder: Encoder, config: ModelConfig, device: torch.device) -> Encoder:
    """The same encoder on `device`, changed as `config` says of what can still be changed."""
    encoder.layers.chunk(None)  # else what is put in their place, as Liger does, would go with it
    use_liger(encoder.backbone, config.use_liger_kernel, device)
    encoder.to(device).bf16 = config.bf16 is True
    if config.save_dtype != "auto":
        encoder.save_dtype = getattr(torch, config.save_dtype)
    set_layers(encoder, config)
    return encoder


def set_layers(encoder: Encoder, config: ModelConfig) -> None:
    """Chunked, checkpointed, where "auto" is decided once texts are known; compiled.

    Raises:
        InputError: this backbone does not have what is asked for.
    """
    encoder.layers.chunk(config.mlp_chunk)
    asked = config.gradient_checkpointing
    kind: Checkpointing = False if asked == "auto" else asked
    if kind and not encoder.layers.can_checkpoint:
        name = encoder.backbone.config.model_type
        raise InputError(f"--gradient_checkpointing {str(kind).lower()}: {name} does not have it; "
                         f"give --gradient_checkpointing false")  # fmt: skip
    if kind == "selective" and (reason := _why_not_selective(encoder)) is not None:
        raise InputError(f"--gradient_checkpointing selective: {reason}; give "
                         f"--gradient_checkpointing true")  # fmt: skip
    if encoder.layers.checkpointed != kind:
        encoder.layers.checkpoint(kind)
    if config.torch_compile:
        encoder.layers.compile()


def _why_not_selective(encoder: Encoder) -> str | None:
    reason = encoder.layers.why_not_selective()
    if reason is None and not selective_is_exact(encoder):
        kind = encoder.backbone.config.model_type
        reason = f"layers of {kind} write over products, so that other gradients come out"
    return reason


def check_offload(offload: Sequence[str], config: ModelConfig, device: torch.device) -> None:
    """InputError where activations are to be offloaded and cannot be."""
    if "activations" not in offload:
        return
    if device.type != "cuda":
        raise InputError(f"--offload activations: it moves them from a GPU to the host, and the "
                         f"device is {device}: leave it out")  # fmt: skip
    if config.gradient_checkpointing is False:
        raise InputError("--offload activations: it moves what goes into checkpointed layers (to "
                         "move all else takes longer than to compute it again): give "
                         "--gradient_checkpointing true, selective or auto")  # fmt: skip


def set_offload(encoder: Encoder, offload: Sequence[str], device: torch.device) -> None:
    """Of an encoder that has been loaded and computes on `device`. InputError: its layers cannot
    be checkpointed."""
    wanted = "activations" in offload
    if wanted and not encoder.layers.can_checkpoint:
        kind = encoder.backbone.config.model_type
        raise InputError(f"--offload activations: it moves what goes into checkpointed layers, and "
                         f"{kind} does not have them: leave it out")  # fmt: skip
    encoder.layers.offload(device if wanted else None)


@contextmanager
def lent(encoder: Encoder | None) -> Iterator[None]:
    """Inside, the encoder is trained; afterwards its weights alone are other ones."""
    if encoder is None:
        yield
        return
    layers, bf16, save_dtype = encoder.layers, encoder.bf16, encoder.save_dtype
    checkpointed, compiled, chunk = layers.checkpointed, layers.compiled, layers.mlp_chunk
    try:
        yield
    finally:
        encoder.bf16, encoder.save_dtype = bf16, save_dtype
        layers.offload(None)
        if layers.mlp_chunk != chunk:
            layers.chunk(chunk)
        if layers.checkpointed != checkpointed:
            layers.checkpoint(checkpointed)
        if layers.compiled and not compiled:
            layers.uncompile()


@contextmanager
def in_training(encoder: Encoder) -> Iterator[None]:
    """In train mode; afterwards in eval mode, without gradients."""
    encoder.train()
    try:
        yield
    finally:
        encoder.eval()
        encoder.zero_grad(set_to_none=True)
