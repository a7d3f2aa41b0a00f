"""GISTEmbed's guide: what a frozen model makes of the texts, computed once and kept.

Its similarities decide which passages are too close to a query to be negatives of it (Solatorio
2024). G dims, of its own.
"""

from functools import partial

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, ModelConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.data.cache import cached
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.train.frozen import are_cosines, ask_frozen, key_of

FLAG = "--guide_model_name_or_path"


def guide_vectors(
    name: str,
    model: ModelConfig,
    data: ContrastiveData,
    device: torch.device,
    compute: ComputeConfig,
) -> tuple[Tensor, Tensor]:
    """Vectors [queries, G] and [passages, G] fp32 on the CPU, of length 1, by the model `name`."""

    def ask(encoder: Encoder) -> tuple[Tensor, Tensor]:
        texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)

        def make() -> dict[str, Tensor]:
            named = texts.strings(data.query_texts, data.passage_texts)
            vectors = encode_texts(
                encoder, texts.table, max_tokens=compute.max_tokens_per_micro_batch,
                progress="guide", texts=named,
            )  # fmt: skip
            return {"vectors": vectors}

        ids = {"ids": texts.table.ids, "offsets": texts.table.offsets}
        find_key = partial(key_of, encoder, ids, compute.max_tokens_per_micro_batch)
        shape = (len(texts.table), encoder.dim)
        fits = partial(are_cosines, name="vectors", shape=shape)
        vectors = cached(compute.cache_path, "guide", find_key, make, fits)["vectors"]
        return vectors[texts.query_rows], vectors[texts.passage_rows]

    return ask_frozen(FLAG, name, model, device, ask, alike=False)
