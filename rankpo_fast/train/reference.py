"""What the frozen reference model thinks of each pair: two similarities, computed once and kept.

They depend on the token ids of the texts (hence on data, tokenizer, prefixes and length limits), on
the weights and on pooling and precision, and in their last bits on packing, kernel, budget, machine
and versions; a sha256 of all that names the file in the cache.
"""

from functools import partial

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, ModelConfig
from rankpo_fast.data.batches import PreferenceData
from rankpo_fast.data.cache import cached
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.rankpo import pair_similarities
from rankpo_fast.train.frozen import are_cosines, ask_frozen, key_of

PAIRS_AT_ONCE = 4096


def other_model_similarities(
    name: str,
    model: ModelConfig,
    data: PreferenceData,
    device: torch.device,
    compute: ComputeConfig,
) -> Tensor:
    """`reference_similarities` of the model `name`, which is loaded for it and gone afterwards."""

    def ask(encoder: Encoder) -> Tensor:
        texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
        return reference_similarities(encoder, texts, data, compute)

    return ask_frozen("--reference_model_name_or_path", name, model, device, ask, alike=True)


def reference_similarities(
    encoder: Encoder, texts: Texts, data: PreferenceData, compute: ComputeConfig
) -> Tensor:
    """Similarities [2, rows] fp32 on the CPU: of chosen and of rejected, without dropout."""

    def make() -> dict[str, Tensor]:
        max_tokens = compute.max_tokens_per_micro_batch
        vectors = encode_texts(
            encoder, texts.table, max_tokens=max_tokens, progress="reference",
            texts=texts.strings(data.query_texts, data.passage_texts),
        )  # fmt: skip
        parts = _pairs(texts, data).split(PAIRS_AT_ONCE, dim=1)
        similarities = torch.cat([pair_similarities(*vectors[part]) for part in parts], dim=1)
        return {"similarities": similarities}

    tensors = {"ids": texts.table.ids, "offsets": texts.table.offsets, "pairs": _pairs(texts, data)}
    find_key = partial(key_of, encoder, tensors, compute.max_tokens_per_micro_batch)
    fits = partial(are_cosines, name="similarities", shape=(2, len(data.query_ids)))
    return cached(compute.cache_path, "reference", find_key, make, fits)["similarities"]


def _pairs(texts: Texts, data: PreferenceData) -> Tensor:
    """Rows [3, rows] of the table: of query, chosen and rejected."""
    passages = torch.stack([data.chosen_ids, data.rejected_ids])
    return torch.cat([texts.query_rows[data.query_ids][None], texts.passage_rows[passages]])
