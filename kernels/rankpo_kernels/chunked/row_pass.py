"""The native rows of InfoNCE, in fp32 on the CPU: a GEMM, and one pass over its scores.

M queries, N passages, D dims; R rows of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.chunks import Lists, column_lists
from rankpo_kernels.chunked.norms import inverse_norms
from rankpo_kernels.objective import limits
from rankpo_kernels.problem import InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import known


@dataclass(frozen=True)
class RowPass:
    """What the chunks of rows share, and what they fill in."""

    q_MD: Tensor
    p_ND: Tensor  # of the dtype of computing
    scale_C: Tensor | None  # of columns, with normalisation: 1 / |p|
    labels_M: Tensor
    masks: "Masks"
    settings: InfoNCESettings
    scale: float
    own: "OwnColumns | None"
    # filled in
    loss_M: Tensor
    positive_M: Tensor
    hardest_M: Tensor
    d_logits_M: Tensor
    sums_M: Tensor  # of exponentials that stay
    tops_M: Tensor  # the logits they are relative to, -inf without a negative

    @classmethod
    def of(cls, problem: InfoNCEProblem) -> "RowPass":
        q_MD, p_ND, _, scale, relations, settings = problem
        M, dtype = len(q_MD), scale.dtype
        own = OwnColumns.of(problem)
        scale_C = inverse_norms(p_ND, dtype) if settings.normalize else None
        if own is not None and scale_C is not None:  # own logits come with their norms
            scale_C = torch.cat([scale_C, scale_C.new_ones(own.width)])
        return cls(
            q_MD, p_ND.to(dtype), scale_C, relations.labels_M.contiguous(), Masks.of(problem),
            settings, scale.item(), own, *q_MD.new_empty(6, M, dtype=dtype),
        )  # fmt: skip

    @property
    def buffers(self) -> int:
        """Of scores that a chunk takes."""
        return 1 + (self.masks.guide is not None)

    @property
    def columns(self) -> int:
        """Passages, and the own negatives of a row."""
        return len(self.p_ND) + (0 if self.own is None else self.own.width)

    @property
    def inverse_p_N(self) -> Tensor | None:
        return None if self.scale_C is None else self.scale_C[: len(self.p_ND)]

    def unit(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Queries as the GEMMs take them, and the inverse norms in them."""
        unit_RD = self.q_MD[rows].to(self.p_ND.dtype).contiguous()
        if not self.settings.normalize:
            return unit_RD, None
        inverse_R = inverse_norms(unit_RD, unit_RD.dtype)
        return unit_RD * inverse_R[:, None], inverse_R

    def read(
        self, rows: slice, unit_RD: Tensor, out_RC: Tensor, judge_RN: Tensor,
        weights_R: Tensor | None = None, *, scale_gradient: bool = False,
    ) -> None:  # fmt: skip
        """Fill in losses, and `out_RC`: with weights by d(sum_i w_i loss_i) / d<unit_i, p_j>,
        without by exp(s_ij - the row's largest), 0 where there is no negative. `judge_RN` holds
        the guide's scores meanwhile."""
        N = len(self.p_ND)
        torch.mm(unit_RD, self.p_ND.T, out=out_RC[:, :N])
        if self.own is not None:
            self.own.fill(rows, unit_RD, out_RC)
        limit_R, judge = self.masks.limit_of(rows, out_RC, judge_RN, self.inverse_p_N)
        lists = self.masks.lists
        native.info_nce_rows(
            out_RC, self.scale_C, self.labels_M[rows], lists and lists.rows(rows),
            limit_R, judge, self.masks.curated_N, weights_R,
            self.loss_M[rows], self.positive_M[rows], self.hardest_M[rows],
            self.d_logits_M[rows] if scale_gradient else None,
            rows.start, self.scale, self.settings.hardness,
            sums=self.sums_M[rows] if weights_R is None else None,
            tops=self.tops_M[rows] if weights_R is None else None,
        )  # fmt: skip


@dataclass(frozen=True)
class OwnColumns:
    """Negatives of one query each, as further columns of its row: as many in each row as the query
    with the most has, K."""

    own_HD: Tensor  # of the dtype of computing
    inverse_H: Tensor  # 1 / |own|, 1 without normalisation
    offsets: Tensor
    width: int  # K
    normalize: bool

    @classmethod
    def of(cls, problem: InfoNCEProblem) -> "OwnColumns | None":
        own_HD, offsets = problem.own_HD, problem.relations.own_offsets
        if own_HD is None or offsets is None or not len(own_HD):
            return None
        own_HD, normalize = own_HD.to(problem.scale.dtype).contiguous(), problem.settings.normalize
        unit = inverse_norms(own_HD, own_HD.dtype) if normalize else own_HD.new_ones(len(own_HD))
        return cls(own_HD, unit, offsets.contiguous(), int(offsets.diff().max()), normalize)

    def fill(self, rows: slice, unit_RD: Tensor, scores_RC: Tensor) -> None:
        """The last columns of the scores with dot products of units."""
        native.own_dots(self._of(rows, unit_RD, scores_RC))

    def add_gradients(
        self, rows: slice, unit_RD: Tensor, grad_RC: Tensor, d_unit_RD: Tensor | None,
        d_own_HD: Tensor | None,
    ) -> None:  # fmt: skip
        """To those of the queries' units; and what those of the negatives are."""
        native.own_gradients(self._of(rows, unit_RD, grad_RC, d_unit_RD, d_own_HD))

    def _of(self, rows: slice, unit_RD: Tensor, scores_RC: Tensor, *grads: Tensor | None) -> Any:
        return native.own_rows(
            scores_RC, unit_RD, self.own_HD, self.inverse_H,
            self.offsets[rows.start : rows.stop + 1], self.width, self.normalize, *grads,
        )  # fmt: skip


@dataclass(frozen=True)
class Guide:
    """Embeddings whose similarities decide about the margin, in the dtype of computing."""

    queries_MG: Tensor
    passages_NG: Tensor
    inverse_M: Tensor
    inverse_N: Tensor

    @classmethod
    def of(cls, guide: tuple[Tensor, Tensor], dtype: torch.dtype, normalize: bool) -> "Guide":
        queries, passages = (x.to(dtype) for x in guide)
        unit = inverse_norms if normalize else lambda x, dtype: x.new_ones(len(x))
        return cls(queries, passages, unit(queries, dtype), unit(passages, dtype))


@dataclass(frozen=True)
class Masks:
    """What is no negative of a row."""

    labels_M: Tensor
    lists: Lists | None  # None: a query knows its label alone
    curated_N: Tensor | None
    guide: Guide | None
    settings: InfoNCESettings

    @classmethod
    def of(cls, problem: InfoNCEProblem) -> "Masks":
        relations, settings, curated_N, guide = problem.relations, problem.settings, None, None
        lists = None
        if not relations.labels_alone:
            lists = column_lists(known(relations, len(problem.p_ND)))
        judged, (chosen, other) = settings.false_negative_margin is not None, settings.hardness
        if relations.curated_N is not None and (judged or chosen != other):
            curated_N = relations.curated_N.to(torch.int32)  # half the bytes to compare
        if judged and relations.guide is not None:
            guide = Guide.of(relations.guide, problem.scale.dtype, settings.normalize)
        return cls(relations.labels_M, lists, curated_N, guide, settings)

    def limit_of(
        self, rows: slice, scores_RN: Tensor, memory_RN: Tensor, inverse_N: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """(the similarity above which nothing is a negative, dot products of the guide with what
        makes them similarities), None without a margin or a guide."""
        if self.settings.false_negative_margin is None:
            return None, None
        judge = None
        if self.guide is not None:
            guide_RG = self.guide.queries_MG[rows] * self.guide.inverse_M[rows, None]
            torch.mm(guide_RG, self.guide.passages_NG.T, out=memory_RN)
            scores_RN, inverse_N = judge = memory_RN, self.guide.inverse_N
        labels_R = self.labels_M[rows]
        positive_R = scores_RN.gather(1, labels_R[:, None])[:, 0]
        if inverse_N is not None:
            positive_R *= inverse_N[labels_R]
        return limits(positive_R, self.settings), judge
