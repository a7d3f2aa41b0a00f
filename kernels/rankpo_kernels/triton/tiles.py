"""How large a tile is and which pipeline runs: tables with their reasons.

None of it is measured yet: the figures are from flops, bytes (`python -m bench.cost`) and what
compiles without spills (`make aot`). `python -m bench` on a GPU sweeps the tiles.
"""

import functools
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import triton

from rankpo_kernels.problem import PQ, QP, InBatchSettings, InfoNCESettings
from rankpo_kernels.relations import Relations


def cdiv(a: int, b: int) -> int:
    """Rounded up; on the host triton.cdiv takes 5 us, which a launch with several feels."""
    return -(-a // b)


FUSION = {"enable_fp_fusion": True}  # said at every launch: Triton's default is about to change


def before(version: str, major: int, minor: int) -> bool:
    """Whether a version of Triton is earlier."""
    return tuple(int(part) for part in version.split(".")[:2]) < (major, minor)


# Such a Triton lets tensor cores read shared memory that cp.async wrote, unordered.
UNFENCED = before(triton.__version__, 3, 7) and not triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tiles:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # tiles of rows that walk the columns together, their rows staying in L2
    PARTS: int = 1  # of its columns, finished one after the other: fewer numbers in registers
    PRECISION: Literal["ieee", "tf32x3"] = "ieee"  # of products of fp32
    programs: int = 1  # that are meant to share a multiprocessor: `make aot` looks that they fit

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        """Of a launch."""
        return {name: x for name, x in asdict(self).items() if name != "programs"} | FUSION


# Two programs share a multiprocessor, so that one's epilogue runs beside the other's products. Of
# four warps each thread may have 255 registers then, 128 of which hold its part of a WIDE tile.
# SLIM reads half as much again from L2 for a product: for what spills in the other.
WIDE = Tiles(128, 128, 64, num_warps=4, num_stages=3, PARTS=4, programs=2)
SLIM = Tiles(128, 64, 64, num_warps=4, num_stages=3, PARTS=2, programs=2)
# A program of `streamed`: twelve warps, two thirds of which multiply and finish 64 x 256 each.
STREAMED = Tiles(128, 256, 64, num_warps=4, num_stages=3)
SMALL = Tiles(64, 64, 32, num_warps=4, num_stages=4)
# Of sm_100, whose tensor memory hands a thread its columns at once, not part by part.
BY_COLUMNS = Tiles(128, 64, 64, num_warps=8, num_stages=3)
SMALL_BY_COLUMNS = Tiles(64, 64, 32, num_warps=8, num_stages=4)
PRODUCT = Tiles(128, 128, 64, num_warps=8, num_stages=3)
# fp32 runs on the plain cores, where larger tiles spill.
FULL = Tiles(64, 64, 32, num_warps=4, num_stages=2)
# Or as three products of tf32. Each BLOCK_K dims are summed by themselves, and to the others as
# fp32: tensor cores cut off what a sum has too many digits of, and of short ones that is less.
SPLIT = Tiles(64, 64, 32, num_warps=4, num_stages=3, PRECISION="tf32x3")


def score_tiles(dtype: torch.dtype, relations: Relations, settings: InfoNCESettings) -> Tiles:
    if dtype == torch.float32:
        return in_fp32(settings.precision)
    # two accumulators, or one that outlives several epilogues
    doubled = relations.guide is not None or len(settings.matryoshka_dims or ()) > 1
    judged = settings.false_negative_margin is not None or settings.hardness_mode is not None
    if _architecture() >= 100:
        return _fenced(SMALL_BY_COLUMNS if doubled or judged else BY_COLUMNS)
    # similarities stand beside the scores; mma.sync holds its operands besides
    if doubled or (judged and _architecture() == 80):
        return SMALL
    return SLIM if judged else WIDE


def product_tiles(dtype: torch.dtype, precision: str = "ieee") -> Tiles:
    """Of products that cuBLAS has no form of."""
    return in_fp32(precision) if dtype == torch.float32 else _fenced(PRODUCT)


def in_fp32(precision: str) -> Tiles:
    return _fenced(SPLIT) if precision == "tf32x3" else FULL


def _fenced(tiles: Tiles) -> Tiles:
    """On sm_100 a loop with a fence of our own (`scores.proxy_fence`) cannot be pipelined, and
    without one must not be: one stage is copied through registers, where Triton has a fence."""
    unfenced = UNFENCED and _architecture() >= 100
    return replace(tiles, num_stages=1) if unfenced else tiles


def streamed_tiles(
    dtype: torch.dtype, D: int, relations: Relations, settings: InfoNCESettings
) -> Tiles | None:
    """For passes over scores whose rows know their labels alone; None where others are taken. By
    the model of `python -m bench.cost` from D = 768 on: below, the epilogue is longer than what a
    wide tile saves."""
    if dtype != torch.bfloat16 or D < 768 or _architecture() != 90:
        return None
    one_level = len(settings.matryoshka_dims or (D,)) == 1 and not settings.label_smoothing
    judged = settings.false_negative_margin is not None or settings.hardness_mode is not None
    one_block = {*settings.directions} <= {QP, PQ}
    simple = one_block and one_level and not judged
    return STREAMED if simple and relations.labels_alone else None


def pair_tiles(dtype: torch.dtype, settings: InBatchSettings, reference: bool, more: bool) -> Tiles:
    """Of losses over pairs; `more`: SFT or the scale's moment, which stand beside x."""
    if dtype == torch.float32:
        return in_fp32(settings.precision)
    if _architecture() >= 100:
        return _fenced(SMALL_BY_COLUMNS if reference or more else BY_COLUMNS)
    if reference:
        return SMALL
    # wgmma reads its operands from shared memory, mma.sync holds them in registers
    return SLIM if more or _architecture() == 80 else WIDE


def _architecture() -> int:
    if triton.knobs.runtime.interpret:
        return 0
    return triton.runtime.driver.active.get_current_target().arch


def multiprocessors(device: torch.device) -> int:
    """0 where nobody knows, as in the interpreter. Tensors without memory stand for an H100's."""
    if device.type == "meta":
        return 132
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


# Which pipeline runs: each function says why its own does not, and nothing where it does.


def against_few_launches(dtype: torch.dtype, M: int, D: int, N: int) -> str:
    """Triton's products, which finish what they multiply, in place of cuBLAS' and the launch after
    them: where a launch counts."""
    if dtype != torch.bfloat16:
        return f"products of {dtype} are faster in cuBLAS"
    if max(M, N) > 4 * min(M, N):  # Triton's do not share one long sum among programs
        return "one side has more than four times the other's rows"
    return "" if against_storing(dtype, M, D, N) else "flops count, not launches"


def against_storing(dtype: torch.dtype, M: int, D: int, N: int) -> str:
    """Exponentials stored (6MND), in place of scores computed twice (8MND).

    By the model storing wins from 4k x 4k at D=384 and 2k x 2k at 1024 on; but the model leaves out
    the host's time for two launches more, which a run of 0.2 ms feels.
    """
    if dtype != torch.bfloat16:
        return f"exponentials beside the positive do not fit {dtype}"
    least = 4096 * 4096 * 1024
    return "" if least < M * N * D else f"M N D = {M * N * D:.2g}, which is not above {least:.2g}"


def against_keeping(
    dtype: torch.dtype, D: int, relations: Relations, settings: InfoNCESettings
) -> str:
    """Both directions from exponentials that are turned into gradients (6MND), in place of scores
    computed twice (8MND); where they fit the workspace: `kept.against_workspace`."""
    if {*settings.directions} != {QP, PQ}:
        return "not both directions of one block"
    if dtype != torch.bfloat16:
        return f"exponentials beside the positive do not fit {dtype}"
    if D < 768:  # by the model
        return f"D={D} is below 768, where moving exponentials costs as much as the product"
    if settings.matryoshka_dims is not None or settings.label_smoothing:
        return "prefixes and smoothing need more than exponentials"
    judged = settings.false_negative_margin is not None or settings.hardness_mode is not None
    one = relations.labels_alone and relations.positive_offsets is None
    return "" if one and not judged else "rows know more than their labels"
