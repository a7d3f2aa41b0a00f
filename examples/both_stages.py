"""Both stages by this package's own trainers, with hard negatives mined between them.

python examples/both_stages.py
"""

from rankpo_fast import ContrastiveTrainer, RankPOTrainer, evaluate, mine_hard_negatives
from small_world import small_world

SMALL = {"max_steps": 15, "learning_rate": 2e-3, "logging_steps": 5, "overwrite_output_dir": True}


def main() -> tuple[float, float]:
    """The alignment, the share of pairs ranked as preferred, after each stage."""
    world = small_world()
    rows = [
        {"query": row["query"], "positives": [row["positive"]], "negatives": [row["negative"]]}
        for row in world.triplets
    ]
    first = ContrastiveTrainer(world.model, rows, output_dir="outputs/examples/one", **SMALL)
    first.train()
    mined = mine_hard_negatives(first.encoder, rows, num_negatives=5, combine=True)
    second = ContrastiveTrainer(
        first.encoder, mined.rows, output_dir="outputs/examples/mined", **SMALL
    )
    second.train()
    before = evaluate(second.encoder, preference_data=world.preferences)
    third = RankPOTrainer(
        second.encoder, world.preferences, output_dir="outputs/examples/two",
        preference_data=world.preferences, reference_free=False, replay_data=mined.rows, **SMALL,
    )  # fmt: skip
    after = third.train().figures
    return before.figures["alignment"], after["alignment"]


if __name__ == "__main__":
    print("alignment before and after: {:.3f} {:.3f}".format(*main()))
