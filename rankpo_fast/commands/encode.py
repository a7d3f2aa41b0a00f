"""`rankpo-fast encode`: the texts of a file as vectors, in a .npy file."""

import dataclasses
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, EncodeConfig, EncoderConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.rows import read_texts
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import check_length
from rankpo_fast.node import read_once
from rankpo_fast.ranks import Ranks


def run(model: EncoderConfig, config: EncodeConfig, compute: ComputeConfig) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    with Ranks.joined(compute) as ranks:
        read: list[str] = []
        with ranks.first_ahead():
            if ranks.reads:
                read = read_texts(config.input, config.text_key)
            texts = [text for text in read if text]
            if config.max_length is not None:
                limits: dict[str, Any] = {f"max_{config.role}_length": config.max_length}
                model = dataclasses.replace(model, **limits)
            encoder = load_encoder(model, device=ranks.device)
            flag = None if config.max_length is None else "--max_length"
            check_length(encoder, config.role, flag)
        roles = {"query": encoder.tokenize_queries, "passage": encoder.tokenize_passages}
        tokenized = partial(roles[config.role], texts, compute.cache_path)
        table = read_once(ranks, compute.cache_path, tokenized)
        vectors = encode_texts(
            encoder, table, max_tokens=compute.max_tokens_per_micro_batch,
            progress="encoding" if ranks.first else None, texts=texts, ranks=ranks,
        )  # fmt: skip
        if ranks.first:
            with whole_file(config.output) as temporary, temporary.open("wb") as file:
                np.save(file, _in_rows(vectors, read).numpy())
            print(
                f"{len(read):,} vectors of {encoder.dim} dims in {config.output}; "
                f"{table.truncated:,} texts truncated"
            )
            if empty := len(read) - len(texts):
                warnings.warn(
                    f"{config.input}: {empty:,} empty texts have a vector of zeros", stacklevel=2
                )
        ranks.meet()


def _in_rows(vectors: Tensor, texts: list[str]) -> Tensor:
    """[rows, D] of the vectors of texts that are not empty; the others have zeros."""
    if len(vectors) == len(texts):
        return vectors
    rows = vectors.new_zeros(len(texts), vectors.shape[1])
    rows[torch.tensor([bool(text) for text in texts])] = vectors
    return rows
