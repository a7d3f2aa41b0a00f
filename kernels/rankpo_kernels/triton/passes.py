"""The passes over blocks of scores that every pipeline of InfoNCE is made of: statistics, what the
pairs make of them, gradients; and the memory that they fill.

R rows of a chunk, M queries, N passages, P positive pairs, L prefixes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankpo_kernels.objective import Stats, add_ranks_, of_all_ranks
from rankpo_kernels.problem import PP, PQ, QP, QQ
from rankpo_kernels.triton import rows, slopes
from rankpo_kernels.triton.blocks import Block, chunks_of
from rankpo_kernels.triton.gradients import gradients_kernel, rest_kernel
from rankpo_kernels.triton.inputs import Inputs
from rankpo_kernels.triton.rows import Scale, absent
from rankpo_kernels.triton.scores import Hardness, Partials, Slopes
from rankpo_kernels.triton.slopes import PairOutputs, Softmax, Softmaxes, Stored
from rankpo_kernels.triton.statistics import statistics_kernel
from rankpo_kernels.triton.streamed import (
    Folded,
    launch_streamed,
    streamed_gradients_kernel,
    streamed_statistics_kernel,
)
from rankpo_kernels.triton.tiles import FUSION, cdiv


def partials(
    p: Inputs, parts: int, rows: int, want: tuple[bool, bool], hard: bool = False
) -> Partials:
    """`want`: the moment, for the scale's gradient; sum and count, for smoothing. `hard`: with
    hardness."""
    moment, counted = want
    return Partials._make(
        p.new(len(p.dims), parts, rows) if wanted else None
        for wanted in (True, True, moment, counted, counted, hard)
    )


def launch_statistics(
    p: Inputs, block: Block, part: slice, row_parts: Partials | None,
    column_parts: Partials | None, positive_R: Tensor | None = None,
    inverse_top: Tensor | None = None, stored: Tensor | None = None,
) -> None:  # fmt: skip
    R, N = part.stop - part.start, len(block.b)
    if p.streamed is not None and row_parts is not None and column_parts is None:
        launch_streamed(
            streamed_statistics_kernel, p.streamed, block, part, row_parts, positive_R, inverse_top,
            stored, p.scale, R, N, 0 if stored is None else stored.stride(0),
        )  # fmt: skip
        return
    tiles = p.tiles
    grid = (cdiv(R, tiles.BLOCK_M) * cdiv(N, tiles.BLOCK_N),)
    statistics_kernel[grid](
        *block.chunk(part), block.hardness or absent(Hardness),
        row_parts or absent(Partials), column_parts or absent(Partials),
        positive_R, inverse_top, stored,
        p.scale, R, N, 0 if stored is None else stored.stride(0),
        p.dims, block.guide_dims, block.curated, **tiles.arguments,
    )  # fmt: skip


def launch_gradients(
    p: Inputs, block: Block, part: slice, out_LRN: Tensor, *, row_slopes: Slopes | None = None,
    column_slopes: Slopes | None = None, folded: Folded | None = None,
    label_slope_LR: Tensor | None = None, inverse_top: Tensor | None = None,
    along: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:  # fmt: skip
    """`folded`: the slopes of all rows and columns, for `streamed`."""
    tiles, R, N = p.tiles, part.stop - part.start, len(block.b)
    if (
        p.streamed is not None
        and row_slopes is not None
        and label_slope_LR is not None
        and (column_slopes is None or folded is not None)
        and inverse_top is None
        and along == (None, None)
    ):
        over = (None, None) if folded is None else (folded.rows_M[part], folded.columns_N)
        launch_streamed(
            streamed_gradients_kernel, p.streamed, block, part, row_slopes, *over,
            label_slope_LR[0], out_LRN[0], p.scale, R, N, out_LRN.stride(1),
        )  # fmt: skip
        if folded is not None:
            launch_rest(
                p, block, part, out_LRN[0], row_slopes, label_slope_LR,
                column_slopes=column_slopes, rest_R=folded.rest_M[part],
            )  # fmt: skip
        return
    grid = (cdiv(R, tiles.BLOCK_M) * cdiv(N, tiles.BLOCK_N),)
    gradients_kernel[grid](
        *block.chunk(part), block.hardness or absent(Hardness),
        row_slopes or absent(Slopes), column_slopes or absent(Slopes), label_slope_LR,
        inverse_top, out_LRN, *along, p.scale, R, N, out_LRN.stride(1), out_LRN.stride(0),
        0 if label_slope_LR is None else label_slope_LR.stride(0),
        p.dims, block.guide_dims, block.curated, **tiles.arguments,
    )  # fmt: skip


def folded_slopes(
    p: Inputs, block: Block, row_slopes: Slopes | None, column_slopes: Slopes | None
) -> Folded | None:
    """Of both directions, for `streamed`; not where columns end within a tile: that spills."""
    if p.streamed is None or row_slopes is None or column_slopes is None:
        return None
    whole = len(block.b) % p.streamed.BLOCK_N == 0
    return Folded.of(row_slopes, column_slopes) if whole else None


def launch_rest(
    p: Inputs, block: Block, part: slice, out_RN: Tensor, row_slopes: Slopes,
    label_slope_LR: Tensor, *, column_slopes: Slopes | None = None,
    inverse_top: Tensor | None = None, rest_R: Tensor | None = None,
) -> None:  # fmt: skip
    """The rows that faster kernels could not do: mostly none, so a program looks after all tiles of
    its rows."""
    # a row that is left works for all rows of its tile
    block_m, block_n = min(64, p.tiles.BLOCK_M), min(64, p.tiles.BLOCK_N)
    tiles = replace(p.tiles, BLOCK_M=block_m, BLOCK_N=block_n, PARTS=1, programs=1)
    R, N = part.stop - part.start, len(block.b)
    rest_kernel[(cdiv(R, tiles.BLOCK_M),)](
        *block.chunk(part), block.hardness or absent(Hardness), row_slopes,
        column_slopes or absent(Slopes), label_slope_LR, inverse_top, rest_R, out_RN,
        p.scale, R, N, out_RN.stride(0), p.dims, block.guide_dims, block.curated, **tiles.arguments,
    )  # fmt: skip


def along_parts(p: Inputs, block: Block, R: int) -> tuple[Tensor, Tensor]:
    """Memory for the parts of gradients along R rows and along all columns."""
    L, N = len(p.dims), len(block.b)
    tiles_m, tiles_n = cdiv(R, p.tiles.BLOCK_M), cdiv(N, p.tiles.BLOCK_N)
    return p.new(L, tiles_n, R), p.new(L, tiles_m, N)


def pair_outputs(p: Inputs, gradients: bool, need_scale: bool) -> PairOutputs:
    """Memory for what the pairs leave."""
    L, M, P = len(p.dims), p.M, len(p.columns_P)
    directions, smooth = p.settings.directions, p.settings.label_smoothing > 0

    def slopes_of(direction: str, rows: int) -> Slopes:
        if not gradients or direction not in directions:
            return absent(Slopes)
        flat = p.new(L, rows) if smooth else None
        return Slopes(p.new(L, rows), p.new(L, rows), flat, rows if L > 1 else 0)

    by_columns = gradients and PQ in directions
    of_columns = p.N if by_columns else 0  # whose share `settle` adds
    d_scale = p.new(L, M + of_columns) if need_scale else None
    return PairOutputs(
        p.new(L, M), p.new(M), p.new(L, P) if gradients else None,
        slopes_of(QP, M), slopes_of(QQ, M), slopes_of(PP, P),
        p.new(L, P) if by_columns else None, p.new(L, P) if by_columns and smooth else None,
        d_scale, M + of_columns, None,
    )  # fmt: skip


def output_rows(outputs: PairOutputs, part: slice) -> PairOutputs:
    """Of a plain loss, which has one level and a pair a row."""
    names = ("loss_LM", "hardest_M", "slope_LP", "d_scale_LM", "factor_M")

    def pick(x: Any) -> Any:
        return None if x is None else x[..., part]

    of_rows = outputs.qp._replace(lse=pick(outputs.qp.lse), soft=pick(outputs.qp.soft))
    return outputs._replace(qp=of_rows, **{name: pick(getattr(outputs, name)) for name in names})


def settle(
    p: Inputs, sums: dict[str, Partials], own: Partials | None, weights: Scale,
    outputs: PairOutputs, stored: Stored | None = None, part: slice = slice(None),
) -> Slopes | None:  # fmt: skip
    """Fill `outputs` from the statistics of all directions; returns the slopes of columns."""
    settings, columns_P = p.settings, p.columns_P[part]
    if settings.group is not None:
        sums = sums | {PQ: _of_all_ranks(p, sums[PQ])}
    M, N, P, L, D = len(outputs.hardest_M), p.N, len(columns_P), len(p.dims), p.dims[-1]
    of = Softmaxes(*map(Softmax.of, [sums.get(QP), own, *map(sums.get, (PQ, QQ, PP))]))
    smoothing = settings.label_smoothing or None
    levels = tuple([weight for _, weight in settings.levels(D)])
    slopes.pairs_kernel[(cdiv(M, slopes.BLOCK), L)](
        of, outputs, stored or absent(Stored), columns_P,
        p.relations.positive_offsets, p.similarity_LP[:, part],
        weights, smoothing, p.scale, M, N, P, D,
        levels, settings.joint, slopes.BLOCK, min(128, rows.block_d(D)),
        num_warps=4, **FUSION,
    )  # fmt: skip
    if outputs.pull_LP is None:
        return None
    flat = None if smoothing is None else p.new(L, N)
    out = Slopes(p.new(L, N), p.new(L, N), flat, N if L > 1 else 0)
    d_scale = outputs.d_scale_LM
    slopes.columns_kernel[(cdiv(N, 32), L)](
        of.pq, columns_P, outputs.pull_LP, outputs.flat_LP, out,
        None if d_scale is None else d_scale[:, M:], outputs.d_scale_stride, p.scale, N, P,
        32, 256, **FUSION,
    )  # fmt: skip
    for x in (out.soft, out.flat):
        if x is not None:
            add_ranks_(x, settings)
    return out


def _of_all_ranks(p: Inputs, parts: Partials) -> Partials:
    """Of columns, over the queries of all ranks: one part."""
    want = (parts.zs is not None, parts.sum is not None)
    one = slopes.reduce(parts, partials(p, 1, p.N, want))
    top, z, *rest, _ = one
    none = torch.zeros_like(z)
    zs, total, count = (none if x is None else x for x in rest)
    lse, mean = top + z.log(), zs / z.masked_fill(z == 0, 1)  # z = 0: log is -inf, and so is top
    stats = of_all_ranks(Stats(lse, mean, total, count, top), p.settings)
    whole = (stats.lse, (stats.lse != -torch.inf).float(), stats.mean, stats.sum, stats.count, None)
    return Partials._make(x if y is not None else None for x, y in zip(whole, one, strict=True))


def hardest(outputs: PairOutputs, directions: Sequence[str]) -> Tensor:
    of_rows = QP in directions or QQ in directions
    return outputs.hardest_M if of_rows else outputs.hardest_M.fill_(-torch.inf)


def statistics(
    p: Inputs, block: Block, want: tuple[bool, bool], in_tiles: bool
) -> dict[str, Partials]:
    """Of a block's directions, each in parts: of its chunks, or of its tiles where they may be (no
    other block needs the memory, and a column is merged once) and there is one chunk alone."""
    L, N, hard = len(p.dims), len(block.b), block.hardness is not None
    tiles = p.tiles if block.column_direction else p.row_tiles
    if block.row_direction is None and block.column_direction is None:
        return {}
    of_row = 4 * (2 + want[0] + 2 * want[1] + hard) * L
    row_bytes = of_row * cdiv(N, tiles.BLOCK_N) + of_row * N // tiles.BLOCK_M
    chunks = chunks_of(block.rows, N, row_bytes, p.workspace_bytes, tiles.BLOCK_M)
    sums: dict[str, Partials] = {}
    row_parts: list[Partials] = []
    columns = partials(p, len(chunks), N, want) if block.column_direction else None
    for at, part in enumerate(chunks):
        R = part.stop - part.start
        of_rows = of_columns = None
        if block.row_direction:
            of_rows = partials(p, cdiv(N, tiles.BLOCK_N), R, want, hard)
        if block.column_direction:
            of_columns = partials(p, cdiv(R, tiles.BLOCK_M), N, want)
        launch_statistics(p, block, part, of_rows, of_columns)
        if in_tiles and len(chunks) == 1:
            row_parts, columns = [] if of_rows is None else [of_rows], of_columns
            break
        if of_rows is not None:
            row_parts.append(slopes.reduce(of_rows, partials(p, 1, R, want, hard)))
        if of_columns is not None and columns is not None:
            slopes.reduce(of_columns, columns, at)
    if block.row_direction:
        sums[block.row_direction] = row_parts[0] if len(row_parts) == 1 else Partials._make(
            None if x[0] is None else torch.cat(x, 2) for x in zip(*row_parts, strict=True)
        )  # fmt: skip
    if block.column_direction and columns is not None:
        sums[block.column_direction] = columns
    return sums
