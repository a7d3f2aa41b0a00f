"""Both directions from exponentials that the first pass keeps: 6MND, where all of them fit the
workspace.

    E_ij = exp(s_ij - s_i,label + SHIFT)
    d total / d s_ij = +-E_ij (exp(undo_i + over_i) +- exp(undo_i + over_j))
    undo_i = s_i,label - SHIFT,   over = log |soft| - lse of the row i, the column j

What does not fit beside the positive, below e^-87 or above e^87, is computed a second time: the row
where it overflows, everything where a column has nothing above what is 0.

M queries, N passages, D dims.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.blocks import Block, largest_inverse, padded, torch_number
from rankpo_kernels.triton.inputs import Inputs
from rankpo_kernels.triton.passes import launch_rest, launch_statistics, partials
from rankpo_kernels.triton.rows import number
from rankpo_kernels.triton.scores import (
    LOG2E,
    Partials,
    Slopes,
    column_factors,
    finite,
    row_factors,
    tile_at,
)
from rankpo_kernels.triton.slopes import OVER
from rankpo_kernels.triton.statistics import SHIFT
from rankpo_kernels.triton.tiles import FUSION, cdiv

SMALLEST = -87.3  # in whose power of e fp32 and bf16 end
ROUNDING = 7.0  # e to its negative is less than bf16 tells from 0 beside 1
BLOCK_M, BLOCK_N = 32, 128


@triton.jit
def over(slopes, at, mask):
    """(log2 |soft| - lse in units of log 2, the sign of soft)."""
    soft = tl.load(slopes.soft + at, mask=mask, other=0.0)
    lse = finite(tl.load(slopes.lse + at, mask=mask, other=0.0))
    return tl.log2(tl.abs(soft)) - lse * LOG2E, tl.where(soft < 0, -1.0, 1.0)


@triton.jit
def turn_kernel(
    kept, a, b, label_R, positive_R, row_slopes, column_slopes, label_slope_R, inverse_top,
    scale, R, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """In place, exponentials into d total / d dot."""
    tiles_n = tl.cdiv(stride, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < R, offs_n < N
    safe_m, scale = tl.minimum(offs_m, R - 1), number(scale)
    at_mn = tile_at(kept, pid_m, pid_n, stride, BLOCK_M, BLOCK_N)
    write_mn = mask_m[:, None] & (offs_n < stride)[None, :]  # 0 past N
    e_mn = tl.load(at_mn, mask=write_mn, other=0.0).to(tl.float32)
    undo_m = (scale * tl.load(positive_R + safe_m) - SHIFT) * LOG2E
    over_m, sign_m = over(row_slopes, safe_m, mask_m)
    over_n, sign_n = over(column_slopes, offs_n, mask_n)
    g_mn = sign_n[None, :] * tl.exp2(undo_m[:, None] + over_n[None, :])
    g_mn = e_mn * (g_mn + (sign_m * tl.exp2(undo_m + over_m))[:, None])
    by_m = row_factors(a, safe_m, 0) * scale
    slope_m = tl.load(label_slope_R + safe_m) * by_m
    by_n = column_factors(b, offs_n, mask_n, 0)
    if b.inverse_L is not None:  # which the exponentials have, divided by the largest
        by_m *= tl.load(inverse_top)
    g_mn *= by_m[:, None]
    label_m = tl.load(label_R + safe_m).to(tl.int32)
    g_mn = tl.where(label_m[:, None] == offs_n[None, :], slope_m[:, None] * by_n[None, :], g_mn)
    tl.store(at_mn, g_mn.to(kept.dtype.element_ty), mask=write_mn)


def against_workspace(p: Inputs, moments: bool) -> str:
    """Why exponentials of all rows, and the sums of their tiles, do not fit it; empty: they do."""
    M, N, tiles = p.M, p.N, p.tiles
    parts = M * cdiv(N, tiles.BLOCK_N) + N * cdiv(M, tiles.BLOCK_M)
    needed = M * padded(N) * p.q_MD.element_size() + 4 * (2 + moments) * parts
    has = p.workspace_bytes
    return "" if needed <= has else f"workspace_bytes={has} of the {needed} that {M} x {N} take"


class Kept(NamedTuple):
    """Exponentials of all rows, and what they are relative to."""

    exponentials_MN: Tensor
    inverse_top: Tensor

    @staticmethod
    def of(p: Inputs) -> "Kept":
        M, N = p.M, p.N
        return Kept(p.new(M, padded(N), dtype=p.q_MD.dtype), largest_inverse(p.inverse_p, p.p_ND))

    def statistics(self, p: Inputs, block: Block, want: tuple[bool, bool]) -> dict[str, Partials]:
        """Of rows and columns, in parts of tiles."""
        M, N, tiles = p.M, p.N, p.tiles
        assert block.row_direction and block.column_direction
        of_rows = partials(p, cdiv(N, tiles.BLOCK_N), M, want)
        of_columns = partials(p, cdiv(M, tiles.BLOCK_M), N, want)
        launch_statistics(
            p, block, slice(0, M), of_rows, of_columns, p.similarity_LP[0], self.inverse_top,
            self.exponentials_MN,
        )  # fmt: skip
        return {block.row_direction: of_rows, block.column_direction: of_columns}

    def gradients(
        self, p: Inputs, block: Block, row_slopes: Slopes, column_slopes: Slopes, slope_M: Tensor
    ) -> Tensor:
        """[M, N]: d total / d dot, in their place."""
        (M, stride), N = self.exponentials_MN.shape, p.N
        all_rows = slice(0, M)
        a, b, *_ = block.chunk(all_rows)
        turn_kernel[(cdiv(M, BLOCK_M) * cdiv(stride, BLOCK_N),)](
            self.exponentials_MN, a, b, p.relations.labels_M, p.similarity_LP[0], row_slopes,
            column_slopes, slope_M, self.inverse_top, p.scale, M, N, stride, BLOCK_M, BLOCK_N,
            num_warps=4, **FUSION,
        )  # fmt: skip
        launch_rest(
            p, block, all_rows, self.exponentials_MN, row_slopes, slope_M[None],
            column_slopes=column_slopes, rest_R=_rest(p, row_slopes, column_slopes),
        )  # fmt: skip
        return self.exponentials_MN[:, :N]


def _rest(p: Inputs, row_slopes: Slopes, column_slopes: Slopes) -> Tensor:
    """[M]: negative for rows that exponentials beside their positives do not hold."""
    positive_M = p.similarity_LP[0, : p.M] * torch_number(p.scale)
    rows_M = row_slopes.lse[0] - positive_M > OVER.value
    zeros = positive_M.max() - SHIFT.value + SMALLEST  # below this, of any row
    low_N = column_slopes.lse[0] < zeros + math.log(len(positive_M)) + ROUNDING
    return -(rows_M | (low_N & (column_slopes.soft[0] != 0)).any()).float()
