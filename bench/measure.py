"""Measuring: contenders interleaved in one run, medians of ratios, peak memory, error against fp64.

Times are compared within a round, so that a slow minute of a shared machine hits all contenders
alike.
"""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUSY_S = 0.01  # a card is timed over runs of so long
Run = Callable[[], Sequence[Tensor]]  # one forward and backward; returns the loss and the gradients


@dataclass(frozen=True)
class Case:
    """One question: who answers it at which shape, and what the answer must be."""

    name: str
    question: str
    shape: dict[str, int]
    device: str
    contenders: dict[str, Run]
    floor: str  # the contender that ratios are taken against
    keep_bytes: int  # inputs' gradients, which every contender must make
    errors: dict[str, float] = field(default_factory=dict)  # NaN where it could not be told
    gate: float = math.inf  # the error above which a time of ours means nothing
    peers: frozenset[str] = frozenset()  # timed whatever their error


@dataclass(frozen=True)
class Row:
    """One contender's result; seconds and ratio are None where it gave none, and `note` says
    why."""

    case: str
    contender: str
    seconds: float | None
    ratio: float | None
    low: float | None  # the 20th and 80th percentile of the ratio
    high: float | None
    peak_mib: float | None  # above inputs and gradients
    error: float | None
    note: str = ""


def measure(case: Case, rounds: int, limit_s: float = math.inf) -> list[Row]:
    """Rows of all contenders, after so many rounds or seconds; those with a red gate are not timed,
    those that memory or an error stops are a row that says so."""
    notes, peaks, repeats = {}, {}, {}
    for name, run in case.contenders.items():
        error = case.errors.get(name, 0.0)
        if name not in case.peers and not error <= case.gate:
            notes[name] = f"error {error:.1e} above the gate {case.gate:.1e}"
            continue
        with noting(name, notes):
            peaks[name] = _peak_bytes(run, case.device) - case.keep_bytes  # and a warm-up
            if case.device == "cuda":
                once = _seconds(run, case.device)
                repeats[name] = max(1, min(20, int(BUSY_S / once)))
    seconds = {name: [] for name in peaks}
    stop = time.perf_counter() + limit_s
    for number in range(rounds):
        order = list(peaks)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            with noting(name, notes):
                run = case.contenders[name]
                seconds[name].append(_seconds(run, case.device, repeats.get(name, 1)))
        if time.perf_counter() > stop:
            break

    if case.floor in notes:
        notes = {name: f"no floor: {notes[case.floor]}" for name in peaks} | notes
    rows = []
    for name in case.contenders:
        error = case.errors.get(name)
        if name in notes:
            rows.append(Row(case.name, name, *[None] * 5, error, notes[name]))
            continue
        ratios = sorted(
            ours / floor for ours, floor in zip(seconds[name], seconds[case.floor], strict=True)
        )
        low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        median = statistics.median
        peak = None if name == case.floor else max(0, peaks[name]) / 2**20
        rows.append(
            Row(case.name, name, median(seconds[name]), median(ratios), low, high, peak, error)
        )
    return rows


@contextlib.contextmanager
def noting(name: str, notes: dict[str, str]) -> Iterator[None]:
    """What stops a contender becomes its note: a machine with a card is too rare to stop for it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        notes[name] = "out of memory"
    except Exception as error:
        notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]


def relative_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error among loss and gradients."""
    pairs = zip(ours, exact, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def _seconds(run: Run, device: str, repeats: int = 1) -> float:
    """Of one run; a card is given `repeats` of them, which hide what the host takes for the
    first."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / repeats / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_bytes(run: Run, device: str) -> int:
    """The most memory in use during a run, above what was in use before it; results are held to its
    end."""
    run()  # libraries and kernels allocate once
    if device == "cpu":
        before = mark_resident()
        result = run()
        peak = peak_resident() - before
        del result
        return peak
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    del result
    return torch.cuda.max_memory_allocated() - before


def mark_resident() -> int:
    """Bytes this process has resident now, from where `peak_resident` starts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed buffers would count as in use before
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # sets the high-water mark VmHWM to what is resident now
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes this process had resident since `mark_resident`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(key))
    return int(line.split()[1]) * 1024
