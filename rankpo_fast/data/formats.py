"""Rows as the tools of this field write them -> which of their keys holds what.

Stage 1   ours                     query, positives, negatives (lists; {"text": [...]} where mined)
          FlagEmbedding            query, pos, neg (lists)
          Tevatron                 query, positive_passages, negative_passages ({"title", "text"})
          sentence-transformers    anchor or query, positive, negative or negative_1, negative_2 ...
                                   (a text or a list), or a JSON list [anchor, positive, negative]
Stage 2   ours                     query, passage1, passage2, preferred
          TRL                      prompt or query, chosen, rejected

A key that means something there and is not used here is warned of; others are left alone.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rankpo_fast.data.jsonl import no_object, shown, text, text_at, texts_at, value
from rankpo_fast.errors import InputError

QUERIES = ("query", "anchor")
POSITIVES = ("positives", "pos", "positive", "positive_passages")
NEGATIVES = ("negatives", "neg", "negative", "negative_passages")
NUMBERED = re.compile(r"negative_[0-9]+")
TEXT_OR_LIST = re.compile(r"positive|negative|negative_[0-9]+")
PAIRS = ("passage1", "chosen")

# What means something in one of the formats and is not used in any: key -> why.
_PROMPT = "--query_prefix puts one before every query"
NO_DISTILLATION = "stage 2 learns scores, from --teacher_data"
_LABELS = "a positive is one, whatever its score"
UNUSED = {
    "prompt": _PROMPT, "instruction": _PROMPT, "type": "rows of all types are batched alike",
    **dict.fromkeys(("pos_scores", "neg_scores", "teacher_scores"), NO_DISTILLATION),
    **dict.fromkeys(("label", "labels", "score", "scores", "margin"), _LABELS),
    "confidence_score": "it weighs pairs of stage 2, not rows of stage 1",
}  # fmt: skip
UNUSED_OF_PAIRS = {
    "prompt": _PROMPT, "instruction": _PROMPT,
    **dict.fromkeys(("margin", "score_chosen", "score_rejected"), "all pairs count alike"),
}  # fmt: skip
UNUSED_OF_GROUPS = dict.fromkeys(("prompt", "instruction"), _PROMPT)
LIKE_NEGATIVES = re.compile(r"(hard_?)?neg(s|atives?)?(_?[0-9]+|_.*)?", re.IGNORECASE)
ELSEWHERE = {  # what a row has instead of passages -> what would work
    "positive_document_ids": "put the texts of those documents under positive_passages",
    "set": "which of its texts are queries is not said: write query and positives",
}


@dataclass(frozen=True)
class ContrastiveKeys:
    """Where rows with certain keys have their texts."""

    query: str
    positives: str
    negatives: tuple[str, ...]  # none: there are none
    unused: dict[str, str]  # key -> why

    @classmethod
    def of(cls, row: dict, where: str) -> "ContrastiveKeys":
        """InputError where a key is missing, or two say the same."""
        for key, hint in ELSEWHERE.items():
            if key in row and row.keys().isdisjoint(POSITIVES):
                raise InputError(f'{where}: a row of "{key}" cannot be used: {hint}')
        query, positives = _only(row, QUERIES, where), _only(row, POSITIVES, where)
        numbered = tuple(key for key in row if NUMBERED.fullmatch(key))
        lists = [key for key in NEGATIVES if key in row]
        if len(lists) + bool(numbered) > 1:
            _refuse_both(*lists, *numbered, where=where)
        negatives = (*lists, *sorted(numbered, key=lambda key: int(key.rpartition("_")[2])))
        return cls(query, positives, negatives, _unused(row, negatives))


def _unused(row: dict, negatives: tuple[str, ...]) -> dict[str, str]:
    """Keys of the row that would mean something, and why they do not here."""
    unused = {key: UNUSED[key] for key in row if key in UNUSED}
    others = [k for k in row if LIKE_NEGATIVES.fullmatch(k) and k not in negatives]
    names = " or ".join(map(shown, negatives or (*NEGATIVES, "negative_1")))
    return dict.fromkeys(others, f"negatives are read from {names}") | unused


def contrastive_texts(
    row: dict, keys: ContrastiveKeys, where: str
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Query, positives and negatives of a row."""
    query, nested = row[keys.query], False
    if isinstance(query, dict):
        nested, query = True, value(query, ("text",), where, f"{keys.query}.").value
    query = text(f"{keys.query}.text" if nested else keys.query, query, where)
    positives = _texts(row, keys.positives, where)
    if not positives:
        raise InputError(f"{where}: no positives: the list is empty")
    if keys.positives == "positive":
        _check_labels(row, len(positives), where)
    # Ours come without negatives only in the nested shape, of rows that are still to be mined.
    if not keys.negatives and keys.positives == "positives" and not nested:
        value(row, ("negatives", "neg"), where, hint=", which may be an empty list")
    negatives = [_texts(row, key, where) for key in keys.negatives]
    return query, positives, negatives[0] if len(negatives) == 1 else sum(negatives, ())


def _texts(row: dict, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(row[key], list | dict) and TEXT_OR_LIST.fullmatch(key):
        return (text(key, row[key], where),)
    return texts_at(row, key, where)


def _check_labels(row: dict, positives: int, where: str) -> None:
    """Pairs labelled 0 are no pairs: their "positive" is a negative. Of a list of labels those of
    the positives come first."""
    for key in ("label", "labels"):
        given = row.get(key)
        if any(label == 0 for label in (given[:positives] if isinstance(given, list) else [given])):
            raise InputError(
                f'{where}: "{key}" is {shown(given)}, so "positive" is none: put it under '
                f'"negative" of a row that has one, or leave "{key}" out if it means nothing'
            )


def row_of_list(row: list, where: str) -> dict:
    """[anchor, positive] or [anchor, positive, negative] under those keys."""
    if any(isinstance(item, dict) for item in row):
        raise no_object(row, where)
    if len(row) not in (2, 3):
        raise InputError(
            f"{where}: a row must be an object, got a list: {shown(row)} (one of 2 or 3 texts "
            f"would do: query, positive, negative)"
        )
    return dict(zip(("anchor", "positive", "negative"), row, strict=False))


def preference_texts(row: dict, where: str) -> tuple[str, str, str]:
    """Query, chosen and rejected passage of a row."""
    theirs = "passage2" not in row and _only(row, PAIRS, where) == "chosen"
    names = ("chosen", "rejected") if theirs else ("passage1", "passage2")
    query = text_at(row, _only(row, ("query", "prompt") if theirs else ("query",), where), where)
    first, second = (text_at(row, name, where) for name in names)
    if first == second:
        raise InputError(f'{where}: "{names[0]}" and "{names[1]}" are the same text, so neither is '
                         f"preferred")  # fmt: skip
    if theirs:
        return query, first, second
    preferred = value(row, ("preferred",), where).value
    if preferred not in ("A", "B"):
        meant = preferred.strip().upper() if isinstance(preferred, str) else None
        hint = f': write "{meant}"' if meant in ("A", "B") else " (passage1 or passage2)"
        raise InputError(
            f'{where}: "preferred" must be a capital "A" or "B", got {shown(preferred)}{hint}'
        )
    return (query, first, second) if preferred == "A" else (query, second, first)


def passage_scores(row: dict, keys: ContrastiveKeys) -> dict[str, list]:
    """The scores that passages of a row have, by the name of their key."""
    scores = {}
    for key in (keys.positives, *keys.negatives):
        items = row[key] if isinstance(row[key], list) else ()
        found = [item.get("score") for item in items if isinstance(item, dict)]
        if found:
            scores[f"{key}[].score"] = [score for score in found if score is not None]
    return scores


class UnusedKeys:
    """How many rows have something under a key that would mean something elsewhere."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    def add(self, row: dict, unused: dict[str, str]) -> None:
        """Count those of `unused` (key -> why) that say something in this row."""
        for key, given in row.items():
            if key in unused and given not in (None, "", []):
                self._rows[key] += 1
                self._why[key] = unused[key]

    def warn(self, files: str) -> None:
        """One warning for each."""
        for key, rows in self._rows.items():
            warnings.warn(
                f'{files}: "{key}" of {rows:,} rows is not used: {self._why[key]}', stacklevel=4
            )


def _only(row: dict, keys: Sequence[str], where: str) -> str:
    """The one of `keys` that the row has."""
    there = [key for key in keys if key in row]
    if len(there) > 1:
        _refuse_both(*there, where=where)
    return there[0] if there else value(row, keys, where).name


def _refuse_both(*keys: str, where: str) -> None:
    names = " and ".join(map(shown, keys))
    raise InputError(f"{where}: has {names}, which say the same: leave one of them")
