"""Graded rows and a teacher's: what is read of which tool's, what is left out, what is refused."""

import json
import warnings

import pytest

from rankpo_fast.data.groups import GroupRow, read_candidates, read_graded, read_scored
from rankpo_fast.errors import InputError


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def said_of(read, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = read(*arguments)
    return rows, [str(warning.message) for warning in caught]


GRADED = {"query": "q", "passages": ["a", "b", "c"], "grades": [2, 0.5, 0]}
SCORED = {"query": "q", "passages": ["a", "b", "c"], "scores": [2, 0.5, -1]}


def test_graded_rows(jsonl):
    titled = {**GRADED, "passages": ["a", {"title": "t", "text": "b"}, "c"], "weight": 0.5}
    rows, said = said_of(read_graded, jsonl(GRADED, titled))
    values = (2.0, 0.5, 0.0)
    assert rows == [
        GroupRow("q", ("a", "b", "c"), values),
        GroupRow("q", ("a", "t b", "c"), values, 0.5),
    ]
    assert not said


def test_rows_without_a_preference_are_counted(jsonl):
    flat = {**GRADED, "grades": [1, 1, 1]}
    rows, said = said_of(read_graded, jsonl(flat, GRADED, {**flat, "prompt": "x"}))
    assert len(rows) == 1
    assert "2 of 3 rows are left out: all their grades are equal" in said[1]
    assert '"prompt" of 1 rows is not used' in said[0]
    with pytest.raises(InputError, match="none of its 1 rows can be used: all their grades"):
        read_graded(jsonl(flat))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(SCORED, id="ours"),
        pytest.param(
            {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [2],
             "neg_scores": [0.5, -1]},
            id="FlagEmbedding",
        ),
        pytest.param(
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "", "text": "a", "score": 2}],
                "negative_passages": [
                    {"text": "b", "score": 0.5}, {"text": "c", "score": -1},
                ],
            },
            id="Tevatron",
        ),
    ],
)  # fmt: skip
def test_a_teachers_rows_of_every_tool(row, jsonl):
    rows, said = said_of(read_scored, jsonl(row))
    assert rows == [GroupRow("q", ("a", "b", "c"), (2.0, 0.5, -1.0))] and not said


FAULTS = [
    (read_graded, {"grades": [1, 0]}, '"passages" has 3 passages but "grades" 2 numbers'),
    (read_graded, {"grades": [1, 0, float("nan")]}, r'"grades\[2\]" must be a finite number'),
    (read_graded, {"grades": [1, 0, True]}, r'"grades\[2\]" must be a finite number, got true'),
    (read_graded, {"grades": [1, 0, None]}, r'"grades\[2\]" must be a finite number, got null'),
    (read_graded, {"grades": 3}, '"grades" must be a list'),
    (read_graded, {"grades": None}, 'missing key "grades"'),
    (read_graded, {"passages": [], "grades": []}, "no passages: the list is empty"),
    (read_graded, {"passages": ["a", "", "c"]}, r'"passages\[1\]" is empty'),
    (read_graded, {"query": None}, 'missing key "query"'),
    (read_graded, {"weight": 0}, '"weight" must be above 0, got 0'),
    (read_scored, {"scores": [1, 2]}, '"passages" has 3 passages but "scores" 2 numbers'),
    (read_scored, {"scores": [1, 2, float("inf")]}, "must be a finite number, got Infinity"),
    (
        read_scored,
        {"passages": None, "pos": ["a"], "neg": ["b"], "pos_scores": [1, 2], "neg_scores": [1]},
        '"pos" has 1 passages but "pos_scores" 2 numbers',
    ),
    (read_scored, {"passages": None, "pos": ["a"], "neg": ["b"], "pos_scores": [1]}, "neg_scores"),
    (read_scored, {"passages": None, "pos": ["a"], "neg": ["b"]}, "no scores: a teacher's row has"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "change", "fault"), FAULTS, ids=[case[2][:40] for case in FAULTS])
def test_faults_are_named_with_file_and_line(read, change, fault, jsonl):
    good = GRADED if read is read_graded else SCORED
    bad = {key: value for key, value in {**good, **change}.items() if value is not None}
    path = jsonl(good, bad)
    with pytest.raises(InputError, match=f"rows.jsonl:2: .*{fault}"):
        read(path)


@pytest.fixture
def beir(tmp_path):
    """A directory of three queries in train; make(split=..., **files) writes more."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = {"d1": "one", "d2": "two", "d3": "", "q2": "itself", "d5": "never judged"}
    queries = {"q1": "first", "q2": "second", "q3": "third", "q9": "of another split"}
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = (json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    judged = [("q1", "d1", 2), ("q1", "d2", 0), ("q1", "d3", 1), ("q1", "gone", 1),
              ("q2", "q2", 1), ("q2", "d1", 1), ("q2", "d2", -1), ("q3", "d2", 1),
              ("q8", "d1", 1)]  # fmt: skip
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in judged)]
    (folder / "qrels/train.tsv").write_text("\n".join(lines))
    (folder / "qrels/test.tsv").write_text("q9\td1\t1\nq9\td2\t0\n")
    return folder


def test_a_beir_directory_is_graded_rows_of_its_training_split(beir):
    rows, said = said_of(read_graded, str(beir))
    assert rows == [
        GroupRow("first", ("one", "two"), (2.0, 0.0)),
        GroupRow("second", ("one", "two"), (1.0, -1.0)),
    ]
    said = " ".join(said)
    for part in (
        "1 queries that it judges are not in queries.jsonl",
        "1 documents that it judges are not in corpus.jsonl",
        "1 documents that it judges have no text",
        "1 queries judge the document of their own id",
        "1 of 3 rows are left out: all their grades are equal",
    ):
        assert part in said
    assert list(read_candidates(str(beir)))[2] == ("third", ("two",))


def test_the_split_of_a_beir_directory_is_said(beir):
    rows, _ = said_of(read_graded, str(beir), "test")
    assert rows == [GroupRow("of another split", ("one", "two"), (1.0, 0.0))]
    with pytest.raises(InputError, match="--graded_split dev: .* has test, train"):
        read_graded(str(beir), "dev")
    (beir / "qrels/train.tsv").unlink()
    rows, said = said_of(read_graded, str(beir))
    assert len(rows) == 1 and "has test alone: its judgements are trained on" in said[0]
    (beir / "qrels/dev.tsv").write_text("q9\td1\t1\n")
    with pytest.raises(InputError, match="--graded_split must be given, as there is no train: .*"):
        read_graded(str(beir))
