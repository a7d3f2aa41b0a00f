"""Readers: every documented shape is read, every fault is named with file and line."""

import json
import os

import pytest

from rankpo_fast.data.rows import (
    ContrastiveRow,
    PreferenceRow,
    read_contrastive,
    read_preferences,
    read_texts,
    write_jsonl,
)
from rankpo_fast.errors import InputError

CONTRASTIVE = {"query": "a job", "positives": ["fits"], "negatives": ["does not", "nor this"]}
PREFERENCE = {"query": "a job", "passage1": "one", "passage2": "two", "preferred": "A"}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def fault_of(read, *args, **options):
    with pytest.raises(InputError) as caught:
        read(*args, **options)
    return str(caught.value)


# --- what is read ---


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(CONTRASTIVE, id="plain"),
        pytest.param(CONTRASTIVE | {"query_id": 7, "meta": {"x": None}}, id="other-keys-too"),
        pytest.param(
            {
                "query": {"text": "a job"},
                "positives": {"text": ["fits"], "index": [3]},
                "negatives": {"text": ["does not", "nor this"]},
            },
            id="nested",
        ),
    ],
)
def test_contrastive_shapes_give_the_same_row(tmp_path, row):
    assert read_contrastive([jsonl(tmp_path / "rows.jsonl", row)]) == [
        ContrastiveRow("a job", ("fits",), ("does not", "nor this"))
    ]


def test_rows_still_to_be_mined_need_no_negatives(tmp_path):
    row = {"query": {"text": "a job"}, "positives": {"text": ["fits"]}}
    assert read_contrastive(jsonl(tmp_path / "a.jsonl", row))[0].negatives == ()
    row = CONTRASTIVE | {"negatives": []}
    assert read_contrastive(jsonl(tmp_path / "b.jsonl", row))[0].negatives == ()


def test_several_files_are_read_in_order(tmp_path):
    paths = [
        jsonl(tmp_path / f"{name}.jsonl", CONTRASTIVE | {"query": name}) for name in ("z", "a")
    ]
    assert [row.query for row in read_contrastive(paths)] == ["z", "a"]


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(PREFERENCE | {"query": "caf\u00e9 \u2028 \u5de5\u4f5c"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \n{line}".encode())
    assert [row.query for row in read_preferences(path)] == ["caf\u00e9 \u2028 \u5de5\u4f5c"] * 2
    path.write_bytes(path.read_bytes() + b"\n{")
    assert f"{path}:5: " in fault_of(read_preferences, path)


def test_preferred_says_which_passage_is_chosen(tmp_path):
    rows = [PREFERENCE, PREFERENCE | {"preferred": "B"}]
    assert read_preferences(jsonl(tmp_path / "rows.jsonl", *rows)) == [
        PreferenceRow("a job", "one", "two", 1.0),
        PreferenceRow("a job", "two", "one", 1.0),
    ]


def test_confidence_weighs_only_when_asked(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", PREFERENCE | {"confidence_score": 65})
    assert read_preferences(path)[0].weight == 1.0
    assert read_preferences(path, use_confidence=True)[0].weight == 0.65


def test_texts_are_read_plain_or_nested(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"query": "one"}, {"query": {"text": "two"}})
    assert read_texts(path, "query") == ["one", "two"]


# --- what is refused ---

BAD_LINES = [
    pytest.param(
        b'{"query": "a"', "malformed JSON: Expecting ',' delimiter at column 14", id="cut-off"
    ),
    pytest.param(b"[]", "must be an object, got a list", id="not-an-object"),
    pytest.param(b"null", "must be an object, got null", id="null"),
    pytest.param(b'{"query": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 15", id="latin-1"),
    pytest.param(b"[" * 100_000, "unusable JSON", id="nested-too-deep"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("read", [read_contrastive, read_preferences])
def test_bad_line_is_named(tmp_path, read, line, message):
    good = json.dumps(CONTRASTIVE | PREFERENCE).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    fault = fault_of(read, [path])
    assert fault.startswith(f"{path}:3: ") and message in fault


BAD_CONTRASTIVE = [
    pytest.param(
        without(CONTRASTIVE, "query"),
        'missing key "query" or "anchor" (keys here: "pos',
        id="query",
    ),
    pytest.param(without(CONTRASTIVE, "positives"), '"positives" or "pos"', id="no-positives-key"),
    pytest.param(
        without(CONTRASTIVE, "negatives"),
        '"negatives" or "neg", which may be an empty list (keys here: ',
        id="no-negatives-key",
    ),
    pytest.param({}, "keys here: none", id="no-keys"),
    pytest.param(
        CONTRASTIVE | {"positives": {"index": [0]}},
        '"positives" are places in a corpus, not texts: such rows go with --corpus_data',
        id="of-an-evaluation",
    ),
    pytest.param(CONTRASTIVE | {"query": 5}, "a string, got a number: 5", id="number"),
    pytest.param(CONTRASTIVE | {"query": None}, "a string, got null", id="null-query"),
    pytest.param(CONTRASTIVE | {"query": {}}, 'missing key "query.text"', id="nested-key"),
    pytest.param(CONTRASTIVE | {"query": ""}, '"query" is empty', id="empty-query"),
    pytest.param(CONTRASTIVE | {"query": " \t\n"}, '"query" is blank', id="blank-query"),
    pytest.param(CONTRASTIVE | {"query": "\ud83d"}, "half a surrogate pair", id="lone-surrogate"),
    pytest.param(CONTRASTIVE | {"positives": []}, "no positives", id="no-positives"),
    pytest.param(CONTRASTIVE | {"positives": "x"}, "a list, got a string", id="bare-string"),
    pytest.param(CONTRASTIVE | {"positives": ["x", ""]}, '"positives[1]" is empty', id="empty-one"),
    pytest.param(CONTRASTIVE | {"negatives": [True]}, "got a boolean: true", id="boolean"),
    pytest.param(
        CONTRASTIVE | {"negatives": {"text": ["x", 1]}}, '"negatives.text[1]"', id="nested-type"
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_CONTRASTIVE)
def test_bad_contrastive_row_is_named(tmp_path, row, message):
    path = jsonl(tmp_path / "rows.jsonl", CONTRASTIVE, row)
    fault = fault_of(read_contrastive, [path])
    assert fault.startswith(f"{path}:2: ") and message in fault


BAD_PREFERENCE = [
    pytest.param(without(PREFERENCE, "passage2"), 'missing key "passage2"', id="no-passage"),
    pytest.param(without(PREFERENCE, "preferred"), 'missing key "preferred"', id="no-preferred"),
    pytest.param(PREFERENCE | {"preferred": "C"}, '"A" or "B", got "C"', id="c"),
    pytest.param(PREFERENCE | {"preferred": " a"}, 'got " a": write "A"', id="lower-case"),
    pytest.param(PREFERENCE | {"preferred": ["A"]}, '"A" or "B", got ["A"]', id="list"),
    pytest.param(PREFERENCE | {"passage2": "one"}, "the same text", id="equal-passages"),
    pytest.param(PREFERENCE | {"passage1": "  "}, '"passage1" is blank', id="blank"),
    pytest.param(PREFERENCE, 'missing key "confidence_score"', id="no-confidence"),
    pytest.param(PREFERENCE | {"confidence_score": 0}, "above 0", id="confidence-0"),
    pytest.param(PREFERENCE | {"confidence_score": 101}, "at most 100", id="confidence-101"),
    pytest.param(PREFERENCE | {"confidence_score": "65"}, 'got "65"', id="confidence-string"),
    pytest.param(PREFERENCE | {"confidence_score": True}, "got true", id="confidence-boolean"),
    pytest.param(PREFERENCE | {"confidence_score": float("nan")}, "got NaN", id="confidence-nan"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PREFERENCE)
def test_bad_preference_row_is_named(tmp_path, row, message):
    path = jsonl(tmp_path / "rows.jsonl", PREFERENCE | {"confidence_score": 80}, row)
    fault = fault_of(read_preferences, [path], use_confidence=True)
    assert fault.startswith(f"{path}:2: ") and message in fault


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=["0", "blank", "bom"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert fault_of(read_contrastive, [path]) == f"{path}: the file is empty"


def test_missing_file_directory_and_no_file_are_refused(tmp_path):
    assert "nothere.jsonl: cannot be read: No such file" in fault_of(
        read_texts, tmp_path / "nothere.jsonl", "text"
    )
    assert f"{tmp_path}: cannot be read: Is a directory" in fault_of(read_preferences, [tmp_path])
    assert "'a\\x00b': cannot be read: embedded null" in fault_of(read_texts, "a\0b", "text")
    assert "no data file" in fault_of(read_contrastive, [])


# --- writing ---


def test_written_rows_are_read_back(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, [CONTRASTIVE, CONTRASTIVE | {"query": "caf\u00e9 \u2028\n"}])
    assert [row.query for row in read_contrastive(path)] == ["a job", "caf\u00e9 \u2028\n"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", CONTRASTIVE)

    def rows():
        yield PREFERENCE
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert read_contrastive(path) and os.listdir(tmp_path) == ["rows.jsonl"]
