"""Data -> checked rows. Every fault is an InputError that says `path:line: what is wrong`.

Stage 1     {"query": str, "positives": [str], "negatives": [str]}
            {"query": {"text": str}, "positives": {"text": [str]}}, the shape to be mined
Stage 2     {"query": str, "passage1": str, "passage2": str, "preferred": "A" | "B"}
Evaluation  {"query": {"text": str}, "positives": {"index": [int]}} with a corpus of {"text": str}
            rows in index order, or a BEIR directory: corpus.jsonl, queries.jsonl, qrels/*.tsv
Rows of other tools are read too (formats.py), from more than plain files (sources.py). Other keys
may be there and are left alone. Blank lines and a byte order mark are skipped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import whole_file
from rankpo_fast.data.formats import (
    UNUSED,
    ContrastiveKeys,
    UnusedKeys,
    contrastive_texts,
    preference_texts,
    row_of_list,
)
from rankpo_fast.data.jsonl import (
    expect,
    kind_of,
    lines,
    objects,
    shown,
    text,
    text_at,
    titled_text,
    value,
    values,
)
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError

QUERY_ID_HEADERS = ("query-id", "query", "qid")  # how the header of a BEIR qrels file may begin


@dataclass(frozen=True, slots=True)
class ContrastiveRow:
    """One query with at least one positive passage and any number of negatives."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One query with two passages of which `chosen` was preferred; weight in (0, 1]."""

    query: str
    chosen: str
    rejected: str
    weight: float


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and for each query the corpus row numbers of its positives."""

    queries: list[str]
    corpus: list[str]
    positives: list[list[int]]


def read_contrastive(paths: str | Path | Sequence[str | Path]) -> list[ContrastiveRow]:
    """Read stage 1 rows from one file or several, in order. Raises InputError."""
    rows, unused = [], UnusedKeys()
    formats: dict[tuple[str, ...], ContrastiveKeys] = {}  # found once for rows of the same keys
    for where, row in _all(values, paths):
        if isinstance(row, list):
            row = row_of_list(row, where)
        elif not isinstance(row, dict):
            raise InputError(f"{where}: a row must be an object, got {kind_of(row)}")
        names = tuple(row)
        keys = formats.get(names)
        if keys is None:
            keys = formats[names] = ContrastiveKeys.of(row, where)
        rows.append(ContrastiveRow(*contrastive_texts(row, keys, where)))
        unused.add(row, keys.unused)
    unused.warn(_named(paths))
    return rows


def read_preferences(
    paths: str | Path | Sequence[str | Path], *, use_confidence: bool | None = None
) -> list[PreferenceRow]:
    """Read stage 2 rows. Raises InputError.

    Args:
        use_confidence: whether a pair weighs `confidence_score` / 100, or 1, which is said of those
            that have one; None: 1, and there is no choice.
    """
    rows, unused = [], UnusedKeys()
    unweighted = {"confidence_score": "--use_confidence weights pairs by it"}
    for where, row in _all(objects, paths):
        texts = preference_texts(row, where)
        rows.append(PreferenceRow(*texts, _confidence(row, where) if use_confidence else 1.0))
        if "chosen" in row:
            unused.add(row, UNUSED["chosen"])
        if use_confidence is False:
            unused.add(row, unweighted)
    unused.warn(_named(paths))
    return rows


def _confidence(row: dict, where: str) -> float:
    name, score = value(row, ("confidence_score",), where)
    if type(score) not in (int, float) or not 0 < score <= 100:
        raise InputError(
            f'{where}: "{name}" must be a number above 0 and at most 100, got {shown(score)}'
        )
    return score / 100


def read_texts(path: str | Path, key: str, *, keep_empty: bool = False) -> list[str]:
    """Read the text under `key` of every row of one file; "text" with the row's title before it.

    Raises InputError, also for an empty text unless `keep_empty`.
    """
    texts = []
    for where, row in objects(path):
        if key == "text" and (keep_empty or "title" in row):
            found = titled_text(row, where)
            texts.append(found if keep_empty and not found else text(key, found, where))
        else:
            texts.append(text_at(row, key, where))
    return texts


def read_retrieval(query_data: str | Path, corpus_data: str | Path | None = None) -> RetrievalSet:
    """Read queries with their positives and the corpus these point into. Raises InputError.

    Args:
        query_data: JSONL file of queries, or a BEIR directory.
        corpus_data: JSONL file of {"text"} rows; None with a BEIR directory, which has its own.
    """
    if Path(query_data).is_dir():
        if corpus_data is not None:
            raise InputError(f"{query_data}: a BEIR directory, so leave --corpus_data out")
        return _read_beir(Path(query_data))
    if corpus_data is None:
        raise InputError(f"{query_data}: needs --corpus_data, as it is no BEIR directory")
    corpus = read_texts(corpus_data, "text")
    queries, positives = [], []
    for where, row in objects(query_data):
        queries.append(text_at(row, "query", where))
        positives.append(_corpus_rows(row, len(corpus), where))
    return RetrievalSet(queries, corpus, positives)


def _corpus_rows(row: dict, corpus_size: int, where: str) -> list[int]:
    """The distinct corpus row numbers under positives/index."""
    positives = expect(dict, *value(row, ("positives",), where), where)
    name, indices = value(positives, ("index",), where, "positives.")
    if not expect(list, name, indices, where):
        raise InputError(f"{where}: no positives: the list is empty")
    for i, index in enumerate(indices):
        if not 0 <= expect(int, f"{name}[{i}]", index, where) < corpus_size:
            raise InputError(
                f'{where}: "{name}[{i}]" is {index}, but the corpus has rows 0 to {corpus_size - 1}'
            )
    return list(dict.fromkeys(indices))


def _read_beir(directory: Path) -> RetrievalSet:
    corpus = _beir_texts(directory / "corpus.jsonl")
    queries = _beir_texts(directory / "queries.jsonl")
    corpus_rows = {key: row for row, key in enumerate(corpus)}
    positives: dict[str, dict[int, None]] = {}  # query id -> ordered set of corpus rows
    qrels = _qrels_file(directory / "qrels")
    for number, (where, line) in enumerate(lines(qrels)):
        try:
            query, passage, score = line.split("\t")
            relevant = int(score) > 0
        except ValueError:
            if number == 0 and _is_qrels_header(line):
                continue
            raise InputError(
                f"{where}: must be query-id, corpus-id and an integer score, with tabs between, "
                f"got {shown(line)}"
            ) from None
        for key, known, file in ((query, queries, "queries"), (passage, corpus_rows, "corpus")):
            if key not in known:
                raise InputError(f"{where}: id {shown(key)} is not in {file}.jsonl")
        if relevant:
            positives.setdefault(query, {})[corpus_rows[passage]] = None
    if not positives:
        raise InputError(f"{qrels}: no positives: no line has a score above 0")
    # queries.jsonl holds those of every split: the ones with positives in this split count.
    return RetrievalSet(
        [queries[query] for query in positives],
        list(corpus.values()),
        [list(rows) for rows in positives.values()],
    )


def _is_qrels_header(line: str) -> bool:
    """Whether it names columns, as query-id, corpus-id and score, rather than holding data."""
    fields = line.lower().split("\t")
    names_query = fields[0].replace("_", "-") in QUERY_ID_HEADERS
    return names_query and not any(character.isdigit() for character in fields[-1])


def _beir_texts(path: Path) -> dict[str, str]:
    """{id: title and text}, in file order."""
    texts: dict[str, str] = {}
    for where, row in objects(path):
        key = expect(str, *value(row, ("_id",), where), where)
        if key in texts:
            raise InputError(f'{where}: "_id" {shown(key)} stands in an earlier line too')
        title = expect(str, "title", row.get("title") or "", where)  # may be null
        body = expect(str, *value(row, ("text",), where), where)
        texts[key] = text("text", f"{title} {body}".strip(), where)
    return texts


def _qrels_file(directory: Path) -> Path:
    """test.tsv, else dev.tsv, else the first by name."""
    files = {path.stem: path for path in sorted(directory.glob("*.tsv"))}
    for split in ("test", "dev", *files):
        if split in files:
            return files[split]
    raise InputError(f"{directory}: no .tsv file, but a BEIR directory has qrels/test.tsv")


def _all(
    read: Callable[[str | Path], Iterator[tuple[str, Any]]],
    paths: str | Path | Sequence[str | Path],
) -> Iterator[tuple[str, Any]]:
    paths = _listed(paths)
    if not paths:
        raise InputError("no data file was given")
    for path in paths:
        yield from read(path)


def _listed(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _named(paths: str | Path | Sequence[str | Path]) -> str:
    return ", ".join(map(place, _listed(paths)))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line; `path` appears whole, or stays as it was."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
