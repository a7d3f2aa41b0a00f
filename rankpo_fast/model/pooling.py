"""Token states -> one vector a text: of texts that lie end to end, or are padded.

S texts of T tokens in all, padded to L each; D dims.
"""

import torch
from torch import Tensor

from rankpo_kernels.problem import compute_dtype


def pool(states: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """Pool states [T, D] of any float dtype; text i is states[offsets[i] : offsets[i + 1]].

    Returns [S, D] fp32: the state of the last token, of the first ("cls"), or the "mean" of all.
    Sums are taken in one order, also in the backward pass on a GPU.
    """
    if pooling == "mean":
        return torch.segment_reduce(states.float(), "mean", offsets=offsets, axis=0, unsafe=True)
    assert pooling in ("last", "cls"), pooling
    token = offsets[1:] - 1 if pooling == "last" else offsets[:-1]  # [S]
    return states.index_select(0, token).float()


def pool_padded(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """The same of states [S, L, D] of texts padded on either side: tokens where mask [S, L] is 1.
    No host sync. Returns [S, D] fp32 (fp64 of fp64)."""
    dtype = compute_dtype(states.dtype)
    if pooling == "mean":
        total = states.masked_fill(mask[..., None] == 0, 0).sum(1, dtype=dtype)
        return total / mask.sum(1, keepdim=True).clamp(min=1)
    assert pooling in ("last", "cls"), pooling
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # [S], argmax being the first of all equal
    token = last if pooling == "last" else mask.argmax(1)
    return states[torch.arange(len(states), device=states.device), token].to(dtype)
