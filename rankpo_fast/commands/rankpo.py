"""`rankpo-fast rankpo`: stage 2."""

from rankpo_fast.config import (
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.train.rankpo import train_rankpo


def run(
    model: ModelConfig,
    data: RankPODataConfig,
    loss: RankPOLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    replay: ReplayConfig,
) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    train_rankpo(model, data, loss, training, evaluation, compute, replay)
