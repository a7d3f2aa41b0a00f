"""InfoNCE's launchers called by themselves, below ops and autograd: for the cost model and the
sweep of tiles, which choose the pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankpo_kernels.problem import PQ, QP, InfoNCEProblem, InfoNCEResult, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.workspace import LARGE_GPU, default_workspace

from .peers import SCALE

SYMMETRIC = {"directions": (QP, PQ), "partition": "per_direction"}


def workspace(x: Tensor, kind: str) -> int | None:
    """Of the device that x lies on; of a GPU of 80 GB where it holds nothing."""
    return None if x.device.type == "cuda" else default_workspace(kind, LARGE_GPU)


def launch(
    q: Tensor, p: Tensor, labels: Tensor, *, function: Callable = info_nce, grads: bool = True,
    options: dict | None = None, **overrides: Any,
) -> InfoNCEResult:  # fmt: skip
    """Losses, and gradients of embeddings; `options` are those of InfoNCESettings, overrides
    (tiles, stored, few, kept) the launcher's."""
    kind = "cpu" if function is not info_nce else "cuda"
    settings = InfoNCESettings(**{"workspace_bytes": workspace(q, kind)} | (options or {}))
    scale = torch.tensor(SCALE, dtype=torch.float64)
    problem = InfoNCEProblem(q, p, None, scale, Relations(labels), settings)
    weight = torch.tensor(1 / max(1, len(q))) if grads else None  # of every query
    return function(problem, weight, (grads, grads, False, False), **overrides)
