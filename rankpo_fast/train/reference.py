"""What the frozen reference model thinks of the passages compared: similarities, computed once and
kept.

They depend on the token ids of the texts (hence on data, tokenizer, prefixes and length limits), on
the weights and on pooling and precision; a sha256 of all that names the file in the cache. E pairs
of query and passage.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, ModelConfig
from rankpo_fast.data.batches import PreferenceData
from rankpo_fast.data.cache import cached
from rankpo_fast.data.group_batches import GroupData
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.train.frozen import ask_frozen, key_of

PAIRS_AT_ONCE = 4096
Compared = PreferenceData | GroupData


def other_model_similarities(
    name: str,
    model: ModelConfig,
    read: Sequence[Compared],
    device: torch.device,
    compute: ComputeConfig,
) -> list[Tensor]:
    """`reference_similarities` of each by the model `name`, which is loaded for it and gone
    afterwards."""

    def ask(encoder: Encoder) -> list[Tensor]:
        tokenized = [
            Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute) for data in read
        ]
        return [
            reference_similarities(encoder, texts, data, compute)
            for texts, data in zip(tokenized, read, strict=True)
        ]

    return ask_frozen("--reference_model_name_or_path", name, model, device, ask, alike=True)


def reference_similarities(
    encoder: Encoder, texts: Texts, data: Compared, compute: ComputeConfig
) -> Tensor:
    """Cosines [E] fp32 on the CPU, of what `data` compares, without dropout."""
    queries, passages = data.compared()
    pairs = torch.stack([texts.query_rows[queries], texts.passage_rows[passages]])  # [2, E]

    def make() -> dict[str, Tensor]:
        max_tokens = compute.max_tokens_per_micro_batch
        vectors = encode_texts(
            encoder, texts.table, max_tokens=max_tokens, progress="reference",
            texts=texts.strings(data.query_texts, data.passage_texts),
        )  # fmt: skip
        parts = [vectors[part].prod(0).sum(1) for part in pairs.split(PAIRS_AT_ONCE, dim=1)]
        return {"similarities": torch.cat(parts)}

    tensors = {"ids": texts.table.ids, "offsets": texts.table.offsets, "pairs": pairs}
    find_key = partial(key_of, encoder, tensors)
    return cached(compute.cache_path, "reference", find_key, make)["similarities"]
