"""InfoNCE on chunks of rows, on any device: GEMMs and the work between them, never M x N.

    s_ij = scale * <a_i, b_j> / (|a_i| |b_j|),   loss and slopes dS from rankpo_kernels.objective

Fused form, one softmax per query, fp32 on the CPU: a GEMM, a native row pass that leaves dS, two
GEMMs. General form, everything else: `combine` turns statistics of rows and columns into slopes,
from which dS is written. With query_to_passage alone a chunk has its statistics as soon as it has
its scores (6MND flops); other directions read the blocks twice, and compute the scores twice where
they take more than KEPT_BYTES.

Rows are normalised a chunk at a time, columns by a factor per column of the scores. With dims, the
scores of a prefix are those of the one before plus a product, and a block of dims takes the sum of
dS over the prefixes that hold it, so all of them cost the products of one.

M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes; R rows of a chunk,
r rows of a slab, C columns. The workspace is R x C per prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_kernels import native
from rankpo_kernels.norms import compute_dtype, inverse_norms, tangent_
from rankpo_kernels.objective import (
    APART,
    PP,
    PQ,
    QP,
    QQ,
    Known,
    Pairs,
    Relations,
    Result,
    Settings,
    Slopes,
    Stats,
    add_ranks_,
    combine,
    expand,
    gradient_dtype,
    is_plain,
    known,
    limits,
    merge,
    of_all_ranks,
    of_rows,
    on_device,
    own_rows,
    positive_pairs,
)

# Fewer rows make the GEMMs slower, more buy nothing on a CPU: at 4096 x 24576 x 384 the three take
# 1.03 of the unchunked ones with 586 rows and 1.00 with 1024 (bench/cases/info_nce.py).
CPU_ROWS = 1024
# Of scores that are kept between two readings, as long as they fit the workspace: a batch of 4,096
# pairs in fp32 saves a product of four, and a larger one would take memory that grows as M N does.
KEPT_BYTES = 64 * 2**20
# Elements that the torch form works on at a time: few enough for the cache, many enough for CUDA.
SLAB = {"cpu": 1 << 18, "cuda": 1 << 24}
# Finite stand-ins for -inf, so that exp(MASKED - top) * MASKED = 0 with no inf - inf; a row with
# nothing left has its largest logit at FLOOR.
MASKED, FLOOR = -3e38, -1e38
ALL = slice(None)


def info_nce(
    q_MD: Tensor, p_ND: Tensor, own_HD: Tensor | None, scale: Tensor,
    relations: Relations, settings: Settings, weights_M: Tensor | None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
) -> Result:  # fmt: skip
    """Losses of all queries and, given weights ([M], or [] for all), the gradients of
    sum_i w_i loss_i that `needs` (q, p, own, scale) names.

    With settings.gradient_filter = eps, the two products of a chunk of the fused form leave out
    columns with |dS_ij| <= pull_i eps / N in every row, pull_i = w_i sigmoid(lse_i - s_i,label).
    So for each row the gradient of its unit vector is off by at most pull_i * scale * eps.
    """
    dtype, device = compute_dtype(q_MD.dtype), q_MD.device
    scale = on_device(scale, device, dtype)
    if weights_M is None:
        needs = (False,) * 4
    else:
        M = len(own_rows(relations, settings).labels_M)
        weights_M = of_rows(weights_M, M, device, dtype)
    needs = needs if own_HD is not None else (*needs[:2], False, needs[3])
    arguments = (scale, relations, settings, weights_M, needs)
    if is_plain(relations, settings) and native.usable(q_MD.new_empty(0, dtype=dtype)):
        result = _fused(q_MD, p_ND, *arguments)
    else:
        result = _general(q_MD, p_ND, own_HD, *arguments)
    return result._replace(**{
        name: grad.to(gradient_dtype(x.dtype))
        for name, x in (("dq_MD", q_MD), ("dp_ND", p_ND), ("d_own_HD", own_HD))
        if (grad := getattr(result, name)) is not None
    })  # fmt: skip


def _chunks(rows: int, columns: int, buffers: int, like: Tensor, workspace_bytes: int):
    """Slices of rows, about equal, whose buffers fit the workspace; the first is the longest."""
    row_bytes = max(1, buffers * columns * like.element_size())
    if (most := workspace_bytes // row_bytes) < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for one row of {columns} columns: "
            f"it takes {row_bytes}"
        )
    if like.device.type == "cpu":
        most = min(most, CPU_ROWS)
    return _slices(rows, -(-rows // max(1, -(-rows // most))))


def _slices(rows: int, most: int) -> Iterator[slice]:
    return (slice(at, min(at + most, rows)) for at in range(0, rows, max(1, most)))


class Lists(NamedTuple):
    """Columns that are no negatives of a query, without expansion: texts first_M[i] : last_M[i] are
    known to query i, and columns[start_E[e] : stop_E[e]] have text e."""

    first_M: Tensor
    last_M: Tensor
    start_E: Tensor
    stop_E: Tensor
    columns: Tensor

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(position in `queries`, column) of all that are listed for them."""
        row, text = _ranges(self.first_M[queries], self.last_M[queries])
        at, place = _ranges(self.start_E[text], self.stop_E[text])
        return row[at], self.columns[place]


def _ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """(k, x) for all x in start_k : stop_k."""
    counts = stop - start
    owner = torch.repeat_interleave(counts)
    first = start - (counts.cumsum(0) - counts)
    return owner, first[owner] + torch.arange(len(owner), device=start.device)


def _lists(known: Known, passage_C: Tensor | slice = ALL) -> Lists:
    """The keys, which go from a passage to the classes that know it, turned round; a column has
    the text of the passage `passage_C`."""
    used = int(known.stop_N.max()) if len(known.stop_N) else 0
    classes, keys = known.keys[:used].sort(stable=True)
    starts = known.start_N.sort().values
    text = starts[torch.searchsorted(starts, keys, right=True) - 1]  # the first key of its text
    start_C = known.start_N.masked_fill(known.start_N == known.stop_N, -1)[passage_C]
    texts, columns = start_C.sort(stable=True)
    return Lists(
        torch.searchsorted(classes, known.class_M),
        torch.searchsorted(classes, known.class_M, right=True),
        torch.searchsorted(texts, text),
        torch.searchsorted(texts, text, right=True),
        columns,
    )


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
        d_unit = d_unit * self.inverse_LN[-1, rows, None]
        _add_rows(self.grad_ND, rows, d_unit)

    def gradient(self, bounds: list, D: int, normalize: bool) -> Tensor:
        """What was added, which took the norms for constants, less what they take away."""
        if normalize and len(bounds) == 1:
            tangent_(self.grad_ND, self.x_ND, self.inverse_LN[0])
        elif normalize:
            take_LN = self.along_LN * self.inverse_LN * self.ratio_LN
            take_LN = take_LN.flip(0).cumsum(0).flip(0)  # a prefix takes from all its blocks
            for rows in _slices(len(self.x_ND), _slab_rows(self.x_ND)):
                unit_rD = self.unit(rows)
                for (low, high), take_N in zip(bounds, take_LN, strict=True):
                    self.grad_ND[rows, low:high] -= unit_rD[:, low:high] * take_N[rows, None]
        return F.pad(self.grad_ND, (0, D - bounds[-1][1]))


def _add_rows(target: Tensor, rows: slice | Tensor, values: Tensor, part: slice = ALL) -> None:
    """target[rows[part]] += values; rows may repeat."""
    if isinstance(rows, slice):
        target[rows][part] += values
        return
    rows = rows[part]
    if target.device.type == "cpu":
        target.index_add_(0, rows, values)
    else:
        target.index_put_((rows,), values, accumulate=True)  # sorts: index_add would use atomics


def _slab_rows(x_RC: Tensor) -> int:
    return max(1, SLAB[x_RC.device.type] // max(1, x_RC.shape[1]))


def _pair_logits(a: Side, b: Side, i_P: Tensor, j_P: Tensor, scale: Tensor, bounds: list) -> Tensor:
    """[L, P] logits of pairs (a_i, b_j)."""
    logits_LP = a.x_ND.new_empty(len(bounds), len(i_P))
    for part in _slices(len(i_P), _slab_rows(a.x_ND)):
        i, j = i_P[part], j_P[part]
        dot_D = a.unit(i).mul_(b.x_ND[j])
        dots = torch.stack([dot_D[:, low:high].sum(1) for low, high in bounds]).cumsum(0)
        logits_LP[:, part] = dots * (scale * a.ratio_LN[:, i] * b.inverse_LN[:, j])
    return logits_LP


def _add_pairs(
    a: Side, b: Side, i_P: Tensor, j_P: Tensor, slope_LP: Tensor, logits_LP: Tensor,
    scale: Tensor, bounds: list,
) -> None:  # fmt: skip
    """Gradients of pairs whose logits have these slopes."""
    for x, rows in ((a, i_P), (b, j_P)):
        for along_N, values in zip(x.along_LN, slope_LP * logits_LP, strict=True):
            _add_rows(along_N, rows, values)
    sizes = torch.tensor([high - low for low, high in bounds], device=i_P.device)
    for part in _slices(len(i_P), _slab_rows(a.x_ND)):
        i, j = i_P[part], j_P[part]
        dot_Lc = slope_LP[:, part] * scale * a.ratio_LN[:, i] * b.inverse_LN[:, j]
        # A dim is in all prefixes from its own on.
        dot_Lc = dot_Lc.flip(0).cumsum(0).flip(0)
        dot_cD = dot_Lc.T.repeat_interleave(sizes, dim=1, output_size=a.x_ND.shape[1])
        if a.grad_ND is not None:
            a.add(i, b.x_ND[j].mul_(dot_cD))
        if b.grad_ND is not None:
            _add_rows(b.grad_ND, j, a.unit(i).mul_(dot_cD))


def _own_stats(logits_H: Tensor, by: Tensor | float, owner_H: Tensor, M: int) -> Stats:
    """Statistics of the own negatives of each query; hardness multiplies their logits `by`."""
    hard_H = logits_H * by
    top_M = logits_H.new_full((M,), FLOOR).scatter_reduce_(0, owner_H, hard_H, "amax")
    e_H = (hard_H - top_M[owner_H]).exp()
    sums = logits_H.new_zeros(4, M)
    parts = (e_H, e_H * logits_H, logits_H, torch.ones_like(logits_H))
    for sum_M, values_H in zip(sums, parts, strict=True):
        _add_rows(sum_M, owner_H, values_H)
    stats = _stats(top_M, *sums)
    return stats._replace(top=stats.top / by)


def _stats(top: Tensor, e: Tensor, weighted: Tensor, total: Tensor, count: Tensor) -> Stats:
    """From sums of exp(s - top), of that times s, of s and of 1."""
    mean = weighted / e.masked_fill(e == 0, 1)
    return Stats(top + e.log(), mean, total, count, _found(top))


def _found(top: Tensor) -> Tensor:
    return top.masked_fill(top <= FLOOR, -torch.inf)


def _row_stats(x_rC: Tensor, hard_rC: Tensor, want_mean: bool, want_total: bool) -> Stats:
    """`hard_rC`: the logits with hardness, or the same."""
    top_r = hard_rC.amax(1).clamp(min=FLOOR)
    e_rC = (hard_rC - top_r[:, None]).exp_()
    e_r, none_r = e_rC.sum(1), torch.zeros_like(top_r)
    weighted_r = e_rC.mul_(x_rC).sum(1) if want_mean else none_r
    totals = _totals(x_rC, 1) if want_total else (none_r, none_r)
    stats = _stats(top_r, e_r, weighted_r, *totals)
    return stats if hard_rC is x_rC else stats._replace(top=_found(x_rC.amax(1)))


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


def _at(rows: slice | int, lines: NamedTuple) -> NamedTuple:
    return type(lines)(*(x[rows] for x in lines))


def _joined(parts: list[NamedTuple]) -> NamedTuple:
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
    settings: Settings

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
        parts = _chunks(count, C, buffers, like, self.settings.workspace_bytes)
        for rows in _slices(count, count) if at_once else parts:
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
                torch.mm(self.guides[0].unit(vectors), self.guides[1].x_ND.T, out=scores[L])
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
        return _slices(len(self.unit_RD), _slab_rows(self.scores[0]))

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
            above_rC = self.judge[0][slab].mul_(block.guides[1].inverse_LN[0])
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
        rows = [[] for _ in self.scores]
        for slab in self.slabs():
            self.to_logits(slab)
            for level, scores_RC in enumerate(self.scores):
                x_rC = scores_RC[slab]
                if self.block.along_rows:
                    rows[level].append(_row_stats(x_rC, self.hardened(x_rC, slab), *want))
                if columns:
                    columns[level].add(x_rC, *want)
        return [_joined(parts) for parts in rows if parts]

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
            slopes_rC = 0
            for logits_rC, (lse, soft, _) in picked:
                slopes_rC += (logits_rC - lse).exp_().mul_(soft)
            if settings.label_smoothing:
                flat = sum(line.flat for _, line in picked)
                slopes_rC -= torch.where(x_rC > FLOOR, flat, 0)
            if len(self.scores) > 1 and settings.normalize:
                along_rC = x_rC.mul_(slopes_rC)
                _add_rows(block.a.along_LN[level], self.vectors, along_rC.sum(1), slab)
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


def _blocks(
    all_queries: Side, passages: Side, pairs: Pairs, similarity_LM: Tensor, scale: Tensor,
    bounds: list, of_all: Relations, settings: Settings,
) -> list[Block]:  # fmt: skip
    """The blocks that the directions read."""
    own, relations = _window(settings), own_rows(of_all, settings)
    queries, keys = all_queries.part(own), known(relations, len(passages.x_ND))
    each_M = torch.arange(len(queries.x_ND), device=scale.device)
    of_passages = _lists(keys)
    limit_LM, guides, curated_N = None, None, relations.curated_N
    if settings.margin is not None:
        if relations.guide_queries is not None:
            guides = tuple(
                Side.of(x, [(0, x.shape[1])], scale.dtype, settings.normalize, False)
                for x in (of_all.guide_queries, of_all.guide_passages)
            )
            guides = (guides[0].part(own), *guides)
            one, dims = torch.ones_like(scale), [(0, guides[0].x_ND.shape[1])]
            similarity_LM = _pair_logits(
                guides[0], guides[2], each_M, relations.labels_M, one, dims
            )
        limit_LM = limits(similarity_LM, settings)

    blocks = []
    wanted = [direction if direction in settings.directions else None for direction in (QP, PQ)]
    rest = (limit_LM, scale, bounds, settings)
    if any(wanted):
        of = (queries, passages, None, each_M, of_passages, curated_N)
        blocks.append(Block(*of, *wanted, guides and guides[::2], *rest))
    if QQ in settings.directions:
        of = (queries, all_queries, None, each_M, _lists(keys, of_all.labels_M), None)
        blocks.append(Block(*of, QQ, None, guides and guides[:2], *rest))
    if PP in settings.directions:
        of = (passages, passages, pairs.columns_P, pairs.rows_P, of_passages, curated_N)
        blocks.append(Block(*of, PP, None, guides and (guides[2], guides[2]), *rest))
    return blocks


def _general(
    q_MD: Tensor, p_ND: Tensor, own_HD: Tensor | None, scale: Tensor,
    relations: Relations, settings: Settings, weights_M: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> Result:  # fmt: skip
    """Every option, in torch."""
    D, device = q_MD.shape[1], q_MD.device
    of_all, relations = relations, own_rows(relations, settings)
    M = len(relations.labels_M)
    prefixes, level_weights = zip(*settings.levels(D), strict=True)
    bounds = list(zip((0, *prefixes), prefixes, strict=False))
    all_queries, passages, owned = (
        None if x is None else Side.of(x, bounds, scale.dtype, settings.normalize, need)
        for x, need in zip((q_MD, p_ND, own_HD), needs, strict=False)
    )
    queries, pairs = all_queries.part(_window(settings)), positive_pairs(relations, scale.dtype)
    s_LP = _pair_logits(queries, passages, *pairs[:2], scale, bounds)
    similarity_LM = s_LP[:, :M] / scale
    if owned is not None:
        owner_H = expand(relations.own_offsets.diff(), len(own_HD))
        own_pairs = (owner_H, torch.arange(len(own_HD), device=device))
        s_LH = _pair_logits(queries, owned, *own_pairs, scale, bounds)
        chosen = settings.hardness[0]
        own_by = 1 + chosen / scale if chosen else 1.0
        own_stats = [_own_stats(s_H, own_by, owner_H, M) for s_H in s_LH]

    loss_M, d_scale = s_LP.new_zeros(M), torch.zeros_like(scale)
    hardest_M = torch.full_like(loss_M, -torch.inf)
    hardest_of = QP if QP in settings.directions else QQ
    slope_LP = torch.zeros_like(s_LP)
    with_gradients = any(needs)
    weights_M = torch.zeros_like(loss_M) if weights_M is None else weights_M

    def settle(rows: slice, at_P: slice | Tensor, stats: list[dict[str, Stats]]) -> Lines:
        """Losses of the queries `rows`, whose pairs are at `at_P`, and what decides the slopes."""
        part = Pairs(*(x[at_P] for x in pairs))
        part = part._replace(rows_P=part.rows_P - rows.start)
        lines = []
        for level, weight in enumerate(level_weights):
            of = stats[level]
            if owned is not None and QP in of:
                of[QP] = merge(of[QP], _at(rows, own_stats[level]))
            loss_R, slopes, slope_LP[level, at_P], d_scale_level = combine(
                part, s_LP[level, at_P], of, weights_M[rows] * weight, scale, settings, needs[3]
            )
            loss_M[rows] += weight * loss_R
            if needs[3]:
                d_scale.add_(d_scale_level)
            lines.append({d: Line.of(of[d], slopes[d]) for d in of})
        if hardest_of in of:
            hardest_M[rows] = of[hardest_of].top / scale
        return lines

    blocks = _blocks(all_queries, passages, pairs, similarity_LM, scale, bounds, of_all, settings)
    want = (needs[3], settings.label_smoothing > 0)  # mean for d_scale, total for smoothing
    if settings.directions == (QP,):
        lines_of_chunks = []
        for chunk in blocks[0].chunks():
            stats = [{QP: of_rows} for of_rows in chunk.stats([], *want)]
            lines = settle(chunk.rows, _pairs_of(chunk.rows, relations), stats)
            if any(needs[:2]):
                chunk.add_gradients(lines, logits=True)
            lines_of_chunks.append(lines)
        of_levels = zip(*lines_of_chunks, strict=True)
        lines = [{QP: _joined([of[QP] for of in of_level])} for of_level in of_levels]
    else:
        stats = [{} for _ in bounds]
        kept_bytes = min(KEPT_BYTES, settings.workspace_bytes) // len(blocks)
        kept: dict[int, Chunk] = {}  # by block: all its logits, for the second reading
        for number, block in enumerate(blocks):
            columns, chunks, keep = [], [], with_gradients and block.nbytes <= kept_bytes
            if block.along_columns:
                columns = [ColumnStats(s_LP, len(block.b.x_ND)) for _ in bounds]
            for chunk in block.chunks(at_once=keep):
                chunks.append(chunk.stats(columns, *want))
                if keep:
                    kept[number] = chunk
            chunk = None  # its memory is free for the second reading
            if block.along_columns:  # of all levels at once: across ranks it is a collective
                whole = Stats(*map(torch.stack, zip(*(x.result() for x in columns), strict=True)))
                whole = of_all_ranks(whole, settings)
            for level, of in enumerate(stats):
                if block.along_rows:
                    none = Stats(*s_LP.new_empty(5, 0))
                    of[block.along_rows] = _joined([none, *(chunk[level] for chunk in chunks)])
                if block.along_columns:
                    of[block.along_columns] = _at(level, whole)
        lines = settle(slice(0, M), slice(None), stats)
        if PQ in settings.directions and with_gradients:
            for name in ("soft", "flat")[: 1 + (settings.label_smoothing > 0)]:
                of_own = torch.stack([getattr(of[PQ], name) for of in lines])
                for of, whole in zip(lines, add_ranks_(of_own, settings), strict=True):
                    of[PQ] = of[PQ]._replace(**{name: whole})
        for number, block in enumerate(blocks):
            if block.a.grad_ND is None and block.b.grad_ND is None:
                continue
            for chunk in [kept[number]] if number in kept else block.chunks():
                local = [
                    {d: _at(chunk.rows, x) if d == block.along_rows else x for d, x in of.items()}
                    for of in lines
                ]
                chunk.add_gradients(local, logits=number in kept)

    result = Result(loss_M, similarity_LM[-1], hardest_M)
    if not with_gradients:
        return result
    _add_pairs(queries, passages, *pairs[:2], slope_LP, s_LP, scale, bounds)
    if owned is not None and QP in settings.directions and M:
        slope_LH = torch.stack([
            soft[owner_H] * (s_H * own_by - lse[owner_H]).exp() - flat[owner_H]
            for (lse, soft, flat), s_H in zip((of[QP] for of in lines), s_LH, strict=True)
        ])  # fmt: skip
        _add_pairs(queries, owned, *own_pairs, slope_LH, s_LH, scale, bounds)
    grads = (
        side.gradient(bounds, D, settings.normalize) if need else None
        for side, need in zip((all_queries, passages, owned), needs, strict=False)
    )
    return Result(*result[:3], *grads, d_scale if needs[3] else None)


def _window(settings: Settings) -> slice:
    """The queries that have a loss, among all of q."""
    return ALL if settings.window is None else slice(*settings.window)


def _pairs_of(rows: slice, relations: Relations) -> Tensor:
    """Where the positive pairs of a chunk of queries stand among all."""
    labels = torch.arange(rows.start, rows.stop, device=relations.labels_M.device)
    if relations.positive_offsets is None:
        return labels
    first, last = relations.positive_offsets[[rows.start, rows.stop]].tolist()
    more = torch.arange(first, last, device=labels.device) + len(relations.labels_M)
    return torch.cat([labels, more])


def _fused(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor, relations: Relations, settings: Settings,
    weights_M: Tensor | None, needs: tuple[bool, bool, bool, bool],
) -> Result:  # fmt: skip
    """One softmax per query, in fp32 on the CPU."""
    (M, D), N, dtype = q_MD.shape, len(p_ND), scale.dtype
    need_q, need_p, _, need_scale = needs
    labels_M = relations.labels_M.contiguous()
    p_gemm_ND = p_ND.to(dtype)
    inverse_p_N = inverse_norms(p_ND, dtype) if settings.normalize else None
    lists = None
    if any(x is not None for x in relations[3:7]):  # else a query knows its label alone
        lists = _lists(known(relations, N))
    guided = settings.margin is not None and relations.guide_queries is not None
    if guided:
        guides = [x.to(dtype) for x in (relations.guide_queries, relations.guide_passages)]
        unit = inverse_norms if settings.normalize else lambda x, dtype: x.new_ones(len(x))
        inverse_guide_M, inverse_guide_N = (unit(x, dtype) for x in guides)
    curated_N = None
    chosen, other = settings.hardness
    if relations.curated_N is not None and (settings.margin is not None or chosen != other):
        curated_N = relations.curated_N.to(torch.int32)  # half the bytes to compare

    loss_M, positive_M, hardest_M = q_MD.new_empty(3, M, dtype=dtype)
    dq_MD = q_MD.new_empty(M, D, dtype=dtype) if need_q else None
    # The first chunk of rows overwrites dp, the others add to it; without rows it is zero.
    dp_ND = q_MD.new_empty(N, D, dtype=dtype) if need_p else None
    if need_p and not M:
        dp_ND.zero_()
    d_logits_M = torch.empty_like(loss_M) if need_scale else None

    scale_number, memory = scale.item(), None
    for rows in _chunks(M, N, 1 + guided, loss_M, settings.workspace_bytes):
        unit_RD = q_MD[rows].to(dtype)
        if settings.normalize:
            inverse_q_R = inverse_norms(unit_RD, dtype)
            unit_RD = unit_RD * inverse_q_R[:, None]
        R = len(unit_RD)
        if memory is None:
            memory = q_MD.new_empty(1 + guided, R, N, dtype=dtype)
        scores_RN, limit_R, judge = memory[0, :R], None, None
        torch.mm(unit_RD, p_gemm_ND.T, out=scores_RN)
        if settings.margin is not None:
            judge_RN, inverse_N = scores_RN, inverse_p_N
            if guided:
                judge_RN, inverse_N = judge = memory[1, :R], inverse_guide_N
                guide_RG = guides[0][rows] * inverse_guide_M[rows, None]
                torch.mm(guide_RG, guides[1].T, out=judge_RN)
            positive_R = judge_RN.gather(1, labels_M[rows, None])[:, 0]
            if inverse_N is not None:
                positive_R *= inverse_N[labels_M[rows]]
            limit_R = limits(positive_R, settings)

        with_grads = need_q or need_p or need_scale
        weights_R = weights_M[rows] if with_grads else None
        native.info_nce_rows(
            scores_RN, inverse_p_N, labels_M[rows],
            lists and (lists.first_M[rows], lists.last_M[rows], *lists[2:]),
            limit_R, judge, curated_N, weights_R,
            loss_M[rows], positive_M[rows], hardest_M[rows],
            d_logits_M[rows] if need_scale else None,
            rows.start, scale_number, chosen, other,
        )  # fmt: skip
        if not (need_q or need_p):
            continue
        grad_RN = scores_RN  # d(sum_i w_i loss_i) / d<unit_i, p_j>
        columns = None
        if settings.gradient_filter:
            pull_R = weights_R * -torch.expm1(-loss_M[rows])  # w sigmoid(gap), loss = softplus(gap)
            least_R = pull_R.abs() * (scale_number * settings.gradient_filter / N)
            columns = _kept(grad_RN, least_R, inverse_p_N)
        if columns is not None:
            grad_RN = _compacted(grad_RN, columns)
        p_CD = p_gemm_ND if columns is None else p_gemm_ND[columns]
        if need_q:
            torch.mm(grad_RN, p_CD, out=dq_MD[rows])
            if settings.normalize:
                tangent_(dq_MD[rows], q_MD[rows], inverse_q_R, inverse_q_R)
        if need_p and columns is None:
            dp_ND.addmm_(grad_RN.T, unit_RD, beta=0 if rows.start == 0 else 1)
        elif need_p:
            if rows.start == 0:
                dp_ND.zero_()
            dp_ND.index_add_(0, columns, grad_RN.T @ unit_RD)

    if need_p and settings.normalize:
        tangent_(dp_ND, p_gemm_ND, inverse_p_N)  # the scores' gradient has 1 / |p| already
    d_scale = d_logits_M.sum() / scale if need_scale else None
    return Result(loss_M, positive_M, hardest_M, dq_MD, dp_ND, None, d_scale)


def _kept(grad_RN: Tensor, least_R: Tensor, inverse_N: Tensor | None) -> Tensor | None:
    """Columns with |grad| > least * inverse in some row; None if they are more than half."""
    keep_N = torch.zeros_like(grad_RN[0], dtype=torch.bool)
    for rows in _slices(len(grad_RN), _slab_rows(grad_RN)):
        least = least_R[rows, None] if inverse_N is None else least_R[rows, None] * inverse_N
        keep_N |= ~(grad_RN[rows].abs() <= least).all(0)  # NaN stays in
    return keep_N.nonzero()[:, 0] if 2 * keep_N.sum() <= len(keep_N) else None


def _compacted(scores_RC: Tensor, columns: Tensor) -> Tensor:
    """The chosen columns, moved to the front of the same memory: a row moves only to where rows
    that were moved before it stood, and itself."""
    R, K = len(scores_RC), len(columns)
    out_RK = scores_RC.view(-1)[: R * K].view(R, K)
    for rows in _slices(R, _slab_rows(scores_RC)):
        out_RK[rows] = scores_RC[rows].index_select(1, columns)
    return out_RK
