"""Settings, a frozen dataclass a room, each the flags and keywords of that room.

Field names are the flags (`learning_rate` is `--learning_rate` and `--learning-rate`) and the
keywords of the trainers, defaults are those of the paper's scripts, and help texts say in brackets
what holds where a default is None. Every class checks its own values: what cannot be used is an
InputError naming flag and value.
"""

from rankpo_fast.config.clicks import ClicksConfig
from rankpo_fast.config.compute import ComputeConfig, DeviceConfig
from rankpo_fast.config.judge import AnnotateConfig, JudgeConfig, PairsConfig, PeopleConfig
from rankpo_fast.config.label import LabelConfig
from rankpo_fast.config.losses import ContrastiveLossConfig, RankPOLossConfig
from rankpo_fast.config.merge import MergeConfig
from rankpo_fast.config.model import (
    PAPER_MAX_PASSAGE_LENGTH,
    PAPER_MAX_QUERY_LENGTH,
    PAPER_SPECIAL_TOKENS,
    EncoderConfig,
    ModelConfig,
)
from rankpo_fast.config.plan import PlanConfig
from rankpo_fast.config.retention import NO_RETENTION, RetentionConfig
from rankpo_fast.config.retrieval import (
    EncodeConfig,
    EvaluatedConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
    MineConfig,
    MineOutputConfig,
    MiningConfig,
    ScoreConfig,
)
from rankpo_fast.config.rounds import RoundsConfig
from rankpo_fast.config.rows import (
    NO_REPLAY,
    ContrastiveDataConfig,
    RankPODataConfig,
    ReplayConfig,
)
from rankpo_fast.config.supervision import NO_GRADES, NO_TEACHER, GradedConfig, TeacherConfig
from rankpo_fast.config.sweep import SweepConfig
from rankpo_fast.config.training import REPORTERS, TrainingConfig

# The settings that each training command takes, in the order in which its body takes them.
_RUN: list[type] = [TrainingConfig, EvaluationConfig, ComputeConfig]
STAGES: dict[str, list[type]] = {
    "contrastive": [ModelConfig, ContrastiveDataConfig, ContrastiveLossConfig, *_RUN],
    "rankpo": [
        ModelConfig,
        RankPODataConfig,
        RankPOLossConfig,
        *_RUN,
        ReplayConfig,
        GradedConfig,
        TeacherConfig,
        RetentionConfig,
    ],
}

__all__ = [
    "NO_GRADES",
    "NO_REPLAY",
    "NO_RETENTION",
    "NO_TEACHER",
    "PAPER_MAX_PASSAGE_LENGTH",
    "PAPER_MAX_QUERY_LENGTH",
    "PAPER_SPECIAL_TOKENS",
    "REPORTERS",
    "STAGES",
    "ClicksConfig",
    "AnnotateConfig",
    "ComputeConfig",
    "ContrastiveDataConfig",
    "ContrastiveLossConfig",
    "DeviceConfig",
    "EncodeConfig",
    "EncoderConfig",
    "EvaluateOutputConfig",
    "EvaluatedConfig",
    "EvaluationConfig",
    "MergeConfig",
    "LabelConfig",
    "JudgeConfig",
    "GradedConfig",
    "MineConfig",
    "MineOutputConfig",
    "MiningConfig",
    "ModelConfig",
    "PairsConfig",
    "PeopleConfig",
    "PlanConfig",
    "RankPODataConfig",
    "RankPOLossConfig",
    "ReplayConfig",
    "RoundsConfig",
    "RetentionConfig",
    "SweepConfig",
    "ScoreConfig",
    "TeacherConfig",
    "TrainingConfig",
]
