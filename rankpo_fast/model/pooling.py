"""Token states of a text -> one vector, right under left and right padding: only the mask is asked.

S sequences, L padded length, D dims.
"""

import torch
from torch import Tensor


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Pool states [S, L, D] of any float dtype over attention_mask [S, L] (1 text, 0 padding).

    Returns [S, D] fp32: the state of the last token, of the first ("cls"), or the "mean" of all.
    """
    if pooling == "mean":
        return _mean(states, attention_mask)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if pooling == "last":
        token = (positions * attention_mask).argmax(dim=1)  # [S]
    else:
        assert pooling == "cls", pooling
        token = attention_mask.argmax(dim=1)  # [S] the first of equal maxima
    rows = torch.arange(len(states), device=states.device)
    return states[rows, token].float()


def _mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    # Padding may hold inf or nan, which a product with 0 would not remove.
    padding = attention_mask[:, :, None] == 0  # [S, L, 1]
    total = states.float().masked_fill(padding, 0.0).sum(dim=1)  # [S, D]
    return total / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
