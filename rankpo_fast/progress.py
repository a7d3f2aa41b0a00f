"""How far long work has come, on stderr: a bar on a terminal, else a line now and then.

What is done within two seconds says nothing.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

from rankpo_fast import signals

DELAY = 2.0  # seconds before the first word
PAUSE, SHARE = 10.0, 0.1  # a line after so many seconds and so much of the whole
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"


def on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress(label: str | None, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """What is yielded takes the number done since it was called last, and asks for signals.

    Args:
        label: what is going on; None: nothing is said.
        unit: what is counted, in the singular.
    """
    if label is None or os.environ.get("RANK", "0") != "0":
        yield lambda count: signals.ask()
    elif on_terminal():
        with tqdm(total=total, desc=label, unit=unit, delay=DELAY, bar_format=BAR) as bar:
            yield _asking(bar.update)
    else:
        lines = _Lines(label, total, unit)
        yield _asking(lines.update)
        lines.end()


def _asking(update: Callable[[int], object]) -> Callable[[int], None]:
    def asking(count: int) -> None:
        update(count)
        signals.ask()

    return asking


class _Lines:
    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total, self._unit = label, total, unit
        self._began = self._said = time.monotonic()
        self._done = 0
        self._due = 0.0  # the share of the whole that the next line waits for

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        pause = PAUSE if self._due else DELAY
        if now - self._said >= pause and self._due <= self._done < self._total:
            self._said, self._due = now, self._done + SHARE * self._total
            left = (now - self._began) / self._done * (self._total - self._done)
            self._say(f"{self._done:,} of {self._total:,} {self._unit}s, {duration(left)} left")

    def end(self) -> None:
        seconds = time.monotonic() - self._began
        if seconds >= DELAY:
            self._say(f"{self._done:,} {self._unit}s in {duration(seconds)}")

    def _say(self, text: str) -> None:
        print(f"{self._label}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """As hours:minutes:seconds."""
    return str(timedelta(seconds=round(seconds)))
