"""Blocks of scores in torch: a chunk of rows at a time they are logits, statistics, slopes, and
gradients of the vectors of both sides.

Rows are normalised a chunk at a time, columns by a factor per column of the scores. With prefixes,
the scores of one are those of the one before plus a product, and a block of dims takes the sum of
dS over the prefixes that hold it, so all of them cost the products of one.

P positive pairs, H own negatives, D dims, L prefixes; R rows of a chunk, r rows of a slab, C
columns. The workspace is R x C per prefix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_kernels.chunked.chunks import Lists, add_rows, row_chunks, slab_rows, slices
from rankpo_kernels.chunked.norms import inverse_norms, tangent_
from rankpo_kernels.objective import Slopes, Stats
from rankpo_kernels.problem import PP, QP, InfoNCESettings
from rankpo_kernels.relations import APART

# Finite stand-ins for -inf, so that exp(MASKED - top) * MASKED = 0 with no inf - inf; a row with
# nothing left has its largest logit at FLOOR.
MASKED, FLOOR = -3e38, -1e38


@dataclass(frozen=True)
class Side:
    """Vectors, what makes unit vectors of their prefixes, and the gradients to be added to."""

    x_ND: Tensor
    inverse_LN: Tensor  # 1 / norm; ones without normalize
    ratio_LN: Tensor  # inverse / inverse of the last prefix
    grad_ND: Tensor | None
    along_LN: Tensor  # sum of dS s per vector: what the gradient through the norm takes away

    @staticmethod
    def of(x_ND: Tensor, bounds: list, dtype: torch.dtype, normalize: bool, need: bool) -> "Side":
        x_ND = x_ND[:, : bounds[-1][1]].to(dtype)
        inverse_LN = x_ND.new_ones(len(bounds), len(x_ND))
        ratio_LN = torch.ones_like(inverse_LN)
        if normalize:
            inverse_LN = torch.stack([inverse_norms(x_ND[:, :high], dtype) for _, high in bounds])
            last_N = inverse_LN[-1]
            ratio_LN = inverse_LN / last_N.masked_fill(last_N == 0, torch.inf)
        grad_ND = x_ND.new_zeros(x_ND.shape) if need else None
        return Side(x_ND, inverse_LN, ratio_LN, grad_ND, torch.zeros_like(inverse_LN))

    def part(self, rows: slice) -> "Side":
        """These vectors alone, in the same memory."""
        grad_ND = None if self.grad_ND is None else self.grad_ND[rows]
        x_ND, along_LN = self.x_ND[rows], self.along_LN[:, rows]
        return Side(x_ND, self.inverse_LN[:, rows], self.ratio_LN[:, rows], grad_ND, along_LN)

    def unit(self, rows: slice | Tensor) -> Tensor:
        return self.x_ND[rows] * self.inverse_LN[-1, rows, None]

    def add(self, rows: slice | Tensor, d_unit: Tensor) -> None:
        """Gradients of unit vectors."""
        assert self.grad_ND is not None
        d_unit = d_unit * self.inverse_LN[-1, rows, None]
        add_rows(self.grad_ND, rows, d_unit)

    def gradient(self, bounds: list, D: int, normalize: bool) -> Tensor:
        """What was added, which took the norms for constants, less what they take away."""
        assert self.grad_ND is not None
        if normalize and len(bounds) == 1:
            tangent_(self.grad_ND, self.x_ND, self.inverse_LN[0])
        elif normalize:
            take_LN = self.along_LN * self.inverse_LN * self.ratio_LN
            take_LN = take_LN.flip(0).cumsum(0).flip(0)  # a prefix takes from all its blocks
            for rows in slices(len(self.x_ND), slab_rows(self.x_ND)):
                unit_rD = self.unit(rows)
                for (low, high), take_N in zip(bounds, take_LN, strict=True):
                    self.grad_ND[rows, low:high] -= unit_rD[:, low:high] * take_N[rows, None]
        return F.pad(self.grad_ND, (0, D - bounds[-1][1]))


def pair_logits(a: Side, b: Side, i_P: Tensor, j_P: Tensor, scale: Tensor, bounds: list) -> Tensor:
    """[L, P] logits of pairs (a_i, b_j)."""
    logits_LP = a.x_ND.new_empty(len(bounds), len(i_P))
    for part in slices(len(i_P), slab_rows(a.x_ND)):
        i, j = i_P[part], j_P[part]
        dot_D = a.unit(i).mul_(b.x_ND[j])
        dots = torch.stack([dot_D[:, low:high].sum(1) for low, high in bounds]).cumsum(0)
        logits_LP[:, part] = dots * (scale * a.ratio_LN[:, i] * b.inverse_LN[:, j])
    return logits_LP


def add_pairs(
    a: Side, b: Side, i_P: Tensor, j_P: Tensor, slope_LP: Tensor, logits_LP: Tensor,
    scale: Tensor, bounds: list,
) -> None:  # fmt: skip
    """Gradients of pairs whose logits have these slopes."""
    for x, rows in ((a, i_P), (b, j_P)):
        for along_N, values in zip(x.along_LN, slope_LP * logits_LP, strict=True):
            add_rows(along_N, rows, values)
    sizes = torch.tensor([high - low for low, high in bounds], device=i_P.device)
    for part in slices(len(i_P), slab_rows(a.x_ND)):
        i, j = i_P[part], j_P[part]
        dot_Lc = slope_LP[:, part] * scale * a.ratio_LN[:, i] * b.inverse_LN[:, j]
        # A dim is in all prefixes from its own on.
        dot_Lc = dot_Lc.flip(0).cumsum(0).flip(0)
        dot_cD = dot_Lc.T.repeat_interleave(sizes, dim=1, output_size=a.x_ND.shape[1])
        if a.grad_ND is not None:
            a.add(i, b.x_ND[j].mul_(dot_cD))
        if b.grad_ND is not None:
            add_rows(b.grad_ND, j, a.unit(i).mul_(dot_cD))


def own_stats(logits_H: Tensor, by: Tensor | float, owner_H: Tensor, M: int) -> Stats:
    """Statistics of the own negatives of each query; hardness multiplies their logits `by`."""
    hard_H = logits_H * by
    top_M = logits_H.new_full((M,), FLOOR).scatter_reduce_(0, owner_H, hard_H, "amax")
    e_H = (hard_H - top_M[owner_H]).exp()
    sums = logits_H.new_zeros(4, M)
    parts = (e_H, e_H * logits_H, logits_H, torch.ones_like(logits_H))
    for sum_M, values_H in zip(sums, parts, strict=True):
        add_rows(sum_M, owner_H, values_H)
    stats = _stats(top_M, *sums)
    return stats._replace(top=stats.top / by)


def _stats(top: Tensor, e: Tensor, weighted: Tensor, total: Tensor, count: Tensor) -> Stats:
    """From sums of exp(s - top), of that times s, of s and of 1."""
    mean = weighted / e.masked_fill(e == 0, 1)
    return Stats(top + e.log(), mean, total, count, _largest(top))


def _largest(top: Tensor) -> Tensor:
    return top.masked_fill(top <= FLOOR, -torch.inf)


def _row_stats(x_rC: Tensor, hard_rC: Tensor, want_mean: bool, want_total: bool) -> Stats:
    """`hard_rC`: the logits with hardness, or the same."""
    top_r = hard_rC.amax(1).clamp(min=FLOOR)
    e_rC = (hard_rC - top_r[:, None]).exp_()
    e_r, none_r = e_rC.sum(1), torch.zeros_like(top_r)
    weighted_r = e_rC.mul_(x_rC).sum(1) if want_mean else none_r
    totals = _totals(x_rC, 1) if want_total else (none_r, none_r)
    stats = _stats(top_r, e_r, weighted_r, *totals)
    return stats if hard_rC is x_rC else stats._replace(top=_largest(x_rC.amax(1)))


def _totals(x_rC: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(sum, number) of the logits that are not masked."""
    kept = x_rC > FLOOR
    return torch.where(kept, x_rC, 0).sum(dim), kept.sum(dim).to(x_rC.dtype)


class ColumnStats:
    """Statistics of columns, slab after slab: exponentials are relative to the largest so far."""

    def __init__(self, like: Tensor, C: int):
        self.top_C = like.new_full((C,), FLOOR)
        self.e_C, self.weighted_C, self.total_C, self.count_C = like.new_zeros(4, C)

    def add(self, x_rC: Tensor, want_mean: bool, want_total: bool) -> None:
        top_C = torch.maximum(self.top_C, x_rC.amax(0))
        fade_C = (self.top_C - top_C).exp_()
        self.top_C = top_C
        e_rC = (x_rC - top_C).exp_()
        self.e_C.mul_(fade_C).add_(e_rC.sum(0))
        if want_mean:
            self.weighted_C.mul_(fade_C).add_(e_rC.mul_(x_rC).sum(0))
        if want_total:
            total_C, count_C = _totals(x_rC, 0)
            self.total_C.add_(total_C)
            self.count_C.add_(count_C)

    def result(self) -> Stats:
        return _stats(self.top_C, self.e_C, self.weighted_C, self.total_C, self.count_C)


class Line(NamedTuple):
    """What decides the slopes of each row (or each column): dS = soft * exp(s - lse) - flat."""

    lse: Tensor  # 0 where there is no negative
    soft: Tensor
    flat: Tensor

    @staticmethod
    def of(stats: Stats, slopes: Slopes) -> "Line":
        flat = torch.zeros_like(slopes.soft) if slopes.flat is None else slopes.flat
        return Line(stats.lse.masked_fill(stats.lse == -torch.inf, 0), slopes.soft, flat)


Lines = list[dict[str, Line]]  # of each prefix, by direction


Numbers = TypeVar("Numbers", Stats, Line)


def take(rows: slice | int, numbers: Numbers) -> Numbers:
    """These rows of each."""
    return type(numbers)(*(x[rows] for x in numbers))


def joined(parts: Sequence[Numbers]) -> Numbers:
    """Of rows that follow each other."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Block:
    """A block of scores, read along rows, columns or both."""

    a: Side
    b: Side
    a_index: Tensor | None  # the vector of each row, if not its number
    query_R: Tensor  # the query whose relations hold for the row
    lists: Lists
    curated_C: Tensor | None
    along_rows: str | None  # the directions
    along_columns: str | None
    guides: tuple[Side, Side] | None
    limit_LM: Tensor | None  # similarity above which nothing is a negative
    scale: Tensor
    bounds: list[tuple[int, int]]
    settings: InfoNCESettings

    @property
    def buffers(self) -> int:
        """So many [R, C] each chunk takes."""
        return len(self.bounds) + (self.guides is not None)

    @property
    def nbytes(self) -> int:
        """Of the scores of all rows."""
        x_ND = self.b.x_ND
        return self.buffers * len(self.query_R) * len(x_ND) * x_ND.element_size()

    def chunks(self, *, at_once: bool = False) -> Iterator["Chunk"]:
        """Dot products, one chunk after the other in the same memory; or all rows at once."""
        C, L, like = len(self.b.x_ND), len(self.bounds), self.b.x_ND
        buffers, memory = self.buffers, None
        count = len(self.query_R) if C else 0  # a rank may bring no passages
        parts = row_chunks(count, C, buffers, like, self.settings.workspace(like.device))
        for rows in slices(count, count) if at_once else parts:
            R = rows.stop - rows.start
            memory = like.new_empty(buffers, R * C) if memory is None else memory
            scores = [buffer[: R * C].view(R, C) for buffer in memory]
            vectors = rows if self.a_index is None else self.a_index[rows]
            unit_RD, before = self.a.unit(vectors), None
            for (low, high), scores_RC in zip(self.bounds, scores, strict=False):
                factors = unit_RD[:, low:high], self.b.x_ND[:, low:high].T
                if before is None:
                    torch.mm(*factors, out=scores_RC)
                else:
                    torch.addmm(before, *factors, out=scores_RC)
                before = scores_RC
            if self.guides is not None:
                judge_a, judge_b = self.guides
                torch.mm(judge_a.unit(vectors), judge_b.x_ND.T, out=scores[L])
            yield Chunk(self, rows, vectors, unit_RD, scores[:L], scores[L:])


@dataclass(frozen=True)
class Chunk:
    """Rows of a block."""

    block: Block
    rows: slice
    vectors: slice | Tensor  # where the rows' vectors stand in block.a
    unit_RD: Tensor
    scores: list[Tensor]  # [R, C] of each prefix: dot products, then logits, then slopes
    judge: list[Tensor]  # [R, C] dot products of the guide, if there is one

    def slabs(self) -> Iterator[slice]:
        return slices(len(self.unit_RD), slab_rows(self.scores[0]))

    def to_logits(self, slab: slice) -> None:
        """In place: scaled, and MASKED where there is no negative."""
        block = self.block
        query_r = block.query_R[self.rows][slab]
        known, mine_rC, above_rC = block.lists.pairs(query_r), None, None
        if block.curated_C is not None and (block.along_rows == PP or block.limit_LM is not None):
            mine_rC = block.curated_C == query_r[:, None]
            if block.along_rows == PP:
                mine_rC |= block.curated_C == APART
        if self.judge:
            assert block.guides is not None and block.limit_LM is not None
            _, judge_b = block.guides
            above_rC = self.judge[0][slab].mul_(judge_b.inverse_LN[0])
            above_rC = above_rC > block.limit_LM[0, query_r, None]
        for level, scores_RC in enumerate(self.scores):
            x_rC = self._times_scale(scores_RC[slab], level, slab, out=scores_RC[slab])
            if block.limit_LM is not None:
                masked_rC = above_rC
                if masked_rC is None:
                    masked_rC = x_rC > block.scale * block.limit_LM[level, query_r, None]
                if mine_rC is not None and block.along_rows != PP:
                    masked_rC = masked_rC & ~mine_rC
                x_rC.masked_fill_(masked_rC, MASKED)
            if mine_rC is not None and block.along_rows == PP:
                x_rC.masked_fill_(mine_rC, MASKED)
            x_rC[known] = MASKED

    def _times_scale(self, x_rC: Tensor, level: int, slab: slice, out: Tensor) -> Tensor:
        """x_ij * d s_ij / d<unit_i, b_j>."""
        block = self.block
        torch.mul(x_rC, block.scale * block.b.inverse_LN[level], out=out)
        if len(self.scores) > 1:
            out.mul_(block.a.ratio_LN[level, self.vectors][slab, None])
        return out

    def hardened(self, x_rC: Tensor, slab: slice) -> Tensor:
        """The logits along the rows: with the hardness of query_to_passage."""
        block, (chosen, other) = self.block, self.block.settings.hardness
        if block.along_rows != QP or not (chosen or other):
            return x_rC
        by = 1 + other / block.scale
        if chosen != other and block.curated_C is not None:
            mine_rC = block.curated_C == block.query_R[self.rows][slab][:, None]
            by = torch.where(mine_rC, 1 + chosen / block.scale, by)
        return x_rC * by  # what is MASKED stays so, or is -inf

    def stats(self, columns: list[ColumnStats], *want: bool) -> list[Stats]:
        """Of the rows, for each prefix; those of columns are added to `columns`."""
        rows: list[list[Stats]] = [[] for _ in self.scores]
        for slab in self.slabs():
            self.to_logits(slab)
            for level, scores_RC in enumerate(self.scores):
                x_rC = scores_RC[slab]
                if self.block.along_rows:
                    rows[level].append(_row_stats(x_rC, self.hardened(x_rC, slab), *want))
                if columns:
                    columns[level].add(x_rC, *want)
        return [joined(parts) for parts in rows if parts]

    def to_slopes(self, slab: slice, lines: Lines) -> None:
        """In place: logits to d total / d<unit_i, b_j>."""
        block, settings = self.block, self.block.settings
        for level, scores_RC in enumerate(self.scores):
            x_rC, of_level = scores_RC[slab], lines[level]
            picked = []
            if block.along_rows:
                of_rows = Line(*(x[slab, None] for x in of_level[block.along_rows]))
                picked.append((self.hardened(x_rC, slab), of_rows))
            if block.along_columns:
                picked.append((x_rC, of_level[block.along_columns]))
            slopes_rC = cast(Tensor, 0)  # until there is a sum
            for logits_rC, (lse, soft, _) in picked:
                slopes_rC += (logits_rC - lse).exp_().mul_(soft)
            if settings.label_smoothing:
                flat = sum(line.flat for _, line in picked)
                slopes_rC -= torch.where(x_rC > FLOOR, flat, 0)
            if len(self.scores) > 1 and settings.normalize:
                along_rC = x_rC.mul_(slopes_rC)
                add_rows(block.a.along_LN[level], self.vectors, along_rC.sum(1), slab)
                block.b.along_LN[level] += along_rC.sum(0)
            self._times_scale(slopes_rC, level, slab, out=x_rC)

    def add_gradients(self, lines: Lines, *, logits: bool) -> None:
        """To both sides; `lines` of rows are those of the chunk's rows, `logits` whether they stand
        in place of the scores already."""
        block, scores = self.block, self.scores
        for slab in self.slabs():
            if not logits:
                self.to_logits(slab)
            self.to_slopes(slab, lines)
        for level in reversed(range(len(scores) - 1)):
            scores[level] += scores[level + 1]  # a dim counts in every prefix from its own on
        if block.a.grad_ND is not None:
            d_unit_RD = torch.empty_like(self.unit_RD)
            for (low, high), scores_RC in zip(block.bounds, scores, strict=True):
                d_unit_RD[:, low:high] = scores_RC @ block.b.x_ND[:, low:high]
            block.a.add(self.vectors, d_unit_RD)
        if block.b.grad_ND is not None:
            for (low, high), scores_RC in zip(block.bounds, scores, strict=True):
                block.b.grad_ND[:, low:high].addmm_(scores_RC.T, self.unit_RD[:, low:high])
