"""How do time and memory grow, and what is the limit of each implementation?

One size of InfoNCE, forward and backward, doubles until an implementation runs out of memory or
takes too long: its limit is the first size that it does not reach. On a CPU each runs in a process
of its own, whose memory is bounded: no machine is brought down, and an implementation ends where it
would on a machine of that size. M queries, N passages, D dims.
"""

import ctypes
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankpo_fast import info_nce_loss

from .apart import answers_here, answers_of_a_process, in_a_process
from .cases import loss
from .measure import BUSY_S, MOST_RUNS, Run, exponent, peak_bytes_of, seconds_of
from .peers import PEERS, SCALE
from .questions import OURS, OUT_OF_MEMORY, Question, Result, Row, Settings, Shape
from .training.backbones import TINY
from .training.corpus import workplace
from .training.implementations import (
    Implementation,
    Measured,
    measure,
    one_graph,
    rankpo_fast,
    sentence_transformers,
)
from .training.steps import batches_of, task_of

IMPLEMENTATIONS = {
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
    fixed: Shape

    @property
    def sizes(self) -> tuple[int, ...]:
        count = (self.last // self.first).bit_length()
        return tuple(self.first << number for number in range(count))


@dataclass(frozen=True)
class Budget:
    """What an implementation may take; the size at which it takes more is its limit."""

    seconds: float  # that a run may take
    mib: int | None = None  # that a process may have; None: what the device has

    @property
    def bytes(self) -> int | None:
        return None if self.mib is None else self.mib * 2**20

    @property
    def about(self) -> dict[str, float | int | None]:
        return {"seconds at most": self.seconds, "MiB at most": self.mib}


BUDGETS = {
    "cpu": {"quick": Budget(2.0, 160), "default": Budget(10.0, 512), "full": Budget(60.0, 4096)},
    "cuda": {"quick": Budget(0.5), "default": Budget(1.0), "full": Budget(5.0)},
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
            "default": Growth(512, 4096, {"N": 16384, "D": 64}),
            "full": Growth(1024, 32768, {"N": 32768, "D": 128}),
        },
        "cuda": {
            "default": Growth(2048, 131072, {"N": 131072, "D": 1024}),
            "full": Growth(2048, 524288, {"N": 524288, "D": 1024}),
        },
    },
    "N": {
        "cpu": {
            "default": Growth(4096, 16384, {"M": 4096, "D": 64}),
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
            "default": Growth(64, 1024, {"M": 2048, "N": 2048}),
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
    """One's loss, forward and backward, at a size of an axis; shape says the other sizes."""

    implementation: str
    axis: str
    shape: Shape
    device: str

    def __call__(self, size: int) -> tuple[Run, int]:
        at = {**self.shape, **dict.fromkeys(self.axis.split("="), size)}
        q, p, labels = loss.draw(at["M"], at["N"], at["D"], self.device, loss.dtype_of(at))
        value = functools.partial(IMPLEMENTATIONS[self.implementation], q, p, labels)
        return loss.forward_backward(value, [q, p]), q.nbytes + p.nbytes


def row(make: LossAt, sizes: Sequence[int], budget: Budget) -> Row:
    if budget.mib is None:
        ask = answers_here
    else:
        ask = functools.partial(answers_of_a_process, memory=budget.bytes)
    seconds, note = ask(times, make, sizes, make.device, budget.seconds)
    if seconds and seconds[-1] > budget.seconds:
        seconds, note = seconds[:-1], f"{OVER} {budget.seconds:g} s"
    mib, stopped = ask(peaks, make, sizes[: len(seconds)], make.device)
    return row_of(make.implementation, make.axis, sizes, seconds[: len(mib)], mib, stopped or note)


def row_of(
    implementation: str, axis: str, sizes: Sequence[int], seconds: Sequence[float],
    mib: Sequence[float], note: str,
) -> Row:  # fmt: skip
    """note: what stopped the implementation; "" if nothing did. A limit is a result, and no note
    but for an error, or where no size was reached."""
    is_result = bool(seconds) and note.startswith((OVER, OUT_OF_MEMORY))
    return Row(
        implementation,
        "" if is_result else note,
        axis=axis,
        sizes=tuple(sizes),
        times=tuple(seconds),
        peaks=tuple(mib),
        exponent=exponent(sizes, seconds),
        memory_exponent=exponent(sizes, mib),
        limit=f"{sizes[len(seconds)]}: {note}" if note else None,
    )


def answer(axis: str, name: str, asks: str, shape: Shape, settings: Settings) -> Result:
    sizes = GROWTHS[axis][settings.device][settings.level].sizes
    budget = BUDGETS[settings.device][settings.level]
    rows = tuple(
        row(LossAt(implementation, axis, shape, settings.device), sizes, budget)
        for implementation in implementations(settings.device)
        if settings.takes(implementation)
    )
    return Result(name, "scaling", asks, shape, rows, about=budget.about)


def implementations(device: str) -> list[str]:
    return ON_A_CPU if device == "cpu" else list(IMPLEMENTATIONS)


def question(axis: str) -> Question:
    def shapes(device: str, level: str) -> list[Shape]:
        growth = GROWTHS[axis][device].get(level)
        return [] if growth is None else [{**growth.fixed, "dtype": loss.DTYPE[device]}]

    name = f"scaling over {axis}"
    asks = f"How do time and memory grow with {axis}, and what is the limit of each?"
    return Question(
        name, "scaling", asks, shapes, functools.partial(answer, axis, name, asks), implementations
    )


# --- the training step ---

STEP: Shape = {"negatives": 1, "steps": 3}
BATCHES = {  # rows of a batch
    "cpu": {
        "default": Growth(32, 256, {**STEP, "backbone": TINY}),
        "full": Growth(64, 1024, {**STEP, "backbone": TINY}),
    },
    "cuda": {"full": Growth(64, 4096, {**STEP, "backbone": "Qwen3-0.6B"})},
}
BUDGETS_OF_STEPS = {
    "cpu": {"default": Budget(5.0, 640), "full": Budget(20.0, 2048)},
    "cuda": {"full": Budget(10.0)},
}
TRAINERS: dict[str, Implementation] = {
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, cached by 32": functools.partial(sentence_transformers, cached=32),
    "one graph, autograd": one_graph,
    OURS: rankpo_fast,
    f"{OURS}, no graph kept": functools.partial(rankpo_fast, activation_memory_gb=0.0),
}
OF_STEPS = "scaling over tokens"
ASKS = "How do time and memory of a training step grow, and what is each trainer's limit?"


def answer_of_steps(shape: Shape, settings: Settings) -> Result:
    budget = BUDGETS_OF_STEPS[settings.device][settings.level]
    sizes = BATCHES[settings.device][settings.level].sizes
    shapes = [{**shape, "batch": batch} for batch in sizes]
    tokens = [round(batches_of(at).tokens) for at in shapes]
    rows = []
    for name, trainer in TRAINERS.items():
        if not settings.takes(name):
            continue
        reached, note = [], ""
        for at in shapes:
            said = trained(trainer, at, settings.device, budget)
            if isinstance(said, str) or said.seconds > budget.seconds:
                note = said if isinstance(said, str) else f"{OVER} {budget.seconds:g} s"
                break
            reached.append(said)
        seconds = [one.seconds for one in reached]
        rows.append(
            row_of(name, "tokens", tokens, seconds, [x.peak / 2**20 for x in reached], note)
        )
    return Result(OF_STEPS, "scaling", ASKS, shape, tuple(rows), about=budget.about)


def trained(trainer: Implementation, at: Shape, device: str, budget: Budget) -> Measured | str:
    with tempfile.TemporaryDirectory(dir=workplace()) as place:
        task = dataclasses.replace(task_of(at, device), output=Path(place) / "trained")
        return in_a_process(measure, trainer, task, memory=budget.bytes)


QUESTIONS = [
    *(question(axis) for axis in GROWTHS),
    Question(
        OF_STEPS, "scaling", ASKS,
        lambda device, level: [BATCHES[device][level].fixed] if level in BATCHES[device] else [],
        answer_of_steps, lambda device: list(TRAINERS),
    ),
]  # fmt: skip
