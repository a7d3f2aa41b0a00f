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
    max_tokens: int | None = None,
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
    queries, passages = evaluation_texts(retrieval, preferences)

    def encode(table: TokenTable, kind: str) -> Tensor:
        label = f"encoding {kind}" if progress else None
        return encode_texts(encoder, table, max_tokens=max_tokens, progress=label)

    query_vectors = encode(encoder.tokenize_queries(queries, cache_dir), "queries")
    passage_vectors = encode(encoder.tokenize_passages(passages, cache_dir), "passages")
    metrics: dict[str, float] = {}
    if retrieval is not None:
        _, found = search(
            query_vectors[_rows(queries, retrieval.queries)].to(encoder.device),
            passage_vectors[_rows(passages, retrieval.corpus)],
            max(cutoffs),
        )
        metrics |= retrieval_metrics(found, retrieval.positives, cutoffs, legacy=legacy)
    if preferences:
        query = _rows(queries, [row.query for row in preferences])
        chosen = _rows(passages, [row.chosen for row in preferences])
        rejected = _rows(passages, [row.rejected for row in preferences])
        better = passage_vectors[chosen] - passage_vectors[rejected]  # [B, D]
        margins = (query_vectors[query] * better).sum(dim=1)
        weights = torch.tensor([row.weight for row in preferences], dtype=torch.float32)
        metrics["alignment"] = alignment(margins, weights)
    return metrics


def evaluation_texts(
    retrieval: RetrievalSet | None, preferences: Sequence[PreferenceRow]
) -> tuple[list[str], list[str]]:
    """The distinct queries and passages that `evaluate` encodes, in order of appearance."""
    queries = [] if retrieval is None else list(retrieval.queries)
    passages = [] if retrieval is None else list(retrieval.corpus)
    queries += [row.query for row in preferences]
    passages += [row.chosen for row in preferences]
    passages += [row.rejected for row in preferences]
    return list(dict.fromkeys(queries)), list(dict.fromkeys(passages))


def _rows(distinct: Sequence[str], texts: Sequence[str]) -> Tensor:
    """The row [len(texts)] of each text among the distinct ones."""
    row = {text: number for number, text in enumerate(distinct)}
    return torch.tensor([row[text] for text in texts], dtype=torch.int64)
