"""What a user can put right: bad data, bad options, a bad path, a model with broken weights; and
what ends a training before its time."""

import json
import os
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankpo_fast.data.memory import Source

EXAMPLES = 3  # texts that a message names
# Variables of the environment whose values are nobody else's, if they are no mere word.
SECRET_NAMES = re.compile("(KEY|TOKEN|SECRET|PASSWORD)$")
SHORTEST_SECRET = 8


def without_secrets(text: str) -> str:
    """The text without keys and tokens of the environment, tokens of the hub, and passwords in
    addresses: libraries may repeat what a server did not take."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"[{name}]")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "[token]", text)
    return re.sub(r"(\w://)[^/\s@]*:[^/\s@]*@", r"\1[password]@", text)


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and what would work.

    Attributes:
        name: the setting, flag or keyword, that is at fault, else the first that the message
            names; None where it names none, as of a row of data.
        copied: whether another process of the run has raised it, which says it.
    """

    copied = False

    def __init__(self, message: str, name: str | None = None):
        super().__init__(without_secrets(message))
        first = re.search(r"--(\w+)", message)
        self.name = name or (first and first[1])


class TrainingStopped(Exception):
    """SIGTERM or Ctrl-C ended a training after the step under way; all that was done is saved.

    Attributes:
        signal: which.
        step: the last step done.
        exit_code: as shells expect it, 143 or 130.
    """

    def __init__(self, message: str, signal: signal.Signals, step: int):
        super().__init__(message)
        self.signal, self.step, self.exit_code = signal, step, 128 + signal


class QuestionsLeft(Exception):
    """Questions to judges have no answer; all answers are in the journal.

    Attributes:
        exit_code: 1, or after a signal 143 or 130.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class NotSaved(OSError):
    """The last checkpoint of a run could not be written, which all ranks raise; its model was."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, or on the host, for which torch has no error of its own."""
    if isinstance(error, RuntimeError):
        words = (
            "can't allocate memory",
            "not enough memory",
            "bad_alloc",
            "Cannot allocate memory",
            "CUDA error: out of memory",  # of pinned memory
            # What libraries take beside torch's allocator, which may have left nothing.
            "Triton Error [CUDA]: out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUDNN_STATUS_ALLOC_FAILED",
        )
        return type(error).__name__ == "OutOfMemoryError" or any(w in str(error) for w in words)
    return isinstance(error, MemoryError)


class RankLost(RuntimeError):
    """Another process of the run is gone, which has said why: this one cannot go on alone."""


class NotFiniteVectors(InputError):
    """Texts whose vectors hold NaN or inf.

    Attributes:
        texts: they, or the first of them.
    """

    def __init__(
        self,
        count: int,
        total: int,
        texts: Sequence[str],
        weights: Sequence[str],
        places: Mapping[str, str] | None = None,
    ):
        """
        Args:
            count: such texts, of `total`.
            weights: the names of the model's tensors that are not finite either.
            places: "path:line" of texts, where known.
        """
        self.texts = texts[:EXAMPLES]
        self._facts = (count, total, self.texts, weights)
        named = [f"{(places or {}).get(text, '')} {_start(text)}".lstrip() for text in self.texts]
        more = f" and {count - len(named):,} more" if named and count > len(named) else ""
        what = f"{count:,} of {total:,} texts have vectors that are not finite"
        if named:
            what += f": {', '.join(named)}{more}"
        if weights:
            what += f"; nor are weights of the model: {', '.join(weights)}"
        elif count == total:
            what += "; the model's weights are finite, but its states overflow"
        super().__init__(what)

    def located(self, paths: Iterable["Path | Source"]) -> "NotFiniteVectors":
        """The same, with file and line of the texts, where they stand in one of the sources."""
        from rankpo_fast.data.jsonl import find_texts

        return NotFiniteVectors(*self._facts, places=find_texts(paths, self.texts))


def _start(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)
