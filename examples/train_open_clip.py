"""A small CLIP of open_clip's learns which picture of a job's words goes with which talent:

python examples/train_open_clip.py
"""

import open_clip
import torch

from rankpo_fast.integrations.open_clip import ClipLoss  # instead of open_clip.loss
from small_world import small_world


def main() -> None:
    rows = small_world().triplets
    words = open_clip.tokenize([row["query"] for row in rows])
    images = torch.zeros(len(rows), 3072).scatter_(1, words % 3072, 1).view(-1, 3, 32, 32)
    texts = open_clip.tokenize([row["positive"] for row in rows])
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    text = {"width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(64, vision, text, output_dict=True)
    loss, optimizer = ClipLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(30):
        batch = torch.randperm(len(rows))[:64]
        value = loss(**model(images[batch], texts[batch]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step in (0, 29):
            print(f"step {step}: loss {value.item():.3f}")


if __name__ == "__main__":
    main()
