"""What people answered to pairs: who is asked which next, what is written, what stands.

    {"key", "judge": name, "pair": pair_id of its texts, "shown": [0, 1] or [1, 0],
     "answer": "left" | "right" | "tie" | "skip" | "undo", "preferred": "A" | "B" | "tie" | None,
     "confidence": 50 where unsure, else None, "usage": None, "created": unix time, "seconds"}

"preferred" speaks of the row's passages, "answer" of those on the page. The journal is appended to
only: "undo" withdraws the answer before it, and of several the last one stands.
"""

import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rankpo_fast.data.jsonl import text_at
from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Answer, Journal, question_key

CHOICES = ("left", "right", "tie", "skip", "undo")
UNSURE = 50  # confidence; others say none


def pair_id(query: str, passage1: str, passage2: str) -> str:
    """The same for the same texts in the row's order, whoever is asked and however it is shown."""
    return question_key(query, passage1, passage2)


def shown_order(annotator: str, pair: str) -> list[int]:
    """[0, 1] or [1, 0], at random but always the same: a liking for one side can be measured."""
    first = int(question_key(annotator, pair)[0], 16) % 2
    return [first, 1 - first]


class _Record:
    """What one annotator has answered, by pair."""

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()  # answers of any kind
        self.latest: dict[str, Answer] = {}
        self.standing: dict[str, Answer] = {}  # those not withdrawn, in the order given

    def add(self, answer: Answer) -> None:
        pair = answer["pair"]
        self.turns[pair] += 1
        self.latest[pair] = answer
        self.standing.pop(pair, None)
        if answer["answer"] != "undo":
            self.standing[pair] = answer


def _records(answers: Iterable[Answer]) -> dict[str, _Record]:
    records: dict[str, _Record] = defaultdict(_Record)
    for answer in answers:
        records[answer["judge"]].add(answer)
    return records


def verdicts(answers: Iterable[Answer]) -> list[Answer]:
    """The latest answer of each annotator to each pair, without those that were withdrawn.

    Skipped pairs are among them, with "preferred" None. Of people alone: a language model that is
    asked in both orders has two answers to a pair.
    """
    return [answer for record in _records(answers).values() for answer in record.standing.values()]


class Late(Exception):
    """An answer to what is not asked now: it is not written.

    Attributes:
        state: what is asked instead.
    """

    def __init__(self, message: str, state: dict[str, Any]):
        super().__init__(message)
        self.state = state


class Ended(Exception):
    """No answer is taken any more."""


class Questions:
    """Pairs, and who has answered which; several threads may ask and answer."""

    def __init__(self, pairs: Sequence[dict], journal: Journal, instructions: str):
        self._texts = {}  # pair_id -> query and both passages in the row's order
        for number, row in enumerate(pairs):
            where = f"pairs[{number}]"
            query, *both = (text_at(row, key, where) for key in ("query", "passage1", "passage2"))
            if both[0] == both[1]:
                raise InputError(f'{where}: "passage1" and "passage2" are the same text')
            self._texts[pair_id(query, *both)] = (query, both)
        if not self._texts:
            raise InputError("there are no pairs to show")
        if repeated := len(pairs) - len(self._texts):
            warnings.warn(f"{repeated:,} of {len(pairs):,} pairs are repetitions: each is asked "
                          f"once", stacklevel=3)  # fmt: skip
        self._journal, self._instructions = journal, instructions
        known = [answer for answer in journal.answers if answer.get("pair") in self._texts]
        self._records = _records(known)
        self._lock, self._closed = threading.Lock(), False

    def annotators(self) -> list[str]:
        with self._lock:
            return sorted(self._records)

    def finished(self) -> int:
        """Annotators who have judged, or skipped, every pair."""
        with self._lock:
            return sum(len(r.standing) == len(self._texts) for r in self._records.values())

    def state(self, annotator: str) -> dict[str, Any]:
        """For the page: counts, the next pair, and the answer that "undo" would withdraw."""
        with self._lock:
            return self._state(annotator)

    def close(self) -> None:
        """No answer is written from now on."""
        with self._lock:
            self._closed = True

    def answer(
        self, annotator: str, pair: str, turn: int, choice: str, unsure: bool, seconds: float
    ) -> dict[str, Any]:
        """Write it to the journal; returns the state after it. Raises Late, Ended, OSError."""
        with self._lock:
            if self._closed:
                raise Ended("The server is ending.")
            if pair not in self._texts:
                raise Late("This pair is not asked any more.",
                              self._state(annotator))  # fmt: skip
            record = self._records.get(annotator, _Record())
            latest = record.latest.get(pair)
            if turn != record.turns[pair]:
                if latest is None or latest["answer"] != choice:
                    raise Late("This pair was answered elsewhere, in "
                                  "another tab perhaps: that answer stands.",
                                  self._state(annotator))  # fmt: skip
                return self._state(annotator)  # sent twice, since our reply was lost
            if choice == "undo" and pair not in record.standing:
                raise Late("There is nothing to take back.",
                              self._state(annotator))  # fmt: skip
            answer = self._answer(annotator, pair, choice, unsure, seconds)
            self._journal.add(answer)
            self._records[annotator].add(answer)
            return self._state(annotator)

    def _answer(
        self, annotator: str, pair: str, choice: str, unsure: bool, seconds: float
    ) -> Answer:
        query, both = self._texts[pair]
        shown = shown_order(annotator, pair)
        sides = {"left": "AB"[shown[0]], "right": "AB"[shown[1]], "tie": "tie"}
        preferred = sides.get(choice)
        key = question_key(self._instructions, annotator, query, *(both[i] for i in shown))
        return {
            "key": key, "judge": annotator, "pair": pair, "shown": shown, "answer": choice,
            "preferred": preferred, "confidence": UNSURE if unsure and preferred else None,
            "usage": None, "created": int(time.time()), "seconds": round(seconds, 1),
        }  # fmt: skip

    def _state(self, annotator: str) -> dict[str, Any]:
        record = self._records.get(annotator, _Record())
        pair = next((pair for pair in self._texts if pair not in record.standing), None)
        last = next(reversed(record.standing), None)
        state: dict[str, Any] = {
            "annotator": annotator, "instructions": self._instructions, "pairs": len(self._texts),
            "done": len(record.standing),
            "skipped": sum(a["answer"] == "skip" for a in record.standing.values()),
            "last": last and {"pair": last, "turn": record.turns[last]},
            "question": None,
        }  # fmt: skip
        if pair is not None:
            query, both = self._texts[pair]
            left, right = (both[i] for i in shown_order(annotator, pair))
            state["question"] = {"pair": pair, "turn": record.turns[pair], "query": query,
                                 "left": left, "right": right}  # fmt: skip
        return state
