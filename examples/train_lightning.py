"""A LightningModule.

python examples/train_lightning.py
"""

import torch
from lightning import LightningModule, Trainer
from transformers import AutoModel

from rankpo_fast import info_nce_loss
from rankpo_fast.model.pooling import pool_padded
from small_world import collator, small_world


class BiEncoder(LightningModule):
    def __init__(self, directory: str):
        super().__init__()
        self.model = AutoModel.from_pretrained(directory).train()

    def forward(self, tokens):
        return pool_padded(self.model(**tokens).last_hidden_state, tokens["attention_mask"], "mean")

    def training_step(self, batch, number):
        loss = info_nce_loss(self(batch["query"]), self(batch["passage"]))
        if self.trainer.is_last_batch:
            self.print(f"epoch {self.current_epoch}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    world = small_world()
    collate = collator(world.model)
    rows = torch.utils.data.DataLoader(world.triplets, 16, shuffle=True, collate_fn=collate)
    trainer = Trainer(max_epochs=4, logger=False, enable_checkpointing=False)
    trainer.fit(BiEncoder(world.model), rows)


if __name__ == "__main__":
    main()
