"""An accelerate loop, with accumulation; processes share their negatives.

accelerate launch examples/train_accelerate.py
"""

import torch.distributed as dist
from accelerate import Accelerator
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModel

from rankpo_fast import InfoNCELoss
from rankpo_fast.model.pooling import pool_padded
from small_world import collator, small_world


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    with accelerator.main_process_first():
        world = small_world()
    model, collate = AutoModel.from_pretrained(world.model), collator(world.model)
    rows = DataLoader(world.triplets, 16, shuffle=True, collate_fn=collate)
    model, optimizer, rows = accelerator.prepare(model, AdamW(model.parameters(), 1e-3), rows)
    loss = InfoNCELoss(process_group=dist.group.WORLD if accelerator.num_processes > 1 else None)

    def embed(tokens):
        return pool_padded(model(**tokens).last_hidden_state, tokens["attention_mask"], "mean")

    for epoch in range(4):
        for batch in rows:
            with accelerator.accumulate(model):
                value = loss(embed(batch["query"]), embed(batch["passage"]))
                accelerator.backward(value)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {value.item():.3f}")


if __name__ == "__main__":
    main()
