"""InfoNCE of prefixes of the dims, in fp32 on the CPU: a GEMM for each block of dims, one native
pass over the rows of all prefixes, two GEMMs a block; 6MND flops for all of them.

A prefix's dots are the sum of its blocks'; a block takes the sum of the gradients of the prefixes
that hold it.

M queries, N passages, D dims, L prefixes; R rows of a chunk.
"""

import torch
from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.blocks import Side
from rankpo_kernels.chunked.chunks import row_chunks
from rankpo_kernels.chunked.row_pass import Masks
from rankpo_kernels.problem import QP, InfoNCEProblem, InfoNCEResult, Needs


def takes_prefixes(problem: InfoNCEProblem) -> bool:
    """Whether this form can: one softmax per query and prefix, whose negatives are listed."""
    relations, settings = problem.relations, problem.settings
    one_way = tuple(settings.directions) == (QP,) and settings.matryoshka_dims is not None
    one_positive = relations.positive_offsets is None and relations.own_offsets is None
    judged = settings.false_negative_margin is not None or settings.label_smoothing > 0
    return one_way and one_positive and not judged


def prefixes(
    problem: InfoNCEProblem, weights_M: Tensor | None, needs: Needs
) -> InfoNCEResult:  # fmt: skip
    """As `chunked.info_nce`, whose scale and weights are of the dtype of computing by now."""
    q_MD, p_ND, _, scale, relations, settings = problem
    (M, D), N, dtype = q_MD.shape, len(p_ND), scale.dtype
    levels, masks, number = settings.levels(D), Masks.of(problem), scale.item()
    ends = [prefix for prefix, _ in levels]
    bounds = list(zip((0, *ends), ends, strict=False))
    queries, passages = (
        Side.of(x, bounds, dtype, settings.normalize, need)
        for x, need in ((q_MD, needs.q), (p_ND, needs.p))
    )
    labels_M, L = relations.labels_M.contiguous(), len(levels)
    loss_LM, positive_LM, hardest_LM, d_logits_LM = q_MD.new_empty(4, L, M, dtype=dtype)
    with_gradients = weights_M is not None and any(needs)

    memory = None
    for rows in row_chunks(M, N, L, passages.x_ND, settings.workspace(q_MD.device)):
        unit_RD = queries.unit(rows)
        if memory is None:
            memory = q_MD.new_empty(L, len(unit_RD) * N, dtype=dtype)
        grads = [x[: len(unit_RD) * N].view(len(unit_RD), N) for x in memory]
        each = []
        for level, ((low, high), (_, weight), grad_RN) in enumerate(
            zip(bounds, levels, grads, strict=True)
        ):
            torch.mm(unit_RD[:, low:high], passages.x_ND[:, low:high].T, out=grad_RN)
            each.append((
                grad_RN, passages.inverse_LN[level], labels_M[rows],
                masks.lists and masks.lists.rows(rows), None, None, masks.curated_N,
                weights_M[rows] * weight if weights_M is not None and with_gradients else None,
                loss_LM[level, rows], positive_LM[level, rows], hardest_LM[level, rows],
                d_logits_LM[level, rows], rows.start, number, settings.hardness,
                queries.ratio_LN[level, rows],
            ))  # fmt: skip
        along_LN = native.info_nce_prefixes(
            [native.rows(*of[:-1], row_scale=of[-1]) for of in each], unit_RD
        )
        if not with_gradients:
            continue
        passages.along_LN.add_(along_LN)
        d_unit_RD = torch.empty_like(unit_RD) if needs.q else None
        for (low, high), grad_RN in zip(bounds, grads, strict=True):
            if d_unit_RD is not None:
                torch.mm(grad_RN, passages.x_ND[:, low:high], out=d_unit_RD[:, low:high])
            if passages.grad_ND is not None:
                passages.grad_ND[:, low:high].addmm_(grad_RN.T, unit_RD[:, low:high])
        if d_unit_RD is not None:
            queries.add(rows, d_unit_RD)

    weight_L = loss_LM.new_tensor([weight for _, weight in levels])
    result = InfoNCEResult(weight_L @ loss_LM, positive_LM[-1], hardest_LM[-1])
    if not with_gradients:
        return result
    queries.along_LN.copy_(d_logits_LM)
    d_scale = d_logits_LM.sum() / scale if needs.scale else None
    dq_MD, dp_ND = (
        None if side.grad_ND is None else side.gradient(bounds, D, settings.normalize)
        for side in (queries, passages)
    )
    return result._replace(dq_MD=dq_MD, dp_ND=dp_ND, d_scale=d_scale)
