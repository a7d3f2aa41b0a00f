"""RankPO by sentence-transformers' trainer, held to a frozen reference by margins computed once:

python examples/train_sentence_transformers_rankpo.py
"""

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator

from rankpo_fast.integrations.sentence_transformers import RankPOLoss, with_reference_margins
from small_world import small_world


def main() -> tuple[float, float]:
    """The alignment, the share of pairs ranked as preferred, before and after."""
    world = small_world()
    model = SentenceTransformer(world.model)
    pairs = [
        (row["query"], *(row["passage1"], row["passage2"])[:: 1 if row["preferred"] == "A" else -1])
        for row in world.preferences
    ]
    columns = dict(zip(("query", "chosen", "rejected"), zip(*pairs, strict=True), strict=True))
    rows = with_reference_margins(Dataset.from_dict(columns), model)
    alignment = TripletEvaluator(*columns.values(), main_similarity_function="cosine")
    args = SentenceTransformerTrainingArguments(
        "outputs/examples/sentence_transformers_rankpo", max_steps=20, learning_rate=2e-3,
        per_device_train_batch_size=32, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, rows, loss=RankPOLoss(model, beta=2.0))
    before = alignment(model)
    trainer.train()
    return before["cosine_accuracy"], alignment(model)["cosine_accuracy"]


if __name__ == "__main__":
    print("alignment before and after: {:.3f} {:.3f}".format(*main()))
