"""`--auto`: settings of memory as the plan finds them, the same on all ranks and after a resume;
`--auto_resume`: whether there is a run to resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.plan.auto import auto_settings
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.output import read_record
from rankpo_fast.train.resume import settings_before

OF_MODEL = ("weights_dtype", "lora_rank", "torch_compile")  # what a plan chooses
OF_TRAINING = ("optim", "offload")


def settle(
    model: ModelConfig,
    training: TrainingConfig,
    ranks: Ranks,
    *,
    negatives: int,
    lent: bool,
) -> tuple[ModelConfig, TrainingConfig]:
    """Both as they are without --auto; with it as the plan completes them, which is said. And
    --resume, where --auto_resume comes to it. All ranks must call it.

    Args:
        negatives: texts of a row besides query and positive.
        lent: whether the encoder is the caller's, in memory already.

    Raises:
        InputError: on the CPU, for an encoder that is lent, or where nothing fits.
    """
    if training.auto_resume and read_record(Path(training.output_dir)) is not None:
        training = replace(training, resume="newest", auto_resume=False)
    if not training.auto:
        return model, training
    if lent:
        raise InputError("--auto chooses how a model is loaded: give the model by its name")
    before = settings_before(training)
    if before:  # what was free then decided
        return _as_before(model, OF_MODEL, before), _as_before(training, OF_TRAINING, before)
    device = ranks.device
    free = [torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0]
    [shortage] = ranks.highest([-bytes for bytes in free])
    model, training, said = auto_settings(
        model, training, device=device, free_bytes=-shortage, negatives=negatives,
        processes=ranks.size,
    )  # fmt: skip
    ranks.say(f"--auto: {said}")
    return model, training


def _as_before(config: Any, names: tuple[str, ...], before: dict[str, Any]) -> Any:
    known = {name: before[f"--{name}"] for name in names if f"--{name}" in before}
    return replace(config, **known)
