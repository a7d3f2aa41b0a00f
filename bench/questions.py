"""What the suite asks and what it finds: a Question has shapes and an answer, which is a Result of
Rows. Every family of cases speaks in these, and the result file holds nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEVELS = ("quick", "default", "full")  # of how much is asked
OURS = "rankpo-fast"  # implementations of ours begin so
OUT_OF_MEMORY, NOT_INSTALLED, NEEDS_GPU = "out of memory", "not installed", "needs a GPU"
DOES_NOT_TAKE = "does not take"  # a dtype, a size, a GPU
NOT_REACHED = "not reached"  # the goal of an end-to-end run
OUT_OF_RESOURCE = "out of resource"  # of a GPU: a tile that is too large
# A peer's notes that are results begin so, unless it is absent.
EXCUSES = (OUT_OF_MEMORY, DOES_NOT_TAKE, NOT_REACHED, OUT_OF_RESOURCE)
TOO_LARGE = "too large for the device"  # a model whose weights alone do not fit: ours is excused
Shape = Mapping[str, Any]  # {"M": 4096, "N": 4096, "D": 1024, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Rates:
    """What this machine reached at the start of the run: FLOP/s of a large GEMM by dtype, bytes/s
    (read and written) of a large copy."""

    gemm: Mapping[str, float]
    copy: float


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: str  # cpu or cuda
    level: str
    rounds: int
    rates: Rates
    implementations: frozenset[str] | None = None  # None: all; the lower bound always runs
    without: frozenset[str] = frozenset()
    limit_s: float = float("inf")  # no round of a loss, or of a training, starts later
    training_s: float = float("inf")

    def takes(self, implementation: str) -> bool:
        asked = self.implementations is None or implementation in self.implementations
        return asked and implementation not in self.without


@dataclass(frozen=True)
class Row:
    """One implementation's result. What does not apply is None; without `seconds`, `note` says
    why."""

    implementation: str
    note: str = ""
    seconds: float | None = None  # the median of rounds; low and high are its 20th, 80th percentile
    low: float | None = None
    high: float | None = None
    ratio: float | None = None  # to the lower bound, or to the first: taken within each round
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratios: tuple[float, ...] | None = None  # of all rounds
    cold: float | None = None  # seconds, with the caches emptied before
    gemm: float | None = None  # useful flops per second, over the measured GEMM rate
    copy: float | None = None  # useful bytes per second, over the measured copy rate
    peak_mib: float | None = None  # above inputs and gradients; of a training: all it holds
    error: float | None = (
        None  # relative, against fp64, the worst of loss and gradients: fresh data
    )
    converged: float | None = None  # the same on converged data
    queries: float | None = None  # a second
    tokens: float | None = None  # a second; of texts, not of padding
    mfu: float | None = None  # flops of the model over the measured GEMM rate
    ndcg: float | None = None
    ndcg_low: float | None = None
    ndcg_high: float | None = None
    watts: float | None = None  # mean of the device, whoever else uses it
    joules: float | None = None  # per million tokens; of an end-to-end run: all it took
    throttled: str | None = None  # why the GPU slowed down meanwhile
    axis: str | None = None  # in a scaling: which size grows, its values, and what each took
    sizes: tuple[int, ...] | None = None
    times: tuple[float, ...] | None = None  # as many as were reached
    peaks: tuple[float, ...] | None = None  # MiB
    work: tuple[float, ...] | None = None  # flops of a rank over M x all N x D: counted, as are
    messages: tuple[int, ...] | None = None  # those that a rank sends, and
    sent: tuple[float, ...] | None = None  # MiB in them, forward and backward
    # time ~ size ** exponent over the upper half of the sizes; without times: what is sent
    exponent: float | None = None
    memory_exponent: float | None = None
    limit: str | None = None  # the first size that was not reached, and why

    @property
    def ours(self) -> bool:
        return self.implementation.startswith(OURS)

    @property
    def cost(self) -> float | None:
        """By which a result's rows are faster than each other: what was taken within each round, or
        seconds where no row has that."""
        return self.seconds if self.ratio is None else self.ratio

    @property
    def absent(self) -> bool:
        """Whether the machine lacks a GPU or a package for it, which says nothing about it."""
        missing = self.note.endswith(NOT_INSTALLED) and ": " not in self.note  # no error's words
        return missing or self.note.startswith(NEEDS_GPU)

    @property
    def red(self) -> bool:
        """Whether the run has failed here: a gate, an error, or ours not running at all."""
        if self.ours:
            return bool(self.note) and TOO_LARGE not in self.note
        return bool(self.note) and not self.absent and not self.note.startswith(EXCUSES)


@dataclass(frozen=True)
class Result:
    """The answer to a question at one shape: a line of the result file."""

    case: str  # name of the question
    family: str  # loss, training, end to end, scaling
    question: str  # in words
    shape: Shape
    rows: tuple[Row, ...]
    lower_bound: str | None = None  # the row that ratios are taken against; None: the first
    flops: float | None = None  # useful ones, the same for every implementation
    bytes: float | None = None
    gate: float | None = None  # the error above which a time of ours means nothing
    about: Mapping[str, Any] = field(default_factory=dict)  # lengths of texts, clocks, ...

    @property
    def name(self) -> str:
        return f"{self.case} {described(self.shape)}"

    def is_lower_bound(self, row: Row) -> bool:
        """Whether it is the lower bound, or another form of it: "copy" and "copy, fresh memory"."""
        return (
            self.lower_bound is not None and row.implementation.split(", ")[0] == self.lower_bound
        )


@dataclass(frozen=True)
class Question:
    """One question that can be asked: `shapes(device, level)`, what matters most first, and
    `answer(shape, settings)`."""

    name: str
    family: str
    asks: str
    shapes: Callable[[str, str], list[Shape]]
    answer: Callable[[Shape, Settings], Result]
    implementations: Callable[[str], Sequence[str]]  # on a device, besides lower bounds


def described(shape: Shape) -> str:
    """8192x8192x1024 float32: numbers as a product, then the rest."""
    sizes = "x".join(str(x) for x in shape.values() if isinstance(x, int))
    return " ".join([sizes, *(str(x) for x in shape.values() if not isinstance(x, int))]).strip()
