"""The two axes of RankPO: how well an encoder retrieves, and how well it ranks as preferred."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankpo_fast.data.rows import PreferenceRow, RetrievalSet
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.retrieval.encode import encode_texts
from rankpo_fast.retrieval.metrics import alignment, retrieval_metrics
from rankpo_fast.retrieval.search import search


def evaluate(
    encoder: Encoder,
    *,
    retrieval: RetrievalSet | None = None,
    preferences: Sequence[PreferenceRow] | None = None,
    cutoffs: Sequence[int] = (1, 5, 10, 20, 100),
    max_tokens: int,
    legacy: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure what is given: "ndcg@20", "mrr@20", "recall@20" ... of `retrieval`, and "alignment".

    Every distinct text is encoded once. Alignment is the share of preference pairs, by weight,
    whose chosen passage is the more similar one.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
    """
    preferences = preferences or []
    queries, passages = {}, {}  # text -> its row among the vectors, in order of appearance
    if retrieval is not None:
        query_rows = _number(queries, retrieval.queries)
        corpus_rows = _number(passages, retrieval.corpus)
    pair_rows = [
        _number(queries, [row.query for row in preferences]),
        _number(passages, [row.chosen for row in preferences]),
        _number(passages, [row.rejected for row in preferences]),
    ]

    def encode(table: TokenTable, kind: str) -> Tensor:
        label = f"encoding {kind}" if progress else None
        return encode_texts(encoder, table, max_tokens=max_tokens, progress=label)

    query_vectors = encode(encoder.tokenize_queries(list(queries), cache_dir), "queries")
    passage_vectors = encode(encoder.tokenize_passages(list(passages), cache_dir), "passages")
    metrics: dict[str, float] = {}
    if retrieval is not None:
        _, found = search(
            query_vectors[query_rows].to(encoder.device),
            passage_vectors[corpus_rows],
            max(cutoffs),
        )
        metrics |= retrieval_metrics(found, retrieval.positives, cutoffs, legacy=legacy)
    if preferences:
        query, chosen, rejected = pair_rows
        better = passage_vectors[chosen] - passage_vectors[rejected]  # [B, D]
        margins = (query_vectors[query] * better).sum(dim=1)
        weights = torch.tensor([row.weight for row in preferences], dtype=torch.float32)
        metrics["alignment"] = alignment(margins, weights)
    return metrics


def _number(rows: dict[str, int], texts: Sequence[str]) -> Tensor:
    """The row [len(texts)] of each text; new texts get the next ones."""
    return torch.tensor([rows.setdefault(text, len(rows)) for text in texts], dtype=torch.int64)
