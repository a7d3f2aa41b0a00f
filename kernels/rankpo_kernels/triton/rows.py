"""Row kernels: inverse norms and pair similarities before the scores, the gradient through
normalisation after them. Bound by memory: each reads its rows once or twice and writes them once.

    inverse_norm[l, r] = 1 / |x_r[:d_l]|,   0 for a zero vector
    similarity[l, k] = <a_i, b_j> / (|a_i| |b_j|) over the first d_l dims, of pair k = (i, j)
    d x_r = g_r - (<g_r, x_r> / |x_r|^2) x_r

A, B rows, P pairs, D dims, L prefixes d_0 < ... < d_L-1 = D (DIMS).
"""

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.triton.tiles import FUSION, cdiv

TINY = tl.constexpr(1.2e-38)  # a shorter vector counts as zero: its norm has no inverse in fp32
BLOCK_R, BLOCK_D = 8, 256  # rows a program, and dims of them at once: 16 numbers a thread


class Scale(NamedTuple):
    """1 / temperature: a number the host knows, or where it lies on the device."""

    value: float
    at: Tensor | None


Record = TypeVar("Record", bound=tuple)


@functools.cache
def absent(kind: type[Record]) -> Record:
    """Arguments a launch goes without: Triton 3.6 cannot ask of a tuple whether it is None."""
    record: Any = kind
    return record(*[None] * len(record._fields))


@triton.jit
def number(scale):
    """The scale as fp32."""
    if scale.at is not None:
        return tl.load(scale.at).to(tl.float32)
    else:
        return scale.value


@triton.jit
def sum_of_parts(parts, n_parts, R, rows, mask):
    """[rows]: over parts[n_parts, R]; several are loaded at once, and summed up at the end."""
    PARTS: tl.constexpr = 8
    sums = tl.zeros([PARTS, rows.shape[0]], tl.float32)
    for first in range(0, n_parts, PARTS):
        offs_p = first + tl.arange(0, PARTS)
        mask_pr = (offs_p < n_parts)[:, None] & mask[None, :]
        sums += tl.load(parts + offs_p[:, None] * R + rows[None, :], mask=mask_pr, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def prepare_kernel(
    a_ptr, b_ptr, rows_ptr, columns_ptr,
    inverse_a_ptr, inverse_b_ptr, similarity_ptr,
    A, B, P, stride_a, stride_ad, stride_b, stride_bd,
    NORMALIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R pairs a program, then rows of a, then rows of b, each paired with itself."""
    pid = tl.program_id(0)
    of_pairs, of_a = tl.cdiv(P, BLOCK_R), tl.cdiv(A, BLOCK_R)
    x_ptr, stride_x, stride_xd = a_ptr, stride_a, stride_ad
    y_ptr, stride_y, stride_yd = b_ptr, stride_b, stride_bd
    out_ptr, size, first = similarity_ptr, P, pid * BLOCK_R
    if NORMALIZE and inverse_a_ptr is not None:
        if pid >= of_pairs + of_a:
            x_ptr, stride_x, stride_xd = b_ptr, stride_b, stride_bd
            out_ptr, size, first = inverse_b_ptr, B, (pid - of_pairs - of_a) * BLOCK_R
        elif pid >= of_pairs:
            y_ptr, stride_y, stride_yd = a_ptr, stride_a, stride_ad
            out_ptr, size, first = inverse_a_ptr, A, (pid - of_pairs) * BLOCK_R
    D: tl.constexpr = DIMS[len(DIMS) - 1]
    offs_r = first + tl.arange(0, BLOCK_R)
    mask_r = offs_r < size
    x_r, y_r = offs_r.to(tl.int64), offs_r.to(tl.int64)
    is_pair = pid < of_pairs
    if is_pair:
        if rows_ptr is not None:
            x_r = tl.load(rows_ptr + offs_r, mask=mask_r, other=0)
        y_r = tl.load(columns_ptr + offs_r, mask=mask_r, other=0)
    x_r, y_r = x_ptr + x_r * stride_x, y_ptr + y_r * stride_y
    top_x, top_y = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    if NORMALIZE:  # divided by their largest elements, squares stay in range
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_rd = mask_r[:, None] & (offs_d < D)[None, :]
            x = tl.load(x_r[:, None] + offs_d[None, :] * stride_xd, mask=mask_rd, other=0.0)
            y = tl.load(y_r[:, None] + offs_d[None, :] * stride_yd, mask=mask_rd, other=0.0)
            top_x = tl.maximum(top_x, tl.max(tl.abs(x.to(tl.float32)), 1))
            top_y = tl.maximum(top_y, tl.max(tl.abs(y.to(tl.float32)), 1))
    top_x, top_y = tl.where(top_x > TINY, top_x, 1.0), tl.where(top_y > TINY, top_y, 1.0)
    dot, square_x = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    square_y = tl.zeros([BLOCK_R], tl.float32)
    for level in tl.static_range(len(DIMS)):
        for start in range(0 if level == 0 else DIMS[level - 1], DIMS[level], BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_rd = mask_r[:, None] & (offs_d < DIMS[level])[None, :]
            x = tl.load(x_r[:, None] + offs_d[None, :] * stride_xd, mask=mask_rd, other=0.0)
            y = tl.load(y_r[:, None] + offs_d[None, :] * stride_yd, mask=mask_rd, other=0.0)
            x, y = x.to(tl.float32) / top_x[:, None], y.to(tl.float32) / top_y[:, None]
            dot += tl.sum(x * y, 1)
            if NORMALIZE:
                square_x += tl.sum(x * x, 1)
                square_y += tl.sum(y * y, 1)
        out = dot
        if NORMALIZE:
            norms = tl.sqrt(square_x) * tl.sqrt(square_y)
            cosine = tl.where(norms == 0, 0.0, dot / tl.where(norms == 0, 1.0, norms))
            # NaN == 0 is false, and NaN must stay
            length = tl.sqrt(square_x) * top_x
            inverse = tl.where(length == 0, 0.0, 1.0 / tl.where(length == 0, 1.0, length))
            out = tl.where(is_pair, cosine, inverse)
        tl.store(out_ptr + level * size + offs_r, out, mask=mask_r)


def prepare(
    a_AD: Tensor, b_BD: Tensor, rows_P: Tensor | None, columns_P: Tensor,
    dims: tuple[int, ...], normalize: bool, *, norms: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """(inverse norms of a [L, A], of b [L, B], similarities [L, P]) in one launch; rows_P=None
    pairs row k of a with column k. Without `norms`, similarities alone."""
    L, A, B, P = len(dims), len(a_AD), len(b_BD), len(columns_P)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=a_AD.device)  # noqa: E731
    norms = norms and normalize
    inverse_a, inverse_b = (new(L, A), new(L, B)) if norms else (None, None)
    similarity_LP = new(L, P)
    programs = sum(cdiv(n, BLOCK_R) for n in ((P, A, B) if norms else (P,)))
    if programs:
        prepare_kernel[(programs,)](
            a_AD, b_BD, rows_P, columns_P, inverse_a, inverse_b, similarity_LP,
            A, B, P, *a_AD.stride(), *b_BD.stride(),
            normalize, tuple(dims), BLOCK_R, block_d(dims[-1]), **FUSION,
        )  # fmt: skip
    return inverse_a, inverse_b, similarity_LP


def block_d(D: int) -> int:
    return min(BLOCK_D, 1 << (D - 1).bit_length())


class Rows(NamedTuple):
    """Gradients of rows on their way out: out = (factor / |x|) (g less its part along x)."""

    g: Tensor  # fp32
    x: Tensor
    inverse_L: Tensor | None  # [L, R]
    factor_R: Tensor | None  # None where g has 1 / |x| already
    along_LR: Tensor | None  # sum of d total / d s * s; None: from g, which has one level then
    out: Tensor
    R: int
    stride_g: int
    stride_x: int
    stride_xd: int
    stride_out: int
    inverse_stride: int
    along_stride: int

    @staticmethod
    def of(
        g: Tensor, x: Tensor, inverse_L: Tensor | None, factor_R: Tensor | None,
        along_LR: Tensor | None, out: Tensor,
    ) -> "Rows":  # fmt: skip
        level_strides = [0 if per_L is None else per_L.stride(0) for per_L in (inverse_L, along_LR)]
        strides = (g.stride(0), *x.stride(), out.stride(0), *level_strides)
        return Rows(g, x, inverse_L, factor_R, along_LR, out, len(g), *strides)


@triton.jit
def _finish(
    rows, block, constant,
    DIMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows: factor, projection onto the tangent, cast."""
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rows.R
    row_r = offs_r.to(tl.int64)
    D: tl.constexpr = DIMS[len(DIMS) - 1]
    by_r = tl.zeros([BLOCK_R], tl.float32) + constant
    norm_r = tl.full([BLOCK_R], 1.0, tl.float32)  # apart: their product may underflow
    if rows.factor_R is not None:
        by_r *= tl.load(rows.factor_R + offs_r, mask=mask_r, other=0.0)
        if rows.inverse_L is not None:
            norm_r = tl.load(rows.inverse_L + offs_r, mask=mask_r, other=0.0)
    along_r = tl.zeros([BLOCK_R], tl.float32)
    if rows.inverse_L is not None and rows.along_LR is None:
        inverse_r = tl.load(rows.inverse_L + offs_r, mask=mask_r, other=0.0)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_rd = mask_r[:, None] & (offs_d < D)[None, :]
            g_rd = rows.g + row_r[:, None] * rows.stride_g + offs_d[None, :]
            g = tl.load(g_rd, mask=mask_rd, other=0.0)
            x_rd = rows.x + row_r[:, None] * rows.stride_x + offs_d[None, :] * rows.stride_xd
            x = tl.load(x_rd, mask=mask_rd, other=0.0).to(tl.float32)
            along_r += tl.sum(g * (x * inverse_r[:, None]), 1)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_rd = mask_r[:, None] & (offs_d < D)[None, :]
        g_rd = rows.g + row_r[:, None] * rows.stride_g + offs_d[None, :]
        g = tl.load(g_rd, mask=mask_rd, other=0.0)
        if rows.inverse_L is not None:
            x_rd = rows.x + row_r[:, None] * rows.stride_x + offs_d[None, :] * rows.stride_xd
            x = tl.load(x_rd, mask=mask_rd, other=0.0).to(tl.float32)
            for level in tl.static_range(len(DIMS)):
                at_r = level * rows.inverse_stride + offs_r
                inverse_r = tl.load(rows.inverse_L + at_r, mask=mask_r, other=0.0)
                unit = x * inverse_r[:, None]
                if rows.along_LR is None:
                    g -= along_r[:, None] * unit
                else:
                    at_r = level * rows.along_stride + offs_r
                    part_r = tl.load(rows.along_LR + at_r, mask=mask_r, other=0.0) * inverse_r
                    g -= tl.where(offs_d[None, :] < DIMS[level], part_r[:, None] * unit, 0.0)
        g = g * by_r[:, None] * norm_r[:, None]
        to_rd = rows.out + row_r[:, None] * rows.stride_out + offs_d[None, :]
        tl.store(to_rd, g.to(rows.out.dtype.element_ty), mask=mask_rd)


@triton.jit
def finish_kernel(
    first, second, constant, scale,
    DIMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of two tensors, one after the other; `constant` * scale is a factor of all."""
    by = 1.0
    if constant is not None:
        by = tl.load(constant) * number(scale)
    block = tl.program_id(0)
    if second.g is None:
        _finish(first, block, by, DIMS, BLOCK_R, BLOCK_D)
    else:
        of_first = tl.cdiv(first.R, BLOCK_R)
        if block < of_first:
            _finish(first, block, by, DIMS, BLOCK_R, BLOCK_D)
        else:
            _finish(second, block - of_first, by, DIMS, BLOCK_R, BLOCK_D)


def finish(
    tensors: list[Rows], dims: tuple[int, ...], constant: Tensor | None = None,
    scale: Scale | None = None,
) -> None:  # fmt: skip
    """One or two tensors' gradients to their last form in one launch; constant * scale is a factor
    of all of them."""
    tensors = [rows for rows in tensors if rows.R]
    if tensors:
        programs = sum(cdiv(rows.R, BLOCK_R) for rows in tensors)
        finish_kernel[(programs,)](
            *tensors, *[absent(Rows)] * (2 - len(tensors)), constant, scale or absent(Scale),
            tuple(dims), BLOCK_R, block_d(dims[-1]), **FUSION,
        )  # fmt: skip
