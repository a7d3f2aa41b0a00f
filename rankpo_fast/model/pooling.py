"""Token states of texts that lie end to end -> one vector a text.

S texts of T tokens in all, D dims.
"""

import torch
from torch import Tensor


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
