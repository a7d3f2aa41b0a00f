"""Evaluation data: both shapes are read, benchmarks by their rules; what is skipped is counted."""

import json

import pytest

from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.errors import InputError

EVALUATION = {"query": {"text": "a job"}, "positives": {"index": [0]}}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def fault_of(read, *args, **options):
    with pytest.raises(InputError) as caught:
        read(*args, **options)
    return str(caught.value)


# --- queries with row numbers of a corpus ---


@pytest.fixture
def corpus(tmp_path):
    return jsonl(tmp_path / "corpus.jsonl", {"text": "one"}, {"text": "two"})


def test_positives_are_corpus_rows(tmp_path):
    rows = [{"text": "plain"}, {"title": "Titled", "text": "body"}, {"title": None, "text": "two "}]
    row = EVALUATION | {"positives": {"index": [2, 0, 2], "text": ["unused"]}}
    queries = jsonl(tmp_path / "queries.jsonl", row)
    read = read_retrieval(queries, jsonl(tmp_path / "corpus.jsonl", *rows))
    assert (read.queries, read.grades) == (["a job"], [{2: 1, 0: 1}])
    assert read.corpus == ["plain", "Titled body", "two "]
    assert read.own is read.query_ids is read.document_ids is None


BAD_EVALUATION = [
    pytest.param(without(EVALUATION, "positives"), 'missing key "positives"', id="no-positives"),
    pytest.param(EVALUATION | {"positives": {}}, '"positives.index"', id="no-index"),
    pytest.param(EVALUATION | {"positives": [0]}, "an object, got a list", id="list"),
    pytest.param(EVALUATION | {"positives": {"index": []}}, "no positives", id="empty"),
    pytest.param(EVALUATION | {"positives": {"index": [2]}}, "rows 0 to 1", id="past-the-end"),
    pytest.param(EVALUATION | {"positives": {"index": [0, -1]}}, "[1]", id="negative"),
    pytest.param(EVALUATION | {"positives": {"index": [0.0]}}, "an integer, got", id="float"),
    pytest.param(EVALUATION | {"positives": {"index": [True]}}, "got a boolean", id="boolean"),
]


@pytest.mark.parametrize(("row", "message"), BAD_EVALUATION)
def test_bad_evaluation_row_is_named(tmp_path, corpus, row, message):
    queries = jsonl(tmp_path / "queries.jsonl", EVALUATION, row)
    fault = fault_of(read_retrieval, queries, corpus)
    assert fault.startswith(f"{queries}:2: ") and message in fault


def test_corpus_goes_with_a_query_file_and_not_with_a_beir_directory(tmp_path, beir, corpus):
    queries = jsonl(tmp_path / "q.jsonl", EVALUATION)
    assert "needs --corpus_data" in fault_of(read_retrieval, queries)
    assert "leave --corpus_data out" in fault_of(read_retrieval, beir, queries)
    assert "--split needs a BEIR" in fault_of(read_retrieval, queries, corpus, split="dev")
    assert "--keep_same_id needs" in fault_of(read_retrieval, queries, corpus, keep_same_id=True)


# --- BEIR directories ---


@pytest.fixture
def beir(tmp_path):
    """make(qrels=..., corpus=..., queries=...) -> the directory; rows as tuples."""
    directory = tmp_path / "beir"
    (directory / "qrels").mkdir(parents=True)
    jsonl(
        directory / "corpus.jsonl",
        {"_id": "d1", "title": "Title", "text": "body"},
        {"_id": "d2", "title": "", "text": "no title"},
        {"_id": "d3", "title": None, "text": "null title"},
    )
    jsonl(
        directory / "queries.jsonl",
        {"_id": "q1", "text": "first"},
        {"_id": "q2", "text": "of another split"},
        {"_id": "q3", "text": "third"},
    )
    qrels(directory, "q3\td2\t2", "q1\td1\t1", "q3\td1\t0", "q3\td3\t1")
    return directory


def qrels(directory, *lines, split="test", header="query-id\tcorpus-id\tscore"):
    path = directory / "qrels" / f"{split}.tsv"
    path.write_text("".join(f"{line}\n" for line in (header, *lines) if line))
    return path


def test_beir_directory_is_read_with_its_grades(beir):
    read = read_retrieval(beir)
    assert (read.queries, read.query_ids) == (["third", "first"], ["q3", "q1"])
    assert read.corpus == ["Title body", "no title", "null title"]
    assert read.document_ids == ["d1", "d2", "d3"]
    assert read.grades == [{1: 2, 2: 1}, {0: 1}]
    assert (read.split, read.splits, read.own) == ("test", ("test",), [None, None])
    assert read.counts == {
        "queries": 2, "documents": 3, "relevant_pairs": 3, "judged_pairs": 4,
        "empty_documents": 0, "own_documents": 0, "absent_queries": 0, "absent_documents": 0,
        "queries_without_relevant": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "splits, given, taken",
    [
        (["dev", "test", "train"], None, "test"),
        (["dev", "train"], None, "dev"),
        (["train", "validation"], None, "train"),
        (["dev", "test"], "dev", "dev"),
    ],
)
def test_the_split_is_the_one_given_or_said(beir, splits, given, taken, recwarn):
    (beir / "qrels" / "test.tsv").unlink()
    for split in splits:
        qrels(beir, f"q{1 + 2 * (split == taken)}\td1\t1", split=split)
    read = read_retrieval(beir, split=given)
    assert (read.queries, read.split) == (["third"], taken)
    assert sorted(read.splits) == sorted(splits)
    said = [str(warning.message) for warning in recwarn]
    expected = f"{beir / 'qrels'} has {', '.join(splits)}: {taken} is measured"
    assert [expected in message for message in said] == ([True] if given is None else [])


def test_a_split_that_is_not_there_is_refused_with_those_that_are(beir):
    qrels(beir, "q1\td1\t1", split="dev")
    assert "--split trian: " in (fault := fault_of(read_retrieval, beir, split="trian"))
    assert "has dev, test" in fault
    for path in (beir / "qrels").iterdir():
        path.unlink()
    assert "qrels: no .tsv file" in fault_of(read_retrieval, beir)


@pytest.mark.parametrize(
    "lines, header",
    [
        pytest.param(["q1\td1\t1", "q3\td2\t2"], "", id="no-header"),
        pytest.param(["q1\td1\t1", "q3\td2\t2"], "Query_ID\tDoc_ID\tScore", id="own-header"),
        pytest.param(["q1\td1\t1", "q3\td2\t2"], "qid\tpid\trelevance", id="other-header"),
        pytest.param(["q1\td1\t1.0", "q3\td2\t2.0"], "query\tid\tscore", id="float-grades"),
        pytest.param(["q1 0 d1 1", "q3 Q0 d2 2"], "", id="trec"),
        pytest.param(["q1\t0\td1\t1", "q3\t0\td2\t2"], "", id="trec-with-tabs"),
        pytest.param(["q1\td1\t1", "q1\td2\t-1", "q3\td2\t2"], "", id="negative-is-not-relevant"),
        pytest.param(
            ["q1\td1\t1\t3", "q3\td2\t2\t0"], "query-id\tcorpus-id\tscore\trank", id="a-rank-too"
        ),
        pytest.param(
            ["q1\t7\td1\t1", "q3\tQ0\td2\t2"], "qid\titer\tdocno\trel", id="trec-by-its-header"
        ),
        pytest.param(["1\td1\tq1", "2\td2\tq3"], "score\tdoc_id\tquery_id", id="other-order"),
    ],
)
def test_qrels_as_they_are_found_give_the_same_grades(beir, lines, header):
    qrels(beir, *lines, header=header)
    assert read_retrieval(beir).grades == [{0: 1}, {1: 2}]


def test_ids_may_be_integers(beir):
    jsonl(beir / "corpus.jsonl", {"_id": 7, "text": "seven"}, {"_id": "8", "text": "eight"})
    jsonl(beir / "queries.jsonl", {"_id": 1, "text": "one"})
    qrels(beir, "1\t8\t1")
    read = read_retrieval(beir)
    assert (read.query_ids, read.document_ids, read.grades) == (["1"], ["7", "8"], [{1: 1}])


def test_a_pair_judged_twice_has_its_last_grade(beir):
    qrels(beir, "q1\td1\t1", "q1\td1\t1", "q1\td1\t2")
    with pytest.warns(UserWarning, match="1 pairs are judged twice, not alike"):
        assert read_retrieval(beir).grades == [{0: 2}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("q1 d1 1", "tabs between", id="spaces"),
        pytest.param("q1\td1\tyes", "integer score", id="no-score"),
        pytest.param("q1\td1\t0.5", "integer score", id="half-a-grade"),
        pytest.param("q1\td1\tnan", "integer score", id="nan"),
        pytest.param("q1\td1\t1e9", "up to 1,000", id="a-grade-that-takes-memory"),
        pytest.param("q1\td1\tx\t1", "integer score", id="four-columns-under-a-header-of-three"),
        pytest.param("q1\td1", "tabs between", id="two-columns"),
    ],
)
def test_beir_fault_names_the_qrels_line(beir, line, message):
    path = qrels(beir, "q1\td1\t1", line)
    fault = fault_of(read_retrieval, beir)
    assert fault.startswith(f"{path}:3: ") and message in fault


@pytest.mark.parametrize("lines", [["q1\t10\t1\t3"], ["q1\t0\td1\t1", "q1\td1\td2\t1"]])
def test_four_columns_are_trecs_if_the_second_is_0_or_q0_in_every_line(beir, lines):
    path = qrels(beir, *lines, header="")
    fault = fault_of(read_retrieval, beir)
    assert fault.startswith(f"{path}:{len(lines)}: ") and "TREC's query-id, 0 or Q0" in fault


@pytest.mark.parametrize("header", ["query-id\tscore\tx", "query-id\tcorpus-id\tx\trank"])
def test_header_that_leaves_a_column_unclear_is_refused(beir, header):
    path = qrels(beir, "q1\td1\t1\t1", header=header)
    fault = fault_of(read_retrieval, beir)
    assert fault.startswith(f"{path}:1: a header must name") and "score" in fault


def test_hidden_files_are_no_splits(beir):
    (beir / "qrels" / "._test.tsv").write_bytes(b"\x00\x05\x16\x07")
    assert read_retrieval(beir).splits == ("test",)


@pytest.mark.parametrize("line", ["q1\td1\tx", "query-id\td1\t1.5", "query-id corpus-id score"])
def test_beir_first_line_that_is_no_header_is_not_passed_over(beir, line):
    path = qrels(beir, line, "q1\td1\t1", header="")
    assert fault_of(read_retrieval, beir).startswith(f"{path}:1: ")


SKIPPED = [
    pytest.param(["q9\td1\t1"], "1 queries that it judges are not in queries.jsonl: skipped",
                 {"absent_queries": 1}, id="absent-query"),
    pytest.param(["q1\td8\t0", "q1\td9\t1", "q3\td9\t1"],
                 '2 documents that it judges are not in corpus.jsonl: .*first: "d8"',
                 {"absent_documents": 2}, id="absent-documents"),
    pytest.param(["q2\td1\t0"], "1 queries have no relevant document: skipped",
                 {"queries_without_relevant": 1}, id="no-relevant-document"),
]  # fmt: skip


@pytest.mark.parametrize("lines, said, counted", SKIPPED)
def test_what_qrels_name_and_is_not_there_is_counted(beir, lines, said, counted):
    qrels(beir, "q1\td1\t1", "q3\td2\t1", *lines)
    with pytest.warns(UserWarning, match=said) as caught:
        read = read_retrieval(beir)
    assert len(caught) == 1
    assert read.queries == ["first", "third"]
    assert read.counts.items() >= counted.items()


def test_an_absent_relevant_document_stays_in_the_ideal_as_in_beir(beir):
    qrels(beir, "q1\td9\t2", "q1\td1\t1")
    with pytest.warns(UserWarning, match="count as missed"):
        read = read_retrieval(beir)
    assert read.grades == [{3: 2, 0: 1}] and len(read.corpus) == 3


@pytest.mark.parametrize(
    "lines, message",
    [
        (["q9\td1\t1"], "none of its 1 queries is in queries.jsonl"),
        (["q1\td1\t0", "q9\td1\t1"], "no positives"),
        (["q1\td9\t1"], "none of the relevant documents is in corpus.jsonl"),
    ],
)
def test_where_nothing_is_left_to_measure_it_is_refused(beir, lines, message):
    qrels(beir, *lines)
    assert message in fault_of(read_retrieval, beir)


def test_an_id_that_stands_twice_is_refused(beir):
    jsonl(beir / "queries.jsonl", {"_id": 1, "text": "a"}, {"_id": "1", "text": "b"})
    assert f"{beir / 'queries.jsonl'}:2: " in fault_of(read_retrieval, beir)


def test_an_id_that_no_file_can_hold_is_refused(beir):
    jsonl(beir / "corpus.jsonl", {"_id": "d1", "text": "a"}, {"_id": "d\ud800", "text": "b"})
    fault = fault_of(read_retrieval, beir)
    assert fault.startswith(f'{beir / "corpus.jsonl"}:2: "_id" holds half a surrogate pair')


def test_an_empty_document_is_kept_and_counted_and_an_empty_query_refused(beir):
    empty = [{"_id": "d2", "text": ""}, {"_id": "d3", "title": " ", "text": "\n"}]
    jsonl(beir / "corpus.jsonl", {"_id": "d1", "title": "Title only", "text": ""}, *empty)
    with pytest.warns(UserWarning, match="2 documents without title and text rank behind"):
        read = read_retrieval(beir)
    assert read.corpus == ["Title only", "", ""]
    assert read.counts["empty_documents"] == 2
    jsonl(beir / "corpus.jsonl", *empty)
    assert "no document has a text" in fault_of(read_retrieval, beir)
    jsonl(beir / "queries.jsonl", {"_id": "q3", "text": "x"}, {"_id": "q1", "text": " "})
    assert 'queries.jsonl:2: "text" is blank' in fault_of(read_retrieval, beir)


def test_a_document_with_the_querys_id_is_left_out_unless_kept(beir):
    jsonl(beir / "queries.jsonl", {"_id": "d2", "text": "a"}, {"_id": "q1", "text": "b"})
    qrels(beir, "d2\td2\t1", "d2\td1\t1", "q1\td1\t1")
    with pytest.warns(UserWarning, match="1 queries have .* their own id.* 1 of these are judged"):
        read = read_retrieval(beir)
    assert read.own == [1, None] and read.counts["own_documents"] == 1
    kept = read_retrieval(beir, keep_same_id=True)
    assert kept.own == [None, None] and kept.counts["own_documents"] == 0
