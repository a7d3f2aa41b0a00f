"""Attention with dropout on its weights, on the CPU, where torch has no kernel for it.

    P = softmax(scaling q k')      out = (P . kept) v / share          kept [n, H, L, L] is 0 or 1
    dP = d_out v' / share          dS = P . kept . dP - P . rowsum(P . kept . dP)

torch composes it of single operations, which draw a float for every weight and leave five states of
the size of the weights behind. Here 16 bits are drawn for each, and P alone is left: what is not
kept has its sign turned. n texts of L tokens, H heads, E dims.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DRAWS = 1 << 16  # as many as 16 bits can tell apart


class DroppedAttention(torch.autograd.Function):
    """query, key, value [n, H, L, E], seen [L, L] bool or None (all) -> out [n, H, L, E]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        lost = round(dropout * DRAWS)  # of the draws
        share = 1 - lost / DRAWS
        scores = (query * scaling) @ key.transpose(2, 3)  # [n, H, L, L]
        if seen is not None:
            # In place, though selective checkpointing may hand out a kept product that is masked
            # already when this is computed again: masked twice it is the same.
            scores.masked_fill_(~seen, float("-inf"))
        kind = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=kind)
        # Between two whole numbers, so that none is 0, whose sign would be lost with it.
        signs = _draw(weights.shape).to(kind).add_(DRAWS // 2 - lost + 0.5)
        signed = weights.copysign_(signs).to(value.dtype)
        out = signed.relu() @ (value / share)
        ctx.save_for_backward(query, key, value, signed)
        ctx.scaling, ctx.share = scaling, share
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        kept = signed.relu()
        d_value = kept.transpose(2, 3) @ (d_out / ctx.share)
        d_scores = (d_out @ (value / ctx.share).transpose(2, 3)).mul_(kept)
        sums = d_scores.sum(dim=-1, keepdim=True)  # [n, H, L, 1]
        d_scores.addcmul_(signed.abs(), sums, value=-1)
        d_query = (d_scores @ key).mul_(ctx.scaling)
        d_key = d_scores.transpose(2, 3) @ (query * ctx.scaling)
        return d_query, d_key, d_value, None, None, None


def _draw(shape: torch.Size) -> Tensor:
    """Uniform int16 of torch's generator for the CPU, four of them a draw."""
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    return draws.view(torch.int16)[:count].view(shape)
