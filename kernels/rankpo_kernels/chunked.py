"""InfoNCE on chunks of rows, on any device: three GEMMs and a row pass a chunk, never M x N.

    s_ij = scale * <q_i, p_j> / (|q_i| |p_j|)
    loss_i = softplus(lse_i - s_i,label)
    lse_i = logsumexp of row i without its label and its excluded columns
    d loss_i / d s_ij = sigmoid(lse_i - s_i,label) * (softmax_ij, or -1 at the label)

Queries are normalised a chunk at a time, passages by a factor per column of the scores, so that no
normalised copy of the passages exists. The row pass is native for fp32 on the CPU and torch
elsewhere. bf16 and fp16 get fp32 scores: on CUDA from the tensor cores, on the CPU from fp32
copies.

M queries, N passages, D dims, R rows of a chunk. 6MND flops with gradients, 2MND without; the
workspace is R x N.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_kernels import native
from rankpo_kernels.norms import compute_dtype, inverse_norms, tangent_

# Fewer rows make the GEMMs slower, more buy nothing on a CPU: at 4096 x 24576 x 384 the three take
# 1.03 of the unchunked ones with 586 rows and 1.00 with 1024 (bench/cases/info_nce.py).
CPU_ROWS = 1024
DEFAULT_WORKSPACE = {"cpu": 90 << 20, "cuda": 256 << 20}


class Excluded(NamedTuple):
    """Row i leaves out the columns `pool[start[i]:stop[i]]`: O(M + N) integers for any mask of
    equal ids."""

    start_M: Tensor
    stop_M: Tensor
    pool: Tensor


class Result(NamedTuple):
    """What one pass gives; the gradients are None where none were asked for."""

    loss_M: Tensor
    positive_M: Tensor  # similarity of the positive
    hardest_M: Tensor  # similarity of the hardest negative, -inf if there is none
    dq_MD: Tensor | None = None
    dp_ND: Tensor | None = None
    d_scale: Tensor | None = None


def info_nce(
    q_MD: Tensor, p_ND: Tensor, labels_M: Tensor, scale: Tensor,
    query_ids_M: Tensor | None, passage_ids_N: Tensor | None,
    excluded_offsets: Tensor | None, excluded_columns: Tensor | None,
    row_weights_M: Tensor | None, needs: tuple[bool, bool, bool] = (False, False, False),
    *, normalize: bool, workspace_bytes: int,
) -> Result:  # fmt: skip
    """Losses of all rows and, given `row_weights`, the gradients of sum_i w_i loss_i that `needs`
    (q, p, scale) names."""
    (M, D), N = q_MD.shape, p_ND.shape[0]
    dtype, device = compute_dtype(q_MD.dtype), q_MD.device
    if device.type == "cpu":
        _check_columns("labels", labels_M, N)
        if excluded_offsets is not None:
            _check_columns("excluded columns", excluded_columns, N)
            _check_offsets(excluded_offsets, excluded_columns)
    # Tensor cores take low precision and give fp32; elsewhere the GEMMs run in the dtype of the
    # scores.
    low = device.type == "cuda" and q_MD.dtype in (torch.float16, torch.bfloat16)
    p_gemm_ND = p_ND if low else p_ND.to(dtype)
    inverse_p_N = inverse_norms(p_ND, dtype) if normalize else None

    need_q, need_p, need_scale = needs
    loss_M, positive_M, hardest_M = (torch.empty(M, dtype=dtype, device=device) for _ in range(3))
    dq_MD = torch.empty(M, D, dtype=dtype, device=device) if need_q else None
    # The first chunk of rows overwrites dp, the others add to it; without rows it is zero.
    dp_ND = torch.empty(N, D, dtype=dtype, device=device) if need_p else None
    if need_p and not M:
        dp_ND.zero_()
    d_scale = torch.zeros((), dtype=dtype, device=device) if need_scale else None

    scale = scale.to(device, dtype)
    excluded = _excluded(labels_M, query_ids_M, passage_ids_N, excluded_offsets, excluded_columns)
    workspace = None
    for rows in _chunks(M, N, loss_M, workspace_bytes):
        unit_RD = q_MD[rows].to(dtype)
        if normalize:
            inverse_q_R = inverse_norms(unit_RD, dtype)
            unit_RD = unit_RD * inverse_q_R[:, None]
        if workspace is None:
            workspace = torch.empty(unit_RD.shape[0], N, dtype=dtype, device=device)
        scores_RN = workspace[: unit_RD.shape[0]]
        if low:
            torch.mm(q_MD[rows], p_gemm_ND.T, out_dtype=dtype, out=scores_RN)
            if normalize:
                scores_RN.mul_(inverse_q_R[:, None])
        else:
            torch.mm(unit_RD, p_gemm_ND.T, out=scores_RN)

        weights_R = None if row_weights_M is None else row_weights_M[rows].to(dtype)
        _row_pass(
            scores_RN, inverse_p_N, scale, labels_M[rows], _csr(excluded, rows), weights_R,
            loss_M[rows], positive_M[rows], hardest_M[rows],
        )  # fmt: skip
        if weights_R is None:
            continue
        grad_RN = scores_RN  # d(sum_i w_i loss_i) / d<unit_i, p_j>
        products = _low_products if low else _products
        d_unit_RD = dq_MD[rows] if need_q else torch.empty_like(unit_RD) if need_scale else None
        products(grad_RN, unit_RD, p_gemm_ND, d_unit_RD, dp_ND, first=rows.start == 0)
        if need_scale:
            d_scale += (d_unit_RD * unit_RD).sum() / scale  # sum_j dS_ij s_ij = <d_unit_i, unit_i>
        if need_q and normalize:
            tangent_(d_unit_RD, q_MD[rows], inverse_q_R, inverse_q_R)

    if need_q:
        dq_MD = dq_MD.to(gradient_dtype(q_MD.dtype))
    if need_p:
        if normalize:
            tangent_(dp_ND, p_gemm_ND, inverse_p_N)  # the scores' gradient has 1 / |p| already
        dp_ND = dp_ND.to(gradient_dtype(p_ND.dtype))
    return Result(loss_M, positive_M, hardest_M, dq_MD, dp_ND, d_scale)


def _check_columns(name: str, columns: Tensor, N: int) -> None:
    if not columns.numel():
        return
    low, high = columns.min().item(), columns.max().item()
    if low < 0 or high >= N:
        raise ValueError(f"{name} lie in [{low}, {high}] but there are {N} passages")


def _check_offsets(offsets: Tensor, columns: Tensor) -> None:
    if offsets[0] != 0 or offsets[-1] != len(columns) or (offsets.diff() < 0).any():
        raise ValueError(
            f"excluded offsets must rise from 0 to the {len(columns)} columns, got "
            f"{offsets[0].item()} ... {offsets[-1].item()}"
        )


def gradient_dtype(stored: torch.dtype) -> torch.dtype:
    """The inputs' dtype, but fp32 for fp16, in which unscaled gradients underflow."""
    return torch.float32 if stored == torch.float16 else stored


def _chunks(M: int, N: int, like: Tensor, workspace_bytes: int) -> Iterator[slice]:
    """Chunks of rows, about equal, whose scores fit the workspace; the first is the longest."""
    row_bytes = max(1, N * like.element_size())
    if (most := workspace_bytes // row_bytes) < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for one row of {N} passages: "
            f"it takes {row_bytes}"
        )
    if like.device.type == "cpu":
        most = min(most, CPU_ROWS)
    rows = -(-M // max(1, -(-M // most)))
    for start in range(0, M, max(1, rows)):
        yield slice(start, min(start + rows, M))


def _excluded(
    labels_M: Tensor, query_ids_M: Tensor | None, passage_ids_N: Tensor | None,
    offsets: Tensor | None, columns: Tensor | None,
) -> list[Excluded]:  # fmt: skip
    """The columns that are no negatives of a row, label included: texts equal to its positive,
    positives of equal queries, and those the caller names."""
    excluded = []
    if passage_ids_N is not None:
        ids, order = passage_ids_N.sort()
        excluded.append(Excluded(*_equal_range(ids, passage_ids_N[labels_M]), order))
    if query_ids_M is not None:
        ids, order = query_ids_M.sort()
        excluded.append(Excluded(*_equal_range(ids, query_ids_M), labels_M[order]))
    if offsets is not None:
        excluded.append(Excluded(offsets[:-1], offsets[1:], columns))
    return excluded


def _equal_range(sorted_ids: Tensor, keys_M: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.searchsorted(sorted_ids, keys_M),
        torch.searchsorted(sorted_ids, keys_M, right=True),
    )


def _csr(excluded: list[Excluded], rows: slice) -> tuple[Tensor, Tensor] | None:
    """The excluded columns of a chunk as (offsets [R + 1], columns)."""
    if not excluded:
        return None
    row_parts, column_parts = [], []
    for start_M, stop_M, pool in excluded:
        start_R, count_R = start_M[rows], stop_M[rows] - start_M[rows]
        row = torch.repeat_interleave(count_R)  # [nnz] 0 0 0 1 2 2 ...
        first_R = start_R - (count_R.cumsum(0) - count_R)
        column_parts.append(pool[first_R[row] + torch.arange(len(row), device=row.device)])
        row_parts.append(row)
    row, order = torch.cat(row_parts).sort(stable=True)
    offsets = torch.searchsorted(row, torch.arange(len(start_R) + 1, device=row.device))
    return offsets, torch.cat(column_parts)[order]


def _row_pass(
    scores_RN: Tensor, column_scale_N: Tensor | None, scale: Tensor,
    labels_R: Tensor, excluded: tuple[Tensor, Tensor] | None, weights_R: Tensor | None,
    loss_R: Tensor, positive_R: Tensor, hardest_R: Tensor,
) -> None:  # fmt: skip
    """Dot products to losses and, in place, to gradients; the torch form is what the native one
    must equal."""
    if native.usable(scores_RN):
        native.info_nce_rows(
            scores_RN, column_scale_N, scale.item(), labels_R.contiguous(), excluded, weights_R,
            loss_R, positive_R, hardest_R,
        )  # fmt: skip
        return
    factor_N = scale if column_scale_N is None else scale * column_scale_N
    scores_RN.mul_(factor_N)
    label_R1 = labels_R[:, None]
    s_positive_R = scores_RN.gather(1, label_R1)[:, 0]
    scores_RN.scatter_(1, label_R1, -torch.inf)
    if excluded is not None:
        offsets, columns = excluded
        scores_RN[torch.repeat_interleave(offsets.diff()), columns] = -torch.inf
    top_R = scores_RN.amax(1)
    # A row without negatives: its exponentials must be exp(-inf - 0) = 0, not exp(-inf + inf).
    alone_R = top_R == -torch.inf
    scores_RN.sub_(top_R.masked_fill(alone_R, 0)[:, None]).exp_()
    sum_R = scores_RN.sum(1)
    gap_R = top_R + sum_R.log() - s_positive_R
    positive_R.copy_(s_positive_R / scale)
    hardest_R.copy_(top_R / scale)
    loss_R.copy_(torch.logaddexp(gap_R, gap_R.new_zeros(())))
    if weights_R is None:
        return
    pull_R = weights_R * gap_R.sigmoid()
    scores_RN.mul_((pull_R / sum_R.masked_fill(alone_R, 1))[:, None])
    scores_RN.scatter_(1, label_R1, -pull_R[:, None])
    scores_RN.mul_(factor_N)


def _products(
    grad_RN: Tensor, unit_RD: Tensor, p_ND: Tensor,
    d_unit_RD: Tensor | None, dp_ND: Tensor | None, *, first: bool,
) -> None:  # fmt: skip
    """d_unit = grad p, dp += grad' unit."""
    if d_unit_RD is not None:
        torch.mm(grad_RN, p_ND, out=d_unit_RD)
    if dp_ND is not None:
        dp_ND.addmm_(grad_RN.T, unit_RD, beta=0 if first else 1)


def _low_products(
    grad_RN: Tensor, unit_RD: Tensor, p_ND: Tensor,
    d_unit_RD: Tensor | None, dp_ND: Tensor | None, *, first: bool,
) -> None:  # fmt: skip
    """The same on tensor cores: gradients rounded to the dtype of p, products in fp32."""
    # Each row is scaled to at most 1 before rounding: fp16 would lose the small gradients of a
    # converged batch.
    top_R1 = grad_RN.abs().amax(1, keepdim=True).clamp(min=torch.finfo(grad_RN.dtype).tiny)
    rounded_RN = (grad_RN / top_R1).to(p_ND.dtype)
    if d_unit_RD is not None:
        torch.mul(torch.mm(rounded_RN, p_ND, out_dtype=grad_RN.dtype), top_R1, out=d_unit_RD)
    if dp_ND is not None:
        top = top_R1.amax()
        weighted_RD = (unit_RD * (top_R1 / top)).to(p_ND.dtype)
        chunk_ND = torch.mm(rounded_RN.T, weighted_RD, out_dtype=grad_RN.dtype) * top
        dp_ND.copy_(chunk_ND) if first else dp_ND.add_(chunk_ND)
