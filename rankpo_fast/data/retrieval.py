"""What retrieval is measured on: queries, a corpus, and how relevant its documents are.

    queries.jsonl   {"query": {"text": str}, "positives": {"index": [int]}}, rows of the corpus file
    corpus.jsonl    {"text": str}, with a "title" or without
or a BEIR directory:
    queries.jsonl   {"_id": str, "text": str}, those of every split
    corpus.jsonl    {"_id": str, "title": str, "text": str}
    qrels/*.tsv     query-id, corpus-id, grade, a file a split, or columns named so by a header;
                    TREC's four, query-id, 0 or Q0, corpus-id, grade, will do too

BEIR's conventions hold: a document with the query's own id is left out of its ranking, and a
relevant document that is not in the corpus is missed by every ranking. What is skipped is counted.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rankpo_fast.data.jsonl import (
    document_text,
    expect,
    lines,
    objects,
    shown,
    text,
    text_at,
    value,
)
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError

# How the header of a qrels file may name its columns, in any order; _ is as good as -.
COLUMNS = {
    "query-id": ("query-id", "query", "qid", "topic", "topic-id"),
    "corpus-id": ("corpus-id", "doc-id", "docid", "document-id", "pid", "passage-id", "docno"),
    "score": ("score", "relevance", "rel", "grade", "label"),
}
BEIR_COLUMNS, TREC_COLUMNS = (0, 1, 2), (0, 2, 3)
COMPRESSED = ("", ".gz", ".zst")
HIGHEST_GRADE = 1000  # pytrec_eval's memory grows with it


@dataclass(frozen=True)
class RetrievalSet:
    """M queries, N documents, and what is known about how they go together.

    Attributes:
        corpus: an empty text is a document without one, which ranks behind all others.
        grades: for each query {corpus row: grade above 0}, not empty. Rows from N on stand for
            relevant documents that are not in the corpus: nothing can retrieve them.
        own: for each query the row of the document left out of its ranking, if there is one.
        query_ids, document_ids: their names; without, they are named by their row.
        groups: of each query, where asked for.
        split: which of `splits` it is, of a BEIR directory.
        tally: what else the files held, and what of it was skipped.
    """

    queries: list[str]
    corpus: list[str]
    grades: list[dict[int, int]]
    own: list[int | None] | None = None
    query_ids: list[str] | None = None
    document_ids: list[str] | None = None
    groups: list[str] | None = None
    split: str | None = None
    splits: tuple[str, ...] = ()
    tally: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of everything, and of everything that was skipped."""
        return {
            "queries": len(self.queries),
            "documents": len(self.corpus),
            "empty_documents": self.corpus.count(""),
            "own_documents": sum(row is not None for row in self.own or ()),
            "relevant_pairs": sum(map(len, self.grades)),
            **self.tally,
        }


def read_retrieval(
    query_data: Path | Source,
    corpus_data: Path | Source | None = None,
    *,
    split: str | None = None,
    keep_same_id: bool = False,
    group_key: str | None = None,
) -> RetrievalSet:
    """Read queries, the corpus and which documents are relevant. Raises InputError.

    Warns of what is skipped, and of the split where it had to be chosen.

    Args:
        query_data: queries, in a JSONL file or in memory, or a BEIR directory.
        corpus_data: rows of {"text"}; None with a BEIR directory, which has its own.
        split: of a BEIR directory; None: test, else dev, else the first by name.
        keep_same_id: a BEIR document with the query's own id is ranked like any other.
        group_key: key of the row of a query, or of its metadata, whose value is its group.
    """
    if not isinstance(query_data, Rows) and Path(query_data).is_dir():
        if corpus_data is not None:
            raise InputError(f"{query_data}: a BEIR directory, so leave --corpus_data out")
        return _read_beir(Path(query_data), split, keep_same_id, group_key)
    if corpus_data is None:
        raise InputError(f"{query_data}: needs --corpus_data, as it is no BEIR directory")
    if split is not None or keep_same_id:
        flag = "--keep_same_id" if split is None else "--split"
        raise InputError(f"{flag} needs a BEIR directory, but --query_data {query_data} is none")
    corpus = [document_text(row, where) for where, row in objects(corpus_data)]
    _check_corpus(corpus_data, corpus)
    queries, grades, groups = [], [], []
    for where, row in objects(query_data):
        queries.append(text_at(row, "query", where))
        groups.append(_group(row, group_key, where))
        grades.append(dict.fromkeys(_corpus_rows(row, len(corpus), where), 1))
    return RetrievalSet(queries, corpus, grades, groups=groups if group_key is not None else None)


def _group(row: dict, key: str | None, where: str) -> str:
    """The value under `key`, in the row or in its metadata, as text."""
    if key is None:
        return ""
    place = row if key in row else row.get("metadata")
    found = value(place if isinstance(place, dict) else row, (key,), where)[1]
    if not isinstance(found, str | int | float):
        raise InputError(f'{where}: "{key}" must be a text or a number, got {shown(found)}')
    return str(found)


def _corpus_rows(row: dict, corpus_size: int, where: str) -> list[int]:
    """The corpus row numbers under positives/index."""
    positives = expect(dict, *value(row, ("positives",), where), where)
    name, indices = value(positives, ("index",), where, "positives.")
    if not expect(list, name, indices, where):
        raise InputError(f"{where}: no positives: the list is empty")
    for i, index in enumerate(indices):
        if not 0 <= expect(int, f"{name}[{i}]", index, where) < corpus_size:
            raise InputError(
                f'{where}: "{name}[{i}]" is {index}, but the corpus has rows 0 to {corpus_size - 1}'
            )
    return indices


def _check_corpus(path: Path | Source, corpus: list[str]) -> None:
    empty = corpus.count("")
    if empty == len(corpus):
        raise InputError(f"{place(path)}: no document has a text")
    if empty:
        _warn(f"{path}: {empty:,} documents without title and text rank behind all others")


# --- BEIR ---


def _read_beir(
    directory: Path, split: str | None, keep_same_id: bool, group_key: str | None
) -> RetrievalSet:
    splits = _splits(directory / "qrels")
    split = _chosen_split(directory / "qrels", list(splits), split)
    qrels = read_qrels(splits[split])
    corpus_file, query_file = text_files(directory)
    texts, groups = _read_queries(query_file, qrels, group_key)
    corpus = {key: document_text(row, where) for key, where, row in _rows_with_ids(corpus_file)}
    _check_corpus(corpus_file, list(corpus.values()))

    relevant = {
        query: {document: grade for document, grade in judged.items() if grade > 0}
        for query, judged in qrels.items()
    }
    measured = [query for query in qrels if query in texts and relevant[query]]
    pairs = [(query, document) for query in measured for document in relevant[query]]
    if not measured or all(document not in corpus for _, document in pairs):
        raise InputError(_why_nothing_is_left(splits[split], texts, relevant))
    absent_queries = [query for query in qrels if query not in texts]
    absent_documents = [key for key in _distinct(qrels.values()) if key not in corpus]
    unanswerable = [query for query in texts if not relevant[query]]
    place = dict(zip(corpus, range(len(corpus)), strict=True))
    own = [None if keep_same_id else place.get(query) for query in measured]
    _warn_of_skipped(splits[split], absent_queries, absent_documents, unanswerable)
    _warn_of_own(directory, [] if keep_same_id else [q for q in measured if q in corpus], relevant)
    for document in absent_documents:
        place[document] = len(place)  # a row past the corpus
    return RetrievalSet(
        queries=[texts[query] for query in measured],
        corpus=list(corpus.values()),
        grades=[
            {place[document]: grade for document, grade in relevant[query].items()}
            for query in measured
        ],
        own=own,
        query_ids=measured,
        document_ids=list(corpus),
        groups=None if group_key is None else [groups[query] for query in measured],
        split=split,
        splits=tuple(sorted(splits)),
        tally={
            "judged_pairs": sum(len(qrels[query]) for query in measured),
            "absent_queries": len(absent_queries),
            "absent_documents": len(absent_documents),
            "queries_without_relevant": len(unanswerable),
        },
    )


def read_judged(
    directory: Path, split: str | None = None, flag: str = "--graded_split"
) -> list[tuple[str, tuple[str, ...], tuple[float, ...]]]:
    """Query, documents and grades, 0 and below too, of what a BEIR directory judges, to train on.

    Raises InputError. Warns of what is absent, empty or a query's own document: left out.

    Args:
        split: None: train, or the only one.
        flag: through which it is given.
    """
    splits = _splits(directory / "qrels")
    there = ", ".join(sorted(splits))
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits or (split is None and name != "train" and len(splits) > 1):
        named = f"{flag} {split}" if split else f"{flag} must be given, as there is no train"
        raise InputError(f"{named}: {directory} has {there}")
    if split is None and len(splits) == 1 and name != "train":
        _warn(f"{directory} has {name} alone: its judgements are trained on")
    qrels = read_qrels(splits[name])
    corpus_file, query_file = text_files(directory)
    (queries, _), wanted = _read_queries(query_file, qrels, None), _distinct(qrels.values())
    corpus = {
        key: document_text(row, where)
        for key, where, row in _rows_with_ids(corpus_file)
        if key in wanted
    }
    rows, own = [], 0
    for key, query in queries.items():
        judged = {document: g for document, g in qrels[key].items() if corpus.get(document)}
        own += judged.pop(key, None) is not None
        if judged:
            texts = tuple(corpus[document] for document in judged)
            rows.append((query, texts, tuple(map(float, judged.values()))))
    for count, what in [
        (len(qrels) - len(queries), "queries that it judges are not in queries.jsonl"),
        (len(wanted) - len(corpus), "documents that it judges are not in corpus.jsonl"),
        ([*corpus.values()].count(""), "documents that it judges have no text"),
        (own, "queries judge the document of their own id"),
    ]:
        if count:
            _warn(f"{splits[name]}: {count:,} {what}: left out")
    if not rows:
        raise InputError(f"{splits[name]}: nothing that it judges is there")
    return rows


def _splits(directory: Path) -> dict[str, Path]:
    """The qrels file of each split, by name."""
    # Not those that begin with a dot, which macOS leaves beside its files.
    files = [path for suffix in COMPRESSED for path in directory.glob(f"[!.]*.tsv{suffix}")]
    if not files:
        raise InputError(f"{directory}: no .tsv file, but a BEIR directory has qrels/test.tsv")
    return {path.name.partition(".tsv")[0]: path for path in sorted(files, reverse=True)}


def _chosen_split(directory: Path, splits: list[str], split: str | None) -> str:
    there = ", ".join(sorted(splits))
    if split is not None:
        if split not in splits:
            raise InputError(f"--split {split}: {directory} has {there}")
        return split
    chosen = next(name for name in ("test", "dev", *sorted(splits)) if name in splits)
    if len(splits) > 1:
        _warn(f"{directory} has {there}: {chosen} is measured, --split takes another")
    return chosen


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """{query id: {document id: grade}}, in file order."""
    qrels: dict[str, dict[str, int]] = {}
    changed, header = 0, None
    for number, (where, line) in enumerate(lines(path)):
        if number == 0 and _is_header(line):
            header = _columns(line, where)
            continue
        query, document, grade = _judgement(line, header, where)
        if grade > HIGHEST_GRADE:
            raise InputError(f"{where}: grades go up to {HIGHEST_GRADE:,}, got {grade}")
        changed += qrels.setdefault(query, {}).setdefault(document, grade) != grade
        qrels[query][document] = grade
    if changed:
        _warn(f"{path}: {changed:,} pairs are judged twice, not alike: the last judgement counts")
    return qrels


def _is_header(line: str) -> bool:
    """Whether it names columns rather than holding data, which has a grade."""
    names = _names(line)
    return not {*names}.isdisjoint(COLUMNS["query-id"]) and not any(map(_is_number, names))


def _columns(header: str, where: str) -> tuple[int, ...]:
    """Where query, document and grade stand by the names of a header; three may have any names
    that do not say another order."""
    names = _names(header)
    found = [
        next((place for place, name in enumerate(names) if name in known), None)
        for known in COLUMNS.values()
    ]
    stated = tuple(place for place in found if place is not None)
    if len(stated) == len(found):
        return stated
    in_order = all(place in (None, usual) for usual, place in enumerate(found))
    if len(names) == len(COLUMNS) and in_order:
        return BEIR_COLUMNS
    raise InputError(
        f"{where}: a header must name query-id, corpus-id and score, got {shown(header)}"
    )


def _names(header: str) -> list[str]:
    """Of columns, which tabs tell apart."""
    return header.lower().replace("_", "-").split("\t") if "\t" in header else []


def _judgement(line: str, columns: tuple[int, ...] | None, where: str) -> tuple[str, str, int]:
    """Query, document and grade of a line, in the columns of a header if there is one."""
    fields = line.split("\t") if "\t" in line else line.split()
    wanted = "query-id, corpus-id and an integer score, with tabs between"
    if columns is None:
        wanted += ", or TREC's query-id, 0 or Q0, corpus-id and score"
        if len(fields) == 4 and fields[1] in ("0", "Q0"):
            columns = TREC_COLUMNS
        elif len(fields) == 3 and "\t" in line:
            columns = BEIR_COLUMNS
    elif "\t" not in line or len(fields) <= max(columns):
        columns = None
    if columns is not None:
        query, document, grade = (fields[column] for column in columns)
        if _is_number(grade) and float(grade).is_integer():  # some write 1.0
            return query, document, int(float(grade))
    raise InputError(f"{where}: must be {wanted}, got {shown(line)}")


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _read_queries(
    path: Path, wanted: dict[str, dict[str, int]], group_key: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """{id: text} and {id: group} of the queries of a split; queries.jsonl has those of every."""
    texts, groups = {}, {}
    for key, where, row in _rows_with_ids(path):
        if key in wanted:
            texts[key], groups[key] = text_at(row, "text", where), _group(row, group_key, where)
    return texts, groups


def _rows_with_ids(path: Path) -> Iterable[tuple[str, str, dict]]:
    """Id, where, and the row; InputError for an id that stands twice."""
    known = set()
    for where, row in objects(path):
        name, key = value(row, ("_id",), where)
        if type(key) is not int:
            text(name, key, where)
        if str(key) in known:
            raise InputError(f'{where}: "_id" {shown(key)} stands in an earlier line too')
        known.add(str(key))
        yield str(key), where, row


def text_files(directory: Path) -> list[Path]:
    """Those of a BEIR directory that texts are read from."""
    return [_file(directory, name) for name in ("corpus.jsonl", "queries.jsonl")]


def beir_files(directory: Path) -> list[Path]:
    """All that is read of a BEIR directory, whatever the split."""
    return [*text_files(directory), *sorted(_splits(directory / "qrels").values())]


def _file(directory: Path, name: str) -> Path:
    """The file of that name, compressed or not."""
    paths = [directory / f"{name}{suffix}" for suffix in COMPRESSED]
    return next((path for path in paths if path.exists()), paths[0])


def _distinct(judged: Iterable[dict[str, int]]) -> dict[str, None]:
    return dict.fromkeys(document for documents in judged for document in documents)


def _warn_of_skipped(
    qrels: Path, queries: list[str], documents: list[str], unanswerable: list[str]
) -> None:
    for keys, what in [
        (queries, "queries that it judges are not in queries.jsonl: skipped"),
        (
            documents,
            "documents that it judges are not in corpus.jsonl: where relevant they count as "
            "missed, as in BEIR's evaluation",
        ),
        (
            unanswerable,
            "queries have no relevant document: skipped, where BEIR's evaluation counts 0",
        ),
    ]:
        if keys:
            _warn(f"{qrels}: {len(keys):,} {what} (the first: {shown(keys[0])})")


def _warn_of_own(directory: Path, queries: list[str], relevant: dict[str, dict[str, int]]) -> None:
    """Of queries with a document of their own id: some sets number both from 0."""
    judged = sum(query in relevant[query] for query in queries)
    if queries:
        _warn(
            f"{directory}: {len(queries):,} queries have a document of their own id, which is left "
            f"out of their ranking as in BEIR's evaluation; {judged:,} of these are judged "
            f"relevant; --keep_same_id ranks them"
        )


def _why_nothing_is_left(
    qrels: Path, texts: dict[str, str], relevant: dict[str, dict[str, int]]
) -> str:
    if not texts:
        return f"{qrels}: none of its {len(relevant):,} queries is in queries.jsonl"
    if not any(relevant[query] for query in texts):
        return f"{qrels}: no positives: no line of a query in queries.jsonl has a score above 0"
    return f"{qrels}: none of the relevant documents is in corpus.jsonl"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
