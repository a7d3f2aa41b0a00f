"""Score kernels for Hopper: each program walks over tiles, operands come and results leave by the
tensor memory accelerator, and one warp group loads while two multiply and finish a half each. Tiles
are twice as wide as elsewhere, which halves what passages take from L2.

For the plain forms alone: labels are all that a row knows. The compiler specialises warps only
where a tile has no branches, so labels are looked at in every tile.

    statistics    as in `statistics`, along rows; besides, exp(s - s_positive + SHIFT)
    gradients     as in `gradients`, along rows, columns or both

R rows of A, N rows of B (columns of S), D dims.
"""

import contextvars
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.blocks import Block
from rankpo_kernels.triton.rows import number
from rankpo_kernels.triton.scores import (
    LOG2E,
    Slopes,
    column_factors,
    finite,
    row_factors,
    tile_of,
)
from rankpo_kernels.triton.statistics import beside_positive, keep_sums, weighted_sums
from rankpo_kernels.triton.tiles import Tiles, multiprocessors


@triton.jit
def described(x, rows, columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.make_tensor_descriptor(x, [rows, columns], [stride, 1], [BLOCK_R, BLOCK_C])


@triton.jit
def streamed_dots(
    of_a, of_b, first_m, first_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]; past the ends operands are zeros."""
    dots_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        dots_mn = tl.dot(of_a.load([first_m, k]), of_b.load([first_n, k]).T, dots_mn)
    return dots_mn


@triton.jit
def streamed_statistics_kernel(
    a, b, masks, rows, positive_R, inverse_top, stored,
    scale, R, N, stored_stride,
    D: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partial statistics along rows of all tiles; EDGE: columns end within a tile."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    scale = number(scale)
    of_a = described(a.x, R, D, a.stride, BLOCK_M, BLOCK_K)
    of_b = described(b.x, N, D, b.stride, BLOCK_N, BLOCK_K)
    if stored is not None:
        to = described(stored, R, stored_stride, stored_stride, BLOCK_M, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), warp_specialize=True
    ):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        dots_mn = streamed_dots(
            of_a, of_b, pid_m * BLOCK_M, pid_n * BLOCK_N, D, BLOCK_M, BLOCK_N, BLOCK_K
        )
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < R, offs_n < N
        safe_m = tl.minimum(offs_m, R - 1)
        by_m = row_factors(a, safe_m, 0) * (scale * LOG2E)
        by_n = column_factors(b, offs_n, mask_n, 0)
        t_mn = dots_mn * by_n[None, :] * by_m[:, None]
        label_m = tl.load(masks.label_R + safe_m).to(tl.int32)
        open_mn = label_m[:, None] != offs_n[None, :]
        if EDGE:
            open_mn = open_mn & mask_n[None, :]
        t_mn = tl.where(open_mn, t_mn, -float("inf"))
        top_m = tl.max(t_mn, 1)
        e_mn = tl.exp2(t_mn - finite(top_m)[:, None])
        zs_m, total_m, count_m = weighted_sums(e_mn, t_mn, finite(top_m), rows, 1)
        z_m = tl.sum(e_mn, 1)
        keep_sums(rows, pid_n * R + offs_m, top_m, z_m, zs_m, total_m, count_m, mask_m)
        if stored is not None:
            e_mn *= beside_positive(top_m, positive_R, scale, safe_m, mask_m)[:, None]
            if b.inverse_L is not None:
                e_mn *= (by_n * (1.0 / tl.load(inverse_top)))[None, :]
            to.store([pid_m * BLOCK_M, pid_n * BLOCK_N], e_mn.to(stored.dtype.element_ty))


@triton.jit
def streamed_gradients_kernel(
    a, b, masks, row_slopes, row_over, column_over, label_slope_R, out,
    scale, R, N, out_stride,
    D: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d total / d dot of all tiles: along rows by their slopes, along both by what was folded."""
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    scale = number(scale)
    of_a = described(a.x, R, D, a.stride, BLOCK_M, BLOCK_K)
    of_b = described(b.x, N, D, b.stride, BLOCK_N, BLOCK_K)
    to = described(out, R, out_stride, out_stride, BLOCK_M, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), warp_specialize=True
    ):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        dots_mn = streamed_dots(
            of_a, of_b, pid_m * BLOCK_M, pid_n * BLOCK_N, D, BLOCK_M, BLOCK_N, BLOCK_K
        )
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n, safe_m = offs_n < N, tl.minimum(offs_m, R - 1)
        by_m = row_factors(a, safe_m, 0) * scale
        by_n = column_factors(b, offs_n, mask_n, 0)
        t_mn = dots_mn * by_n[None, :] * (by_m * LOG2E)[:, None]
        if EDGE:  # beside a small sum, exp(0 - lse) overflows
            t_mn = tl.where(mask_n[None, :], t_mn, -float("inf"))
        if column_over is None:
            # -inf of a row without negatives beside closed pairs would be NaN
            lse_m = finite(tl.load(row_slopes.lse + safe_m)) * LOG2E
            g_mn = tl.exp2(t_mn - lse_m[:, None])
            g_mn *= (tl.load(row_slopes.soft + safe_m) * by_m)[:, None]
        else:  # no further vector along the columns fits the registers
            over_n = tl.load(column_over + offs_n, mask=mask_n, other=-float("inf"))
            g_mn = tl.exp2(t_mn + tl.load(row_over + safe_m)[:, None])
            g_mn += tl.exp2(t_mn + over_n[None, :])
        label_m = tl.load(masks.label_R + safe_m).to(tl.int32)
        slope_m = tl.load(label_slope_R + safe_m)  # earlier, it takes 150 instructions more
        if column_over is None:
            slope_m *= by_m
        g_mn = tl.where(label_m[:, None] == offs_n[None, :], slope_m[:, None], g_mn)
        if column_over is not None:
            g_mn *= by_m[:, None]
        g_mn *= by_n[None, :]
        to.store([pid_m * BLOCK_M, pid_n * BLOCK_N], g_mn.to(out.dtype.element_ty))


class Folded(NamedTuple):
    """Slopes of which none is negative: soft exp2(t - lse) = exp2(t + over)."""

    rows_M: Tensor
    columns_N: Tensor
    rest_M: Tensor  # negative, all, where they do not hold

    @staticmethod
    def of(row_slopes: Slopes, column_slopes: Slopes) -> "Folded":
        lowest = torch.minimum(row_slopes.soft[0].amin(), column_slopes.soft[0].amin())
        rest_M = lowest.expand(row_slopes.soft.shape[1]).contiguous()
        return Folded(_over(row_slopes), _over(column_slopes), rest_M)


def _over(slopes: Slopes) -> Tensor:
    lse = slopes.lse[0].clamp(min=-1e30)  # of those without a negative
    return torch.sub(slopes.soft[0].log2(), lse, alpha=LOG2E.value)


def streams(*tensors: Tensor) -> bool:
    """Whether the accelerator can move these rows: aligned to 16 bytes, elements side by side, none
    of them in two rows."""
    return all(
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.element_size() == 2
        for x in tensors
    )


def launch_streamed(
    kernel: Any, tiles: Tiles, block: Block, part: slice, *arguments: Any
) -> None:  # fmt: skip
    """As many programs as multiprocessors, over the rows `part` of a block. Descriptors lie in
    memory that Triton asks for: of this launch alone, so a caller's own allocator stays."""
    a, b, _, _, masks = block.chunk(part)
    N, D = block.b.shape
    device = block.b.device

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def launch() -> None:
        triton.set_allocator(scratch)
        unknown = {"PARTS", "PRECISION"}  # to these kernels
        of_tiles = {name: x for name, x in tiles.arguments.items() if name not in unknown}
        grid = (max(1, multiprocessors(device)),)
        kernel[grid](a, b, masks, *arguments, D=D, EDGE=N % tiles.BLOCK_N != 0, **of_tiles)

    contextvars.copy_context().run(launch)
