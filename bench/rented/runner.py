"""Runs the steps, each in a process of its own that has a deadline.

A process ends with its step, with its time, or with the GPU: after an illegal access nothing runs
in it any more. It is forked from this one, which has imported everything and never touches the GPU,
since a process forked after that could not use it. What a part answers comes through a pipe and is
written before the next one counts.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from .state import CUT_OFF, DONE, NOT_REACHED, Found, Record

PART_S = 60.0  # that a part may take, unless it says otherwise: what hangs must not take all
END_S = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[], Found]
    seconds: float = PART_S


@dataclass(frozen=True)
class Step:
    """`parts(record, deadline)`, made when the step's turn has come: what earlier ones have
    found and when (of time.monotonic()) it must have ended can be in them."""

    name: str
    seconds: float  # of one call
    parts: Callable[[Record, float], Sequence[Part]]


class Stopped(BaseException):
    """By a signal: what has ended is kept."""


@dataclass
class Runner:
    record: Record
    commit: str
    log: Path
    stop: float  # of time.monotonic(), for the whole call
    alive: Callable[[], str | None] = lambda: None  # in a step's process: why no more can run

    def run(self, steps: Sequence[Step]) -> int:
        """The exit code: 1 if a part of this call or of those before it is red."""
        for step in steps:
            self.record.expect(step.name)
        self.record.write()
        with _signals():
            try:
                for step in steps:
                    self._run(step)
            except Stopped as signalled:
                self.say(f"stopped by {signalled}: what has ended is in {self.record.path}")
                return 1
        return 1 if self.record.red else 0

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def _run(self, step: Step) -> None:
        if time.monotonic() >= self.stop:
            return
        deadline = min(time.monotonic() + step.seconds, self.stop)
        parts = {part.name: part for part in step.parts(self.record, deadline)}
        self.record.declare(step.name, list(parts))
        self.record.write()
        left = self.record.left(step.name, list(parts), self.commit)
        while left and time.monotonic() < deadline:
            left = self._in_a_process(step, [parts[name] for name in left], deadline)
        state = self.record.steps[step.name]["state"]
        if state in (CUT_OFF, NOT_REACHED):
            self.say(f"{step.name}: {state}, left: {', '.join(left)}"[:300])

    def _in_a_process(self, step: Step, parts: list[Part], deadline: float) -> list[str]:
        """What is left when the process has ended, however it did."""
        here, there = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=_work, args=(there, here, parts, self.log, self.alive))
        process.start()
        there.close()  # so that the process's end is the pipe's
        left, current = [part.name for part in parts], parts[0]
        began = time.monotonic()
        try:
            while left:
                current = parts[-len(left)]
                began = time.monotonic()
                until = min(began + current.seconds, deadline)
                answer = self._answer(here, process, until, current, deadline)
                if answer is None:
                    self.record.cut_off(step.name, current.name)
                    self.record.write()
                    break
                left, (found, going_on) = left[1:], answer
                self._keep(step, current, found, time.monotonic() - began)
                if not going_on:
                    break
                with contextlib.suppress(OSError):  # it has died, as the next answer will say
                    here.send(None)
        except Stopped:
            self.record.cut_off(step.name, current.name)
            self.record.write()
            raise
        finally:
            _end(process)
        return left

    def _keep(self, step: Step, part: Part, found: Found, seconds: float) -> None:
        self.record.add(step.name, part.name, found, seconds, self.commit)
        self.record.write()
        words = f"RED: {found.reason}" if found.reason else found.says or DONE
        self.say(f"{step.name}: {part.name}: {words[:200]} ({seconds:.1f} s)")

    def _answer(
        self, pipe: Connection, process: Any, until: float, part: Part, deadline: float
    ) -> tuple[Found, bool] | None:
        """(what the part answers, whether its process goes on); None if the step's time is up."""
        if not pipe.poll(max(0.0, until - time.monotonic())):
            if until >= deadline:
                return None
            return Found(red=f"took longer than {part.seconds:g} s"), False
        try:
            return pipe.recv()
        except EOFError:
            process.join(END_S)
            return Found(red=f"its process died: exit code {process.exitcode}"), False


def _work(
    pipe: Connection, other: Connection, parts: Sequence[Part], log: Path, alive: Callable
) -> None:
    """In the step's process: sends (what a part answers, whether it goes on) of each."""
    os.setsid()  # so that it can be ended with all that it starts
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    other.close()
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)  # whatever they were before
    for part in parts:
        print(f"-- {part.name}", flush=True)
        try:
            found = part.run()
        except Exception as error:
            traceback.print_exc()
            found = Found(red=f"{type(error).__name__}: {error}"[:300])
        lost = alive()
        if lost is not None:
            found = Found(found.results, found.facts, found.says, f"{found.reason} {lost}".strip())
        sys.stdout.flush()
        pipe.send((found, lost is None))
        if lost is not None:
            break
        pipe.recv()  # it is written
    pipe.close()


def _end(process: Any) -> None:
    """It and all that it has started."""
    for number, wait in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        if number == signal.SIGTERM:
            process.join(0.5)  # most have ended, or do now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        process.join(wait)
    process.kill()  # if it had no group of its own yet


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
