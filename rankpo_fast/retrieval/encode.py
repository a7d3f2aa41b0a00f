"""Texts -> unit vectors for search, without gradients. n texts, D dims."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.data.packing import pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.progress import progress as shown


@torch.no_grad()
def encode_texts(
    encoder: Encoder,
    table: TokenTable,
    *,
    max_tokens: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """Vectors [n, D] fp32 of length 1, on the CPU, in the table's order.

    Args:
        max_tokens: tokens, padding included, that go through the encoder at once; None: what suits
            the device.
        progress: label of what is said of it on stderr; None for nothing.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
    """
    groups = encoder.plan(table.lengths, max_tokens)
    vectors = torch.empty(len(table), encoder.dim, dtype=torch.float32)
    training = encoder.training
    encoder.eval()
    with shown(progress, len(table), "text") as advance:
        for text_ids in groups:
            vectors[text_ids] = _encode(encoder, table, text_ids)
            advance(len(text_ids))
    encoder.train(training)
    return vectors


def _encode(encoder: Encoder, table: TokenTable, text_ids: Tensor) -> Tensor:
    """Vectors [S, D] of a micro-batch; in two halves where memory does not suffice for it."""
    try:
        return F.normalize(encoder(pack(table, text_ids)), dim=1).cpu()
    except torch.OutOfMemoryError:
        if len(text_ids) == 1:
            raise
    torch.cuda.empty_cache()  # of blocks cut for the larger one
    return torch.cat([_encode(encoder, table, half) for half in text_ids.tensor_split(2)])
