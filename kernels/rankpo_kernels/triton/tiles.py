"""How large a tile is and which pipeline runs: tables with their reasons.

None of it is measured yet: the figures are from flops, bytes (`python -m bench.cost`) and what
compiles without spills (`make aot`). `python -m bench` on a GPU sweeps the tiles.
"""

from dataclasses import dataclass

import torch
import triton

from rankpo_kernels.problem import InfoNCESettings, is_plain
from rankpo_kernels.relations import Relations

FUSION = {"enable_fp_fusion": True}  # said at every launch: Triton's default is about to change


@dataclass(frozen=True)
class Tiles:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # tiles of rows that walk the columns together, their rows staying in L2


# 64 numbers of a score tile a thread, two warp groups of wgmma 64 x 128: what an epilogue adds must
# fit beside them in 255 registers. A thread also holds a value for each of its columns from every
# vector along the columns, so what reads many of them takes fewer columns.
WIDE = Tiles(128, 128, 64, num_warps=8, num_stages=3)
SLIM = Tiles(128, 64, 64, num_warps=8, num_stages=3)
SMALL = Tiles(64, 64, 32, num_warps=8, num_stages=4)
PRODUCT = Tiles(128, 128, 64, num_warps=8, num_stages=3)
# fp32 runs on the plain cores, where larger tiles spill.
FULL = Tiles(64, 64, 32, num_warps=4, num_stages=2)


def score_tiles(
    dtype: torch.dtype, relations: Relations, settings: InfoNCESettings, stored: bool, few: bool
) -> Tiles:  # fmt: skip
    if dtype == torch.float32:
        return FULL
    if relations.guide is not None or len(settings.matryoshka_dims or ()) > 1:
        return SMALL  # two accumulators, or one that outlives several epilogues
    judged = settings.false_negative_margin is not None or settings.hardness_mode is not None
    masked = judged or not relations.labels_alone
    if masked or few or settings.gradient_filter or not is_plain(relations, settings):
        return SLIM  # few launches: their gradients keep dot products beside the slopes
    # tensor memory of sm_100 comes as 64 columns a thread, with wgmma they are 32
    relative = stored or dtype == torch.float16
    return SLIM if relative and _architecture() >= 100 else WIDE


def _architecture() -> int:
    if triton.knobs.runtime.interpret:
        return 0
    return triton.runtime.driver.active.get_current_target().arch


def takes_few_launches(dtype: torch.dtype, M: int, D: int, N: int) -> bool:
    """Whether Triton's products, which finish what they multiply, replace cuBLAS' and the launch
    after them: where a launch counts. In fp32 they would run on the plain cores; and they do not
    share one long sum among programs, which a few queries beside many passages need."""
    even = max(M, N) <= 4 * min(M, N)
    return dtype == torch.bfloat16 and even and not stores_scores(M, D, N)


def stores_scores(M: int, D: int, N: int) -> bool:
    """Whether exponentials are stored (6MND) or the scores computed twice (8MND), in bf16.

    By the model storing wins from 4k x 4k at D=384 and 2k x 2k at 1024 on; but the model leaves out
    the host's time for two launches more, which a run of 0.2 ms feels.
    """
    return M * N * D > 2**34  # 4k x 4k x 1024
