"""The accuracy gates of the losses: relative Frobenius error against fp64 on the same rounded
inputs.

Two roundings of one loss are each held against fp64, never one against the other: what lies between
them is the luck of both, and changes with the instruction set.

Where a bound comes from: u = 2^-24 is one rounding of fp32, S the largest a logit can be.
  * A logit is wrong by 8 u S: norms, unit vectors, product, scale, the difference to the positive.
    A sum over D in blocks is a rounding or two of these at any D, so D is in no bound.
  * softplus(gap) is relatively wrong by no more than gap is absolutely: sigmoid <= softplus.
  * What does not grow with S, the exponentials (2 ulp) and the sums over rows and columns, is 32 u.
  * A gradient has a logit's error twice: in how far its row is off, and in its column's share.
Gradients that are stored in 16 bits have the rounding of their storage, and of slopes in 16 bits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def error(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact|, and the plain norm where exact is 0; infinite where there is a NaN,
    which a max of errors would pass over."""
    ours, exact = ours.double(), exact.double()
    off = ((ours - exact).norm() / (exact.norm() or torch.tensor(1.0))).item()
    return math.inf if math.isnan(off) else off


def gates(dtype: torch.dtype, temperature: float) -> tuple[float, float]:
    """(loss, gradient) bounds where no logit is larger than 1 / temperature, as of cosines."""
    fp32 = 2e-6 + 8 * 2**-24 / temperature
    return {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (fp32, 2 * fp32),
        torch.bfloat16: (fp32, 8e-3),
        torch.float16: (fp32, 2e-3),
    }[dtype]


def pass_the_gates(ours: Sequence[Tensor], exact: Sequence[Tensor], logits: float) -> list[float]:
    """Errors of (loss, *gradients) that are computed in fp32, all within the gates.

    logits: the largest there can be: the scale of cosines, or the scale times the longest query
    times the longest passage.
    """
    errors = [error(x.detach(), y.detach()) for x, y in zip(ours, exact, strict=True)]
    loss_gate, grad_gate = gates(torch.float32, 1 / logits)
    assert errors[0] < loss_gate and max(errors[1:], default=0) < grad_gate, (
        errors,
        loss_gate,
        grad_gate,
    )
    return errors


def longest_product(q: Tensor, p: Tensor) -> float:
    """The largest a dot product of these rows can be."""
    longest = [x.double().norm(dim=-1).amax().item() if x.numel() else 0.0 for x in (q, p)]
    return longest[0] * longest[1]


@contextmanager
def in_fp64(*models: nn.Module) -> Iterator[None]:
    """What these models make in fp32 is fp64 from there on: the loss around them is exact."""

    def widen(module, args, output):
        for name in {"sentence_embedding", "last_hidden_state"} & output.keys():
            output[name] = output[name].double()

    hooks = [model.register_forward_hook(widen) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw(M: int, N: int, D: int, dtype: torch.dtype, converged: bool, seed: int = 0):
    """queries, passages, labels: random directions, or (converged) positives at a similarity of
    about 0.9."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(M, D, generator=generator, dtype=torch.float64)
    p = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels = (
        torch.randperm(N, generator=generator)[:M]
        if N >= M
        else torch.randint(N, (M,), generator=generator)
    )
    if converged:
        p[labels] = q + 0.45 * torch.randn(M, D, generator=generator, dtype=torch.float64)
    return q.to(dtype), p.to(dtype), labels


# What one rounding more or less can do: below it, a comparison with plain torch compares luck. Of
# fp64 there is none: there plain torch is the truth.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def plain_torch(q, p, labels, scale):
    """Gradients by what one would write without us: cross entropy of the scores, in the inputs'
    dtype."""
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    unit = torch.nn.functional.normalize
    loss = torch.nn.functional.cross_entropy(scale * unit(leaves[0]) @ unit(leaves[1]).T, labels)
    return torch.autograd.grad(loss, leaves)
