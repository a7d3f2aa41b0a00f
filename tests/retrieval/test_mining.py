"""Mined negatives rank high, are never known positives, and depend on the seed alone."""

import pytest
import torch

from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval.encode import encode_texts
from rankpo_fast.retrieval.mining import mine_hard_negatives

CORPUS = [f"{title} in {place}" for title in ("nurse", "teacher", "cook") for place in "ABCDE"]
QUERY = "wanted: nurse"


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def ranked(encoder):
    """The corpus as the encoder ranks it for QUERY."""
    tables = encoder.tokenize_queries([QUERY]), encoder.tokenize_passages(CORPUS)
    query, passages = (encode_texts(encoder, table, max_tokens=64) for table in tables)
    return [CORPUS[i] for i in (passages @ query[0]).argsort(descending=True).tolist()]


def mine(encoder, rows, corpus=CORPUS, **settings):
    return mine_hard_negatives(encoder, rows, corpus, max_tokens=64, **settings)


def test_topk_takes_the_best_of_the_range_that_no_row_of_the_query_calls_positive(encoder, ranked):
    rows = [ContrastiveRow(QUERY, (ranked[3],), ("old",)), ContrastiveRow(QUERY, (ranked[4],), ())]
    mined = mine(encoder, rows, search_range=(2, 8), num_negatives=3, method="topk")
    expected = (ranked[2], ranked[5], ranked[6])
    assert [row.negatives for row in mined] == [expected, expected]
    assert [row.positives for row in mined] == [row.positives for row in rows]


def test_keep_puts_the_mined_behind_the_old_without_repeats(encoder, ranked):
    row = ContrastiveRow(QUERY, (ranked[0],), ("old", ranked[2]))
    [mined] = mine(encoder, [row], num_negatives=2, method="topk", keep=True)
    assert mined.negatives == ("old", ranked[2], ranked[1])


def test_the_query_itself_and_repeated_texts_are_no_second_negative(encoder, ranked):
    row = ContrastiveRow(QUERY, (ranked[0],), ())
    [mined] = mine(encoder, [row], [QUERY, *CORPUS, *CORPUS], num_negatives=14, method="topk")
    assert mined.negatives == tuple(ranked[1:])


def test_sample_draws_from_the_range_by_seed(encoder, ranked):
    rows = [ContrastiveRow(QUERY, (ranked[0],), ())] * 2
    settings = {"search_range": (0, 8), "num_negatives": 4, "method": "sample"}
    first = mine(encoder, rows, seed=1, **settings)
    for row in first:
        assert len(set(row.negatives)) == 4
        assert set(row.negatives) <= set(ranked[1:8])
    assert mine(encoder, rows, seed=1, **settings) == first
    assert mine(encoder, rows, seed=2, **settings) != first


def test_a_row_gets_what_there_is_and_a_warning_counts_such_rows(encoder, ranked):
    row = ContrastiveRow(QUERY, tuple(ranked[:14]), ("old",))
    full = ContrastiveRow("wanted: cook", tuple(ranked[:1]), ())
    with pytest.warns(UserWarning, match="1 of 2 rows got fewer than 5 negatives") as caught:
        mined, _ = mine(encoder, [row, full], num_negatives=5, method="sample")
    assert mined.negatives == (ranked[14],)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("positives", "search_range"),
    [pytest.param(15, (0, 100), id="all-positive"), pytest.param(1, (15, 20), id="past-the-end")],
)
def test_no_negative_for_any_row_is_refused(encoder, ranked, positives, search_range):
    row = ContrastiveRow(QUERY, tuple(ranked[:positives]), ())
    with pytest.raises(InputError, match="no row got a negative"):
        mine(encoder, [row], search_range=search_range)
