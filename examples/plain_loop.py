"""A plain torch loop; the loss alone is ours.

python examples/plain_loop.py
"""

import random

import torch
from transformers import AutoModel

from rankpo_fast import info_nce_loss
from rankpo_fast.model.pooling import pool_padded
from small_world import collator, small_world


def main() -> None:
    world = small_world()
    model, collate = AutoModel.from_pretrained(world.model), collator(world.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def embed(tokens):
        return pool_padded(model(**tokens).last_hidden_state, tokens["attention_mask"], "mean")

    for step in range(20):
        batch = collate(random.Random(step).sample(world.triplets, 16))
        loss = info_nce_loss(embed(batch["query"]), embed(batch["passage"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, 19):
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
