"""Which texts of a batch are the same: by their tokens, wherever padding is."""

from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]  # of one column


def text_ids(features: Features) -> Tensor:
    """[B] int64 hashes of a column's tokens, wherever their padding is: equal texts are equal, and
    of a million unequal ones hardly two (3e-8)."""
    tokens = features.get("input_ids")
    ends = "cu_seq_lens_q" in features or "attention_mask" in features
    if tokens is None or not ends or features.get("modality", "text") != "text":
        raise ValueError(
            "mask_duplicates needs input_ids and attention_mask of texts, got "
            f"{features.get('modality', 'text')} with {sorted(features)}"
        )
    if "cu_seq_lens_q" in features:
        tokens = tokens[0]  # [T]
        ends = features["cu_seq_lens_q"].to(tokens.device, torch.int64)
        text_T = torch.searchsorted(
            ends[1:], torch.arange(len(tokens), device=ends.device), right=True
        )
        mixed_T = _mixed(tokens, torch.arange(len(tokens), device=ends.device) - ends[text_T])
        return mixed_T.new_zeros(len(ends) - 1).index_add(0, text_T, mixed_T)
    mask = features["attention_mask"].to(torch.int64)
    return (_mixed(tokens, mask.cumsum(1) - 1) * mask).sum(1)


def _mixed(tokens: Tensor, positions: Tensor) -> Tensor:
    """A random-looking int64 for each token at its place (the finaliser of splitmix64)."""
    x = (tokens.to(torch.int64) + 1) * -7046029254386353131 + (positions + 1) * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * factor
    return x


def first_equal(ids_B: Tensor, ids_N: Tensor, otherwise: Tensor) -> Tensor:
    """A column [B] of ids_N that equals each of ids_B, where there is one."""
    order_N = ids_N.argsort()
    found_B = order_N[torch.searchsorted(ids_N[order_N], ids_B).clamp(max=len(ids_N) - 1)]
    return torch.where(ids_N[found_B] == ids_B, found_B, otherwise)
