"""Encoders of the sizes that people train, from their published configs: the weights are random,
and nothing is fetched.

A model's useful flops are those of its matrices and its attention, forward and backward: what is
computed again, for padding, or for no gradient does not count.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TINY = "tiny"  # the corpus' own: its weights are on disk, so that all learn from the same ones
STATE_BYTES = 16  # a parameter with its gradient and AdamW's two moments, all fp32
_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960,
          "rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 8,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
          "tie_word_embeddings": True}  # fmt: skip


def _llama(factor: float) -> dict[str, Any]:
    """`factor`: that positions are stretched by, beyond the 8,192 it was first trained on."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    return {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_parameters": rope}  # fmt: skip


def _size(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads}  # fmt: skip


BACKBONES: Mapping[str, Mapping[str, Any]] = {
    TINY: _BERT | _size(64, 256, 2, 2),
    "MiniLM-L6": _BERT | _size(384, 1536, 6, 12),
    "bge-base": _BERT | _size(768, 3072, 12, 12),
    "Qwen3-0.6B": _QWEN3 | _size(1024, 3072, 28, 16),
    "Llama-3.2-1B": _llama(32.0) | _size(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    "Llama-3.2-3B": _llama(32.0) | _size(3072, 8192, 28, 24) | {"tie_word_embeddings": True},
    "Qwen3-4B": _QWEN3 | _size(2560, 9728, 36, 32),
    "Llama-3.1-8B": _llama(8.0) | _size(4096, 14336, 32, 32),
    "Qwen3-32B": _QWEN3 | _size(5120, 25600, 64, 64) | {"tie_word_embeddings": False},
}


def config_of(backbone: str, **more: Any) -> "PreTrainedConfig":
    from transformers import AutoConfig

    return AutoConfig.for_model(**{**BACKBONES[backbone], **more})


def skeleton(config: "PreTrainedConfig") -> nn.Module:
    """The encoder without storage."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def training_flops(config: "PreTrainedConfig", lengths: torch.Tensor) -> float:
    """Useful flops of a step on texts of `lengths` tokens, int64 [n].

    A forward takes 2 flops a token and parameter of a matrix, 4 a pair of tokens of a text, layer
    and dim of the heads; a backward twice as many. Causal attention counts in full, as is usual.
    """
    matrices = sum(
        module.weight.numel()
        for name, module in skeleton(config).named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler.")  # which reads one token
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = lengths.double().square().sum().item()
    attention = 4 * config.num_hidden_layers * heads * head_dim * pairs
    return 3 * (2 * matrices * lengths.sum().item() + attention)


@cache
def written_bytes(backbone: str) -> int:
    """Of its weights in a file, in bf16."""
    return 2 * sum(parameter.numel() for parameter in skeleton(config_of(backbone)).parameters())


def state_bytes(config: "PreTrainedConfig") -> int:
    """What training holds of a model before the first text: weights, gradients, AdamW's moments."""
    return STATE_BYTES * sum(parameter.numel() for parameter in skeleton(config).parameters())
