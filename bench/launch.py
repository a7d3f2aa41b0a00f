"""InfoNCE's launchers called by themselves, below ops and autograd: for the cost model and the
sweep of tiles, which choose the pipeline."""

import torch
from torch import Tensor

from rankpo_kernels.gpu.info_nce import info_nce
from rankpo_kernels.objective import DEFAULT_WORKSPACE, DIRECTIONS, Relations, Result, Settings

from .peers import SCALE

SYMMETRIC = {"directions": DIRECTIONS[:2], "joint": False}


def launch(
    q: Tensor, p: Tensor, labels: Tensor, *, function=info_nce, grads: bool = True,
    options: dict | None = None, **overrides,
) -> Result:  # fmt: skip
    """Losses, and gradients of embeddings; `options` are those of Settings, overrides (tiles,
    stored, few) the launcher's."""
    workspace = DEFAULT_WORKSPACE["cpu" if function is not info_nce else "cuda"]
    settings = {"normalize": True, "workspace_bytes": workspace} | (options or {})
    weight = torch.tensor(1 / max(1, len(q))) if grads else None  # of every query
    return function(
        q, p, None, torch.tensor(SCALE, dtype=torch.float64), Relations(labels),
        Settings(**settings), weight, (grads, grads, False, False), **overrides,
    )  # fmt: skip
