"""Rows to be judged -> questions -> answers, as the journal has them.

A question shows the passages of an item in one order to one judge. Its answer is kept in terms of
the row's passages, whatever the order was.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rankpo_fast.config.judge import Mode
from rankpo_fast.data.jsonl import expect, objects, passage, text_at, value
from rankpo_fast.data.memory import Source
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Answer, question_key
from rankpo_fast.judge.parse import UNPARSED, parse, probability
from rankpo_fast.judge.template import Prompt

MOST = 50  # passages of a list
OF_PAIRS = ("passage1", "passage2")


@dataclass(frozen=True)
class Item:
    """What is judged: a pair, or all passages of a row or a query."""

    query: str
    passages: tuple[str, ...]
    row: dict[str, Any]  # what the output carries, texts included

    @property
    def key(self) -> str:
        """The same wherever the row stands."""
        return question_key(self.query, *self.passages)


@dataclass(frozen=True)
class Question:
    """`item` to `judge`, its passages shown in the order `shown`; a grade's one passage too."""

    key: str
    judge: str
    item: Item
    shown: tuple[int, ...]

    @property
    def texts(self) -> list[str]:
        return [self.item.passages[i] for i in self.shown]


@dataclass(frozen=True)
class Reply:
    """What a server sent: an answer that has been paid for."""

    text: str
    finish: str | None = None
    refusal: str | None = None
    usage: dict[str, Any] | None = None
    tokens: Sequence[dict[str, Any]] = ()  # with log-probabilities


def read_items(source: Source, mode: Mode) -> list[Item]:
    """InputError names the line of a row that cannot be judged; equal passages are left out, and
    counted in a warning."""
    items: list[Item] = []
    gathered: dict[str, dict[str, Any]] = {}  # query -> passage -> its id
    of_query: dict[str, dict[str, Any]] = {}
    equal = 0
    for where, row in objects(source):
        query = text_at(row, "query", where)
        if mode != "pair" and "passages" in row:
            found = expect(list, *value(row, ("passages",), where), where)
            texts = tuple(passage(f"passages[{i}]", one, where) for i, one in enumerate(found))
            items.append(Item(query, texts, {**row, "query": query, "passages": [*texts]}))
            _check_list(items[-1], mode, where)
            continue
        pair = tuple(text_at(row, name, where) for name in OF_PAIRS)
        if mode == "pair":
            if pair[0] == pair[1]:
                equal += 1
                continue
            texts_of_row = {"query": query, **dict(zip(OF_PAIRS, pair, strict=True))}
            items.append(Item(query, pair, {**row, **texts_of_row}))
            continue
        for number, one in enumerate(pair, 1):
            gathered.setdefault(query, {}).setdefault(one, row.get(f"passage_id{number}"))
        of_query.setdefault(query, {k: row[k] for k in ("query_id",) if k in row})
    for query, ids in gathered.items():
        row = {"query": query, "passages": [*ids], **of_query[query]}
        if all(key is not None for key in ids.values()):
            row["passage_ids"] = [*ids.values()]
        items.append(Item(query, tuple(ids), row))
        _check_list(items[-1], mode, place(source))
    if equal:
        warnings.warn(f"{place(source)}: {equal:,} pairs of equal passages are left out",
                      stacklevel=2)  # fmt: skip
    if not items:
        raise InputError(f"{place(source)}: no pair is left to be judged")
    return items


def _check_list(item: Item, mode: Mode, where: str) -> None:
    if not item.passages or len(set(item.passages)) < len(item.passages):
        raise InputError(f'{where}: "passages" must be different texts, at least one')
    if mode == "list" and not 2 <= len(item.passages) <= MOST:
        raise InputError(f"{where}: --mode list ranks 2 to {MOST} passages of a query, got "
                         f"{len(item.passages)}")  # fmt: skip


def questions(
    items: Sequence[Item], judges: Sequence[str], prompt: Prompt, both: bool
) -> Iterator[Question]:
    """All of an item together, so that whoever must stop has whole ones; none comes twice."""
    known: set[str] = set()
    for item in items:
        everything = tuple(range(len(item.passages)))
        if prompt.mode == "grade":
            orders: list[tuple[int, ...]] = [(i,) for i in everything]
        else:
            orders = [everything, everything[::-1]] if both else [everything]
        for judge in judges:
            for shown in orders:
                texts = [item.passages[i] for i in shown]
                key = question_key(prompt.mode, prompt.digest, judge, item.query, *texts)
                if key not in known:
                    known.add(key)
                    yield Question(key, judge, item, shown)


def answer_to(question: Question, reply: Reply, mode: Mode, seconds: float | None) -> Answer:
    """What the journal keeps: the text as it came, and what it says about the row's passages."""
    count = len(question.shown)
    verdict = UNPARSED if reply.refusal else parse(mode, reply.text, count)
    confidence, stated = verdict.confidence, True
    if verdict.place is not None and mode != "list":
        choices = ("A", "B", "tie") if mode == "pair" else ("0", "1", "2", "3")
        likely = probability(verdict.place, reply.tokens, choices)
        if likely is not None:
            confidence, stated = round(100 * likely, 2), False
    answer: Answer = {
        "key": question.key,
        "judge": question.judge,
        "pair": question.item.key,
        "shown": [*question.shown],
        "answer": reply.text if reply.refusal is None else reply.refusal or reply.text,
        "preferred": None,
        "confidence": confidence,
        "usage": reply.usage,
        "created": int(time.time()),
    }
    found = verdict.value
    if mode == "pair" and found is not None:
        first = "AB"[question.shown[0]]
        answer["preferred"] = found if found == "tie" else first if found == "A" else _other(first)
    elif mode == "grade":
        answer["grade"] = found
    elif mode == "list":
        assert found is None or isinstance(found, tuple)
        answer["ranking"] = None if found is None else [question.shown[i] for i in found]
    if confidence is not None and not stated:
        answer["confidence_by"] = "logprobs"
    if found is None:
        refused, cut = reply.refusal is not None, reply.finish == "length"
        answer["error"] = "refused" if refused else "truncated" if cut else "unparsed"
    if seconds is not None:
        answer["seconds"] = round(seconds, 2)
    return answer


def verdict_in(answer: Answer, mode: Mode) -> Any:
    """Of an answer; None where it does not parse."""
    return answer.get({"pair": "preferred", "grade": "grade", "list": "ranking"}[mode])


def _other(letter: str) -> str:
    return "B" if letter == "A" else "A"
