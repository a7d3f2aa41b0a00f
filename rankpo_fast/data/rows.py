"""Data -> checked rows. Every fault is an InputError that says `path:line: what is wrong`.

Stage 1     {"query": str, "positives": [str], "negatives": [str]}
            {"query": {"text": str}, "positives": {"text": [str]}}, the shape to be mined
Stage 2     {"query": str, "passage1": str, "passage2": str, "preferred": "A" | "B"}
Rows of other tools are read too (formats.py), from more than plain files (sources.py). Other keys
may be there and are left alone. Blank lines and a byte order mark are skipped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import whole_file
from rankpo_fast.data.formats import (
    NO_DISTILLATION,
    UNUSED_OF_PAIRS,
    ContrastiveKeys,
    UnusedKeys,
    contrastive_texts,
    passage_scores,
    preference_texts,
    row_of_list,
)
from rankpo_fast.data.jsonl import document_text, no_object, objects, shown, text_at, value, values
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError

Sources = Path | Source | Sequence[Path | Source]


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


def read_contrastive(paths: Sources) -> list[ContrastiveRow]:
    """Read stage 1 rows from one file or several, in order. Raises InputError."""
    rows, unused = [], UnusedKeys()
    formats: dict[tuple[str, ...], ContrastiveKeys] = {}  # found once for rows of the same keys
    for where, row in _all(values, paths):
        if isinstance(row, list):
            row = row_of_list(row, where)
        elif not isinstance(row, dict):
            raise no_object(row, where)
        names = tuple(row)
        keys = formats.get(names)
        if keys is None:
            keys = formats[names] = ContrastiveKeys.of(row, where)
        rows.append(ContrastiveRow(*contrastive_texts(row, keys, where)))
        unused.add(row, keys.unused)
        if scores := passage_scores(row, keys):
            unused.add(scores, dict.fromkeys(scores, NO_DISTILLATION))
    unused.warn(_named(paths))
    return rows


def read_preferences(paths: Sources, *, use_confidence: bool | None = None) -> list[PreferenceRow]:
    """Read stage 2 rows. Raises InputError.

    Args:
        use_confidence: whether a pair weighs `confidence_score` / 100, or 1, which is said of those
            that have one; None: 1, as in an evaluation, which is said too.
    """
    rows, unused = [], UnusedKeys()
    meant = dict(UNUSED_OF_PAIRS)
    if not use_confidence:
        choice = "all pairs count alike in an evaluation"
        meant["confidence_score"] = (
            choice if use_confidence is None else "--use_confidence weights pairs by it"
        )
    without_query = {key: why for key, why in meant.items() if key != "prompt"}
    for where, row in _all(objects, paths):
        texts = preference_texts(row, where)
        rows.append(PreferenceRow(*texts, _confidence(row, where) if use_confidence else 1.0))
        unused.add(row, meant if "query" in row else without_query)
    unused.warn(_named(paths))
    return rows


def _confidence(row: dict, where: str) -> float:
    name, score = value(row, ("confidence_score",), where)
    if type(score) not in (int, float) or not 0 < score <= 100:
        raise InputError(
            f'{where}: "{name}" must be a number above 0 and at most 100, got {shown(score)}'
        )
    return score / 100


def read_texts(path: Path | Source, key: str) -> list[str]:
    """Read the text under `key` of every row of one file.

    Of "text" a row's title goes before it, and documents without either are "", not all of them.
    Raises InputError.
    """
    read = document_text if key == "text" else partial(text_at, key=key)
    texts = [read(row, where=where) for where, row in objects(path)]
    if not any(texts):
        raise InputError(f"{place(path)}: all its texts are empty")
    return texts


def _all(
    read: Callable[[Path | Source], Iterator[tuple[str, Any]]],
    paths: Sources,
) -> Iterator[tuple[str, Any]]:
    paths = _listed(paths)
    if not paths:
        raise InputError("no data file was given, and no rows")
    for path in paths:
        yield from read(path)


def _listed(paths: Sources) -> Sequence[Path | Source]:
    return [paths] if isinstance(paths, str | Path | Rows) else paths


def _named(paths: Sources) -> str:
    return ", ".join(map(place, _listed(paths)))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line; `path` appears whole, or stays as it was."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
