"""From the vectors of texts to the documents of a corpus, best first for each query; run files.

Documents may share a text, have none, or be left out of the ranking of a query. M queries, N
documents of n distinct texts, D dims.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rankpo_fast.data.files import whole_file
from rankpo_fast.data.jsonl import lines, shown
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.errors import InputError
from rankpo_fast.retrieval.search import search

BELOW_ALL = -2.0  # the score of a document without text: no cosine is below -1
RUN_NAME = "rankpo-fast"


class Ranking(NamedTuple):
    """Rows of the corpus, the best first, and their scores."""

    documents: list[int]
    scores: list[float]


def rank_documents(
    queries: Tensor,
    texts: Tensor,
    text_of: Sequence[int | None],
    own: Sequence[int | None] | None,
    k: int,
) -> list[Ranking]:
    """The k best documents of each query, fewer where there are fewer. Documents of equal score are
    in the order in which their texts first appear, then in their own.

    Args:
        queries: [M, D].
        texts: [n, D] the vectors of distinct texts.
        text_of: for each document the row of its text; None has none and ranks behind all others.
        own: for each query the document that is left out of its ranking, if there is one.
    """
    texts_N = np.array([len(texts) if text is None else text for text in text_of])
    by_text = texts_N.argsort(kind="stable")  # the documents, those of a text together
    starts = texts_N[by_text].searchsorted(np.arange(len(texts) + 2))

    def documents(text: int, left_out: int | None) -> list[int]:
        of_text = by_text[starts[text] : starts[text + 1]].tolist()
        return [document for document in of_text if document != left_out]

    # One more than asked for takes the place of the one that is left out.
    scores, indices = search(queries, texts, k + (own is not None))
    own = [None] * len(queries) if own is None else own
    rankings = []
    for row_scores, row_texts, left_out in zip(scores.tolist(), indices.tolist(), own, strict=True):
        ranking = Ranking([], [])
        pairs = zip([*row_texts, len(texts)], [*row_scores, BELOW_ALL], strict=True)
        for text, score in pairs:
            room = k - len(ranking.documents)
            found = documents(text, left_out)[:room]
            ranking.documents.extend(found)
            ranking.scores.extend([score] * len(found))
        rankings.append(ranking)
    return rankings


def write_run(
    path: str | Path,
    rankings: Iterable[Ranking],
    query_ids: Sequence[str] | None,
    document_ids: Sequence[str] | None,
) -> None:
    """Write TREC's `query Q0 document rank score name`; row numbers stand for ids that are None.

    The file appears whole, or not at all; OSError passes through.
    """
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, ranking in enumerate(rankings):
            query = row if query_ids is None else query_ids[row]
            for rank, (document, score) in enumerate(zip(*ranking, strict=True), 1):
                name = document if document_ids is None else document_ids[document]
                file.write(f"{query} Q0 {name} {rank} {score:.9g} {RUN_NAME}\n")


def read_run(path: Path, retrieval: RetrievalSet, k: int) -> list[Ranking]:
    """The k best documents of each query of `retrieval`, as a run file of TREC's format has them:
    by score, those of equal score by the rank column, which leaves a file of `write_run` as it was.

    trec_eval orders equal scores by the documents' names instead; a warning counts the queries that
    have some. It also counts what is left out: queries that are not measured, the documents of the
    queries' own ids. Unknown documents keep their ranks and are relevant to nothing.

    Raises:
        InputError: a line that cannot be read, a document twice, or no query or document is known.
    """
    queries = _numbers(retrieval.query_ids, len(retrieval.queries))
    documents = _numbers(retrieval.document_ids, len(retrieval.corpus))
    found: list[dict[str, tuple[float, float]]] = [{} for _ in queries]
    skipped: set[str] = set()
    for where, line in lines(path):
        query, document, rank, score = _run_line(line, where)
        if query not in queries:
            skipped.add(query)
            continue
        of_query = found[queries[query]]
        if document in of_query:
            raise InputError(f"{where}: document {shown(document)} stands twice for its query")
        of_query[document] = (-score, rank)
    if not any(found):
        raise InputError(f"{path}: no line of a query that is measured ({len(queries):,} are)")
    if all(document not in documents for of_query in found for document in of_query):
        raise InputError(f"{path}: none of its documents is in the corpus")
    own = retrieval.own or [None] * len(found)
    rankings, unknown, tied, left_out = [], 0, 0, 0
    for of_query, own_document in zip(found, own, strict=True):
        ranking = Ranking([], [])
        for document in sorted(of_query, key=of_query.__getitem__):
            number = documents.get(document, -1 - unknown)
            if number < 0:  # each its own, so that none counts as another
                unknown += 1
            elif number == own_document:
                left_out += 1
                continue
            ranking.documents.append(number)
            ranking.scores.append(-of_query[document][0])
        tied += len({*ranking.scores}) < len(ranking.scores)
        rankings.append(Ranking(ranking.documents[:k], ranking.scores[:k]))
    for count, what in [
        (len(skipped), "queries are none of those measured: skipped"),
        (sum(not of_query for of_query in found), "queries that are measured have no line: all 0"),
        (unknown, "documents are not in the corpus: they keep their ranks, relevant to nothing"),
        (left_out, "documents with the id of their query are left out of its ranking"),
        (tied, "queries have documents of equal scores: ordered by the rank column"),
    ]:
        if count:
            warnings.warn(f"{path}: {count:,} {what}", stacklevel=2)
    return rankings


def _numbers(ids: Sequence[str] | None, count: int) -> dict[str, int]:
    """Row numbers by the names that a run file has."""
    names = map(str, range(count)) if ids is None else ids
    return {name: number for number, name in enumerate(names)}


def _run_line(line: str, where: str) -> tuple[str, str, float, float]:
    """Query, document, rank and score."""
    fields = line.split()
    try:
        query, _, document, rank, score = fields[:5]
        numbers = float(rank), float(score)
    except ValueError:
        numbers = math.nan, math.nan
    if len(fields) != 6 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: must be query Q0 document rank score name, got {shown(line)}")
    return query, document, *numbers
