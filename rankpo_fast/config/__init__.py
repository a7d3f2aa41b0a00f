"""Settings, a frozen dataclass a room, each the flags and keywords of that room.

Field names are the flags (`learning_rate` is `--learning_rate` and `--learning-rate`) and the
keywords of the trainers, defaults are those of the paper's scripts, and help texts say in brackets
what holds where a default is None. Every class checks its own values: what cannot be used is an
InputError naming flag and value.
"""

from rankpo_fast.config.compute import ComputeConfig
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
from rankpo_fast.config.retrieval import (
    EncodeConfig,
    EvaluatedConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
    MineConfig,
    MineOutputConfig,
)
from rankpo_fast.config.rows import (
    NO_REPLAY,
    ContrastiveDataConfig,
    RankPODataConfig,
    ReplayConfig,
)
from rankpo_fast.config.training import REPORTERS, TrainingConfig

__all__ = [
    "NO_REPLAY",
    "PAPER_MAX_PASSAGE_LENGTH",
    "PAPER_MAX_QUERY_LENGTH",
    "PAPER_SPECIAL_TOKENS",
    "REPORTERS",
    "ComputeConfig",
    "ContrastiveDataConfig",
    "ContrastiveLossConfig",
    "EncodeConfig",
    "EncoderConfig",
    "EvaluateOutputConfig",
    "EvaluatedConfig",
    "EvaluationConfig",
    "MergeConfig",
    "MineConfig",
    "MineOutputConfig",
    "ModelConfig",
    "PlanConfig",
    "RankPODataConfig",
    "RankPOLossConfig",
    "ReplayConfig",
    "TrainingConfig",
]
