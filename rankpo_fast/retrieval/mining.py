"""Hard negatives: passages that rank high for a query but are none of its positives."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.retrieval.encode import encode_texts
from rankpo_fast.retrieval.search import search


def mine_hard_negatives(
    encoder: Encoder,
    rows: Sequence[ContrastiveRow],
    corpus: Sequence[str],
    *,
    search_range: tuple[int, int] = (0, 100),
    num_negatives: int = 10,
    method: str = "sample",
    seed: int = 42,
    keep: bool = False,
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> list[ContrastiveRow]:
    """The rows with mined negatives, at most `num_negatives` each, from the distinct corpus texts.

    Candidates of a row are the passages at ranks search_range[0] to search_range[1] - 1 for its
    query, less every text that is a positive of this query in any row, or the query itself. Where
    fewer are left than asked, the row gets those, and a warning counts such rows.

    Args:
        method: "topk" takes the best ranked candidates, "sample" draws them without repeats.
        seed: of "sample"; a row's draw depends on it and on the place of the row alone.
        keep: put the mined ones behind the negatives the row has, without repeats.
        max_tokens: tokens, padding included, that go through the encoder at once; None: what suits
            the device.

    Raises:
        InputError: a text alone has more than max_tokens tokens, or no row has a candidate.
    """
    assert method in ("topk", "sample"), method
    known: dict[str, set[str]] = {}  # query -> its positives, and itself
    for row in rows:
        known.setdefault(row.query, {row.query}).update(row.positives)
    passages = list(dict.fromkeys(corpus))
    first, last = search_range

    queries = encoder.tokenize_queries(list(known), cache_dir)
    corpus_table = encoder.tokenize_passages(passages, cache_dir)
    labels = ("encoding queries", "encoding passages") if progress else (None, None)
    _, found = search(
        encode_texts(
            encoder, queries, max_tokens=max_tokens, progress=labels[0], texts=list(known)
        ).to(encoder.device),
        encode_texts(
            encoder, corpus_table, max_tokens=max_tokens, progress=labels[1], texts=passages
        ),
        last,
    )
    ranking = dict(zip(known, found[:, first:].tolist(), strict=True))

    mined, counts = [], []
    for number, row in enumerate(rows):
        candidates = [passages[i] for i in ranking[row.query]]
        candidates = [text for text in candidates if text not in known[row.query]]
        count = min(num_negatives, len(candidates))
        if method == "sample":
            random = np.random.default_rng([seed, number])
            candidates = [candidates[i] for i in random.permutation(len(candidates))]
        negatives = (*(row.negatives if keep else ()), *candidates[:count])
        mined.append(replace(row, negatives=tuple(dict.fromkeys(negatives))))
        counts.append(count)
    _check_counts(counts, num_negatives, f"ranks {first} to {last - 1} of {len(passages)} passages")
    return mined


def _check_counts(counts: Sequence[int], num_negatives: int, searched: str) -> None:
    """Say how many rows are short of negatives; where all are without, refuse."""
    if not any(counts):
        raise InputError(f"no row got a negative: {searched} hold none that is not a positive")
    short = sum(count < num_negatives for count in counts)
    if short:
        warnings.warn(
            f"{short} of {len(counts)} rows got fewer than {num_negatives} negatives: {searched} "
            f"hold no more that are not positives",
            stacklevel=3,
        )
