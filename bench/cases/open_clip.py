"""What do open_clip's losses cost beside the same losses with our kernels?

Given the normalised features of B images and B texts, loss and gradients of them, of the scale and
of SigLIP's bias, on one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankpo_fast.integrations import open_clip as ours

from ..measure import Case, Run
from ..questions import OURS, Shape
from . import loss
from .loss import GATE, Shapes, loss_question

SHAPES: Shapes = {
    "cpu": {
        "quick": [(512, 64)],
        "default": [(512, 64), (2048, 512)],
        "full": [(512, 64), (2048, 512), (8192, 512)],
    },
    "cuda": {  # up to where one of them no longer fits
        "quick": [(8192, 768)],
        "default": [(8192, 768), (32768, 768)],
        "full": [(8192, 768), (32768, 768), (131072, 768)],
    },
}
FOR_ERRORS = 512  # pairs: fp64 is slow
THEIRS = "open_clip"
LOSSES = {"ClipLoss": (1 / 0.07,), "SigLipLoss": (10.0, -10.0)}  # the scale and bias of the start


MODULES: dict[str, Callable[[], Any]] = {OURS: lambda: ours, THEIRS: ours.loss_file}


def draw(name: str, B: int, D: int, device: str, dtype: torch.dtype, **state: bool) -> list[Tensor]:
    """Normalised features, and numbers."""
    images, texts, _ = loss.draw(B, B, D, device, dtype, **state)
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [torch.tensor(x, device=device, dtype=wide) for x in LOSSES[name]]
    return [images, texts, *(x.requires_grad_() for x in numbers)]


def implementations(name: str, leaves: list[Tensor]) -> dict[str, Run]:
    """(loss, gradients) of either."""

    def value(module: Callable[[], Any]) -> Tensor:
        return getattr(module(), name)()(*leaves)

    return {
        who: loss.forward_backward(functools.partial(value, module), leaves)
        for who, module in MODULES.items()
    }


def errors(name: str, D: int, device: str, dtype: torch.dtype, **state: bool) -> loss.Errors:
    """Of each implementation against ours in fp64."""
    leaves = draw(name, FOR_ERRORS, D, device, dtype, **state)
    truth = implementations(name, loss.exact(leaves))[OURS]()
    return loss.Errors(implementations(name, leaves), lambda _: truth)


def case(name: str, shape: Shape, device: str) -> Case:
    B, D, dtype = shape["B"], shape["D"], loss.dtype_of(shape)
    fresh, converged = (errors(name, D, device, dtype, converged=c) for c in (False, True))
    leaves = draw(name, B, D, device, dtype)
    images, texts, *_ = leaves
    return loss.beside_gemms(
        3, images, texts, leaves, implementations(name, leaves), errors=fresh,
        converged=converged, gate=GATE[dtype],
    )  # fmt: skip


QUESTIONS = [
    loss_question(
        f"{THEIRS} {name}", __doc__.splitlines()[0], "BD", SHAPES, functools.partial(case, name),
        MODULES,
    )
    for name in LOSSES
]  # fmt: skip
