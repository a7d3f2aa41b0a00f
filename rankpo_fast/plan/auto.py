"""`--auto`: settings of memory as the plan finds them for the GPU that is here."""

from dataclasses import replace
from typing import Any

import torch

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.plan.gpus import CONTEXT, GIB, gpu_here
from rankpo_fast.plan.report import shortage
from rankpo_fast.plan.search import Asked, find, would_fit


def auto_settings(
    model: ModelConfig,
    training: TrainingConfig,
    *,
    device: torch.device,
    free_bytes: float,
    negatives: int,
    lengths: tuple[int, int] | None = None,
    processes: int = 1,
) -> tuple[ModelConfig, TrainingConfig, str]:
    """Both configs with what the plan chose, and what that is, for the user.

    What differs from its default stays. How layers are checkpointed is left to the run, which
    measures, unless what is moved to the host depends on it.

    Args:
        device: the GPU.
        free_bytes: of its memory, before anything is loaded; of several GPUs the least.
        negatives: texts of a row besides query and positive.
        lengths: tokens of the longest query and passage, where they are known; None: as many as
            are kept of a text.
        processes: GPUs that train together.

    Raises:
        InputError: on the CPU, or where nothing fits.
    """
    if device.type != "cuda":
        raise InputError(f"--auto fits a training into a GPU's memory, and the device is {device}: "
                         f"leave it out")  # fmt: skip
    gpu = replace(gpu_here(device), bytes=free_bytes + CONTEXT)  # whose part is taken already
    planned = model
    if lengths is not None:
        planned = replace(model, max_query_length=lengths[0], max_passage_length=lengths[1])
    asked = Asked(
        model=planned,
        gpu=gpu,
        rows=training.per_device_train_batch_size,
        negatives=negatives,
        optim=training.optim,
        offload=tuple(training.offload),
        shard=training.shard,
        processes=processes,
    )
    plan = find(asked)
    if not plan.fits:
        raise InputError(shortage(plan, would_fit(asked)).replace("--gpu", "--auto", 1), "auto")
    levers = plan.best.levers
    chosen = levers.model(model)
    if "activations" not in levers.offload:
        chosen = replace(chosen, gradient_checkpointing=model.gradient_checkpointing)
    moved = "".join(f", {what} on the host" for what in levers.offload)
    if plan.compiled is not None:
        moved += f", layers compiled ({plan.compiled:.2f} times as fast by the plan's model)"
    changes: dict[str, Any] = {"optim": levers.optim, "offload": list(levers.offload)}
    return (
        chosen,
        replace(training, **changes),
        f"{levers.name}{moved}: of {free_bytes / GIB:.1f} GiB free "
        f"{plan.best.needed / GIB - CONTEXT / GIB:.1f} GiB are needed",
    )
