"""How do time and memory grow, and where does each contender fall over?

One size of InfoNCE, forward and backward, doubles until a contender runs out of memory or takes too
long. On a CPU each runs in a process of its own, whose memory has a limit: no machine is brought
down, and a contender falls over where it would on a machine of that size. M queries, N passages, D
dims.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rankpo_fast import info_nce_loss

from .apart import answers_here, answers_of_a_process
from .cases import loss
from .measure import BUSY_S, MOST_RUNS, Run, exponent, peak_bytes_of, seconds_of
from .peers import PEERS, SCALE, Peer
from .questions import OURS, OUT_OF_MEMORY, Question, Result, Row, Settings, Shape

CONTENDERS: dict[str, Peer | None] = {OURS: None, **PEERS}
# A CPU's minutes go to those that differ there, and not to compilers.
ON_A_CPU = [
    OURS, "torch cross_entropy", "torch linear_cross_entropy, chunked",
    "sentence-transformers, cached",
]  # fmt: skip
M_MMAP_THRESHOLD = -3  # of malloc.h
Reached = tuple[float, int]  # seconds and bytes above inputs and gradients, of a run at one size


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
    "cuda": dict.fromkeys(("quick", "default", "full"), Limits(5.0)),
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
            "default": Growth(1024, 32768, {"N": 32768, "D": 64}),
            "full": Growth(1024, 65536, {"N": 65536, "D": 128}),
        },
        "cuda": {
            "default": Growth(2048, 131072, {"N": 131072, "D": 1024}),
            "full": Growth(2048, 524288, {"N": 524288, "D": 1024}),
        },
    },
    "N": {
        "cpu": {
            "quick": Growth(2048, 8192, {"M": 512, "D": 64}),
            "default": Growth(4096, 131072, {"M": 4096, "D": 64}),
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
            "default": Growth(64, 4096, {"M": 2048, "N": 2048}),
            "full": Growth(64, 4096, {"M": 4096, "N": 4096}),
        },
        "cuda": {
            "default": Growth(128, 8192, {"M": 16384, "N": 16384}),
            "full": Growth(128, 16384, {"M": 16384, "N": 16384}),
        },
    },
}


def grow(
    make: Callable[[int], tuple[Run, int]], sizes: Sequence[int], limit_s: float, device: str
) -> Iterator[Reached]:
    """Reached, size by size, until a run takes longer than `limit_s`, which is still told.

    make: a run at a size, and the bytes of its gradients, which are no contender's own.
    """
    make(sizes[0])[0]()  # libraries and kernels load, compile and allocate once
    for size in sizes:
        run, gradients = make(size)
        peak = max(0, peak_bytes_of(run, device) - gradients)  # and a warm-up at this size
        seconds = seconds_of(run, device)
        if seconds < BUSY_S:
            seconds = seconds_of(run, device, min(MOST_RUNS, math.ceil(BUSY_S / seconds)))
        yield seconds, peak
        if seconds > limit_s:
            return


def of_loss(
    contender: str, axis: str, shape: Shape, sizes: Sequence[int], limit_s: float, device: str
) -> Iterator[Reached]:
    """Of the loss over sizes of an axis, what shape says being the others.

    In a process of its own on a CPU: there blocks are given back when freed, as glibc does only
    from 32 MiB on. Or peaks of smaller sizes were those of the heap, and growth had a bend there.
    """

    def make(size: int) -> tuple[Run, int]:
        at = shape | dict.fromkeys(axis.split("="), size)
        q, p, labels = loss.draw(at["M"], at["N"], at["D"], device, loss.dtype_of(at))
        if (peer := CONTENDERS[contender]) is None:
            value = functools.partial(info_nce_loss, q, p, labels, scale=SCALE)
        else:
            value = functools.partial(peer, q, p, labels, symmetric=False)
        return loss.forward_backward(value, [q, p]), q.nbytes + p.nbytes

    if device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    yield from grow(make, sizes, limit_s, device)


def row(
    contender: str, axis: str, sizes: Sequence[int], reached: Sequence[Reached], note: str,
    limit_s: float,
) -> Row:  # fmt: skip
    """note: what stopped the contender; "" if nothing did.

    To fall over is a result, but not for an error, nor before the first size.
    """
    if reached and reached[-1][0] > limit_s:
        reached, note = reached[:-1], f"over {limit_s:g} s"
    times, peaks = ([one[place] for one in reached] for place in (0, 1))
    return Row(
        contender,
        note if not reached or not note.startswith(("over", OUT_OF_MEMORY)) else "",
        axis=axis,
        sizes=tuple(sizes),
        times=tuple(times),
        peaks=tuple(peak / 2**20 for peak in peaks),
        exponent=exponent(sizes, times),
        memory_exponent=exponent(sizes, peaks),
        falls_over=f"{sizes[len(reached)]}: {note}" if note else None,
    )


def answer(axis: str, name: str, asks: str, shape: Shape, settings: Settings) -> Result:
    sizes = GROWTHS[axis][settings.device][settings.level].sizes
    limits = LIMITS[settings.device][settings.level]
    rows = []
    for contender in contenders(settings.device):
        if not settings.takes(contender):
            continue
        asked = (of_loss, contender, axis, shape, sizes, limits.seconds, settings.device)
        if limits.mib is None:
            reached, note = answers_here(*asked)
        else:
            reached, note = answers_of_a_process(*asked, memory=limits.mib * 2**20)
        rows.append(row(contender, axis, sizes, reached, note, limits.seconds))
    about = {"seconds at most": limits.seconds, "MiB at most": limits.mib}
    return Result(name, "scaling", asks, shape, tuple(rows), about=about)


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
