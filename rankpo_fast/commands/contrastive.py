"""`rankpo-fast contrastive`: stage 1."""

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from rankpo_fast.train.contrastive import train_contrastive


def run(
    model: ModelConfig,
    data: ContrastiveDataConfig,
    loss: ContrastiveLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    train_contrastive(model, data, loss, training, evaluation, compute)
