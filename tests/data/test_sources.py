"""Compressed files, standard input, tables and hub names give the rows a plain file would."""

import gzip
import hashlib
import io
import json
import os
import sys
import threading

import pytest

from rankpo_fast.data import sources
from rankpo_fast.data.jsonl import find_texts, objects
from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.data.rows import read_contrastive, read_texts
from rankpo_fast.data.sources import digest
from rankpo_fast.errors import InputError

ROWS = [{"query": f"q{i}", "positives": [f"p{i}"], "negatives": []} for i in range(3)]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd():
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd
    return pytest.importorskip("backports.zstd")


def compressed(kind, content=PLAIN):
    return gzip.compress(content) if kind == "gz" else zstd().compress(content)


@pytest.fixture(autouse=True)
def nothing_kept():
    """Of streams that went by the same names."""
    sources._kept.cache_clear()


@pytest.fixture
def standard_input(monkeypatch):
    """A function that puts bytes there, to be read once."""

    def put(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


def fault_of(read, *args):
    with pytest.raises(InputError) as caught:
        read(*args)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["rows.jsonl.{}", "rows.jsonl"])
def test_compressed_rows_are_known_by_their_content(tmp_path, kind, name):
    plain, packed = tmp_path / "plain.jsonl", tmp_path / name.format(kind)
    plain.write_bytes(PLAIN)
    packed.write_bytes(compressed(kind))
    assert read_contrastive(packed) == read_contrastive(plain)
    assert digest(packed) == digest(plain)  # so that a run goes on with the unpacked file


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_file_that_is_cut_off_is_refused(tmp_path, kind):
    path = tmp_path / "rows"
    path.write_bytes(compressed(kind)[:-9])
    assert f"{path}: a damaged compressed file" in fault_of(read_contrastive, path)


def test_fault_in_a_compressed_file_has_its_line(tmp_path):
    path = tmp_path / "rows.gz"
    path.write_bytes(gzip.compress(PLAIN + b"{"))
    assert fault_of(read_contrastive, path).startswith(f"{path}:4: malformed JSON")


def test_where_a_csv_file_goes_is_said(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query,positives\na,b\n")
    assert "records of a CSV file become rows by `rankpo-fast label`" in (
        fault_of(read_contrastive, path)
    )


def test_zst_of_a_large_window_is_read(tmp_path):
    parameter = zstd().CompressionParameter
    options = {parameter.window_log: 30, parameter.content_size_flag: 0}
    packer = zstd().ZstdCompressor(options=options)
    (tmp_path / "rows.zst").write_bytes(packer.compress(PLAIN) + packer.flush())
    assert len(read_contrastive(tmp_path / "rows.zst")) == len(ROWS)


def test_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "rows.zst"
    path.write_bytes(compressed("zst"))
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    assert "rankpo-fast[data]" in fault_of(read_contrastive, path)


def test_standard_input_is_read_once_and_serves_every_reading(standard_input):
    standard_input(PLAIN)
    assert [row.query for row in read_contrastive("-")] == ["q0", "q1", "q2"]
    assert digest("-") and read_texts("-", "query") == ["q0", "q1", "q2"]
    assert find_texts(["-"], ["p1"]) == {"p1": "standard input:2"}


@pytest.fixture
def pipe(tmp_path):
    """A FIFO into which PLAIN is written once."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[PLAIN], daemon=True).start()
    return path


def test_a_pipe_is_read_once_and_serves_every_reading(pipe, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(PLAIN)
    assert read_contrastive(pipe) == read_contrastive(plain)
    assert digest(pipe) == digest(plain)  # so that --resume knows other data
    assert find_texts([pipe], ["p1"]) == {"p1": f"{pipe}:2"}


def test_process_substitution_is_a_pipe(tmp_path):
    source, target = os.pipe()
    os.write(target, gzip.compress(PLAIN))
    os.close(target)
    assert len(read_contrastive(f"/dev/fd/{source}")) == len(ROWS)
    assert digest(f"/dev/fd/{source}") == hashlib.sha256(PLAIN).hexdigest()
    os.close(source)


def test_streams_of_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name, kind in (("-", "standard input"), (pipe, "no regular file")):
        message = f"{name} ({kind}) cannot be read by several processes: give the name of a file"
        assert fault_of(read_contrastive, name) == message


# --- tables ---


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")

    def write(rows):
        import pyarrow as pa

        pyarrow.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    return write


def test_parquet_rows_are_those_of_a_file(parquet, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 2)
    path = parquet(ROWS)
    assert [row for _, row in objects(path)] == ROWS
    assert [row.query for row in read_contrastive([path])] == ["q0", "q1", "q2"]
    first = digest(path)
    assert digest(parquet(ROWS)) == first != digest(parquet(ROWS[:2]))


def test_parquet_in_capitals_is_parquet(parquet):
    path = parquet(ROWS)
    assert len(read_contrastive(path.rename(path.with_suffix(".PARQUET")))) == len(ROWS)


def test_null_in_a_table_is_named_by_row_and_column(parquet):
    path = parquet([{"anchor": "q", "positive": "p"}, {"anchor": "q", "positive": None}])
    assert fault_of(read_contrastive, path).startswith(f'{path}:row 2: "positive" must be a string')


def test_parquet_that_is_none_is_missing_or_empty_is_refused(tmp_path, parquet):
    path = tmp_path / "rows.parquet"
    assert f"{path}: cannot be read" in fault_of(read_contrastive, path)
    path.write_bytes(PLAIN)
    assert f"{path}: cannot be read" in fault_of(read_contrastive, path)
    assert "has no rows" in fault_of(read_contrastive, parquet(ROWS[:0]))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        pytest.param("owner/rows", ("owner/rows", "train"), id="train-unless-named"),
        pytest.param("owner/rows:dev", ("owner/rows", "dev"), id="split"),
        pytest.param("owner/rows:triplet:dev", ("owner/rows", "triplet", "dev"), id="config"),
    ],
)
def test_hub_name_is_loaded_by_datasets(name, asked, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*names, split):
        calls.append((*names, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.query for row in read_contrastive([name])] == ["q0", "q1", "q2"]
    assert calls == [asked] and digest(name) == digest(name)


def test_hub_that_has_no_such_data_is_an_input_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_, split):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['test'].")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "Should be one of ['test']" in fault_of(read_contrastive, "owner/rows:dev")


def test_table_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("owner/rows", tmp_path / "rows.parquet"):
        assert "rankpo-fast[data]" in fault_of(read_contrastive, name)


@pytest.mark.parametrize("name", ["data/rows.jsonl", "./rows", "../rows"])
def test_missing_file_with_a_directory_is_no_hub_name(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert fault_of(read_contrastive, name) == f"{name}: cannot be read: No such file or directory"


# --- where a text stands ---


def test_texts_are_found_by_line_wherever_they_stand(tmp_path):
    path = tmp_path / "rows.jsonl"
    passages = [{"title": "A", "text": "b"}]
    rows = [*ROWS, {"query": {"text": "n"}, "pos": passages}, {"title": "C", "text": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = ["q1", "p2", "n", "A b", "C d", "absent"]
    assert find_texts([path], wanted) == {
        "q1": f"{path}:2", "p2": f"{path}:3", "n": f"{path}:4", "A b": f"{path}:4",
        "C d": f"{path}:5",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["text", "body"])
def test_title_is_joined_to_the_text_of_a_document_alone(tmp_path, key):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"title": "Title", key: "body"}) + "\n")
    assert read_texts(path, key) == ["Title body" if key == "text" else "body"]


DOCUMENTS = [
    pytest.param({"text": "b "}, "b ", id="spaces-decide-tokens"),
    pytest.param({"title": "", "text": "\nb"}, "\nb", id="empty-title"),
    pytest.param({"title": " ", "text": " b"}, " b", id="blank-title"),
    pytest.param({"title": None, "text": " b"}, " b", id="null-title"),
    pytest.param({"title": "A", "text": "b\n"}, "A b", id="joined-as-in-beir"),
    pytest.param({"title": "A ", "text": ""}, "A", id="title-only"),
    pytest.param({"title": "", "text": " \t"}, "", id="nothing"),
]


@pytest.mark.parametrize("row, expected", DOCUMENTS)
def test_every_reader_has_one_text_for_a_document(tmp_path, row, expected):
    """`encode` and `mine --corpus_data`; `evaluate` with a corpus; a passage of a row; messages."""
    path, queries = tmp_path / "rows.jsonl", tmp_path / "queries.jsonl"
    path.write_text(json.dumps(row) + "\n" + '{"text": "other"}\n')
    queries.write_text('{"query": "q", "positives": {"index": [1]}}\n')
    assert read_texts(path, "text") == read_retrieval(queries, path).corpus == [expected, "other"]
    queries.write_text(json.dumps({"query": "q", "positive_passages": [row]}) + "\n")
    if expected:
        assert read_contrastive(queries)[0].positives == (expected,)
        assert find_texts([queries], [expected]) == {expected: f"{queries}:1"}
    else:
        assert "is blank" in fault_of(read_contrastive, queries)


@pytest.mark.parametrize("title", [0, False, []])
def test_title_that_is_no_text_is_named_by_line(tmp_path, title):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"title": title, "text": "b"}))
    assert fault_of(read_texts, path, "text").startswith(f'{path}:1: "title" must be a string')


def test_texts_that_are_all_empty_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}\n')
    assert fault_of(read_texts, path, "text") == f"{path}: all its texts are empty"
