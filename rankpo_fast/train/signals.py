"""SIGTERM and Ctrl-C end a run after the step that is under way, the same one on all ranks."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from rankpo_fast.ranks import Ranks

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request to stop after the step; a second Ctrl-C acts at once.

    Signals that are ignored stay so, and runs in other threads are left alone.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def agreed(self, ranks: Ranks, save: bool = False) -> tuple[signal.Signals | None, bool]:
        """What any rank was asked for, since all stop after the same step; and whether the first
        one is for `save`, since clocks differ."""
        stop, saves = ranks.highest([self.requested or 0, save and ranks.first])
        return signal.Signals(stop) if stop else None, bool(saves)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # reentrant
            signal.signal(number, self._previous[self.requested])
