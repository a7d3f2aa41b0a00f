"""Measuring: implementations interleaved in one run, medians and percentiles, peak memory, error
against fp64.

Times are compared within a round, so that a slow minute of a shared machine hits all
implementations alike.
"""

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .questions import (
    DOES_NOT_TAKE,
    NEEDS_GPU,
    NOT_INSTALLED,
    OURS,
    OUT_OF_MEMORY,
    OUT_OF_RESOURCE,
    Row,
    Settings,
)

BUSY_S = 0.01  # of runs that are timed as one, which hides what the first of them costs
MOST_RUNS = 20
LACK = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch's words without its class
Run = Callable[[], Sequence[Tensor]]  # one forward and backward; returns the loss and the gradients


class NeedsGPU(Exception):
    """Raised by an implementation that does not run on the CPU."""


class Unfit(Exception):
    """Raised by an implementation for inputs that it does not take, as the message says."""


@dataclass(frozen=True)
class Case:
    """Who answers at which cost, and what the answer must be."""

    device: str
    implementations: Mapping[str, Run]
    lower_bound: str  # the implementation that ratios are taken against
    flops: float  # that any implementation has to do; and the bytes it has to move
    bytes: float
    keep_bytes: int = 0  # inputs' gradients, which every implementation must make
    errors: Mapping[str, float] = field(default_factory=dict)  # NaN where it could not be told
    converged: Mapping[str, float] = field(default_factory=dict)  # on data of a finished training
    gate: float = math.inf  # the error above which a time of ours means nothing
    dtype: torch.dtype = torch.float32  # of the products


def measure(case: Case, settings: Settings) -> tuple[Row, ...]:
    """A row of each implementation that is asked for; ours are not timed above the gate, and what
    memory or an error stops is a row that says so. Where that is the lower bound, the others have
    no ratio."""
    names = [n for n in case.implementations if n == case.lower_bound or settings.takes(n)]
    errors: dict[str, dict[str, Any]] = {
        name: {
            "error": _known(case.errors.get(name)),
            "converged": _known(case.converged.get(name)),
        }
        for name in names
    }
    notes: dict[str, str] = {}
    peaks, repeats = {}, {}
    evict = evictor(case)
    for name in names:
        run = case.implementations[name]
        if (note := above_the_gate(case, name)) is not None:
            notes[name] = note
            with noting(name, notes):  # what it raises says more than that it has no error
                run()
            continue
        with noting(name, notes):
            peaks[name] = peak_bytes_of(run, case.device) - case.keep_bytes  # and a warm-up
            once = seconds_of(run, case.device)
            repeats[name] = max(1, min(MOST_RUNS, int(BUSY_S / once)))
    hot: dict[str, list[float]] = {name: [] for name in peaks}
    cold: dict[str, list[float]] = {name: [] for name in peaks}
    stop = time.perf_counter() + settings.limit_s
    for number in range(settings.rounds):
        for name in turned(list(peaks), number):
            run = case.implementations[name]
            with noting(name, notes):
                hot[name].append(seconds_of(run, case.device, repeats[name]))
                if evict is not None:
                    cold[name].append(seconds_of(run, case.device, before=evict))
        if time.perf_counter() > stop:
            break

    of_bound = [] if case.lower_bound in notes else hot[case.lower_bound]
    rows = []
    for name in names:
        if name in notes:
            rows.append(Row(name, notes[name], **errors[name]))
            continue
        found = _times(hot[name], cold[name], of_bound)
        found |= _shares(case, found["seconds"], settings)
        if name != case.lower_bound:
            found["peak_mib"] = max(0, peaks[name]) / 2**20
        rows.append(Row(name, **errors[name], **found))
    return tuple(rows)


def turned(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins with another implementation."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the 20th and the 80th; of up to four values the least and the most."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]


def spread(values: Sequence[float], *names: str) -> dict[str, float]:
    """Percentiles by the names of their fields: the median, the 20th, the 80th."""
    return dict(zip(names, percentiles(values), strict=True))


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Of value ~ size ** exponent, fitted to the upper half of the sizes that have a value, two at
    least; None where there are fewer, or a value is 0."""
    upper = list(zip(sizes, values, strict=False))[-max(2, (len(values) + 1) // 2) :]
    if len(upper) < 2 or min(value for _, value in upper) <= 0:
        return None
    logarithms = ([math.log(x) for x in column] for column in zip(*upper, strict=True))
    return statistics.linear_regression(*logarithms).slope


@contextlib.contextmanager
def noting(name: str, notes: dict[str, str]) -> Iterator[None]:
    """What stops an implementation is its note: a machine with a GPU is too rare to stop for it."""
    try:
        yield
    except ModuleNotFoundError as error:
        notes[name] = f"{error.name} {NOT_INSTALLED}"
    except NeedsGPU:
        notes[name] = NEEDS_GPU
    except Unfit as error:
        notes[name] = f"{DOES_NOT_TAKE} {error}"
    except Exception as error:
        lack = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if lack or any(words in str(error) for words in LACK):
            notes[name] = OUT_OF_MEMORY
        elif str(error).startswith(OUT_OF_RESOURCE):
            notes[name] = str(error)[:90]
        else:
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]


def relative_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error among loss and gradients; inf if one is not finite."""
    pairs = zip(ours, exact, strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def above_the_gate(case: Case, name: str) -> str | None:
    if not name.startswith(OURS):
        return None  # a peer is timed whatever its error, which stands beside
    worst = [e for e in (case.errors.get(name), case.converged.get(name)) if e is not None]
    if all(error <= case.gate for error in worst):
        return None
    return f"error {max(worst):.1e} above the gate {case.gate:.1e}"


def _known(error: float | None) -> float | None:
    return None if error is None or math.isnan(error) else error


def _times(hot: list[float], cold: list[float], lower_bound: list[float]) -> dict[str, Any]:
    """lower_bound: its seconds of the same rounds, or none."""
    found: dict[str, Any] = {**spread(hot, "seconds", "low", "high")}
    if lower_bound:
        ratios = [seconds / of_bound for seconds, of_bound in zip(hot, lower_bound, strict=True)]
        found |= spread(ratios, "ratio", "ratio_low", "ratio_high") | {"ratios": tuple(ratios)}
    return found | {"cold": statistics.median(cold) if cold else None}


def _shares(case: Case, seconds: float, settings: Settings) -> dict[str, Any]:
    """Of what this machine reaches. Copies are told apart from products by having no flops."""
    gemm = settings.rates.gemm.get(str(case.dtype).removeprefix("torch."))
    return {
        "gemm": case.flops / seconds / gemm if case.flops and gemm else None,
        "copy": case.bytes / seconds / settings.rates.copy,
    }


@functools.cache
def cache_bytes(device: str) -> int:
    """Of the last level of caches."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    found = [path.read_text().strip() for path in sizes]
    return max((int(size[:-1]) * units[size[-1]] for size in found), default=32 * 2**20)


def evictor(case: Case) -> Callable[[], object] | None:
    """Empties the caches; None where a run does so itself: what it reads and writes is larger."""
    size = cache_bytes(case.device)
    if case.bytes > 2 * size:
        return None
    other = torch.empty(2 * size, dtype=torch.uint8, device=case.device)
    return lambda: other.add_(1)


def seconds_of(
    run: Run, device: str, repeats: int = 1, before: Callable[[], object] = lambda: None
) -> float:
    """Of one run, over `repeats` of them, after `before`; a GPU is still busy with that when runs
    are launched, so that it does not wait for the first."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before()
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / repeats / 1e3
    before()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def peak_bytes_of(run: Run, device: str) -> int:
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
    return status_bytes("VmRSS")


def peak_resident() -> int:
    """The most bytes this process had resident since `mark_resident`."""
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(key))
    return int(line.split()[1]) * 1024
