"""InfoNCE as one softmax per query, in fp32 on the CPU: a GEMM, a native row pass that leaves dS in
place of the scores, two GEMMs; 6MND flops.

M queries, N passages, D dims; R rows of a chunk, K of which are kept, C columns: the passages, and
the own negatives of a row.
"""

import torch
from torch import Tensor

from rankpo_kernels.chunked.chunks import row_chunks, slab_rows, slices
from rankpo_kernels.chunked.norms import tangent_
from rankpo_kernels.chunked.row_pass import RowPass
from rankpo_kernels.objective import by_pull
from rankpo_kernels.problem import InfoNCEProblem, InfoNCEResult, Needs


def takes_plain(problem: InfoNCEProblem) -> bool:
    """Whether this form can: one softmax per query, of whose own negatives no option tells them
    from others."""
    relations, settings = problem.relations, problem.settings
    chosen, other = settings.hardness
    alike = (
        settings.false_negative_margin is None and chosen == other and not settings.gradient_filter
    )
    one_positive = relations.positive_offsets is None
    return settings.plain and one_positive and (relations.own_offsets is None or alike)


def plain(problem: InfoNCEProblem, weights_M: Tensor | None, needs: Needs) -> InfoNCEResult:
    """As `chunked.info_nce`, whose scale and weights are of the dtype of computing by now."""
    q_MD, p_ND, own_HD, scale, _, settings = problem
    (M, D), N, dtype = q_MD.shape, len(p_ND), scale.dtype
    of = RowPass.of(problem)
    dq_MD = q_MD.new_empty(M, D, dtype=dtype) if needs.q else None
    # The first chunk of rows overwrites dp, the others add to it; without rows it is zero.
    dp_ND = q_MD.new_empty(N, D, dtype=dtype) if needs.p else None
    if dp_ND is not None and not M:
        dp_ND.zero_()
    d_own_HD = None
    if own_HD is not None and needs.own:
        d_own_HD = own_HD.new_empty(own_HD.shape, dtype=dtype)

    memory = None
    for rows in row_chunks(M, of.columns, of.buffers, of.p_ND, settings.workspace(q_MD.device)):
        unit_RD, inverse_q_R = of.unit(rows)
        R = len(unit_RD)
        if memory is None:
            memory = q_MD.new_empty(of.buffers, R, of.columns, dtype=dtype)
        grad_RC = memory[0, :R]
        weights_R = None
        if weights_M is not None and any(needs):
            weights_R = weights_M[rows]
        of.read(rows, unit_RD, grad_RC, memory[-1, :R], weights_R, scale_gradient=needs.scale)
        grad_RN, kept_K = grad_RC[:, :N], None
        if settings.gradient_filter and weights_R is not None and (needs.q or needs.p):
            kept_K = _kept(of.loss_M[rows], weights_R, settings.gradient_filter)
        if kept_K is not None:
            grad_RN, unit_RD = _compacted(grad_RN, kept_K), unit_RD[kept_K]
        if dq_MD is not None and kept_K is None:
            torch.mm(grad_RN, of.p_ND, out=dq_MD[rows])
        elif dq_MD is not None and kept_K is not None:
            dq_MD[rows].zero_().index_copy_(0, kept_K, grad_RN @ of.p_ND)
        if of.own is not None:
            d_unit_RD = None if dq_MD is None else dq_MD[rows]
            of.own.add_gradients(rows, unit_RD, grad_RC, d_unit_RD, d_own_HD)
        if dq_MD is not None and inverse_q_R is not None:
            tangent_(dq_MD[rows], q_MD[rows], inverse_q_R, inverse_q_R)
        if dp_ND is not None:
            dp_ND.addmm_(grad_RN.T, unit_RD, beta=0 if rows.start == 0 else 1)

    if dp_ND is not None and of.inverse_p_N is not None:
        tangent_(dp_ND, of.p_ND, of.inverse_p_N)  # the scores' gradient has 1 / |p| already
    d_scale = of.d_logits_M.sum() / scale if needs.scale else None
    return InfoNCEResult(of.loss_M, of.positive_M, of.hardest_M, dq_MD, dp_ND, d_own_HD, d_scale)


def _kept(loss_R: Tensor, weights_R: Tensor, share: float) -> Tensor | None:
    """Rows whose gradients are not left out, ascending; None for all."""
    rows_R, count = by_pull(loss_R, weights_R, share)
    return None if count == len(rows_R) else rows_R[:count].sort().values


def _compacted(grad_RN: Tensor, kept_K: Tensor) -> Tensor:
    """The kept rows, moved to the front of the same memory: a row moves only to where it stood, or
    rows that were moved before it."""
    out_KN = grad_RN[: len(kept_K)]
    for part in slices(len(kept_K), slab_rows(grad_RN)):
        out_KN[part] = grad_RN[kept_K[part]]
    return out_KN
