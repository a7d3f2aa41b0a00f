"""What the frozen reference model thinks of the passages compared: similarities, computed once and
kept.

They depend on the token ids of the texts (hence on data, tokenizer, prefixes and length limits), on
the weights and on pooling and precision, and in their last bits on packing, kernel, budget, machine
and versions; a sha256 of all that names the file in the cache. E pairs of query and passage.
"""

from collections.abc import Callable, Mapping, Sequence
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
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.train.frozen import are_cosines, ask_frozen, key_of

PAIRS_AT_ONCE = 4096
KIND, SIMILARITIES = "reference", "similarities"  # in the cache
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
    find_key = partial(_key, encoder, texts, data, compute)
    make = partial(_similarities, encoder, texts, data, compute, ALONE)
    return cached(compute.cache_path, KIND, find_key, make, _fits(data))[SIMILARITIES]


def similarities_by_ranks(
    encoder: Encoder, texts: Texts, data: Compared, compute: ComputeConfig, ranks: Ranks
) -> Tensor:
    """The same by an encoder whose weights lie in parts, for which all ranks must call it. The
    first has the cache, and tells the others whether they are asked."""
    key = "" if compute.cache_path is None else _key(encoder, texts, data, compute)
    make = partial(_similarities, encoder, texts, data, compute, ranks)
    if not ranks.first:
        missing, *_ = ranks.objects(None)
        if missing:
            make()
        similarities, *_ = ranks.objects(None)
        return similarities
    told = []

    def make_with_others() -> dict[str, Tensor]:
        told.append(ranks.objects(True))
        return make()

    found = cached(compute.cache_path, KIND, lambda: key, make_with_others, _fits(data))
    kept = found[SIMILARITIES]
    if not told:
        ranks.objects(False)
    ranks.objects(kept)
    return kept


def _similarities(
    encoder: Encoder, texts: Texts, data: Compared, compute: ComputeConfig, ranks: Ranks
) -> dict[str, Tensor]:
    """Nothing where other ranks have the vectors."""
    named = texts.strings(data.query_texts, data.passage_texts) if data.query_texts else ()
    vectors = encode_texts(
        encoder, texts.table, max_tokens=compute.max_tokens_per_micro_batch,
        progress="reference" if ranks.first else None, texts=named, ranks=ranks,
    )  # fmt: skip
    if not ranks.first:
        return {}
    parts = _pairs(texts, data).split(PAIRS_AT_ONCE, dim=1)
    return {SIMILARITIES: torch.cat([vectors[part].prod(0).sum(1) for part in parts])}


def _fits(data: Compared) -> Callable[[Mapping[str, Tensor]], bool]:
    return partial(are_cosines, name=SIMILARITIES, shape=(len(data.compared()[0]),))


def _key(encoder: Encoder, texts: Texts, data: Compared, compute: ComputeConfig) -> str:
    tensors = {"ids": texts.table.ids, "offsets": texts.table.offsets, "pairs": _pairs(texts, data)}
    return key_of(encoder, tensors, compute.max_tokens_per_micro_batch)


def _pairs(texts: Texts, data: Compared) -> Tensor:
    """Rows [2, E] of the table: of query and passage."""
    queries, passages = data.compared()
    return torch.stack([texts.query_rows[queries], texts.passage_rows[passages]])
