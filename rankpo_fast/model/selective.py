"""Selective checkpointing: a layer keeps its products and attention, the rest is computed again.

Products are nearly all of a layer's work, and what lies between them (norms, activations, rotary
positions, dropout, sums) nearly nothing of it, but more than half of what the backward pass needs.
"""

from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

# By names, since most are there with certain libraries or on certain devices only. One that is not
# here, as an attention kernel that tells torch no name, is computed again: slower, not wrong.
PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::_int_mm", "aten::_scaled_mm", "aten::_grouped_mm",
    "aten::_scaled_grouped_mm", "bitsandbytes::gemv_4bit", "bitsandbytes::int8_linear_matmul",
}  # fmt: skip
BATCHED = {"aten::bmm", "aten::baddbmm"}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
}


def _policy(
    context: SelectiveCheckpointContext, op: Any, *arguments: Any, **keywords: Any
) -> CheckpointPolicy:
    name = _name(op)
    if name in PRODUCTS:
        keep = True
    elif name in BATCHED:
        # Scores of attention [L, L] are as large as all that checkpointing is there to spare.
        first, second = [x for x in arguments if isinstance(x, torch.Tensor)][-2:]
        product = first.numel() // first.shape[-1] * second.shape[-1]
        keep = product <= first.numel() + second.numel()
    else:
        # Were it not drawn again, dropout after it would draw what was drawn here.
        keep = name in ATTENTION and not _dropout(op, arguments, keywords)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# Two contexts for each call of a layer: torch's checkpoint enters one forward, one in the backward.
contexts = partial(create_selective_checkpoint_contexts, _policy)


@cache
def _name(op: Any) -> str:
    """Without the overload: aten::mm."""
    return op.name().partition(".")[0]


def _dropout(op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    place = _place_of_dropout(op)
    if place is None:
        return False
    return (arguments[place] if place < len(arguments) else keywords.get("dropout_p", 0.0)) > 0


@cache
def _place_of_dropout(op: Any) -> int | None:
    names = [argument.name for argument in op._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None
