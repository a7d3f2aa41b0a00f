"""FlagEmbedding's runner on the rows of a JSONL file, with transformers before 5.24.

python examples/train_flag_embedding.py
"""

import json
import tempfile

from FlagEmbedding.finetune.embedder.encoder_only import base

from rankpo_fast.integrations.flag_embedding import apply_to
from small_world import small_world


def main() -> None:
    world, directory = small_world(), tempfile.mkdtemp()
    with open(f"{directory}/train.jsonl", "w") as file:
        for row in world.triplets:
            row = {"query": row["query"], "pos": [row["positive"]], "neg": [row["negative"]]}
            file.write(json.dumps(row) + "\n")
    apply_to(base.BiEncoderOnlyEmbedderModel)  # the line
    runner = base.EncoderOnlyEmbedderRunner(
        base.EncoderOnlyEmbedderModelArguments(world.model),
        base.EncoderOnlyEmbedderDataArguments([file.name], directory, train_group_size=2),
        base.EncoderOnlyEmbedderTrainingArguments(
            f"{directory}/model", per_device_train_batch_size=32, max_steps=30, logging_steps=1,
            learning_rate=1e-3, sentence_pooling_method="last_token", report_to="none",
        ),
    )  # fmt: skip
    runner.run()
    losses = [row["loss"] for row in runner.trainer.state.log_history if "loss" in row]
    print(f"step 0: loss {losses[0]:.3f}\nstep 29: loss {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
