"""JSONL files -> checked rows. Every fault is an InputError that says `path:line: what is wrong`.

Stage 1     {"query": str, "positives": [str], "negatives": [str]}; FlagEmbedding's pos and neg too
            {"query": {"text": str}, "positives": {"text": [str]}}, the shape to be mined
Stage 2     {"query": str, "passage1": str, "passage2": str, "preferred": "A" | "B"}
Other keys may be there and are left alone. Blank lines and a byte order mark are skipped.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankpo_fast.data.files import whole_file
from rankpo_fast.data.jsonl import objects, shown, text_at, texts_at, value
from rankpo_fast.errors import InputError


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


def read_contrastive(paths: str | Path | Sequence[str | Path]) -> list[ContrastiveRow]:
    """Read stage 1 rows from one file or several, in order. Raises InputError."""
    return [_contrastive_row(row, where) for where, row in _all_objects(paths)]


def _contrastive_row(row: dict, where: str) -> ContrastiveRow:
    query = text_at(row, "query", where)
    positives = texts_at(row, ("positives", "pos"), where)
    if not positives:
        raise InputError(f"{where}: no positives: the list is empty")
    # Rows in the nested shape are those still to be mined, so they may come without negatives.
    if isinstance(row["query"], dict) and not {"negatives", "neg"} & row.keys():
        return ContrastiveRow(query, positives, ())
    negatives = texts_at(row, ("negatives", "neg"), where, ", which may be an empty list")
    return ContrastiveRow(query, positives, negatives)


def read_preferences(
    paths: str | Path | Sequence[str | Path], *, use_confidence: bool = False
) -> list[PreferenceRow]:
    """Read stage 2 rows; weight 1, or `confidence_score` / 100 on request. Raises InputError."""
    return [_preference_row(row, where, use_confidence) for where, row in _all_objects(paths)]


def _preference_row(row: dict, where: str, use_confidence: bool) -> PreferenceRow:
    query = text_at(row, "query", where)
    passages = {"A": text_at(row, "passage1", where), "B": text_at(row, "passage2", where)}
    if passages["A"] == passages["B"]:
        raise InputError(f'{where}: "passage1" and "passage2" are the same text, so neither is '
                         f"preferred")  # fmt: skip
    name, preferred = value(row, ("preferred",), where)
    if preferred not in ("A", "B"):
        raise InputError(f'{where}: "{name}" must be a capital "A" or "B", got {shown(preferred)}')
    weight = _confidence(row, where) if use_confidence else 1.0
    return PreferenceRow(query, passages.pop(preferred), *passages.values(), weight)


def _confidence(row: dict, where: str) -> float:
    name, score = value(row, ("confidence_score",), where)
    if type(score) not in (int, float) or not 0 < score <= 100:
        raise InputError(
            f'{where}: "{name}" must be a number above 0 and at most 100, got {shown(score)}'
        )
    return score / 100


def read_texts(path: str | Path, key: str) -> list[str]:
    """Read the text under `key` of every row of one file. Raises InputError."""
    return [text_at(row, key, where) for where, row in objects(path)]


def _all_objects(paths: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, dict]]:
    paths = [paths] if isinstance(paths, str | Path) else paths
    if not paths:
        raise InputError("no data file was given")
    for path in paths:
        yield from objects(path)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line; `path` appears whole, or stays as it was."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
