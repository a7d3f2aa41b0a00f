"""Pairs to be judged: two passages among the best that a model finds for a query.

k candidates of each query, by rank from 1; s is the cosine. Texts are the same when their token ids
are, so that no pair holds one text twice and no pair comes twice.

    uniform      any of the k (k - 1) / 2 pairs alike
    stratified   the ranks in equal parts; every two parts in turn, a part with itself too
    uncertainty  in proportion to p (1 - p), p = sigmoid((s1 - s2) / temperature), the chance that
                 the model's own ranking, read as Bradley-Terry's, gives to passage 1
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankpo_fast.config import ComputeConfig
from rankpo_fast.config.judge import PairsConfig
from rankpo_fast.data.jsonl import document_text, objects, text_at
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.data.rows import read_contrastive
from rankpo_fast.data.sources import place
from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.retrieval.mining import searched_passages
from rankpo_fast.retrieval.search import search

Id = str | int
QUERY_IDS, PASSAGE_IDS = ("query_id", "_id", "id"), ("passage_id", "_id", "id")


@dataclass(frozen=True)
class Texts:
    """Queries and a corpus, distinct as strings, with their names: those that the data gives, else
    the number of their row, from 0."""

    queries: dict[str, Id]
    corpus: dict[str, Id]
    own: dict[str, str]  # query -> the document of its own id, which it is not ranked for


def read_texts_and_ids(config: PairsConfig) -> Texts:
    """InputError names the line of what cannot be read."""
    source = config.query_data
    if not isinstance(source, Rows) and Path(source).is_dir():
        found = read_retrieval(source, config.corpus_data, split=config.split)
        assert found.query_ids is not None and found.document_ids is not None  # a directory's
        queries = _named(zip(found.queries, found.query_ids, strict=True))
        corpus = _named(zip(found.corpus, found.document_ids, strict=True))
        own = {
            query: found.corpus[row]
            for query, row in zip(found.queries, found.own or (), strict=True)
            if row is not None
        }
        return Texts(queries, corpus, own)
    if config.split is not None:
        raise InputError("--split needs --query_data to be a BEIR directory")
    first = next(objects(source))[1] if not _of_other_tools(source) else {}
    if "query" in first:
        rows = ((text_at(row, "query", at), row) for at, row in objects(source))
        queries = _named(
            (text, _id(row, QUERY_IDS, number)) for number, (text, row) in enumerate(rows)
        )
    else:
        queries = _named((row.query, n) for n, row in enumerate(read_contrastive(source)))
    if config.corpus_data is None:
        passages = searched_passages(read_contrastive(source), None)
        ids = _passage_ids(source) if "ids" in first else {}
        return Texts(
            queries, _named((text, ids.get(text, n)) for n, text in enumerate(passages)), {}
        )
    documents = ((document_text(row, at), row) for at, row in objects(config.corpus_data))
    corpus = _named(
        (text, _id(row, PASSAGE_IDS, number)) for number, (text, row) in enumerate(documents)
    )
    return Texts(queries, corpus, {})


def _of_other_tools(source: Source) -> bool:
    """Whether its rows are lists of texts, which only stage 1 reads."""
    from rankpo_fast.data.jsonl import values

    return isinstance(next(values(source))[1], list)


def _named(texts: Iterator[tuple[str, Id]] | Any) -> dict[str, Id]:
    """The first name of each text; none of an empty one."""
    names: dict[str, Id] = {}
    for text, name in texts:
        if text:
            names.setdefault(text, name)
    return names


def _id(row: dict[str, Any], keys: Sequence[str], number: int) -> Id:
    """A query's may also stand where `label` writes it, as row["ids"]["query"]."""
    if keys is QUERY_IDS and isinstance(row.get("ids"), dict):
        number = row["ids"].get("query", number)
    return next((row[key] for key in keys if isinstance(row.get(key), Id)), number)


def _passage_ids(source: Source) -> dict[str, Id]:
    """{passage: id} of rows of stage 1 as `label` writes them. A list whose ids are not as many, as
    where negatives were mined, gives none."""
    found: dict[str, Id] = {}
    for _, row in objects(source):
        for key in ("positives", "negatives"):
            texts, ids = row.get(key), (row.get("ids") or {}).get(key)
            if isinstance(texts, list) and isinstance(ids, list) and len(texts) == len(ids):
                found |= zip(texts, ids, strict=True)
    return found


def find_pairs(
    encoder: Encoder, texts: Texts, config: PairsConfig, compute: ComputeConfig, *,
    progress: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows to be judged; which passage comes first is drawn.

    Raises:
        InputError: no query has two candidates, or a text alone has more tokens than go at once.
    """
    cache = compute.cache_path
    queries, [query_rows] = joined(encoder.tokenize_queries([*texts.queries], cache))
    others = [text for text in texts.queries if text not in texts.corpus]
    passages, [corpus_rows, other_rows] = joined(
        encoder.tokenize_passages([*texts.corpus], cache), encoder.tokenize_passages(others, cache)
    )
    row_of = dict(zip([*texts.corpus, *others], [*corpus_rows.tolist(), *other_rows.tolist()],
                      strict=True))  # fmt: skip
    count = 1 + int(corpus_rows.max())
    firsts = _firsts(texts.corpus, corpus_rows.tolist())
    asked = _firsts(texts.queries, query_rows.tolist())

    def encode(table: TokenTable, kind: str, names: list[str]) -> torch.Tensor:
        label = f"encoding {kind}" if progress else None
        return encode_texts(encoder, table, max_tokens=compute.max_tokens_per_micro_batch,
                            progress=label, texts=names)  # fmt: skip

    query_vectors = encode(queries, "queries", asked).to(encoder.device)
    vectors = encode(passages.head(count), "passages", firsts)
    # One more each for the query's own text and own document, which are left out.
    scores, found = (
        part.cpu().numpy() for part in search(query_vectors, vectors, config.top_k + 2)
    )
    rows: list[dict[str, Any]] = []
    short = 0
    for number, query in enumerate(asked):
        random = np.random.default_rng([config.seed, number])
        left_out = {row_of[query], row_of.get(texts.own.get(query, ""), -1)}
        kept = [(row, score) for row, score in zip(found[number], scores[number], strict=True)
                if row not in left_out][: config.top_k]  # fmt: skip
        similarity = np.array([score for _, score in kept], dtype=np.float64)
        chosen = draw(similarity, config, random)
        short += len(chosen) < config.pairs_per_query
        for pair in chosen:
            pair = pair if random.random() < 0.5 else pair[::-1]
            row: dict[str, Any] = {"query": query}
            row |= {f"passage{i}": firsts[kept[rank][0]] for i, rank in enumerate(pair, 1)}
            row["query_id"] = texts.queries[query]
            row |= {f"passage_id{i}": texts.corpus[firsts[kept[rank][0]]]
                    for i, rank in enumerate(pair, 1)}  # fmt: skip
            row |= {f"passage_rank{i}": rank + 1 for i, rank in enumerate(pair, 1)}
            row |= {f"similarity{i}": round(float(similarity[rank]), 6)
                    for i, rank in enumerate(pair, 1)}  # fmt: skip
            rows.append(row)
    if not rows:
        raise InputError(f"{place(config.corpus_data or config.query_data)}: no query has two "
                         f"different candidates")  # fmt: skip
    if short:
        warnings.warn(f"{short:,} of {len(asked):,} queries have fewer than "
                      f"{config.pairs_per_query} pairs: all there are", stacklevel=2)  # fmt: skip
    return rows


def _firsts(texts: dict[str, Id], rows: list[int]) -> list[str]:
    """The first text of each row of a joined table, whose first rows these are."""
    firsts: dict[int, str] = {}
    for text, row in zip(texts, rows, strict=True):
        firsts.setdefault(row, text)
    return [firsts[row] for row in range(len(firsts))]


def draw(
    similarity: np.ndarray, config: PairsConfig, random: np.random.Generator
) -> list[tuple[int, int]]:
    """At most `pairs_per_query` pairs of candidates [k], best first, each pair once."""
    k = len(similarity)
    first, second = np.triu_indices(k, 1)  # [k (k - 1) / 2]
    wanted = min(config.pairs_per_query, len(first))
    if wanted == 0:
        return []
    if config.sampling == "stratified":
        chosen = _by_strata(first, second, k, wanted, config.strata, random)
    else:
        keys = random.gumbel(size=len(first))
        if config.sampling == "uncertainty":
            # The largest of log weight + Gumbel noise: a draw by weight, without repeats.
            # log p (1 - p) = -|x| - 2 log(1 + e^-|x|)
            x = np.abs(similarity[first] - similarity[second]) / config.temperature
            keys = keys - x - 2 * np.log1p(np.exp(-x))
        chosen = np.argsort(-keys, kind="stable")[:wanted]
    return [(int(first[i]), int(second[i])) for i in chosen]


def _by_strata(
    first: np.ndarray, second: np.ndarray, k: int, wanted: int, strata: int,
    random: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Numbers of pairs: one of each two strata in turn, the turns in an order that is drawn."""
    stratum = np.arange(k) * strata // k  # [k]
    turns = []
    for low, high in combinations_with_replacement(range(strata), 2):
        inside = np.flatnonzero((stratum[first] == low) & (stratum[second] == high))
        if len(inside):
            turns.append(list(random.permutation(inside)))
    random.shuffle(turns)
    chosen: list[int] = []
    while len(chosen) < wanted:
        for turn in turns:
            if turn and len(chosen) < wanted:
                chosen.append(turn.pop())
    return np.array(chosen)
