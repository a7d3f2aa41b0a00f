"""What judges answered, on disk as soon as it is answered: JSON lines, appended and fsynced.

    {"journal": 1, "asked": {...}}                     the head: what all of its answers were asked
    {"key": ..., "judge": ..., "answer": ..., ...}     one answer each

Whoever is killed has lost no answer that was written and, started again, asks for none of them a
second time. A line cut off by the kill is the last one, and is taken away.
"""

import fcntl
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankpo_fast.errors import InputError
from rankpo_fast.paths import check_writable, reason

FORMAT = 1
Answer = dict[str, Any]


def question_key(*parts: Any) -> str:
    """sha256 in hex digits of all that decides an answer: the prompt, the judge, the texts in the
    order in which they are shown."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """An open journal; several threads may add answers.

    Args:
        asked: what decides the answers beside their texts, as the prompt: a journal in which it
            differs is refused.
        writes: False: nothing is written, and another process may have it open.

    Raises InputError where another process has it open, it is damaged, cannot be written, or was
    asked something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, writes: bool = True):
        self.path, self._asked, self._writes = path, asked, writes
        if writes:
            check_writable("the journal", path)
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            there = path if writes or path.exists() else Path(os.devnull)
            self._file = there.open("ab+" if writes else "rb")
        except OSError as error:
            raise InputError(f"{path}: {reason(error)}") from None
        try:
            if writes:
                self._hold()
            self.answers = self._read()
        except BaseException:
            self._file.close()
            raise
        self._keys = {answer["key"] for answer in self.answers}
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Returns once it is on the disk; raises OSError. `answer` must have a "key"."""
        with self._lock:
            self._append([answer])
            self.answers.append(answer)
            self._keys.add(answer["key"])

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process writes this journal") from None

    def _read(self) -> list[Answer]:
        self._file.seek(0)
        lines = self._file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            if self._writes:
                warnings.warn(f"{self.path}:{len(lines)}: cut off in the middle, taken away",
                              stacklevel=4)  # fmt: skip
                self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        rows = [self._parsed(line, number) for number, line in enumerate(lines, 1)]
        head, *answers = rows or [{"journal": FORMAT}]
        if not answers and head.get("journal") == FORMAT:  # of a run that asked nothing, or of none
            if self._writes:
                self._file.truncate(0)
                self._append([{"journal": FORMAT, "asked": self._asked}])
            return []
        self._check_head(head)
        for number, answer in enumerate(answers, 2):
            if not isinstance(answer.get("key"), str):
                raise InputError(f"{self.path}:{number}: an answer without its key")
        return answers

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}:{number}: damaged: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{self.path}:{number}: damaged: no JSON object")
        return row

    def _check_head(self, head: dict[str, Any]) -> None:
        if head.get("journal") != FORMAT:
            raise InputError(f"{self.path}: no journal of this version: give another name")
        given = head.get("asked", {})
        if not isinstance(given, dict):
            raise InputError(f"{self.path}:1: damaged: no object of what was asked")
        for name in sorted(given.keys() | self._asked.keys()):
            was, is_now = given.get(name), self._asked.get(name)
            if was != is_now:
                raise InputError(f"{self.path}: its answers were asked with {name} {was!r}, now it "
                                 f"is {is_now!r}: give another --journal")  # fmt: skip

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
