"""A stage run with few words: flags as on the command line, small where nothing is said."""

import dataclasses
from pathlib import Path

from rankpo_fast import config as configs
from rankpo_fast.train.contrastive import train_contrastive
from rankpo_fast.train.rankpo import train_rankpo

STAGES = {
    "contrastive": (
        train_contrastive,
        configs.ContrastiveDataConfig,
        configs.ContrastiveLossConfig,
    ),
    "rankpo": (train_rankpo, configs.RankPODataConfig, configs.RankPOLossConfig),
}
OF_STAGE_2 = [
    configs.ReplayConfig,
    configs.GradedConfig,
    configs.TeacherConfig,
    configs.RetentionConfig,
]
SMALL = {
    "bf16": False,
    "gradient_checkpointing": False,
    "num_negatives": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "device": "cpu",
}


def run(stage: str, **flags) -> Path:
    """Train; returns the output directory."""
    train, data, loss = STAGES[stage]
    classes = [
        configs.ModelConfig,
        data,
        loss,
        configs.TrainingConfig,
        configs.EvaluationConfig,
        configs.ComputeConfig,
        *(OF_STAGE_2 if stage == "rankpo" else []),
    ]
    return train(*(_settings(cls, {**SMALL, **flags}) for cls in classes)).output_dir


def _settings(cls: type, flags: dict) -> object:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in flags.items() if name in names})
