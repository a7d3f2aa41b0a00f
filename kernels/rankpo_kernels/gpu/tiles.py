"""How large a tile is, which pipeline runs, how many rows a chunk has: tables with their reasons.

None of it is measured yet: the figures are from flops, bytes and what compiles without spills
(`make aot`). See `cost` for the model.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # tiles of rows that walk the columns together, their rows staying in L2


# Two warp groups of 64 x 256 fill Hopper's wgmma; 64 registers a thread and accumulator leave room
# for the epilogue. fp32 runs on the plain cores, where larger tiles spill.
HALF = Tiles(128, 128, 64, num_warps=8, num_stages=3)
FULL = Tiles(64, 64, 32, num_warps=4, num_stages=2)


def score_tiles(dtype: torch.dtype) -> Tiles:
    return FULL if dtype == torch.float32 else HALF


def stores_scores(M: int, D: int, N: int, dtype: torch.dtype) -> bool:
    """Whether exponentials are stored (6MND) or the scores computed twice (8MND).

    Storing takes two launches more, which a batch of 0.2 ms feels and a larger one does not.
    """
    return dtype == torch.bfloat16 and M * N * D >= 2**36  # 8k x 8k x 1024
