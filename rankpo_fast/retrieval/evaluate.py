"""The two axes of RankPO: how well an encoder retrieves, and how well it ranks as preferred.

Every distinct text has one vector, whatever number of documents and pairs it stands in. What is
the same text is decided by token ids, as the encoder gets them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankpo_fast.config import EvaluationConfig
from rankpo_fast.data.retrieval import RetrievalSet, read_retrieval
from rankpo_fast.data.rows import PreferenceRow, read_preferences
from rankpo_fast.data.tokens import TokenTable, first_of_each, joined
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.retrieval.metrics import alignment, retrieval_metrics
from rankpo_fast.retrieval.ranking import Ranking, rank_documents
from rankpo_fast.retrieval.report import table

PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class EvaluationData:
    """What an encoder is measured on."""

    retrieval: RetrievalSet | None = None
    preferences: Sequence[PreferenceRow] = ()


def read_evaluation_data(config: EvaluationConfig) -> EvaluationData:
    """InputError names the file and line of what cannot be read."""
    retrieval, preferences = None, []
    if config.query_data is not None:
        retrieval = read_retrieval(
            config.query_data,
            config.corpus_data,
            split=config.split,
            keep_same_id=config.keep_same_id,
        )
    if config.preference_data is not None:
        preferences = read_preferences(config.preference_data)
    return EvaluationData(retrieval, preferences)


@dataclass(frozen=True)
class Evaluation:
    """Figures of an encoder. As text it is a table.

    Attributes:
        figures: by name, "ndcg@20", "mrr@20", "recall@20" ... and "alignment".
        counts: of what they were taken of, "retrieval" and "preferences", as far as each was
            measured.
        rankings: of each query, to the last cutoff.
    """

    figures: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)

    def __str__(self) -> str:
        return table(self.figures, self.counts)


def measure(
    encoder: Encoder,
    *,
    retrieval: RetrievalSet | None = None,
    preferences: Sequence[PreferenceRow] = (),
    cutoffs: Sequence[int] = (1, 5, 10, 20, 100),
    max_tokens: int | None = None,
    legacy: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure what is given: nDCG, MRR and recall of `retrieval`, and the alignment.

    Every distinct text is encoded once, by one of the ranks; the first has the figures, the others
    nothing. Alignment is the share of preference pairs, by weight, whose chosen passage is the more
    similar one; a tie is none.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
        NotFiniteVectors: the vector of a text holds NaN or inf.
    """
    query_texts, passage_texts = evaluation_texts(retrieval, preferences)
    queries = _Distinct.of(query_texts, encoder.tokenize_queries(query_texts, cache_dir))
    passages = _Distinct.of(passage_texts, encoder.tokenize_passages(passage_texts, cache_dir))

    def encode(distinct: _Distinct, kind: str) -> Tensor:
        label = f"encoding {kind}" if progress and ranks.first else None
        return encode_texts(
            encoder, distinct.table, max_tokens=max_tokens, progress=label, texts=distinct.texts,
            ranks=ranks,
        )  # fmt: skip

    query_vectors, passage_vectors = encode(queries, "queries"), encode(passages, "passages")
    if not ranks.first:
        return Evaluation()
    figures: dict[str, float] = {}
    counts: dict[str, dict[str, Any]] = {}
    rankings = []
    if retrieval is not None:
        text_of = [passages.row_of.get(text) for text in retrieval.corpus]
        # The texts of the corpus come first among the passages.
        searched = passage_vectors[
            : 1 + max((row for row in text_of if row is not None), default=-1)
        ]
        rankings = rank_documents(
            query_vectors[queries.rows(retrieval.queries)].to(encoder.device),
            searched,
            text_of,
            retrieval.own,
            max(cutoffs),
        )
        documents = [ranking.documents for ranking in rankings]
        figures |= retrieval_metrics(documents, retrieval.grades, cutoffs, legacy=legacy)
        counts["retrieval"] = dict(retrieval.counts)
        if retrieval.split is not None:
            counts["retrieval"] |= {"split": retrieval.split, "splits": list(retrieval.splits)}
    if preferences:
        rows = torch.stack([
            queries.rows([row.query for row in preferences]),
            passages.rows([row.chosen for row in preferences]),
            passages.rows([row.rejected for row in preferences]),
        ])  # fmt: skip
        parts = rows.split(PAIRS_AT_ONCE, dim=1)
        margins = torch.cat([_margins(query_vectors, passage_vectors, *part) for part in parts])
        weights = torch.tensor([row.weight for row in preferences], dtype=torch.float32)
        figures["alignment"] = alignment(margins, weights)
        counts["preferences"] = {"pairs": len(preferences), "ties": int((margins == 0).sum())}
    return Evaluation(figures, counts, rankings)


def evaluation_texts(
    retrieval: RetrievalSet | None, preferences: Sequence[PreferenceRow]
) -> tuple[list[str], list[str]]:
    """The queries and passages that `evaluate` encodes, in order of appearance.

    They are distinct as strings; empty documents are none of them.
    """
    queries = [] if retrieval is None else list(retrieval.queries)
    passages = [] if retrieval is None else [text for text in retrieval.corpus if text]
    queries += [row.query for row in preferences]
    passages += [row.chosen for row in preferences]
    passages += [row.rejected for row in preferences]
    return list(dict.fromkeys(queries)), list(dict.fromkeys(passages))


def _margins(
    queries: Tensor, passages: Tensor, query: Tensor, chosen: Tensor, rejected: Tensor
) -> Tensor:
    """By how much more similar the chosen passage of each pair is, [B]; the last three are rows."""
    better = passages[chosen] - passages[rejected]  # [B, D]
    return (queries[query] * better).sum(dim=1)


@dataclass(frozen=True, eq=False)
class _Distinct:
    """n texts that differ as tokens."""

    table: TokenTable  # [n]
    texts: list[str]  # [n] the first of each
    row_of: dict[str, int]  # text -> its row in the table

    @classmethod
    def of(cls, texts: Sequence[str], tokens: TokenTable) -> "_Distinct":
        """Of texts that differ as strings, and their tokens."""
        table, [rows] = joined(tokens)
        row_of = dict(zip(texts, rows.tolist(), strict=True))
        return cls(table, first_of_each(row_of), row_of)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """The row [len(texts)] of each text."""
        return torch.tensor([self.row_of[text] for text in texts], dtype=torch.int64)
