"""Row norms: their inverses without overflow or division by zero, and the gradient through them.

    unit_n = x_n / |x_n|,   d x_n = (d unit_n - <d unit_n, unit_n> unit_n) / |x_n|

fp32 on the CPU is native, one pass over memory each; everything else is torch, `ROWS` rows at a
time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rankpo_kernels.chunked import native

ROWS = 4096  # bounds the temporaries of the torch forms


def inverse_norms(x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x_n| as [N] in `dtype`; 0 for a row of zeros, whose gradient through normalisation is
    then 0 too."""
    inverse_N = torch.empty(x_ND.shape[0], dtype=dtype, device=x_ND.device)
    if native.usable(x_ND):
        native.inverse_norms(x_ND, inverse_N)
        return inverse_N
    tiny = torch.finfo(dtype).tiny
    for rows in _slices(x_ND):
        chunk_RD = x_ND[rows].to(dtype)
        # Divided by the largest element first, the squares stay in range; NaN < tiny is false, so
        # NaN stays.
        top_R1 = torch.linalg.vector_norm(chunk_RD, ord=torch.inf, dim=1, keepdim=True)
        # `sum` adds in pairs. `norm` has one running sum, which at D=4096 is 8 roundings off for
        # values in bf16.
        norm_R = (chunk_RD / top_R1.clamp(min=tiny)).square_().sum(1).sqrt_() * top_R1[:, 0]
        inverse_N[rows] = torch.where(norm_R < tiny, 0, 1 / norm_R)
    return inverse_N


def tangent_(
    grad_ND: Tensor, x_ND: Tensor, inverse_N: Tensor, factor_N: Tensor | None = None
) -> None:
    """In place: grad_n := factor_n (grad_n - <grad_n, unit_n> unit_n); without a factor it is 1."""
    if native.usable(grad_ND, x_ND):
        native.tangent_(grad_ND, x_ND, inverse_N, factor_N)
        return
    for rows in _slices(x_ND):
        unit_RD = x_ND[rows].to(grad_ND.dtype) * inverse_N[rows, None]
        along_R1 = (grad_ND[rows] * unit_RD).sum(1, keepdim=True)
        grad_ND[rows] -= along_R1 * unit_RD
        if factor_N is not None:
            grad_ND[rows] *= factor_N[rows, None]


def _slices(x_ND: Tensor) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, x_ND.shape[0], ROWS))
