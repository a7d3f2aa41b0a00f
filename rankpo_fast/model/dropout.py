"""Attention with dropout on its weights, on the CPU, where torch has no kernel for it.

    P = softmax(scaling q k')      out = (P . kept) v / share          kept [B, L, L] is 0 or 1
    dP = d_out v' / share          dS = P . kept . dP - P . rowsum(P . kept . dP)

torch composes it of single operations, which draw a float for every weight and leave five states of
the size of the weights behind. Here 16 bits are drawn for each, and P alone is left: what is not
kept has its sign turned. A few heads go at a time, so that all else stays in the processor's cache.
B heads of all texts, L tokens of each, E dims.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DRAWS = 1 << 16  # as many as 16 bits can tell apart
AT_ONCE = 1 << 20  # weights


class DroppedAttention(torch.autograd.Function):
    """query, key, value [..., L, E], seen [L, L] bool or None (all) -> out [..., L, E]."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        lost = round(dropout * DRAWS)  # of the draws
        share = 1 - lost / DRAWS
        q, k, v = _heads(query, scaling), _heads(key), _heads(value, 1 / share)  # [B, L, E]
        signed = q.new_empty(*q.shape[:2], q.shape[1])  # [B, L, L]
        out = torch.empty_like(q)
        kind = torch.promote_types(q.dtype, torch.float32)
        for few in _few(signed):
            scores = q[few] @ k[few].transpose(1, 2)
            if seen is not None:
                scores.masked_fill_(~seen, float("-inf"))
            weights = scores.softmax(dim=-1, dtype=kind)
            # Between two whole numbers, so that none is 0, whose sign would be lost with it.
            signs = _draw(weights.shape).to(kind).add_(DRAWS // 2 - lost + 0.5)
            signed[few] = weights.copysign_(signs)
            torch.bmm(signed[few].relu(), v[few], out=out[few])
        ctx.save_for_backward(query, key, value, signed)
        ctx.scaling, ctx.share = scaling, share
        return out.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        query, key, value, signed = ctx.saved_tensors
        q, k, v = _heads(query, ctx.scaling), _heads(key, ctx.scaling), _heads(value)
        d = _heads(d_out, 1 / ctx.share)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for few in _few(signed):
            kept = signed[few].relu()
            torch.bmm(kept.transpose(1, 2), d[few], out=dv[few])
            d_scores = (d[few] @ v[few].transpose(1, 2)).mul_(kept)
            sums = d_scores.sum(dim=-1, keepdim=True)  # [few, L, 1]
            # P is 2 kept - signed: two passes here, where its own would be five times as long.
            d_scores.addcmul_(kept, sums, value=-2).addcmul_(signed[few], sums)
            torch.bmm(d_scores, k[few], out=dq[few])
            torch.bmm(d_scores.transpose(1, 2), q[few], out=dk[few])
        return *(x.view_as(query) for x in (dq, dk, dv)), None, None, None


def _heads(states: Tensor, factor: float = 1.0) -> Tensor:
    """[..., L, E] -> [B, L, E], times a factor."""
    flat = states.reshape(-1, *states.shape[-2:])
    return flat if factor == 1.0 else flat * factor


def _few(weights: Tensor) -> Iterator[slice]:
    """Of the heads of weights [B, L, L], so many that they have AT_ONCE weights, or one."""
    heads = max(1, AT_ONCE // max(1, weights[0].numel())) if len(weights) else 1
    for first in range(0, len(weights), heads):
        yield slice(first, first + heads)


def _draw(shape: torch.Size) -> Tensor:
    """Uniform int16 of torch's generator for the CPU, four of them a draw."""
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    return draws.view(torch.int16)[:count].view(shape)
