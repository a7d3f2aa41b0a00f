"""From the vectors of texts to the documents of a corpus, best first for each query; run files.

Documents may share a text, have none, or be left out of the ranking of a query. M queries, N
documents of n distinct texts, D dims.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rankpo_fast.data.files import whole_file
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
