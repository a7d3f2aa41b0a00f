"""InfoNCE of both directions, in fp32 on the CPU. The scores' exponentials are made once, and kept
as far as the workspace goes: 6MND flops, 8 for rows that have no place.

    E_ij = exp(s_ij - top_i),   top_i the largest logit of row i's negatives; no negative: 0

    sum over row i       exp(top_i) sum_j E_ij
    sum over column j    exp(top) sum_i share_i E_ij,   share_i = exp(top_i - top), top the largest
    d total / d s_ij     E_ij (u_i + share_i v_j),      u, v: slopes over sums

What is 87 below its row's largest logit, or 87 below the largest of all, is 0: too little for every
row, but not for a column that has nothing else. There the general form is taken.

M queries, N passages, D dims; R rows of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.chunks import row_chunks
from rankpo_kernels.chunked.norms import tangent_
from rankpo_kernels.chunked.row_pass import RowPass
from rankpo_kernels.objective import Slopes, Stats, combine
from rankpo_kernels.problem import PQ, QP, InfoNCEProblem, InfoNCEResult, Needs
from rankpo_kernels.relations import positive_pairs
from rankpo_kernels.workspace import KEPT_ON_CPU

SMALLEST = -87.3  # in whose power of e fp32 ends; below it `native` has zeros
ROUNDING = 18.0  # e to its negative is less than fp32 can tell from 0 beside 1


def takes_both(problem: InfoNCEProblem, needs: Needs) -> bool:
    """Whether this form can: both directions of one block, a positive a query, plain softmaxes."""
    relations, settings = problem.relations, problem.settings
    one_block = set(settings.directions) == {QP, PQ} and settings.group is None
    one_positive = relations.positive_offsets is None and relations.own_offsets is None
    plain = settings.matryoshka_dims is None and not settings.label_smoothing
    whole = settings.window is None and len(problem.q_MD) > 1
    gradients = needs.q or not needs.scale  # that of the scale is read off those of the queries
    hard = settings.hardness != (0.0, 0.0)
    return one_block and one_positive and plain and whole and gradients and not hard


def both(
    problem: InfoNCEProblem, weights_M: Tensor | None, needs: Needs
) -> InfoNCEResult | None:  # fmt: skip
    """As `chunked.info_nce`; None where a column has nothing but what is 0 in fp32."""
    scale, relations, settings = problem.scale, problem.relations, problem.settings
    of = RowPass.of(problem)
    M, workspace = len(of.loss_M), settings.workspace_bytes or KEPT_ON_CPU
    chunks = list(row_chunks(M, len(of.p_ND), of.buffers, of.p_ND, workspace))
    kept = Kept(of, chunks, workspace if any(needs) else 0)
    columns = ColumnSums(of.p_ND)
    for number, rows in enumerate(chunks):
        columns.add(kept.exponentials(number), of.tops_M[rows])
    if columns.out_of_range(M)[of.labels_M].any():
        return None

    stats = {QP: _stats(of.tops_M + of.sums_M.log()), PQ: _stats(columns.lse(scale.dtype))}
    pairs = positive_pairs(relations, scale.dtype)
    weights_M = torch.zeros_like(of.loss_M) if weights_M is None else weights_M
    loss_M, slopes, slope_M, _ = combine(
        pairs, of.positive_M * scale, stats, weights_M, scale, settings, False
    )
    result = InfoNCEResult(loss_M, of.positive_M, of.hardest_M)
    if not any(needs):
        return result
    gradients = Gradients.of_slopes(of, slopes, slope_M, columns)
    dq_MD, dp_ND, d_scale = gradients.added(kept, needs)
    return result._replace(dq_MD=dq_MD, dp_ND=dp_ND, d_scale=d_scale)


class Kept:
    """Exponentials of chunks of rows, as many as fit `nbytes`: the others are read when they are
    asked for, in the place of the one before."""

    def __init__(self, of: RowPass, chunks: list[slice], nbytes: int) -> None:
        self.of, self.chunks = of, chunks
        R, N = chunks[0].stop, len(of.p_ND)
        a_chunk = R * N * of.p_ND.element_size()
        places = min(len(chunks), max(1, nbytes // a_chunk - (of.buffers - 1)))
        self.memory = native.in_huge_pages(of.p_ND.new_empty(places + of.buffers - 1, R, N))
        self.places: list[int | None] = [None] * places  # the chunks there
        self.units: tuple[int, tuple[Tensor, Tensor | None]] | None = None  # of the last one read

    def exponentials(self, number: int) -> Tensor:
        """Of a chunk [R, N]."""
        rows, place = self.chunks[number], min(number, len(self.places) - 1)
        R = rows.stop - rows.start
        out_RN = self.memory[place, :R]
        if self.places[place] != number:
            unit_RD, _ = self.unit(number)
            self.of.read(rows, unit_RD, out_RN, self.memory[-1, :R])
            self.places[place] = number
        return out_RN

    def unit(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Of a chunk, as `RowPass.unit`."""
        if self.units is None or self.units[0] != number:
            self.units = number, self.of.unit(self.chunks[number])
        return self.units[1]

    def taken(self) -> Iterator[tuple[int, Tensor]]:
        """Each chunk once, to be overwritten: after that nothing is kept. The last is there."""
        for number in (len(self.chunks) - 1, *range(len(self.chunks) - 1)):
            yield number, self.exponentials(number)


class ColumnSums:
    """Of the exponentials of all chunks, relative to the largest logit of all."""

    def __init__(self, p_ND: Tensor) -> None:
        self.top = -math.inf
        self.sums_N = p_ND.new_zeros(len(p_ND), dtype=torch.float64)

    def add(self, exponentials_RN: Tensor, tops_R: Tensor) -> None:
        top = tops_R.max().item()
        if top == -math.inf:  # no row has a negative
            return
        sums_N = native.column_sums(exponentials_RN, (tops_R - top).exp())
        if top > self.top:
            self.sums_N *= math.exp(self.top - top)
            self.top = top
        self.sums_N += sums_N * math.exp(top - self.top)

    def out_of_range(self, M: int) -> Tensor:
        """[N] whether what M rows of zeros may have held could be seen."""
        return self.sums_N.log() < SMALLEST + ROUNDING + math.log(M)

    def lse(self, dtype: torch.dtype) -> Tensor:
        return (self.top + self.sums_N.log()).to(dtype)


def _stats(lse: Tensor) -> Stats:
    """Without what smoothing and the scale's gradient would ask for."""
    none = torch.empty_like(lse)
    return Stats(lse, none, none, none, none)


@dataclass(frozen=True)
class Gradients:
    """What turns exponentials into gradients."""

    of: RowPass
    top: float
    row_slopes_M: Tensor  # u
    column_scale_N: Tensor
    column_slopes_N: Tensor  # v times column_scale
    label_slopes_M: Tensor

    @classmethod
    def of_slopes(
        cls, of: RowPass, slopes: dict[str, Slopes], slope_M: Tensor, columns: ColumnSums
    ) -> "Gradients":
        inverse_N = torch.ones_like(of.p_ND[:, 0]) if of.inverse_p_N is None else of.inverse_p_N
        scale_N, soft_M, soft_N = of.scale * inverse_N, slopes[QP].soft, slopes[PQ].soft
        # 0 / 0 of what has no negative
        u_M = (soft_M / of.sums_M).masked_fill(soft_M == 0, 0)
        v_N = (soft_N / columns.sums_N).masked_fill(soft_N == 0, 0).to(scale_N.dtype)
        return cls(of, columns.top, u_M, scale_N, v_N * scale_N, slope_M * scale_N[of.labels_M])

    def added(self, kept: Kept, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dq_MD, dp_ND, d scale), None where there is no need."""
        of, (N, D) = self.of, self.of.p_ND.shape
        new = lambda rows, need: of.p_ND.new_empty(rows, D) if need else None  # noqa: E731
        dq_MD, dp_ND = new(len(of.loss_M), needs.q), new(N, needs.p)
        d_scale = of.p_ND.new_zeros((), dtype=torch.float64)
        for step, (number, grad_RN) in enumerate(kept.taken()):
            rows = kept.chunks[number]
            native.both_directions_(
                grad_RN, (of.tops_M[rows] - self.top).exp(), of.labels_M[rows],
                self.row_slopes_M[rows], self.column_scale_N, self.column_slopes_N,
                self.label_slopes_M[rows],
            )  # fmt: skip
            unit_RD, inverse_R = kept.unit(number)
            if dq_MD is not None:
                torch.mm(grad_RN, of.p_ND, out=dq_MD[rows])
                if needs.scale:  # sum_j d s_ij s_ij
                    d_scale += torch.linalg.vecdot(dq_MD[rows], unit_RD).sum(dtype=torch.float64)
                if inverse_R is not None:
                    tangent_(dq_MD[rows], of.q_MD[rows], inverse_R, inverse_R)
            if dp_ND is not None:
                dp_ND.addmm_(grad_RN.T, unit_RD, beta=min(step, 1))
        if dp_ND is not None and of.inverse_p_N is not None:
            tangent_(dp_ND, of.p_ND, of.inverse_p_N)  # the scores' gradient has 1 / |p| already
        of_scale = (d_scale / of.scale).to(of.p_ND.dtype) if needs.scale else None
        return dq_MD, dp_ND, of_scale
