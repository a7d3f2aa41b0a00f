"""Tevatron's model of 0.1.0, from PyPI; in a loop, since its trainer does not run with transformers
5.

python examples/train_tevatron.py
"""

import random
from types import SimpleNamespace

import torch
from tevatron.modeling import DenseModel
from transformers import AutoModel, AutoTokenizer

from rankpo_fast.integrations.tevatron import apply_to
from small_world import small_world


def last_token(q=None, p=None):
    return (p if q is None else q)[:, -1]


def main() -> None:
    world = small_world()
    tokenizer = AutoTokenizer.from_pretrained(world.model, padding_side="left")
    encoder = AutoModel.from_pretrained(world.model)
    one_process = SimpleNamespace(negatives_x_device=False)
    model = DenseModel(encoder, encoder, last_token, train_args=one_process).train()
    apply_to(DenseModel)  # the line
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(40):
        rows = random.Random(step).sample(world.triplets, 32)
        passages = [row[kind] for row in rows for kind in ("positive", "negative")]
        texts = [row["query"] for row in rows], passages
        loss = model(*[tokenizer(x, padding=True, return_tensors="pt") for x in texts]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 39):
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
