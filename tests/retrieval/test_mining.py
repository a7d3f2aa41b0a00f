"""Mined negatives rank high, are never known positives, and depend on the seed alone."""

import math

import pytest
import torch

from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval import mining
from rankpo_fast.retrieval.draw import Drawing
from rankpo_fast.retrieval.mining import Limits

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


@pytest.fixture(scope="module")
def uncased(uncased_llama_dir):
    return load_encoder(EncoderConfig(str(uncased_llama_dir)), device=torch.device("cpu"))


def mine(encoder, rows, corpus=CORPUS, **settings):
    return mine_all(encoder, rows, corpus, **settings).examples


def mine_all(encoder, rows, corpus=CORPUS, **settings):
    words = {key: settings.pop(key) for key in ("method", "seed", "clusters", "decay")
             if key in settings}  # fmt: skip
    return mining.mine(encoder, rows, corpus, max_tokens=64, drawing=Drawing(**words), **settings)


def test_topk_takes_the_best_of_the_range_that_no_row_of_the_query_calls_positive(encoder, ranked):
    rows = [ContrastiveRow(QUERY, (ranked[3],), ("old",)), ContrastiveRow(QUERY, (ranked[4],), ())]
    mined = mine(encoder, rows, search_range=(2, 8), num_negatives=3, method="topk")
    expected = (ranked[2], ranked[5], ranked[6])
    assert [row.negatives for row in mined] == [expected, expected]
    assert [row.positives for row in mined] == [row.positives for row in rows]


def test_keep_puts_the_mined_behind_the_old_without_repeats(encoder, ranked):
    row = ContrastiveRow(QUERY, (ranked[0],), ("old", ranked[2]))
    [mined] = mine(encoder, [row], num_negatives=2, method="topk", keep=True)
    assert mined.negatives == ("old", ranked[2], ranked[1], ranked[3])


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


# --- what is the same text ---

TWINS = ["Nurse in A", "nurse in a", "NURSE IN A\u200b"]  # for the uncased tokenizer


def test_twins_of_a_positive_the_query_or_each_other_are_no_negatives(uncased):
    corpus = [*TWINS, "Wanted: NURSE", "cook in B", "Cook in B", "pilot in C"]
    row = ContrastiveRow(QUERY, (TWINS[0],), ())
    mined = mine_all(uncased, [row], corpus, num_negatives=2, method="topk")
    assert sorted(mined.examples[0].negatives) == ["cook in B", "pilot in C"]
    assert (mined.passages, mined.candidates, mined.dropped) == (4, 4, {"positives": 2})


def test_queries_that_differ_in_case_share_their_positives(uncased):
    rows = [ContrastiveRow(QUERY, ("nurse in A",), ()), ContrastiveRow(QUERY.upper(), ("b",), ())]
    mined = mine(uncased, rows, ["Nurse in A", "B", "pilot in C"], num_negatives=1, method="topk")
    assert [row.negatives for row in mined] == [("pilot in C",)] * 2


def test_kept_negatives_that_are_positives_go_and_their_twins_are_not_mined_again(uncased):
    row = ContrastiveRow(QUERY, (TWINS[0],), (TWINS[1], "Cook in B"))
    with pytest.warns(UserWarning, match="1 negatives of the rows are positives"):
        [mined] = mine(
            uncased, [row], ["cook in B", "pilot in C"], num_negatives=1, method="topk", keep=True
        )
    assert mined.negatives == ("Cook in B", "pilot in C")


def test_positives_that_are_not_searched_are_counted(uncased):
    """As those of a corpus with titles, which is the way to mine a positive as a negative."""
    rows = [ContrastiveRow(QUERY, (TWINS[0], "Nurse in B", "cook"), ())]
    with pytest.warns(UserWarning, match='2 of 3 positives are none .* first: "Nurse in B"'):
        mine(uncased, rows, [TWINS[1], "B nurse in B", "pilot in C"], num_negatives=1)


def test_the_loss_of_mined_rows_can_fall_below_that_of_twins(uncased):
    """A twin scores as its positive whatever the weights: no loss is below log 2 with one."""
    row = ContrastiveRow(QUERY, (TWINS[0],), ())
    [mined] = mine(uncased, [row], [*TWINS, "cook in B"], num_negatives=1, method="topk")
    table = uncased.tokenize_passages([mined.positives[0], *mined.negatives, TWINS[1]])
    positive, negative, twin = encode_texts(uncased, table)
    [query] = encode_texts(uncased, uncased.tokenize_queries([QUERY]))
    floors = [math.log1p(math.exp(20 * (x - positive) @ query)) for x in (twin, negative)]
    assert floors[0] == pytest.approx(math.log(2)) and abs(floors[1] - math.log(2)) > 1e-3


@pytest.mark.parametrize("method", ["topk", "sample", "cluster"])
def test_rows_say_where_their_negatives_come_from(method, encoder, ranked, scores):
    row = ContrastiveRow(QUERY, (ranked[3],), (ranked[0],))
    found = mine_all(encoder, [row], search_range=(2, 9), num_negatives=4, method=method, keep=True)
    [told] = found.rows
    mined = told.pop("mined")
    new = told["negatives"][1:]
    assert [ranked[rank] for rank in mined["ranks"]] == new and len(new) == 4
    assert mined["scores"] == pytest.approx([scores[text] for text in new], abs=1e-5)
    assert mined["method"] == method and len(mined["model"]) == 16
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1
        other = encoder.digest()
        next(encoder.parameters())[0, 0] -= 1
    assert other != mined["model"]


# --- limits ---


@pytest.fixture(scope="module")
def scores(encoder):
    """Cosine of QUERY and each text of the corpus."""
    tables = encoder.tokenize_queries([QUERY]), encoder.tokenize_passages(CORPUS)
    query, passages = (encode_texts(encoder, table, max_tokens=64) for table in tables)
    return dict(zip(CORPUS, (passages @ query[0]).tolist(), strict=True))


@pytest.mark.parametrize("sign", [1, -1], ids=["positive-scores", "negative-scores"])
@pytest.mark.parametrize("rule", ["max_score", "absolute_margin", "relative_margin"])
def test_limit_drops_what_lies_above_it(rule, sign, encoder, ranked, scores, monkeypatch):
    """Checked text by text. Of two positives the lower one counts, though the corpus lacks it."""
    lower, corpus = ranked[8], [text for text in CORPUS if text != ranked[8]]
    if sign < 0:  # every vector of a passage is turned round

        def turned(encoder, table, **settings):
            vectors = encode_texts(encoder, table, **settings)
            return vectors if len(table) == 1 else -vectors

        monkeypatch.setattr("rankpo_fast.retrieval.mining.encode_texts", turned)
    score = {text: sign * scores[text] for text in CORPUS}
    low = min(score[ranked[2]], score[lower])
    middle = sorted(score.values())[5]
    value = {
        "max_score": middle,
        "absolute_margin": max(low - middle, 0.0),
        "relative_margin": max(low - middle, 0.0) / abs(low),
    }[rule]
    ceiling = middle if rule == "max_score" else min(low, middle)
    row = ContrastiveRow(QUERY, (ranked[2], lower), ())
    mined = mine_all(
        encoder, [row], corpus, num_negatives=99, method="topk", limits=Limits(**{rule: value})
    )
    candidates = [text for text in corpus if text != ranked[2]]
    near = {text for text in candidates if abs(score[text] - ceiling) < 1e-6}  # rounding decides
    expected = {text for text in candidates if score[text] <= ceiling}
    assert set(mined.examples[0].negatives) ^ expected <= near
    assert mined.dropped["positives"] == 1
    assert mined.dropped[rule] == len(candidates) - len(mined.examples[0].negatives) > 0


def test_each_rule_counts_what_it_is_the_first_to_drop(encoder, ranked, scores):
    row = ContrastiveRow(QUERY, (ranked[0],), ())
    limits = Limits(scores[ranked[3]] + 1e-5, relative_margin=0.0, absolute_margin=0.0)
    mined = mine_all(encoder, [row], num_negatives=12, method="topk", limits=limits)
    assert mined.dropped == {
        "positives": 1, "max_score": 2, "absolute_margin": 0, "relative_margin": 0
    }  # fmt: skip
    assert mined.examples[0].negatives == tuple(ranked[3:])
    assert "1 are positives" in mined.summary() and "2 for --max_score" in mined.summary()
