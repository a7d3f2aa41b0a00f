"""What a call takes: of time, of memory, and how it ends; in a process of its own."""

import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from rankpo_fast import cli

RAN_AWAY = 60  # seconds


class Outcome(NamedTuple):
    code: int  # of the command line; less than 0: the signal that ended it
    said: str
    seconds: float
    mebibytes: float  # more than what was there

    @property
    def complaint(self) -> str:
        """Its last line."""
        return (self.said.strip().splitlines() or [""])[-1]


def command(
    *arguments: object, before: Callable[[], None] = lambda: None, killed_after: float = math.inf
) -> Outcome:
    """The command line, without the second that imports take: in a fork of this process.

    Args:
        before: is called there first, to set limits.
        killed_after: seconds until SIGKILL.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        # All forks share the semaphore of tqdm's own, and one that was killed holds it for ever.
        tqdm.set_lock(threading.RLock())
        signal.alarm(RAN_AWAY)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        code = 99
        try:
            reset_peak()
            start, began = peak(), time.monotonic()
            before()
            code = cli.main([str(argument) for argument in arguments])
            end = time.monotonic() - began, peak() - start
            os.write(write, b"\0" + pickle.dumps(end))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    kill = threading.Timer(min(killed_after, 2 * RAN_AWAY), os.kill, (child, signal.SIGKILL))
    kill.start()
    with open(read, "rb") as file:
        began = time.monotonic()
        content = file.read()
    kill.cancel()
    kill.join()  # before another process may have the number
    _, status = os.waitpid(child, 0)
    said, _, measured = content.partition(b"\0")
    seconds, more = pickle.loads(measured) if measured else (time.monotonic() - began, 0.0)
    return Outcome(os.waitstatus_to_exitcode(status), said.decode(), seconds, more)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> float:
    """MiB that the process had at most since."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
