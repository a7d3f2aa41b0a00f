"""Several passages of a query, and a number for each: a grade, or a teacher's score.

Graded    {"query": str, "passages": [str], "grades": [number]}, the higher the better
          a BEIR directory: the documents that one of its qrels files judges
Teacher   {"query": str, "passages": [str], "scores": [number]}
          FlagEmbedding            query, pos, neg, pos_scores, neg_scores (lists)
          Tevatron                 query, positive_passages, negative_passages ({"text", "score"})

Either may have a "weight" above 0. Every fault is an InputError that says `path:line: what`.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankpo_fast.data.formats import (
    UNUSED_OF_GROUPS,
    ContrastiveKeys,
    UnusedKeys,
    contrastive_texts,
    preference_texts,
)
from rankpo_fast.data.jsonl import expect, objects, shown, text_at, texts_at, value
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.data.retrieval import read_judged
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError

HOW_TO_SCORE = (
    'a teacher\'s row has "passages" and "scores", or "pos_scores" and "neg_scores", or a "score" '
    "in each passage: `rankpo-fast score` makes such rows"
)


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One query with passages, each with its grade or score."""

    query: str
    passages: tuple[str, ...]
    values: tuple[float, ...]
    weight: float = 1.0


def read_graded(source: Source, split: str | None = None) -> list[GroupRow]:
    """Graded rows of a file, or of a `split` of a BEIR directory; None: train, or the only one.

    Rows whose grades are all equal are left out, with a warning. Raises InputError.
    """
    if is_directory(source):
        rows = [GroupRow(*judged) for judged in read_judged(Path(str(source)), split)]
    else:
        rows = [_graded(row, where) for where, row in _counted(source)]
    differ = [row for row in rows if min(row.values) < max(row.values)]
    return _some(differ, len(rows), source, "all their grades are equal, so that nothing is "
                 "preferred")  # fmt: skip


def _graded(row: dict, where: str) -> GroupRow:
    passages = _passages(row, where)
    grades = _numbers(row, "grades", len(passages), "passages", where)
    return GroupRow(text_at(row, "query", where), passages, grades, _weight(row, where))


def read_scored(source: Source) -> list[GroupRow]:
    """Rows of a teacher's scores; those of one passage are left out, with a warning. Raises
    InputError."""
    rows = [_scored(row, where) for where, row in _counted(source)]
    several = [row for row in rows if len(row.passages) > 1]
    return _some(several, len(rows), source, "they have one passage, beside no other")


def _scored(row: dict, where: str) -> GroupRow:
    if "passages" in row:
        passages = _passages(row, where)
        scores = _numbers(row, "scores", len(passages), "passages", where)
        return GroupRow(text_at(row, "query", where), passages, scores, _weight(row, where))
    keys = ContrastiveKeys.of(row, where)
    query, positives, negatives = contrastive_texts(row, keys, where)
    if "pos_scores" in row or "neg_scores" in row:
        scores = _numbers(row, "pos_scores", len(positives), keys.positives, where)
        if negatives:
            scores += _numbers(row, "neg_scores", len(negatives), keys.negatives[0], where)
    else:
        items = [(key, item) for key in (keys.positives, *keys.negatives) for item in row[key]]
        if not all(isinstance(item, dict) and "score" in item for _, item in items):
            raise InputError(f"{where}: no scores: {HOW_TO_SCORE}")
        scores = tuple(_number(f"{key}[].score", item["score"], where) for key, item in items)
    return GroupRow(query, positives + negatives, scores, _weight(row, where))


def read_candidates(
    source: Source, split: str | None = None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Query and passages of each row of whatever kind: stage 1, pairs, graded, a teacher's; of a
    BEIR directory what it judges. Raises InputError, in mid-file."""
    if is_directory(source):
        yield from (
            (query, passages)
            for query, passages, _ in read_judged(Path(str(source)), split, "--split")
        )
        return
    for where, row in objects(source):
        if "passages" in row:
            yield text_at(row, "query", where), _passages(row, where)
        elif "passage1" in row or "chosen" in row:
            query, *pair = preference_texts(row, where)
            yield query, tuple(pair)
        else:
            keys = ContrastiveKeys.of(row, where)
            query, positives, negatives = contrastive_texts(row, keys, where)
            yield query, positives + negatives


def is_directory(source: Source) -> bool:
    return not isinstance(source, Rows) and Path(source).is_dir()


def _counted(source: Source) -> Iterator[tuple[str, dict]]:
    """Rows; keys that would mean something elsewhere are said at the end."""
    unused = UnusedKeys()
    for where, row in objects(source):
        yield where, row
        unused.add(row, UNUSED_OF_GROUPS)
    unused.warn(place(source))


def _some(rows: list[GroupRow], read: int, source: Source, why: str) -> list[GroupRow]:
    if not rows:
        raise InputError(f"{place(source)}: none of its {read:,} rows can be used: {why}")
    if left := read - len(rows):
        warnings.warn(f"{place(source)}: {left:,} of {read:,} rows are left out: {why}",
                      stacklevel=3)  # fmt: skip
    return rows


def _passages(row: dict, where: str) -> tuple[str, ...]:
    passages = texts_at(row, value(row, ("passages",), where).name, where)
    if not passages:
        raise InputError(f"{where}: no passages: the list is empty")
    return passages


def _numbers(row: dict, key: str, count: int, of: str, where: str) -> tuple[float, ...]:
    """The numbers under `key`, one for each of `count` passages under the key `of`."""
    name, numbers = value(row, (key,), where)
    if len(expect(list, name, numbers, where)) != count:
        raise InputError(
            f'{where}: "{of}" has {count:,} passages but "{key}" {len(numbers):,} numbers'
        )
    return tuple(_number(f"{key}[{i}]", number, where) for i, number in enumerate(numbers))


def _number(name: str, number: Any, where: str) -> float:
    if type(number) not in (int, float) or not math.isfinite(number):
        raise InputError(f'{where}: "{name}" must be a finite number, got {shown(number)}')
    return float(number)


def _weight(row: dict, where: str) -> float:
    weight = _number("weight", 1 if row.get("weight") is None else row["weight"], where)
    if weight <= 0:
        raise InputError(f'{where}: "weight" must be above 0, got {shown(weight)}')
    return weight
