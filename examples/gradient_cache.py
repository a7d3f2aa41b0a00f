"""A batch that does not fit: embed without a graph, one loss, embed again for the gradients.

python examples/gradient_cache.py
"""

import random

import torch
from transformers import AutoModel, AutoTokenizer

from rankpo_fast import info_nce_loss_and_grads
from rankpo_fast.model.pooling import pool_padded
from small_world import small_world


def backward(embed, queries, passages, size):
    """As `info_nce_loss(embed(queries), embed(passages)).backward()`, in memory for `size` texts.

    Returns the loss. Dropout must be off, or draw the same numbers in both passes.
    """
    sides = [[x[i : i + size] for i in range(0, len(x), size)] for x in (queries, passages)]
    with torch.no_grad():
        q, p = [torch.cat([embed(chunk) for chunk in side]) for side in sides]
    loss, grads, _ = info_nce_loss_and_grads(q, p)
    for side, gradient in zip(sides, (grads.queries, grads.passages), strict=True):
        for chunk, of_chunk in zip(side, gradient.split(size), strict=True):
            embed(chunk).backward(of_chunk)
    return loss


def main() -> None:
    world = small_world()
    model = AutoModel.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def embed(texts):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        return pool_padded(model(**tokens).last_hidden_state, tokens.attention_mask, "mean")

    for step in range(10):
        rows = random.Random(step).sample(world.triplets, 32)
        passages = [row[key] for row in rows for key in ("positive", "negative")]
        loss = backward(embed, [row["query"] for row in rows], passages, size=8)
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 9):
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
