"""SIGTERM and Ctrl-C end a run after the step that is under way, the same one on all ranks; so do
SIGUSR1 and SIGHUP, by which schedulers tell that time is up."""

import os
import signal
from typing import NamedTuple

from rankpo_fast.ranks import Ranks
from rankpo_fast.signals import Signals


class Agreed(NamedTuple):
    """By all ranks."""

    stop: signal.Signals | None  # to end the program for
    save: bool
    end: bool  # whether this step is the last


class StopSignal(Signals):
    """Turns a signal into a request to stop after the step; a second Ctrl-C acts at once."""

    def agreed(self, ranks: Ranks, *, save: bool = False, end: bool = False) -> "Agreed":
        """What any rank was asked for, since all stop after the same step; and what the first one
        is for, since clocks differ and callbacks are its alone."""
        stop, saves, ends = ranks.highest(
            [self.requested or 0, save and ranks.first, end and ranks.first]
        )
        return Agreed(signal.Signals(stop) if stop else None, bool(saves), bool(ends))

    def noted(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # reentrant
            signal.signal(number, self.at_once(number))
