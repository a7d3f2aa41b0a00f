"""Texts -> unit vectors for search, without gradients. n texts, D dims."""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rankpo_fast.data.packing import pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encoder import Encoder


@torch.no_grad()
def encode_texts(
    encoder: Encoder, table: TokenTable, *, max_tokens: int, progress: str | None = None
) -> Tensor:
    """Vectors [n, D] fp32 of length 1, on the CPU, in the table's order.

    Args:
        max_tokens: tokens, padding included, that go through the encoder at once.
        progress: label of a progress bar on stderr; None for none.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
    """
    groups = encoder.plan(table.lengths, max_tokens)
    vectors = torch.empty(len(table), encoder.dim, dtype=torch.float32)
    training = encoder.training
    encoder.eval()
    with tqdm(total=len(table), desc=progress, unit="text", disable=progress is None) as bar:
        for text_ids in groups:
            batch = encoder(pack(table, text_ids))  # [S, D]
            vectors[text_ids] = F.normalize(batch, dim=1).cpu()
            bar.update(len(text_ids))
    encoder.train(training)
    return vectors
