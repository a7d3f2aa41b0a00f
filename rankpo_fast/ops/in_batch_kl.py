"""What a model makes of the passages of a batch, held to what a frozen reference makes of them.

    P_i = softmax over j of r_ij / temperature,  Q_i the same of s_ij
    loss_i = sum_j P_ij (log P_ij - log Q_ij),   d loss_i / d s_ij = (Q_ij - P_ij) / temperature

s and r are cosines of query i and passage j by the model and by the reference: distillation (Hinton
et al. 2015) over in-batch lists. M queries, N passages, D and G dims. Both score matrices are made
in chunks of rows; the gradient of a row needs the row alone, so one pass has it all, and no graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_fast.ops.checks import check_embeddings, guide_sides, in_one_dtype, widest_dtype
from rankpo_fast.ops.common import LossAndGrads, mean, row_weights, unit_rows
from rankpo_kernels.chunked.chunks import row_chunks
from rankpo_kernels.chunked.norms import inverse_norms, tangent_
from rankpo_kernels.problem import compute_dtype
from rankpo_kernels.workspace import workspace_of

BUFFERS = 6  # of a chunk's rows at once: scores and logarithms of both, P, a temporary


def in_batch_kl_definition(
    q_MD: Tensor, p_ND: Tensor, r_MG: Tensor, t_NG: Tensor, temperature: float
) -> Tensor:
    """Losses [M]: what the function must equal. Stores M x N."""
    log_q_MN = (unit_rows(q_MD) @ unit_rows(p_ND).T / temperature).log_softmax(1)
    log_p_MN = (unit_rows(r_MG) @ unit_rows(t_NG).T / temperature).log_softmax(1)
    return (log_p_MN.exp() * (log_p_MN - log_q_MN)).sum(1)


class InBatchKLGrads(NamedTuple):
    queries: Tensor  # [M, D]
    passages: Tensor  # [N, D]


class InBatchKLStats(NamedTuple):
    """Without weights."""

    kl: Tensor  # mean over queries, in nats
    top1_kept: Tensor  # share of queries whose most similar passage is the reference's


@torch.no_grad()
def in_batch_kl_loss_and_grads(
    queries: Tensor,
    passages: Tensor,
    reference_queries: Tensor,
    reference_passages: Tensor,
    *,
    temperature: float,
    weights: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> LossAndGrads[InBatchKLGrads, InBatchKLStats]:
    """The mean over queries, weighted, and its gradients; nothing in it has a graph.

    8MND + 2MNG flops. Beside the embeddings in fp32 it takes `workspace_bytes` for six buffers of
    [R, N], R rows at a time.

    Args:
        queries, passages: [M, D] and [N, D] of fp64, fp32, bf16 or fp16. A zero vector has
            similarity and gradient 0.
        reference_queries, reference_passages: [M, G] and [N, G], on the same device.
        temperature: > 0, both cosines are divided by it.
        weights: [M] >= 0.
        workspace_bytes: for one chunk; None: the device's default.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    M, N = len(queries), len(passages)
    embeddings = {"queries": queries, "passages": passages}
    reference = (reference_queries, reference_passages)
    check_embeddings(embeddings | guide_sides("reference", reference, M, N))
    dtype = compute_dtype(widest_dtype(embeddings.values()))
    frozen = in_one_dtype(reference, dtype)
    assert frozen is not None
    with torch.autocast(queries.device.type, enabled=False):
        x_MD, x_ND = queries.to(dtype), passages.to(dtype)
        inverse_M, inverse_N = inverse_norms(x_MD, dtype), inverse_norms(x_ND, dtype)
        q_MD, p_ND = x_MD * inverse_M[:, None], x_ND * inverse_N[:, None]
        r_MG, t_NG = (unit_rows(x.to(dtype)) for x in frozen)
        weights_M = row_weights(q_MD, weights, M, "mean")
        dq_MD, dp_ND = torch.empty_like(q_MD), torch.zeros_like(p_ND)
        loss_M, kept_M = q_MD.new_empty(M), q_MD.new_empty(M)
        workspace = workspace_bytes or workspace_of(queries.device)
        for rows in row_chunks(M, N, BUFFERS, q_MD, workspace):
            s_RN = (q_MD[rows] @ p_ND.T).div_(temperature)
            r_RN = (r_MG[rows] @ t_NG.T).div_(temperature)
            kept_M[rows] = (s_RN.argmax(1) == r_RN.argmax(1)).to(dtype)
            log_q_RN, log_p_RN = s_RN.log_softmax(1), r_RN.log_softmax(1)
            p_RN = log_p_RN.exp()
            loss_M[rows] = log_p_RN.sub_(log_q_RN).mul_(p_RN).sum(1)
            slopes_RN = log_q_RN.exp_().sub_(p_RN).mul_(weights_M[rows, None] / temperature)
            dq_MD[rows] = slopes_RN @ p_ND
            dp_ND.addmm_(slopes_RN.T, q_MD[rows])
        tangent_(dq_MD, x_MD, inverse_M, inverse_M)
        tangent_(dp_ND, x_ND, inverse_N, inverse_N)
        grads = InBatchKLGrads(dq_MD.to(queries.dtype), dp_ND.to(passages.dtype))
        stats = InBatchKLStats(mean(loss_M), mean(kept_M))
        return LossAndGrads((weights_M * loss_M).sum(), grads, stats)
