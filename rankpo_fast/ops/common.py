"""What every loss shares: unit vectors for the definitions, and how per-row losses become one
number.

mean is sum_i w_i loss_i / sum_i w_i (0 without rows or weight), sum is sum_i w_i loss_i, none is
w_i loss_i.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rankpo_kernels.norms import compute_dtype

Reduction = Literal["mean", "sum", "none"]


def unit_rows(x_ND: Tensor) -> Tensor:
    """x / |x| per row; 0 with gradient 0 for a row of zeros, where F.normalize has a gradient of
    1e12."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    return x_ND / norm_N1.masked_fill(norm_N1 == 0, torch.inf)


def uniform_weight(rows: int, reduction: Reduction) -> Tensor:
    """The factor of every row, a number on the CPU: no launch fills it."""
    value = 1 / max(rows, 1) if reduction == "mean" else 1.0
    return torch.tensor(value, dtype=torch.float64)


def row_weights(like: Tensor, weights: Tensor | None, rows: int, reduction: Reduction) -> Tensor:
    """[rows] factors whose weighted sum of losses is the reduction; computed in fp32 (fp64)."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    dtype = compute_dtype(like.dtype)
    if weights is None:
        return torch.full(
            (rows,),
            1 / max(rows, 1) if reduction == "mean" else 1.0,
            dtype=dtype,
            device=like.device,
        )
    if weights.shape != (rows,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({rows},)")
    if weights.requires_grad:
        raise ValueError("weights require a gradient, which the losses do not give: detach them")
    on_cpu = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and rows and not weights.min() >= 0:  # on CUDA asking would cost a sync
        raise ValueError(f"weights must be >= 0, got {weights.min().item()}")
    weights = weights.to(like.device, dtype)
    if reduction == "mean":
        weights = weights / weights.sum().clamp(min=torch.finfo(dtype).tiny)
    return weights


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph  # private: see its test


def scaled_grads(
    grads: Sequence[Tensor], by: Tensor | None, needs: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Gradients that came with the loss, times its upstream gradient, where they are needed.

    In place unless the graph is kept for another backward: no second copy of the gradients. A
    number on the CPU can be looked at: one, as of `loss.backward()`, is no work.
    """
    if by is None:
        return [None] * len(grads)
    kept = torch.compiler.is_compiling() or _graph_is_kept()
    one = not kept and by.device.type == "cpu" and by == 1
    times = Tensor.mul if kept else (lambda grad, _: grad) if one else Tensor.mul_
    return [
        times(grad, by.to(grad.device)).to(dtype) if need else None
        for grad, need, dtype in zip(grads, needs, dtypes, strict=True)
    ]
