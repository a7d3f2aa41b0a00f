"""Sentence-transformers' trainer: no score matrix, duplicates masked, a learnt scale:

python examples/train_sentence_transformers.py
"""

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from rankpo_fast.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
from small_world import small_world


def main() -> tuple[float, float]:
    """The loss before and after."""
    world = small_world()
    model = SentenceTransformer(world.model)
    rows = Dataset.from_list(world.triplets)
    scale = torch.nn.Parameter(torch.tensor(20.0))
    loss = CachedMultipleNegativesRankingLoss(
        model, scale, mini_batch_size=16, mask_duplicates=True
    )
    args = SentenceTransformerTrainingArguments(
        "outputs/examples/sentence_transformers", max_steps=20, per_device_train_batch_size=32,
        learning_rate=2e-3, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, rows, rows, loss)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    print("loss before and after: {:.3f} {:.3f}".format(*main()))
