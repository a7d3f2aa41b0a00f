"""How do time and memory grow, and where does each contender fall over?

One size of InfoNCE, forward and backward, doubles until a contender runs out of memory or takes too
long. On a CPU each runs in a process of its own, whose memory has a limit: no machine is brought
down, and a contender falls over where it would on a machine of that size. M queries, N passages, D
dims.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rankpo_fast import info_nce_loss

from .apart import answers_here, answers_of_a_process
from .cases import loss
from .measure import BUSY_S, MOST_RUNS, Run, exponent, peak_bytes_of, seconds_of
from .peers import PEERS, SCALE
from .questions import OURS, OUT_OF_MEMORY, Question, Result, Row, Settings, Shape

CONTENDERS = {
    OURS: functools.partial(info_nce_loss, scale=SCALE),
    **{name: functools.partial(peer, symmetric=False) for name, peer in PEERS.items()},
}
# A CPU's minutes go to those that differ there.
ON_A_CPU = [OURS, "torch cross_entropy", "torch linear_cross_entropy, chunked"]
OVER = "over"
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Growth:
    """Sizes from `first` to `last`, each twice the one before; the others stay as they are."""

    first: int
    last: int
    fixed: dict[str, int]

    @property
    def sizes(self) -> tuple[int, ...]:
        count = (self.last // self.first).bit_length()
        return tuple(self.first << number for number in range(count))


@dataclass(frozen=True)
class Limits:
    """When a contender has fallen over."""

    seconds: float  # that a run may take
    mib: int | None = None  # that a process may have; None: what the device has


LIMITS = {
    "cpu": {"quick": Limits(2.0, 160), "default": Limits(10.0, 2048), "full": Limits(60.0, 4096)},
    "cuda": {"quick": Limits(0.5), "default": Limits(1.0), "full": Limits(5.0)},
}
# By axis, what matters most first; by device and level.
GROWTHS: dict[str, dict[str, dict[str, Growth]]] = {
    "M=N": {
        "cpu": {
            "quick": Growth(512, 4096, {"D": 64}),
            "default": Growth(1024, 16384, {"D": 128}),
            "full": Growth(1024, 32768, {"D": 384}),
        },
        "cuda": {
            "quick": Growth(4096, 131072, {"D": 1024}),
            "default": Growth(2048, 262144, {"D": 1024}),
            "full": Growth(2048, 524288, {"D": 1024}),
        },
    },
    "M": {
        "cpu": {
            "quick": Growth(512, 2048, {"N": 2048, "D": 64}),
            "default": Growth(1024, 16384, {"N": 16384, "D": 64}),
            "full": Growth(1024, 32768, {"N": 32768, "D": 128}),
        },
        "cuda": {
            "default": Growth(2048, 131072, {"N": 131072, "D": 1024}),
            "full": Growth(2048, 524288, {"N": 524288, "D": 1024}),
        },
    },
    "N": {
        "cpu": {
            "quick": Growth(2048, 8192, {"M": 512, "D": 64}),
            "default": Growth(4096, 65536, {"M": 4096, "D": 64}),
            "full": Growth(4096, 262144, {"M": 4096, "D": 128}),
        },
        "cuda": {
            "default": Growth(16384, 1048576, {"M": 16384, "D": 1024}),
            "full": Growth(16384, 4194304, {"M": 16384, "D": 1024}),
        },
    },
    "D": {
        "cpu": {
            "quick": Growth(64, 256, {"M": 1024, "N": 1024}),
            "default": Growth(64, 2048, {"M": 2048, "N": 2048}),
            "full": Growth(64, 4096, {"M": 4096, "N": 4096}),
        },
        "cuda": {
            "default": Growth(128, 8192, {"M": 16384, "N": 16384}),
            "full": Growth(128, 16384, {"M": 16384, "N": 16384}),
        },
    },
}
Make = Callable[[int], tuple[Run, int]]  # a run at a size, and the bytes of its gradients


def times(make: Make, sizes: Iterable[int], device: str, limit_s: float) -> Iterator[float]:
    """Seconds of a run, size by size, up to the first that takes longer than `limit_s`."""
    for size in sizes:
        run, _ = make(size)
        run()  # libraries load, kernels compile
        seconds = seconds_of(run, device)
        if seconds < BUSY_S:
            seconds = seconds_of(run, device, min(MOST_RUNS, math.ceil(BUSY_S / seconds)))
        yield seconds
        if seconds > limit_s:
            return


def peaks(make: Make, sizes: Iterable[int], device: str) -> Iterator[float]:
    """MiB above inputs and gradients, size by size.

    On a CPU freed blocks are given back, as glibc does by itself from 32 MiB on: peaks of smaller
    sizes were the heap's. That takes time, and is for a process in which nothing is timed.
    """
    if device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    for size in sizes:
        run, gradients = make(size)
        yield max(0, peak_bytes_of(run, device) - gradients) / 2**20


@dataclass(frozen=True)
class LossAt:
    """A contender's loss, forward and backward, at a size of an axis; shape says the others."""

    contender: str
    axis: str
    shape: Shape
    device: str

    def __call__(self, size: int) -> tuple[Run, int]:
        at = self.shape | dict.fromkeys(self.axis.split("="), size)
        q, p, labels = loss.draw(at["M"], at["N"], at["D"], self.device, loss.dtype_of(at))
        value = functools.partial(CONTENDERS[self.contender], q, p, labels)
        return loss.forward_backward(value, [q, p]), q.nbytes + p.nbytes


def row(make: LossAt, sizes: Sequence[int], limits: Limits) -> Row:
    if limits.mib is None:
        ask = answers_here
    else:
        ask = functools.partial(answers_of_a_process, memory=limits.mib * 2**20)
    seconds, note = ask(times, make, sizes, make.device, limits.seconds)
    if seconds and seconds[-1] > limits.seconds:
        seconds, note = seconds[:-1], f"{OVER} {limits.seconds:g} s"
    mib, stopped = ask(peaks, make, sizes[: len(seconds)], make.device)
    return row_of(make.contender, make.axis, sizes, seconds[: len(mib)], mib, stopped or note)


def row_of(
    contender: str, axis: str, sizes: Sequence[int], seconds: Sequence[float],
    mib: Sequence[float], note: str,
) -> Row:  # fmt: skip
    """note: what stopped the contender; "" if nothing did. To fall over is a result, and no note
    but for an error, or where no size was reached."""
    fell = bool(seconds) and note.startswith((OVER, OUT_OF_MEMORY))
    return Row(
        contender,
        "" if fell else note,
        axis=axis,
        sizes=tuple(sizes),
        times=tuple(seconds),
        peaks=tuple(mib),
        exponent=exponent(sizes, seconds),
        memory_exponent=exponent(sizes, mib),
        falls_over=f"{sizes[len(seconds)]}: {note}" if note else None,
    )


def answer(axis: str, name: str, asks: str, shape: Shape, settings: Settings) -> Result:
    sizes = GROWTHS[axis][settings.device][settings.level].sizes
    limits = LIMITS[settings.device][settings.level]
    rows = tuple(
        row(LossAt(contender, axis, shape, settings.device), sizes, limits)
        for contender in contenders(settings.device)
        if settings.takes(contender)
    )
    about = {"seconds at most": limits.seconds, "MiB at most": limits.mib}
    return Result(name, "scaling", asks, shape, rows, about=about)


def contenders(device: str) -> list[str]:
    return ON_A_CPU if device == "cpu" else list(CONTENDERS)


def question(axis: str) -> Question:
    def shapes(device: str, level: str) -> list[Shape]:
        growth = GROWTHS[axis][device].get(level)
        return [] if growth is None else [growth.fixed | {"dtype": loss.DTYPE[device]}]

    name = f"scaling over {axis}"
    asks = f"How do time and memory grow with {axis}, and where does each fall over?"
    return Question(
        name, "scaling", asks, shapes, functools.partial(answer, axis, name, asks), contenders
    )


QUESTIONS = [question(axis) for axis in GROWTHS]
