"""Hard negatives: passages that rank high for a query but are none of its positives.

What is the same text is decided by token ids, as the encoder gets them. C candidates of each of U
queries that differ; s is the cosine of query and passage, in fp32.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.jsonl import shown
from rankpo_fast.data.memory import Source
from rankpo_fast.data.rows import ContrastiveRow, read_texts
from rankpo_fast.data.sources import place
from rankpo_fast.data.tokens import TokenTable, first_of_each, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.node import read_once
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.retrieval.draw import Drawing
from rankpo_fast.retrieval.index import indexed
from rankpo_fast.retrieval.reranked import RerankerFilter
from rankpo_fast.retrieval.search import search


@dataclass(frozen=True)
class Limits:
    """Which candidates are too close to a query; s+ is its lowest positive's cosine.

    As in sentence-transformers' mine_hard_negatives, and right for an s+ below 0 too. The share p
    of the positive's score in NV-Retriever is a relative margin of 1 - p.
    """

    max_score: float | None = None  # drops s > max_score
    absolute_margin: float | None = None  # drops s > s+ - margin
    relative_margin: float | None = None  # drops s > s+ - margin * |s+|

    @property
    def compare(self) -> bool:
        """Whether the positives' scores are needed."""
        return self.absolute_margin is not None or self.relative_margin is not None

    def ceilings(self, positive_scores: np.ndarray) -> dict[str, np.ndarray]:
        """For each rule that is on, the highest score [U] it lets pass."""
        ceilings = {}
        if self.max_score is not None:
            ceilings["max_score"] = np.full_like(positive_scores, self.max_score)
        if self.absolute_margin is not None:
            ceilings["absolute_margin"] = positive_scores - self.absolute_margin
        if self.relative_margin is not None:
            slack = self.relative_margin * np.abs(positive_scores)
            ceilings["relative_margin"] = positive_scores - slack
        return ceilings


NO_LIMITS, SAMPLE = Limits(), Drawing()


@dataclass(frozen=True)
class Origin:
    """Of the mined negatives of a row, which are its last ones."""

    ranks: list[int]  # as --search_range counts them, from 0
    scores: list[float]  # cosines with the query


@dataclass(frozen=True)
class Mined:
    """Rows with mined negatives, and how they came about."""

    examples: list[ContrastiveRow]
    passages: int  # distinct ones searched
    queries: int  # distinct ones
    candidates: int  # of all these queries
    dropped: dict[str, int]  # candidates by the first rule that left them out: "positives", ...
    origins: list[Origin] = field(default_factory=list)  # of each row
    method: str = ""
    model: str = ""  # its digest

    @property
    def rows(self) -> list[dict[str, Any]]:
        """To train on: {"query", "positives", "negatives"}, and under "mined" where the last of the
        negatives come from: ranks, scores, method, model."""
        return [
            {
                "query": row.query,
                "positives": [*row.positives],
                "negatives": [*row.negatives],
                "mined": {"method": self.method, "model": self.model, "ranks": origin.ranks,
                          "scores": [round(score, 6) for score in origin.scores]},
            }
            for row, origin in zip(self.examples, self.origins, strict=True)
        ]  # fmt: skip

    def summary(self) -> str:
        """What was searched and what was left out of it."""
        names = {"positives": "are positives of their query or the query itself"}
        rules = [
            f"{count:,} {names.get(rule, f'for --{rule}')}" for rule, count in self.dropped.items()
        ]
        return (
            f"{self.candidates:,} candidates of {self.queries:,} queries among {self.passages:,} "
            f"distinct passages; left out: {', '.join(rules)}"
        )


def mine(
    encoder: Encoder,
    rows: Sequence[ContrastiveRow],
    corpus: Sequence[str],
    *,
    search_range: tuple[int, int] = (0, 100),
    num_negatives: int = 10,
    drawing: Drawing = SAMPLE,
    limits: Limits = NO_LIMITS,
    reranker: RerankerFilter | None = None,
    keep: bool = False,
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    index_dir: Path | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Mined:
    """The rows with mined negatives, at most `num_negatives` each, from the distinct corpus texts.

    Candidates of a row are the passages at ranks search_range[0] to search_range[1] - 1 for its
    query, less those that are a positive of this query in any row, or the query itself, and those
    that `limits` drop. Texts with equal token ids are the same text. Where fewer are left than
    asked, the row gets those, and a warning counts such rows. Another counts positives that are
    none of the corpus texts.

    Args:
        drawing: how negatives are chosen; a row's draw depends on the seed, its candidates and the
            place of the row alone.
        limits: on the candidates' scores. Positives that the corpus lacks are encoded for it.
        reranker: scores the candidates that the other rules leave; it runs on the first rank.
        keep: put the mined ones, none of which repeats them, behind the negatives the row has.
        max_tokens: tokens, padding included, that go through the encoder at once; None: what suits
            the device.
        index_dir: passage vectors lie there in fp16 instead of in memory in fp32.
        ranks: all encode, the first searches and has the rows mined. Only those that read for
            others need `rows` and `corpus`.

    Raises:
        InputError: a text alone has more than max_tokens tokens, or no row has a negative then.
    """
    first, last = search_range
    with ranks.first_ahead():
        texts = _Texts.of(encoder, rows, corpus, keep, cache_dir)
        _check_positives(texts, rows)
    tables = read_once(ranks, None if cache_dir is None else Path(cache_dir), lambda: texts.tables)
    texts = replace(texts, tables=tables)

    def encode(table: TokenTable, kind: str, ids: dict[str, int]) -> Tensor:
        label = f"encoding {kind}" if progress else None
        names = first_of_each(ids)
        return encode_texts(
            encoder, table, max_tokens=max_tokens, progress=label, texts=names, ranks=ranks
        )

    queries = encode(tables.queries, "queries", texts.query_of)
    wanted = tables.passages.head(tables.with_positives if limits.compare else tables.searched)
    if index_dir is None:
        passages = encode(wanted, "passages", texts.passage_of)
    else:
        passages = indexed(
            encoder, wanted, index_dir, max_tokens=max_tokens,
            progress="encoding passages" if progress else None,
            texts=first_of_each(texts.passage_of), ranks=ranks,
        )  # fmt: skip
    if not ranks.first:
        return Mined([], tables.searched, len(tables.queries), 0, {})
    searched = passages[: tables.searched]
    best = search(queries.to(encoder.device), searched, last)
    scores, found = (ranked[:, first:].numpy(force=True) for ranked in best)
    lowest = np.full(len(queries), np.inf, np.float32)  # score of a positive
    if limits.compare:
        for query, ids in enumerate(texts.positives):
            lowest[query] = (passages[list(ids)].float() @ queries[query]).min().item()
    left, dropped = _left(scores, found, texts, limits.ceilings(lowest))
    if reranker is not None:
        drops = _reranked(reranker, left, found, texts, progress)
        left, dropped["reranker_margin"] = left & ~drops, int(drops.sum())

    mined, origins, positive_negatives = [], [], 0
    for number, row in enumerate(rows):
        query = texts.query_of[row.query]
        kept: dict[int, str] = {}
        for text in row.negatives if keep else ():
            if texts.passage_of[text] in texts.known[query]:
                positive_negatives += 1
            else:
                kept.setdefault(texts.passage_of[text], text)
        places = [i for i in left[query].nonzero()[0].tolist() if found[query][i] not in kept]
        vectors = None
        if drawing.method == "cluster":
            vectors = searched[torch.from_numpy(found[query][places])].float().numpy()
        order = drawing.order(vectors, len(places), number)[:num_negatives]
        new = [places[i] for i in order]
        negatives = [texts.corpus[found[query][i]] for i in new]
        mined.append(replace(row, negatives=(*kept.values(), *negatives)))
        origins.append(Origin([first + i for i in new], scores[query][new].tolist()))
    if positive_negatives:
        warnings.warn(
            f"{positive_negatives:,} negatives of the rows are positives of their query, or the "
            f"query itself: left out",
            stacklevel=2,
        )
    where = f"ranks {first} to {last - 1} of {len(texts.corpus)} passages"
    if not any(row.negatives for row in mined):
        raise InputError(f"no row got a negative: {where} hold none that may be one")
    _check_counts([len(origin.ranks) for origin in origins], num_negatives, where)
    return Mined(
        mined, len(texts.corpus), len(queries), found.size, dropped, origins, drawing.method,
        encoder.digest(),
    )  # fmt: skip


def searched_passages(rows: Sequence[ContrastiveRow], corpus_data: Source | None) -> list[str]:
    """What is searched: a corpus, or all passages of the rows. InputError if it cannot be read."""
    if corpus_data is None:
        return [text for row in rows for text in (*row.positives, *row.negatives)]
    read = read_texts(corpus_data, "text")
    corpus = [text for text in read if text]
    if empty := len(read) - len(corpus):
        warnings.warn(
            f"{place(corpus_data)}: {empty:,} empty texts are no negatives: left out", stacklevel=3
        )
    return corpus


class _Tables(NamedTuple):
    """What is encoded; ids count what is distinct as tokens."""

    queries: TokenTable  # [U]
    passages: TokenTable  # the corpus, then other positives, then other texts of the rows
    searched: int  # passages of the corpus
    with_positives: int  # passages up to the last positive


@dataclass(frozen=True, eq=False)
class _Texts:
    """The texts of a mining run."""

    tables: _Tables
    corpus: list[str]  # the first text of each id
    query_of: dict[str, int]
    passage_of: dict[str, int]
    positives: list[set[int]]  # [U] of each query in any row
    known: list[set[int]]  # [U] these and the query itself

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        rows: Sequence[ContrastiveRow],
        corpus: Sequence[str],
        keep: bool,
        cache_dir: str | Path | None,
    ) -> "_Texts":
        of_corpus = dict.fromkeys(corpus)
        of_positives = dict.fromkeys(text for row in rows for text in row.positives)
        of_queries = dict.fromkeys(row.query for row in rows)
        of_rows = {**of_positives, **of_queries}
        if keep:
            of_rows |= dict.fromkeys(text for row in rows for text in row.negatives)
        others = [text for text in of_rows if text not in of_corpus]

        queries, [query_ids] = joined(encoder.tokenize_queries(list(of_queries), cache_dir))
        passages, ids = joined(
            encoder.tokenize_passages(list(of_corpus), cache_dir),
            encoder.tokenize_passages(others, cache_dir),
        )
        query_of = dict(zip(of_queries, query_ids.tolist(), strict=True))
        passage_of = dict(zip([*of_corpus, *others], torch.cat(ids).tolist(), strict=True))
        corpus_texts = first_of_each({text: passage_of[text] for text in of_corpus})
        positives: list[set[int]] = [set() for _ in range(len(queries))]
        for row in rows:
            positives[query_of[row.query]].update(passage_of[text] for text in row.positives)
        known = [set(ids) for ids in positives]
        for text, query in query_of.items():
            known[query].add(passage_of[text])
        last = max((passage_of[text] for text in (*of_positives, *of_corpus)), default=-1)
        tables = _Tables(queries, passages, len(corpus_texts), last + 1)
        return cls(tables, corpus_texts, query_of, passage_of, positives, known)


def _left(
    scores: np.ndarray, found: np.ndarray, texts: _Texts, ceilings: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, int]]:
    """Which candidates [U, C] pass all rules, and how many each rule is the first to drop."""
    pairs = zip(found, texts.known, strict=True)
    drops = {"positives": np.array([np.isin(ids, list(known)) for ids, known in pairs])}
    drops |= {rule: scores > ceiling[:, None] for rule, ceiling in ceilings.items()}
    left, dropped = np.ones(found.shape, bool), {}
    for rule, drop in drops.items():
        dropped[rule] = int((left & drop).sum())
        left &= ~drop
    return left, dropped


def _reranked(
    reranker: RerankerFilter, left: np.ndarray, found: np.ndarray, texts: _Texts, shown: bool
) -> np.ndarray:
    """Which candidates [U, C] are as good as a positive of their query; says what was cut."""
    passages = first_of_each(texts.passage_of)
    positives = [[passages[i] for i in sorted(ids)] for ids in texts.positives]
    drops, cut = reranker.drops(
        left, first_of_each(texts.query_of), positives, found, texts.corpus, shown=shown
    )
    if cut:
        warnings.warn(
            f"--reranker: {cut:,} pairs were cut to {reranker.reranker.max_length:,} tokens",
            stacklevel=3,
        )
    return drops


def _check_positives(texts: _Texts, rows: Sequence[ContrastiveRow]) -> None:
    """Say how many positives are not searched: what they mean may be, with a title, say."""
    positives = dict.fromkeys(text for row in rows for text in row.positives)
    absent = [text for text in positives if texts.passage_of[text] >= len(texts.corpus)]
    if absent:
        warnings.warn(
            f"{len(absent):,} of {len(positives):,} positives are none of the passages searched "
            f"(the first: {shown(absent[0])}): where one stands there in other words, with its "
            f"title for instance, it may be mined as a negative of its own query",
            stacklevel=3,
        )


def _check_counts(counts: Sequence[int], num_negatives: int, searched: str) -> None:
    """Say how many rows are short of new negatives."""
    short = sum(count < num_negatives for count in counts)
    if short:
        warnings.warn(
            f"{short} of {len(counts)} rows got fewer than {num_negatives} negatives: {searched} "
            f"hold no more that may be one",
            stacklevel=3,
        )
