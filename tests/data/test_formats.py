"""Rows of other tools give the rows their tools mean; what is not used of them is said."""

import json
import warnings

import pytest

from rankpo_fast.data.formats import UNUSED
from rankpo_fast.data.rows import ContrastiveRow, PreferenceRow, read_contrastive, read_preferences
from rankpo_fast.errors import InputError


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def fault_of(read, path):
    with pytest.raises(InputError) as caught:
        read(path)
    return str(caught.value)


def said_of(read, path, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(path, **options)
    return [str(warning.message) for warning in caught]


BOTH = [
    pytest.param({"query": "q", "pos": ["p"], "neg": ["n", "m"], "prompt": ""}, id="FlagEmbedding"),
    pytest.param({"anchor": "q", "positive": "p", "negative": ["n", "m"]}, id="triplet-with-list"),
    pytest.param({"query": "q", "positive": ["p"], "negative": ["n", "m"]}, id="lists"),
    pytest.param(
        {"anchor": "q", "negative_10": "m", "positive": "p", "negative_2": "n"}, id="n-tuple"
    ),
    pytest.param(
        {
            "query_id": "7",
            "query": "q",
            "positive_passages": [{"docid": "1", "title": "", "text": "p"}],
            "negative_passages": [{"docid": "2", "text": "n"}, {"docid": "3", "text": "m"}],
        },
        id="Tevatron",
    ),
]
ALONE = [
    pytest.param({"anchor": "q", "positive": "p"}, id="pair"),
    pytest.param({"query": "q", "pos": ["p"]}, id="query-pair"),
    pytest.param(["q", "p"], id="list"),
]


@pytest.mark.parametrize("row", BOTH)
def test_negatives_are_where_the_tool_puts_them(jsonl, row):
    path = jsonl(row)
    assert read_contrastive(path) == [ContrastiveRow("q", ("p",), ("n", "m"))]
    assert not said_of(read_contrastive, path)


@pytest.mark.parametrize("row", ALONE)
def test_pairs_have_no_negatives(jsonl, row):
    assert read_contrastive(jsonl(row)) == [ContrastiveRow("q", ("p",), ())]


def test_a_file_may_mix_formats(jsonl):
    rows = read_contrastive(jsonl(["q", "p", "n"], *(row.values[0] for row in BOTH)))
    assert {(row.query, row.positives) for row in rows} == {("q", ("p",))}


def test_title_goes_before_the_text_as_in_beir(jsonl):
    passage = {"docid": "1", "title": "Title", "text": "body"}
    [row] = read_contrastive(jsonl({"query": "q", "positive_passages": [passage]}))
    assert row.positives == ("Title body",)


@pytest.mark.parametrize("query", ["prompt", "query"])
def test_chosen_and_rejected_are_a_pair(jsonl, query):
    path = jsonl({query: "q", "chosen": "c", "rejected": "r"})
    assert read_preferences(path) == [PreferenceRow("q", "c", "r", 1.0)]


REFUSED = [
    pytest.param({"query": "q", "anchor": "a", "pos": ["p"]}, '"query" and "anchor"', id="queries"),
    pytest.param({"query": "q", "pos": ["p"], "positive": "p"}, "leave one of them", id="positive"),
    pytest.param(
        {"anchor": "q", "positive": "p", "negative": "n", "negative_1": "n"},
        '"negative" and "negative_1"',
        id="negatives",
    ),
    pytest.param({"anchor": "q", "positive": None}, '"positive" must be a string', id="null"),
    pytest.param(
        {"anchor": "q", "positive": "p", "negative_1": None}, '"negative_1" must', id="null-in-n"
    ),
    pytest.param({"anchor": "q", "positive": "p", "label": 0}, '"label" is 0', id="no-pair"),
    pytest.param(
        {"anchor": "q", "positive": ["p", "n"], "labels": [1, 0]}, '"labels" is [1, 0]', id="list"
    ),
    pytest.param(
        {"query": "q", "positive_passages": [{"docid": "1"}]},
        'missing key "positive_passages[0].text"',
        id="no-text",
    ),
    pytest.param(
        {"query": "q", "positive_passages": [{"title": 1, "text": "p"}]},
        '"positive_passages[0].title" must be a string',
        id="title",
    ),
    pytest.param({"query_id": "1", "positive_document_ids": ["2"]}, "positive_passages", id="ids"),
    pytest.param({"set": ["a", "b"]}, "write query and positives", id="set"),
    pytest.param(["q"], "one of 2 or 3 texts would do", id="short-list"),
    pytest.param(
        [{"anchor": "q", "positive": "p"}, {"anchor": "r", "positive": "p"}],
        "a list of 2 rows: write one object a line",
        id="array-of-rows",
    ),
    pytest.param(
        {"anchor": "q", "positive": "p", "negative": "n", "labels": [0, 1]},
        '"labels" is [0, 1]',
        id="negative-first",
    ),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_is_unclear_is_refused_by_line_and_key(jsonl, row, message):
    path = jsonl({"anchor": "q", "positive": "p"}, row)
    fault = fault_of(read_contrastive, path)
    assert fault.startswith(f"{path}:2: ") and message in fault


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"chosen": "c", "rejected": "r"}, '"query" or "prompt"', id="no-prompt"),
        pytest.param(
            {"prompt": "q", "query": "q", "chosen": "c", "rejected": "r"},
            '"query" and "prompt"',
            id="two-queries",
        ),
        pytest.param({"prompt": "q", "chosen": "c", "rejected": "c"}, "the same text", id="same"),
        pytest.param(
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "c", "rejected": "r"},
            '"prompt" must be a string, got a list',
            id="messages",
        ),
        pytest.param(
            {"query": "q", "passage1": "a", "chosen": "a", "rejected": "b"},
            '"passage1" and "chosen"',
            id="two-formats",
        ),
    ],
)
def test_unclear_pair_is_refused(jsonl, row, message):
    assert message in fault_of(read_preferences, jsonl(row))


def test_labels_of_negatives_are_no_fault(jsonl):
    row = {"anchor": "q", "positive": "p", "negative": "n", "labels": [1, 0]}
    assert read_contrastive(jsonl(row)) == [ContrastiveRow("q", ("p",), ("n",))]


def test_an_array_of_pairs_is_told_to_be_lines(jsonl):
    row = {"query": "q", "chosen": "c", "rejected": "r"}
    assert "write one object a line" in fault_of(read_preferences, jsonl([row, row, row]))


@pytest.mark.parametrize(
    ("row", "key"),
    [
        pytest.param({"query": "q", "pos": ["p"], "neg": ["n"]}, "prompt", id="instruction"),
        pytest.param({"query": "q", "pos": ["p"], "neg": ["n"]}, "pos_scores", id="teacher"),
        pytest.param({"query": "q", "pos": ["p"], "neg": ["n"]}, "type", id="batching"),
        pytest.param({"anchor": "q", "positive": "p"}, "score", id="similarity"),
        pytest.param({"anchor": "q", "positive": "p"}, "label", id="class"),
    ],
)
def test_meaning_that_is_not_used_is_said_once_with_its_count(jsonl, row, key):
    with_key = row | {key: [1.0] if key == "pos_scores" else 1}
    [said] = said_of(read_contrastive, jsonl(row, with_key, with_key, row | {key: None}))
    assert f'"{key}" of 2 rows is not used' in said and "rows.jsonl" in said


@pytest.mark.parametrize("positives", ["positives", "pos", "positive", "positive_passages"])
def test_a_meaning_is_said_however_the_positives_are_spelled(jsonl, positives):
    value = {"positive": "p", "positive_passages": [{"text": "p"}]}.get(positives, ["p"])
    keys = [*UNUSED, "hard_negatives", "negative1", "neg_hard"]
    row = {"query": "q", positives: value, "neg": []}
    said = said_of(read_contrastive, jsonl(row | dict.fromkeys(keys, 1)))
    assert sorted(f'"{key}" of 1 rows' in " ".join(said) for key in keys) == [True] * len(said)
    assert "--query_prefix" in next(message for message in said if '"prompt"' in message)
    assert 'negatives are read from "neg"' in next(m for m in said if '"hard_negatives"' in m)


def test_negatives_under_another_name_alone_are_said(jsonl):
    [said] = said_of(read_contrastive, jsonl({"anchor": "q", "positive": "p", "negative1": "n"}))
    assert '"negative1" of 1 rows is not used: negatives are read from "negatives" or' in said


def test_keys_without_a_meaning_are_left_alone(jsonl):
    row = {"query": "q", "positives": ["p"], "negatives": [], "_id": "7", "negotiable": "x"}
    assert not said_of(read_contrastive, jsonl(row | {"source": "y", "prompt": None}))


def test_scores_of_passages_are_said(jsonl):
    passages = [{"docid": "1", "text": "n", "score": 0.5}, {"docid": "2", "text": "m"}]
    row = {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": passages}
    [said] = said_of(read_contrastive, jsonl(row, row))
    assert '"negative_passages[].score" of 2 rows is not used: stage 2 learns scores' in said


def test_margins_of_pairs_and_unasked_confidence_are_said(jsonl):
    row = {"prompt": "q", "chosen": "c", "rejected": "r"}
    assert '"margin" of 1 rows' in said_of(read_preferences, jsonl(row | {"margin": 2}))[0]
    path = jsonl(row | {"confidence_score": 80})
    assert "--use_confidence" in said_of(read_preferences, path, use_confidence=False)[0]
    assert not said_of(read_preferences, path, use_confidence=True)
    [said] = said_of(read_preferences, path)
    assert '"confidence_score" of 1 rows is not used: all pairs count alike in an eval' in said


def test_an_instruction_beside_the_query_of_a_pair_is_said(jsonl):
    row = {"query": "q", "passage1": "c", "passage2": "r", "preferred": "A", "prompt": "Find: "}
    [said] = said_of(read_preferences, jsonl(row))
    assert '"prompt" of 1 rows is not used: --query_prefix' in said
