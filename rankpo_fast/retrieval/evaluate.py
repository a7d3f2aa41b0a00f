"""The two axes of RankPO: how well an encoder retrieves, and how well it ranks as preferred.

Every distinct text has one vector, whatever number of documents and pairs it stands in. What is
the same text is decided by token ids, as the encoder gets them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.config import EvaluationConfig
from rankpo_fast.data.retrieval import RetrievalSet, read_retrieval
from rankpo_fast.data.rows import PreferenceRow, read_preferences
from rankpo_fast.data.tokens import TokenTable, first_of_each, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.node import read_once
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.retrieval.metrics import alignment, query_metrics
from rankpo_fast.retrieval.ranking import BELOW_ALL, Ranking, rank_documents, read_run
from rankpo_fast.retrieval.report import table
from rankpo_fast.retrieval.statistics import Sums, difference, intervals, p_values

PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class EvaluationData:
    """What an encoder is measured on."""

    retrieval: RetrievalSet | None = None
    preferences: Sequence[PreferenceRow] = ()


def read_evaluation_data(config: EvaluationConfig, group_key: str | None = None) -> EvaluationData:
    """`group_key`: of queries, see `read_retrieval`.

    InputError names the file and line of what cannot be read.
    """
    retrieval, preferences = None, []
    if config.query_data is not None:
        retrieval = read_retrieval(
            config.query_data,
            config.corpus_data,
            split=config.split,
            keep_same_id=config.keep_same_id,
            group_key=group_key,
        )
    if config.preference_data is not None:
        preferences = read_preferences(config.preference_data)
    return EvaluationData(retrieval, preferences)


class DistinctTokens(NamedTuple):
    """Of n texts that differ as strings."""

    table: TokenTable  # those that differ as tokens too
    rows: Tensor  # [n] where each is


class EvaluationTokens(NamedTuple):
    """What an encoder makes of `evaluation_texts`."""

    queries: DistinctTokens
    passages: DistinctTokens


@dataclass(frozen=True, eq=False)
class Pairs:
    """Of B preference pairs."""

    margins: np.ndarray  # [B] by how much more similar the chosen passage is
    weights: np.ndarray  # [B]
    query_of: np.ndarray  # [B] int64, which of the distinct queries


@dataclass(frozen=True)
class Difference:
    """Between two models."""

    value: float
    low: float  # of a 95 % interval by bootstrap over queries
    high: float
    p: float  # of a paired randomisation test, two-sided


@dataclass(frozen=True)
class Evaluation:
    """Figures of an encoder. As text it is a table.

    Attributes:
        figures: by name, "ndcg@20", "mrr@20", "recall@20" ... and "alignment".
        counts: of what they were taken of, "retrieval" and "preferences", as far as each was
            measured.
        rankings: of each query, to the last cutoff.
        by_query: figures of retrieval of each query, by name, each [M].
        similarities: cosines of queries with all their relevant documents ("positives"), and with
            the best ranked that is not relevant ("hardest negatives").
        pairs: what the alignment is taken of.
    """

    figures: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)
    by_query: dict[str, np.ndarray] = field(default_factory=dict)
    similarities: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: Pairs | None = None

    def __str__(self) -> str:
        return table(self.figures, self.counts)

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Bounds of each figure by bootstrap over queries, 95 %."""
        return {k: v for sums in self.sums() for k, v in intervals(sums, seed=seed).items()}

    def against(self, other: "Evaluation", seed: int = 0) -> dict[str, Difference]:
        """Of each figure, how far this one is from `other`, which was measured on the same data.

        InputError where it was not.
        """
        found: dict[str, Difference] = {}
        ours, theirs = self.sums(), other.sums()
        if len(ours) != len(theirs):
            raise InputError("models are compared on the same data, but these were not measured so")
        for mine, of_other in zip(ours, theirs, strict=True):
            change = difference(of_other, mine)
            bounds, p = intervals(change, seed=seed), p_values(change, seed=seed)
            for name, value in zip(change.names, change.figures.tolist(), strict=True):
                found[name] = Difference(value, *bounds[name], p[name])
        return found

    def sums(self) -> list[Sums]:
        """What the figures are ratios of, over queries: those of retrieval, then the alignment."""
        sums = []
        if self.by_query:
            columns = np.stack([*self.by_query.values()], axis=1)
            sums.append(Sums(tuple(self.by_query), columns, np.ones(len(columns))))
        if self.pairs is not None:
            weights, queries = self.pairs.weights, self.pairs.query_of
            aligned = np.bincount(queries, weights * (self.pairs.margins > 0))
            sums.append(Sums(("alignment",), aligned[:, None], np.bincount(queries, weights)))
        return sums


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
    tokens: EvaluationTokens | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure what is given: nDCG, MRR and recall of `retrieval`, and the alignment.

    Every distinct text is encoded once, by one of the ranks; the first has the figures, the others
    nothing. Alignment is the share of preference pairs, by weight, whose chosen passage is the more
    similar one; a tie is none.

    Args:
        tokens: of `tokens_of_ranks`, with which only the first rank needs the data; None: all have
            them.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
        NotFiniteVectors: the vector of a text holds NaN or inf.
    """
    query_texts, passage_texts = evaluation_texts(retrieval, preferences)
    if tokens is None:
        tokens = _tokens(encoder, query_texts, passage_texts, cache_dir)
    queries = _Distinct.of(query_texts, tokens.queries)
    passages = _Distinct.of(passage_texts, tokens.passages)

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
    rankings: list[Ranking] = []
    by_query: dict[str, np.ndarray] = {}
    similarities: dict[str, np.ndarray] = {}
    of_pairs = None
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
        by_query, counts["retrieval"] = _retrieved(rankings, retrieval, cutoffs, legacy)
        figures |= {name: float(np.mean(values)) for name, values in by_query.items()}
        relevant = [
            (queries.row_of[query], text_of[document])
            for query, grades in zip(retrieval.queries, retrieval.grades, strict=True)
            for document in grades
            if document < len(text_of) and text_of[document] is not None
        ]
        similarities = {
            "positives": _cosines(query_vectors, passage_vectors, relevant),
            "hardest negatives": _hardest(rankings, retrieval.grades),
        }
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
        # By their strings, not tokens: so that two models, of whatever tokenizers, can be compared.
        numbers = {query: n for n, query in enumerate(dict.fromkeys(r.query for r in preferences))}
        query_of = np.array([numbers[row.query] for row in preferences])
        of_pairs = Pairs(margins.double().numpy(), weights.double().numpy(), query_of)
    return Evaluation(figures, counts, rankings, by_query, similarities, of_pairs)


def measure_run(
    path: Path, retrieval: RetrievalSet, cutoffs: Sequence[int], *, legacy: bool = False
) -> Evaluation:
    """Measure the rankings in a run file, without a model. InputError as of `read_run`."""
    rankings = read_run(path, retrieval, max(cutoffs))
    by_query, counts = _retrieved(rankings, retrieval, cutoffs, legacy)
    figures = {name: float(np.mean(values)) for name, values in by_query.items()}
    return Evaluation(figures, {"retrieval": counts}, rankings, by_query)


def _retrieved(
    rankings: Sequence[Ranking], retrieval: RetrievalSet, cutoffs: Sequence[int], legacy: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Figures of each query, and what they are taken of."""
    documents = [ranking.documents for ranking in rankings]
    by_query = query_metrics(documents, retrieval.grades, cutoffs, legacy=legacy)
    counts: dict[str, Any] = dict(retrieval.counts)
    if retrieval.split is not None:
        counts |= {"split": retrieval.split, "splits": list(retrieval.splits)}
    return by_query, counts


def _cosines(
    queries: Tensor, passages: Tensor, pairs: Sequence[tuple[int, int | None]]
) -> np.ndarray:
    """Of pairs of rows."""
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    parts = [(queries[part[:, 0]] * passages[part[:, 1]]).sum(dim=1) for part in
             rows.split(PAIRS_AT_ONCE)]  # fmt: skip
    return torch.cat(parts).double().numpy() if parts else np.empty(0)


def _hardest(rankings: Sequence[Ranking], grades: Sequence[Mapping[int, int]]) -> np.ndarray:
    """The highest score of a document that is not relevant, of queries that have one retrieved."""
    best = [
        next((score for document, score in zip(*ranking, strict=True) if document not in relevant),
             None)
        for ranking, relevant in zip(rankings, grades, strict=True)
    ]  # fmt: skip
    return np.array([score for score in best if score is not None and score != BELOW_ALL])


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


def tokens_of_ranks(
    encoder: Encoder, data: EvaluationData, cache_dir: Path | None, ranks: Ranks
) -> EvaluationTokens | None:
    """For `measure`, so that of several ranks those alone that read for others need the data.
    All must call it. None: this process is alone."""
    if ranks.size == 1:
        return None

    def make() -> EvaluationTokens:
        texts = evaluation_texts(data.retrieval, data.preferences)
        return _tokens(encoder, *texts, cache_dir)

    return read_once(ranks, cache_dir, make)


def _tokens(
    encoder: Encoder, queries: list[str], passages: list[str], cache_dir: str | Path | None
) -> EvaluationTokens:
    def distinct(table: TokenTable) -> DistinctTokens:
        table, [rows] = joined(table)
        return DistinctTokens(table, rows)

    return EvaluationTokens(
        distinct(encoder.tokenize_queries(queries, cache_dir)),
        distinct(encoder.tokenize_passages(passages, cache_dir)),
    )


@dataclass(frozen=True, eq=False)
class _Distinct:
    """n texts that differ as tokens; of their strings nothing where another rank has them."""

    table: TokenTable  # [n]
    texts: list[str]  # [n] the first of each
    row_of: dict[str, int]  # text -> its row in the table

    @classmethod
    def of(cls, texts: Sequence[str], tokens: DistinctTokens) -> "_Distinct":
        row_of = dict(zip(texts, tokens.rows.tolist(), strict=True)) if texts else {}
        return cls(tokens.table, first_of_each(row_of), row_of)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """The row [len(texts)] of each text."""
        return torch.tensor([self.row_of[text] for text in texts], dtype=torch.int64)
