"""Signals that end a program: SIGTERM, Ctrl-C, and those of schedulers, SIGUSR1 and SIGHUP.

They are noted where they come and asked for where a program can end: after a step, between
micro-batches, between parts of long work. An exception raised where they come would be lost in a
callback of C++, or abort the process there, as it does while torch is imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What SIGUSR1 and SIGHUP do unless somebody uses them.
UNUSED = (signal.SIG_DFL, None)
GRACE = 5.0  # seconds that a command has to ask


def not_ignored() -> list[signal.Signals]:
    """Those to take: what is ignored stays so, as SIGHUP behind nohup and Ctrl-C behind an &."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(KeyboardInterrupt):
    """A signal ended what was under way, between two parts of it.

    Attributes:
        exit_code: as shells expect it, 128 and the signal's number.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
        super().__init__(f"stopped by {self.signal.name}")


class Signals:
    """A context manager that notes those that come, in the main thread; others are left alone.
    Within another one, it stands for it."""

    current: "Signals | None" = None

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._outer: Signals | None = None

    def __enter__(self) -> Self:
        self._outer, Signals.current = Signals.current, self
        self.requested = None if self._outer is None else self._outer.requested
        if threading.current_thread() is threading.main_thread():
            for number in not_ignored():
                common = number in (signal.SIGTERM, signal.SIGINT) or self._outer is not None
                if common or signal.getsignal(number) in UNUSED:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        Signals.current = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.noted(self.requested)

    def noted(self, number: signal.Signals) -> None:
        """Called in the handler."""

    def at_once(self, number: signal.Signals) -> Any:
        """What ends a program that was told to end already: what was done before, but for another
        one's note, which would be taken once more."""
        return signal.SIG_DFL if self._outer is not None else self._previous[number]

    def ask(self) -> None:
        """Raise Interrupted, where that is this one's way to end."""


class EndsCommand(Signals):
    """Of a command that has nothing to save: what it writes is whole or not there.

    `ask` raises. Who does not ask in time ends all the same, and so after a second Ctrl-C.
    """

    def noted(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._end, args=(number,), daemon=True).start()

    def ask(self) -> None:
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _end(self, number: signal.Signals) -> None:
        time.sleep(GRACE)
        if Signals.current is self:
            print(f"rankpo-fast: error: stopped by {number.name}", file=sys.stderr, flush=True)
            os._exit(128 + number)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C waits: Python's own handler raises, and C++ that imports would abort."""
    handler, came = signal.getsignal(signal.SIGINT), list[int]()
    if (
        handler is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def requested() -> int:
    """The signal that came, 0 where none did."""
    return 0 if Signals.current is None else Signals.current.requested or 0


def ask() -> None:
    """Raise Interrupted if this process is to end: called between the parts of long work."""
    if Signals.current is not None:
        Signals.current.ask()
