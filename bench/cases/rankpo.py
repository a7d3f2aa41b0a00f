"""Is the pairwise RankPO loss bound by memory, as three reads and three writes of [B, D] should be?

Lower bound: copying the three embeddings, the same bytes, into memory that is there. The gradients
are fresh memory, whose pages the system has to find on the CPU: "copy, fresh memory" pays for that
too.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankpo_fast import rankpo_loss
from rankpo_fast.ops.rankpo import margin_loss, pair_similarities_definition

from ..measure import Case, Run
from ..questions import OURS, Shape
from . import loss
from .loss import Shapes, loss_question

SHAPES: Shapes = {
    "cpu": {
        "quick": [(1024, 384)],
        "default": [(8192, 2048), (1024, 384)],
        "full": [(8192, 2048), (1024, 384), (65536, 1024)],
    },
    "cuda": {
        "quick": [(8192, 2048)],
        "default": [(65536, 1024), (8192, 2048)],
        "full": [(65536, 1024), (8192, 2048), (1024, 384), (65536, 1024, "float32")],
    },
}
# Against fp64, where logits lie within beta / temperature = 20: as in loss.py.
GATE = {torch.float32: 2 * (2e-6 + 8 * 2**-24 * 20), torch.bfloat16: 8e-3, torch.float16: 2e-3}
FOR_ERRORS = 256  # pairs
LOWER_BOUND, FRESH = "copy", "copy, fresh memory"


def draw(
    B: int, D: int, device: str, dtype: torch.dtype, *, converged: bool = False
) -> list[Tensor]:
    """Queries, chosen and rejected passages: early in a training both are near, after it not."""
    q, c, r = torch.randn(3, B, D, device=device)
    near = (c + 2 * q, r - q) if converged else (q + c, q + r)
    return [x.to(dtype).requires_grad_() for x in (q, *near)]


def definition(q: Tensor, c: Tensor, r: Tensor) -> Tensor:
    chosen, rejected = pair_similarities_definition(q, c, r)
    return margin_loss(chosen - rejected).mean()


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {OURS: rankpo_loss, "torch": definition}


def implementations(tensors: list[Tensor]) -> dict[str, Run]:
    """Everything that gives (loss, dq, dc, dr), by name."""
    return {
        name: loss.forward_backward(functools.partial(of, *tensors), tensors)
        for name, of in IMPLEMENTATIONS.items()
    }


def copies(tensors: list[Tensor]) -> dict[str, Run]:
    """The lower bounds: into memory that exists, and into memory that does not."""
    sources = [x.detach() for x in tensors]
    targets = [torch.empty_like(x) for x in sources]

    def into_existing() -> Sequence[Tensor]:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return ()

    return {LOWER_BOUND: into_existing, FRESH: lambda: [x.clone() for x in sources]}


def errors(D: int, device: str, dtype: torch.dtype, **state: bool) -> loss.Errors:
    tensors = draw(FOR_ERRORS, D, device, dtype, **state)
    truth = implementations(loss.exact(tensors))["torch"]()
    return loss.Errors(implementations(tensors), lambda _: truth)


def case(shape: Shape, device: str) -> Case:
    B, D, dtype = shape["B"], shape["D"], loss.dtype_of(shape)
    fresh, converged = (errors(D, device, dtype, converged=c) for c in (False, True))
    tensors = draw(B, D, device, dtype)
    moved = sum(x.nbytes for x in tensors)
    return Case(
        device, copies(tensors) | implementations(tensors), LOWER_BOUND, flops=0, bytes=2 * moved,
        keep_bytes=moved, errors=fresh, converged=converged, gate=GATE[dtype], dtype=dtype,
    )  # fmt: skip


QUESTIONS = [
    loss_question("rankpo", __doc__.splitlines()[0], "BD", SHAPES, case, [FRESH, *IMPLEMENTATIONS])
]
