"""Another model that a run asks once and then does without: a reference, a guide."""

import dataclasses
import gc
import hashlib
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.data.files import hash_tensors
from rankpo_fast.errors import InputError
from rankpo_fast.model.check import whole
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.arithmetic import arithmetic

Answer = TypeVar("Answer")
COMPUTING = ("attn_implementation", "packing", "bf16")  # settings that say nothing of texts


def ask_frozen(
    flag: str,
    name: str,
    model: ModelConfig,
    device: torch.device,
    ask: Callable[[Encoder], Answer],
    *,
    alike: bool,
) -> Answer:
    """`ask` of the model `name`, which is gone afterwards. It computes as `model` does, which is
    trained, and reads text like it where `alike`, else as its own files say. InputError names
    `flag`."""
    fields = dataclasses.fields(EncoderConfig)
    names = [field.name for field in fields] if alike else COMPUTING
    own = {name: getattr(model, name) for name in names}
    config = EncoderConfig(**{**own, "model_name_or_path": name, "tokenizer_name": None})
    try:
        encoder = load_encoder(config, device=device)
    except InputError as error:
        raise InputError(str(error).replace("--model_name_or_path", flag)) from error
    answer = ask(encoder)
    del encoder
    gc.collect()  # modules refer to themselves in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return answer


def are_cosines(kept: Mapping[str, Tensor], *, name: str, shape: tuple[int, ...]) -> bool:
    """Whether `kept` is one tensor of that name and shape, fp32, whose values are in [-1, 1] but
    for rounding: similarities, or elements of vectors of length 1."""
    tensor = kept.get(name)
    if len(kept) != 1 or tensor is None or tensor.dtype != torch.float32:
        return False
    return tuple(tensor.shape) == shape and bool((tensor.abs() <= 1.001).all())


def key_of(encoder: Encoder, tensors: Mapping[str, Tensor], max_tokens: int | None) -> str:
    """sha256 of what decides an encoder's vectors to the last bit, and of `tensors`; all ranks
    must ask it of weights that lie in parts.

    Args:
        max_tokens: of a micro-batch.
    """
    computing = (encoder.bf16, encoder.packed, encoder.attention, max_tokens)
    said = [encoder.settings.pooling, *computing, *arithmetic(encoder.device).items()]
    digest = hashlib.sha256(repr(said).encode())
    weights = encoder.backbone.state_dict().items()
    hash_tensors(digest, chain(tensors.items(), ((name, whole(t)) for name, t in weights)))
    return digest.hexdigest()
