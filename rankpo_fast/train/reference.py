"""What the frozen reference model thinks of each pair: two similarities, computed once and kept.

They depend on the token ids of the texts (hence on data, tokenizer, prefixes and length limits), on
the weights and on pooling and precision; a sha256 of all that names the file in the cache.
"""

import dataclasses
import gc
import hashlib
from functools import partial

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, EncoderConfig, ModelConfig
from rankpo_fast.data.batches import PreferenceData
from rankpo_fast.data.cache import cached
from rankpo_fast.data.files import tensor_bytes
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.rankpo import pair_similarities

PAIRS_AT_ONCE = 4096


def other_model_similarities(
    name: str,
    model: ModelConfig,
    data: PreferenceData,
    device: torch.device,
    compute: ComputeConfig,
) -> Tensor:
    """`reference_similarities` of the model `name`, which is loaded for it and gone afterwards."""
    own = {field.name: getattr(model, field.name) for field in dataclasses.fields(EncoderConfig)}
    config = EncoderConfig(**{**own, "model_name_or_path": name, "tokenizer_name": None})
    try:
        encoder = load_encoder(config, device=device)
    except InputError as error:
        flag = "--reference_model_name_or_path"
        raise InputError(str(error).replace("--model_name_or_path", flag)) from error
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    similarities = reference_similarities(encoder, texts, data, compute)
    del encoder
    gc.collect()  # modules refer to themselves in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return similarities


def reference_similarities(
    encoder: Encoder, texts: Texts, data: PreferenceData, compute: ComputeConfig
) -> Tensor:
    """Similarities [2, rows] fp32 on the CPU: of chosen and of rejected, without dropout."""

    def make() -> dict[str, Tensor]:
        max_tokens = compute.max_tokens_per_micro_batch
        vectors = encode_texts(
            encoder, texts.table, max_tokens=max_tokens, progress="reference",
            texts=_texts_of_table(texts, data),
        )  # fmt: skip
        parts = _pairs(texts, data).split(PAIRS_AT_ONCE, dim=1)
        similarities = torch.cat([pair_similarities(*vectors[part]) for part in parts], dim=1)
        return {"similarities": similarities}

    if compute.cache_path is None:
        return make()["similarities"]
    find_key = partial(_key, encoder, texts, data)
    return cached(compute.cache_path, "reference", find_key, make)["similarities"]


def _pairs(texts: Texts, data: PreferenceData) -> Tensor:
    """Rows [3, rows] of the table: of query, chosen and rejected."""
    passages = torch.stack([data.chosen_ids, data.rejected_ids])
    return torch.cat([texts.query_rows[data.query_ids][None], texts.passage_rows[passages]])


def _texts_of_table(texts: Texts, data: PreferenceData) -> list[str]:
    """A text of each row of the table."""
    by_row = [""] * len(texts.table)
    for rows, own in [
        (texts.query_rows, data.query_texts),
        (texts.passage_rows, data.passage_texts),
    ]:
        for row, text in zip(rows.tolist(), own, strict=True):
            by_row[row] = text
    return by_row


def _key(encoder: Encoder, texts: Texts, data: PreferenceData) -> str:
    tensors = {
        "ids": texts.table.ids,
        "offsets": texts.table.offsets,
        "pairs": _pairs(texts, data),
        **encoder.backbone.state_dict(),
    }
    digest = hashlib.sha256(f"{encoder.settings.pooling} bf16={encoder.bf16}".encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
