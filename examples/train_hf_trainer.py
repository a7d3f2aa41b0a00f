"""Both stages by transformers' Trainer.

python examples/train_hf_trainer.py
"""

from transformers import AutoModel, AutoTokenizer, TrainingArguments

from rankpo_fast.integrations.hf_trainer import (
    HFContrastiveTrainer,
    HFRankPOTrainer,
    RankPOArguments,
)
from small_world import collator, small_world


def main() -> None:
    world = small_world()
    model = AutoModel.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    run = {"output_dir": "outputs/examples/hf_trainer", "learning_rate": 1e-3, "max_steps": 30,
           "per_device_train_batch_size": 16, "report_to": "none"}  # fmt: skip
    first = HFContrastiveTrainer(
        model, TrainingArguments(**run), pooling="mean", tokenizer=tokenizer,
        data_collator=collator(world.model), train_dataset=world.triplets[16:],
        eval_dataset=world.triplets[:16],
    )  # fmt: skip
    second = HFRankPOTrainer(
        model, args=RankPOArguments(**run), pooling="mean", tokenizer=tokenizer,
        train_dataset=world.preferences[32:], eval_dataset=world.preferences[:32],
    )  # fmt: skip
    for stage, trainer in enumerate((first, second), start=1):
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        print(f"stage {stage}: loss {before:.3f}, after training loss {after:.3f}")


if __name__ == "__main__":
    main()
