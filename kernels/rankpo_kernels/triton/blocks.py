"""What launchers share: numbers and embeddings as kernels take them, blocks of scores, chunks of
their rows, and the products of a chunk.

R rows of a chunk, N columns, D dims, L prefixes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.triton import products
from rankpo_kernels.triton.products import Chosen
from rankpo_kernels.triton.rows import Scale, absent
from rankpo_kernels.triton.scores import Hardness, Masks, Side
from rankpo_kernels.triton.waves import equal_rows, rows_of_chunk

LEAST = torch.finfo(torch.float32).tiny  # a GPU may take what is smaller for 0


def as_number(x: Tensor) -> Scale:
    """For kernels: read here where the host has it, else where it lies. A CUDA graph keeps what was
    read: a scale that is learned must lie on the device there."""
    return Scale(float(x), None) if x.device.type == "cpu" and not x.dim() else Scale(0.0, x)


def addressable(x: Tensor) -> Tensor:
    """Kernels count dims in 32 bits."""
    return x.contiguous() if x.stride(1) * x.shape[1] >= 2**31 else x


def torch_number(number: Scale) -> float | Tensor:
    """For what torch computes with it."""
    return number.value if number.at is None else number.at.float()


VECTOR = 16  # elements: rows of scores begin at whole vectors, whatever N is


def padded(N: int) -> int:
    """What a row of N scores takes; the rest holds zeros."""
    return -(-N // VECTOR) * VECTOR


def chunks_of(
    rows: int, columns: int, row_bytes: int, workspace_bytes: int, block: int,
    products: tuple[int, int] | None = None,
) -> list[slice]:  # fmt: skip
    """Slices of as many rows as the workspace holds, about equal ones; with `products`, which are
    (dims of their results, multiprocessors), such that they fill whole waves of those."""
    if (most := workspace_bytes // row_bytes) < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is too small for one row of {columns} passages: it "
            f"takes {row_bytes}"
        )
    if products is None:
        each = equal_rows(rows, most, block)
    else:
        dims, sms = products
        each = rows_of_chunk(rows, columns, dims, most, block, sms)
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def _side(
    x: Tensor, inverse_L: Tensor | None, index: Tensor | None = None, part: slice | None = None
) -> Side:
    """Rows `part` of x, or of x[index]; None: all."""
    if index is not None and part is not None:
        index = index[part]
    elif part is not None:
        x = x[part]
        inverse_L = None if inverse_L is None else inverse_L[:, part]
    stride = 0 if inverse_L is None or len(inverse_L) == 1 else inverse_L.stride(0)
    stride_x, stride_d = x.stride()
    return Side(x, stride_x, stride_d, index, inverse_L, stride)


class Guide(NamedTuple):
    """Embeddings whose similarities decide about the margin, with their inverse norms [1, rows]."""

    a: Tensor
    inverse_a: Tensor | None
    b: Tensor
    inverse_b: Tensor | None

    def among_queries(self) -> "Guide":
        return self._replace(b=self.a, inverse_b=self.inverse_a)

    def among_passages(self) -> "Guide":
        return self._replace(a=self.b, inverse_a=self.inverse_b)


class Block(NamedTuple):
    """One block of scores: rows of a against rows of b."""

    a: Tensor
    inverse_a: Tensor | None
    # rows of a, None for all; the name hides tuple.index, which nobody asks
    index: Tensor | None  # type: ignore[assignment]
    b: Tensor
    inverse_b: Tensor | None
    guide: Guide | None
    masks: Masks  # of all rows
    curated: int
    row_direction: str | None
    column_direction: str | None
    hardness: Hardness | None = None  # along the rows

    @property
    def guide_dims(self) -> tuple[int, ...]:
        return () if self.guide is None else (self.guide.a.shape[1],)

    @property
    def rows(self) -> int:
        return len(self.a) if self.index is None else len(self.index)

    def chunk(self, rows: slice) -> tuple[Side, Side, Side, Side, Masks]:
        part = None if rows == slice(0, self.rows) else rows  # views cost the host
        guide = (absent(Side), absent(Side))
        if self.guide is not None:
            of_a = _side(self.guide.a, self.guide.inverse_a, self.index, part)
            guide = (of_a, _side(self.guide.b, self.guide.inverse_b))
        return (
            _side(self.a, self.inverse_a, self.index, part), _side(self.b, self.inverse_b), *guide,
            _part_of(self.masks, part),
        )  # fmt: skip


def _part_of(masks: Masks, part: slice | None) -> Masks:
    limit = masks.limit_LR
    masks = masks._replace(limit_stride=0 if limit is None or len(limit) == 1 else limit.stride(0))
    if part is None:
        return masks
    pick = lambda x: None if x is None else x[part]  # noqa: E731
    return masks._replace(
        label_R=pick(masks.label_R), class_R=pick(masks.class_R), id_R=pick(masks.id_R),
        limit_LR=None if limit is None else limit[:, part],
    )  # fmt: skip


def product(
    g_RN: Tensor, b: Tensor, out: Tensor, add: bool, *, transpose: bool = False,
    chosen: Chosen | None = None, precision: str = "ieee",
) -> None:  # fmt: skip
    """out = (or +=) g b, or g' b, in fp32; of g the chosen rows alone where they are told."""
    a = g_RN.T if transpose else g_RN
    if chosen is not None or precision != "ieee":
        products.of_rows(g_RN, b, out, chosen or absent(Chosen), add, transpose, precision)
    elif out.device.type == "cpu":  # the interpreter's: the CPU has no product of mixed dtypes
        out.addmm_(a.float(), b.float(), beta=int(add))
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values; on the GPU by sorting, not by atomics, so always in one order."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)


def largest_inverse(inverse_LN: Tensor | None, like: Tensor) -> Tensor:
    """Of the norms of columns, beside which relative ones stay in range; they may all be 0."""
    if inverse_LN is None:
        return torch.ones((), device=like.device)
    return inverse_LN.amax().clamp(min=LEAST)


def add_relative(
    g_RN: Tensor, q_RD: Tensor, factor_R: Tensor, inverse_R: Tensor | None, dp_ND: Tensor,
    first: bool, chosen: Chosen | None = None,
) -> None:  # fmt: skip
    """dp (=, or += after the first chunk) g' (factor q / |q|) for rows of g that were divided by
    their factors: the largest one joins in fp32, where fp16 would lose it."""
    largest = factor_R.abs().amax().clamp(min=LEAST)
    by_R = factor_R / largest
    by_R = by_R if inverse_R is None else by_R * inverse_R
    of_chunk = torch.empty_like(dp_ND)
    weighted_RD = (q_RD * by_R[:, None]).to(g_RN.dtype)
    product(g_RN, weighted_RD, of_chunk, False, transpose=True, chosen=chosen)
    of_chunk *= largest
    dp_ND.copy_(of_chunk) if first else dp_ND.add_(of_chunk)
