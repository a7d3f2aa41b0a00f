"""Which tile, and which pipeline, is fastest on this GPU? `triton/tiles.py` rests on it.

Lower bound: three GEMMs. A row is a tile under one pipeline: exact (8MND) or stored (6MND). From
2k x 2k on they stand side by side with the tiles as shipped, and with exact in few launches, for
the size from which to store. On a GPU alone: needs Triton.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankpo_kernels.triton.tiles import SLIM, WIDE, Tiles

from ..launch import SYMMETRIC, launch
from ..measure import Case
from ..questions import Shape
from . import loss
from .info_nce import DIMS
from .loss import LossQuestion, Shapes, draw, loss_question

CANDIDATES: dict[str, Tiles | None] = {
    "wide": WIDE,
    "slim": SLIM,
    "wide, 4 stages": replace(WIDE, num_stages=4),
    "wide, 4 warps": replace(WIDE, num_warps=4),
    "wide, groups of 16": replace(WIDE, GROUP=16),
    "128 x 256": Tiles(128, 256, 64, num_warps=8, num_stages=3),
}
SHIPPED: dict[str, Tiles | None] = {"as shipped": None}
Pipelines = dict[str, dict[str, Any]]  # what the launcher is told
PIPELINES: Pipelines = {"exact": {"stored": False, "few": False}, "stored": {"stored": True}}
SMALLER = PIPELINES | {"exact in few launches": {"stored": False, "few": True}}


def implementations(
    q: Tensor, p: Tensor, labels: Tensor, tiles: dict[str, Tiles | None], pipelines: Pipelines
) -> dict[str, Callable[..., Any]]:
    return {
        f"{pipeline}, {name}": functools.partial(launch, q, p, labels, tiles=tile, **how)
        for name, tile in tiles.items()
        for pipeline, how in pipelines.items()
    }


def case(tiles: dict[str, Tiles | None], pipelines: Pipelines, shape: Shape, device: str) -> Case:
    M, N, D, dtype = shape["M"], shape["N"], shape["D"], loss.dtype_of(shape)
    q, p, labels = (x.detach() for x in draw(M, N, D, device, dtype))
    return loss.beside_gemms(3, q, p, [q, p], implementations(q, p, labels, tiles, pipelines))


def question(
    name: str,
    asks: str,
    tiles: dict[str, Tiles | None],
    pipelines: Pipelines,
    sizes: list[int],
) -> LossQuestion:
    default = [(size, size, D) for size in sizes for D in DIMS]
    shapes: Shapes = {
        "cuda": {"quick": [], "default": default, "full": default},
        "cpu": {"quick": [], "default": [], "full": []},
    }
    names = [f"{pipeline}, {tile}" for tile in tiles for pipeline in pipelines]
    return loss_question(
        name, asks, "MND", shapes, functools.partial(case, tiles, pipelines), names
    )


QUESTIONS = [
    question("tiles", "Which tile is fastest on this GPU?", CANDIDATES, PIPELINES, [16384]),
    question(
        "pipelines", "From which size on does storing pay?", SHIPPED, SMALLER, [4096, 2048, 8192]
    ),
]


def compile_all(D: int) -> None:
    """Leave the kernels that the bench takes at these dims in Triton's cache: short runs."""
    q, p, labels = (x.detach() for x in draw(512, 4096, D, "cuda", torch.bfloat16))
    runs = implementations(q, p, labels, CANDIDATES | SHIPPED, SMALLER)
    for options in ({}, SYMMETRIC):
        for how in ({"few": False}, {"few": True}, {"grads": False}):
            told: dict[str, Any] = how | {"options": options}
            runs[f"{told}"] = functools.partial(launch, q, p, labels, **told)
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # as in the bench, where it is a row
            print(f"D={D}, {name}: {type(error).__name__}: {error}"[:200])
