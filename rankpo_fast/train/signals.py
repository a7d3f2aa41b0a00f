"""SIGTERM and Ctrl-C end a run after the step that is under way, the same one on all ranks."""

import os
import signal
import threading
from types import FrameType
from typing import Any, NamedTuple

from rankpo_fast.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Agreed(NamedTuple):
    """By all ranks."""

    stop: signal.Signals | None  # to end the program for
    save: bool
    end: bool  # whether this step is the last


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request to stop after the step; a second Ctrl-C acts at once.

    Signals that are ignored stay so, and runs in other threads are left alone.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def agreed(self, ranks: Ranks, *, save: bool = False, end: bool = False) -> "Agreed":
        """What any rank was asked for, since all stop after the same step; and what the first one
        is for, since clocks differ and callbacks are its alone."""
        stop, saves, ends = ranks.highest(
            [self.requested or 0, save and ranks.first, end and ranks.first]
        )
        return Agreed(signal.Signals(stop) if stop else None, bool(saves), bool(ends))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # reentrant
            signal.signal(number, self._previous[self.requested])
