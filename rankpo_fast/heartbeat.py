"""A rank that falls silent ends all: others would wait for it, as no connection of it closes.

Every rank says every few seconds, through torch's store, that it lives and where its program is. A
process that is stopped (SIGSTOP, a debugger, a machine that swaps or has lost its network) says
nothing. The others then say who was where, and end: by RankLost where they wait on the host, else,
as in the midst of a collective of the devices, without ceremony.

Silence is counted in own beats, not by the clock: a job that is suspended as a whole goes on.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from rankpo_fast.errors import RankLost

BEATS = 12  # in the time that a rank may be silent
LONGEST = 5.0  # seconds from beat to beat
GRACE = 5.0  # seconds for the program to end by itself
PACKAGE = Path(__file__).parent
FRAMES = 4  # that tell where a program is

_times = itertools.count()  # that this process has joined others, which all have as often


class Beat(NamedTuple):
    """What a rank says."""

    number: int  # 0: it has left
    place: str  # where its program is
    since: float  # seconds that it has been there


class Heartbeat:
    """A context manager, in which a thread tells and listens; all ranks must enter it.

    Args:
        timeout: seconds after whose silence a rank counts as lost.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self._rank, self._size, self._timeout = rank, size, timeout
        self._every = min(LONGEST, timeout / BEATS)
        self._main, self._left = threading.get_ident(), threading.Event()
        self._place, self._there_since = "", time.monotonic()
        self._silence = self._lost = ""  # why nobody must wait any more
        self._heard = 1, [Beat(1, "its start", 0.0)] * size
        store = dist.distributed_c10d._get_default_store()
        store = store.clone()  # type: ignore[attr-defined]  # others wait in that one
        self._store = dist.PrefixStore(f"rankpo_fast/{next(_times)}", store)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._talk, self._watch)]

    def __enter__(self) -> "Heartbeat":
        self._tell(1)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(self._every)

    def check(self) -> None:
        """Raise RankLost where a rank has fallen silent."""
        if self._silence:
            raise RankLost(f"rank {self._rank} stops, since {self._silence}")

    def _talk(self) -> None:
        """Tell and hear until the end; where its host is silent, a call never returns."""
        for number in itertools.count(2):
            left = self._left.wait(self._every)
            try:
                self._tell(0 if left else number)
                if left:
                    return
                told = self._store.multi_get([str(rank) for rank in range(self._size)])
                self._heard = number, [Beat(*json.loads(beat)) for beat in told]
            except RuntimeError as error:
                self._lost = f"torch's store is gone ({error})"
                return

    def _watch(self) -> None:
        silent_for = [0.0] * (self._size + 1)  # seconds; the last of the store
        last, (answers, beats) = time.monotonic(), self._heard
        while not self._left.wait(self._every):
            if self._lost:
                self._end(self._lost, [])
                return
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._every), now
            answers_before, before = answers, beats
            answers, beats = self._heard
            quiet = [beat.number and beat.number == was.number
                     for was, beat in zip(before, beats, strict=True)]  # fmt: skip
            for one, is_quiet in enumerate([*quiet, answers == answers_before]):
                silent_for[one] = silent_for[one] + passed if is_quiet else 0.0
            silent = [i for i, s in enumerate(silent_for) if s >= self._timeout - self._every]
            if silent:
                who = _ranks(silent)
                if self._size in silent:  # so that nobody is heard; it is mostly rank 0's process
                    silent, who = [0], "the process that has torch's store has been"
                why = f"{who} silent for {self._timeout:.0f} s (--rank_timeout)"
                self._end(why, beats, silent)
                return

    def _tell(self, number: int) -> None:
        self._store.set(str(self._rank), json.dumps(self._own(number)))

    def _own(self, number: int) -> Beat:
        place, now = self._where(), time.monotonic()
        if place != self._place:
            self._place, self._there_since = place, now
        return Beat(number, place, now - self._there_since)

    def _where(self) -> str:
        """The innermost functions of this package that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        places: list[str] = []
        while frame is not None and len(places) < FRAMES:
            code = frame.f_code
            if Path(code.co_filename).is_relative_to(PACKAGE):
                file = Path(code.co_filename).relative_to(PACKAGE)
                places.append(f"{code.co_name} ({file}:{frame.f_lineno})")
            frame = frame.f_back
        return " < ".join(places) or "code of others"

    def _end(self, why: str, beats: Sequence[Beat], silent: Sequence[int] = ()) -> None:
        """Say who was where, once, and leave the program a moment to end by itself."""
        self._silence = why
        alive = [rank for rank in range(self._size) if rank not in silent]
        if beats and self._rank == alive[0]:
            beats = [*beats[: self._rank], self._own(1), *beats[self._rank + 1 :]]
            lines = [
                f"  rank {rank}: "
                + ("has left" if beat.number == 0 else f"{beat.since:.0f} s in {beat.place}")
                + (", and then silent" if rank in silent else "")
                for rank, beat in enumerate(beats)
            ]
            print("\n".join([f"{why}. Ranks were here:", *lines]), file=sys.stderr, flush=True)
        if not self._left.wait(GRACE):
            error = f"rankpo-fast: error: rank {self._rank} stops, since {why}"
            print(error, file=sys.stderr, flush=True)
            os._exit(1)


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]} has been"
    return f"ranks {', '.join(map(str, numbers))} have been"
