"""A run as settled before a model is loaded: its settings, its data, where it goes on from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankpo_fast.config import ComputeConfig, EvaluationConfig, ModelConfig, TrainingConfig
from rankpo_fast.data.files import Stamp
from rankpo_fast.model.precision import Precision
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import EvaluationData, EvaluationTokens
from rankpo_fast.train.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Run:
    """Made by `prepare_run`."""

    stage: str
    model: ModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    compute: ComputeConfig
    ranks: Ranks
    evaluation_data: EvaluationData  # of ranks that read
    settings: dict[str, Any]  # what a resumed run must share
    checkpoint: Checkpoint | None  # to go on from
    precision: Precision
    stamps: dict[Path, Stamp]  # of the files of models, before they were hashed
    inputs: list[tuple[str, str]]  # flag and name of all data, and each model, that is read
    evaluation_tokens: EvaluationTokens | None = None  # of several ranks, once these are one

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def path(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def first_step(self) -> int:
        """The number of steps that are done already."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def sharded(self) -> bool:
        """Whether weights lie in parts on several ranks, for which the run's result has no
        encoder."""
        return self.ranks.size > 1 and self.training.shard != "none"
