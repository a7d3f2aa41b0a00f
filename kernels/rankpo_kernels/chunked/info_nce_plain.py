"""InfoNCE as one softmax per query, in fp32 on the CPU: a GEMM, a native row pass that leaves dS in
place of the scores, two GEMMs; 6MND flops.

M queries, N passages, D dims; R rows of a chunk, r rows of a slab, C columns that are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.chunks import Lists, column_lists, row_chunks, slab_rows, slices
from rankpo_kernels.chunked.norms import inverse_norms, tangent_
from rankpo_kernels.objective import limits
from rankpo_kernels.problem import InfoNCEProblem, InfoNCEResult, InfoNCESettings, Needs
from rankpo_kernels.relations import known


def plain(problem: InfoNCEProblem, weights_M: Tensor | None, needs: Needs) -> InfoNCEResult:
    """As `chunked.info_nce`, whose scale and weights are of the dtype of computing by now."""
    q_MD, p_ND, _, scale, relations, settings = problem
    (M, D), N, dtype = q_MD.shape, len(p_ND), scale.dtype
    masks = Masks.of(problem)
    labels_M = relations.labels_M.contiguous()
    p_gemm_ND = p_ND.to(dtype)
    inverse_p_N = inverse_norms(p_ND, dtype) if settings.normalize else None

    loss_M, positive_M, hardest_M = q_MD.new_empty(3, M, dtype=dtype)
    dq_MD = q_MD.new_empty(M, D, dtype=dtype) if needs.q else None
    # The first chunk of rows overwrites dp, the others add to it; without rows it is zero.
    dp_ND = q_MD.new_empty(N, D, dtype=dtype) if needs.p else None
    if dp_ND is not None and not M:
        dp_ND.zero_()
    d_logits_M = torch.empty_like(loss_M) if needs.scale else None

    scale_number, memory, buffers = scale.item(), None, 1 + (masks.guide is not None)
    for rows in row_chunks(M, N, buffers, loss_M, settings.workspace(q_MD.device)):
        unit_RD, inverse_q_R = q_MD[rows].to(dtype), None
        if settings.normalize:
            inverse_q_R = inverse_norms(unit_RD, dtype)
            unit_RD = unit_RD * inverse_q_R[:, None]
        R = len(unit_RD)
        if memory is None:
            memory = q_MD.new_empty(buffers, R, N, dtype=dtype)
        grad_RN = memory[
            0, :R
        ]  # scores, and after the row pass d(sum_i w_i loss_i) / d<unit_i, p_j>
        torch.mm(unit_RD, p_gemm_ND.T, out=grad_RN)
        limit_R, judge = masks.limit_of(rows, grad_RN, memory[-1, :R], inverse_p_N)
        weights_R = None
        if weights_M is not None and (needs.q or needs.p or needs.scale):
            weights_R = weights_M[rows]
        native.info_nce_rows(
            grad_RN, inverse_p_N, labels_M[rows], masks.lists and masks.lists.rows(rows),
            limit_R, judge, masks.curated_N, weights_R,
            loss_M[rows], positive_M[rows], hardest_M[rows],
            None if d_logits_M is None else d_logits_M[rows],
            rows.start, scale_number, *settings.hardness,
        )  # fmt: skip
        columns, p_CD = None, p_gemm_ND
        if settings.gradient_filter and weights_R is not None and (needs.q or needs.p):
            pull_R = weights_R * -torch.expm1(-loss_M[rows])  # w sigmoid(gap), loss = softplus(gap)
            least_R = pull_R.abs() * (scale_number * settings.gradient_filter / N)
            columns = _kept(grad_RN, least_R, inverse_p_N)
        if columns is not None:
            grad_RN, p_CD = _compacted(grad_RN, columns), p_gemm_ND[columns]
        if dq_MD is not None:
            torch.mm(grad_RN, p_CD, out=dq_MD[rows])
            if inverse_q_R is not None:
                tangent_(dq_MD[rows], q_MD[rows], inverse_q_R, inverse_q_R)
        if dp_ND is not None and columns is None:
            dp_ND.addmm_(grad_RN.T, unit_RD, beta=0 if rows.start == 0 else 1)
        elif dp_ND is not None and columns is not None:
            if rows.start == 0:
                dp_ND.zero_()
            dp_ND.index_add_(0, columns, grad_RN.T @ unit_RD)

    if dp_ND is not None and inverse_p_N is not None:
        tangent_(dp_ND, p_gemm_ND, inverse_p_N)  # the scores' gradient has 1 / |p| already
    d_scale = None if d_logits_M is None else d_logits_M.sum() / scale
    return InfoNCEResult(loss_M, positive_M, hardest_M, dq_MD, dp_ND, None, d_scale)


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


def _kept(grad_RN: Tensor, least_R: Tensor, inverse_N: Tensor | None) -> Tensor | None:
    """Columns with |grad| > least * inverse in some row; None if they are more than half."""
    keep_N = torch.zeros_like(grad_RN[0], dtype=torch.bool)
    for rows in slices(len(grad_RN), slab_rows(grad_RN)):
        least = least_R[rows, None] if inverse_N is None else least_R[rows, None] * inverse_N
        keep_N |= ~(grad_RN[rows].abs() <= least).all(0)  # NaN stays in
    return keep_N.nonzero()[:, 0] if 2 * keep_N.sum() <= len(keep_N) else None


def _compacted(scores_RC: Tensor, columns: Tensor) -> Tensor:
    """The chosen columns, moved to the front of the same memory: a row moves only to where rows
    that were moved before it stood, and itself."""
    R, K = len(scores_RC), len(columns)
    out_RK = scores_RC.view(-1)[: R * K].view(R, K)
    for rows in slices(R, slab_rows(scores_RC)):
        out_RK[rows] = scores_RC[rows].index_select(1, columns)
    return out_RK
