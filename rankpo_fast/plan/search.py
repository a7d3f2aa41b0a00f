"""The fastest settings that fit, in the way to train that changes the training least."""

from dataclasses import dataclass, replace

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.plan.count import Counts, count
from rankpo_fast.plan.estimate import Batch, Estimate, estimate
from rankpo_fast.plan.gpus import GIB, GPUS, Gpu
from rankpo_fast.plan.levers import Levers, Method, ways
from rankpo_fast.plan.skeleton import Shape, read_shape

HOST_SIZE = 2.0  # of the host's memory, in the GPU's, where nobody says
WORTH = 1.05  # so much faster has to be what is less plain
SHORTEST = 64  # tokens: below, nobody asks what would fit


@dataclass(frozen=True)
class Asked:
    """What a plan is made for."""

    model: ModelConfig
    gpu: Gpu
    rows: int
    negatives: int
    optim: str = "adamw"
    offload: tuple[str, ...] = ()
    shard: str = "none"
    processes: int = 1
    host_bytes: float | None = None  # for what is moved there; None: twice the GPU's
    method: Method | None = None


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        best: of `chosen`'s way, the fastest; where none fits, the one that lacks least.
        passed: the fastest of each other way, in order, or the one that lacks least.
        compiled: how many times as fast `best` is as without compiled layers; None: it has none.
        float8: how many times as fast it would be with --float8, which changes results and so is
            not chosen; None: it cannot be had, is set already, or is not worth it.
    """

    asked: Asked
    shape: Shape
    batch: Batch
    best: Estimate
    passed: list[Estimate]
    compiled: float | None = None
    float8: float | None = None

    @property
    def fits(self) -> bool:
        return self.best.fits


def find(asked: Asked) -> Plan:
    """Raises InputError for what cannot be counted, or settings that leave no way to train."""
    if asked.model.float8 and not asked.gpu.float8:
        raise InputError(f"--float8: {asked.gpu.name} has no products in 8 bits: leave it out")
    counter = _Counter(asked.model, asked.gpu)
    batch = counter.batch(asked)
    found = [_best([counter.estimate(levers, asked) for levers in way]) for way in ways_of(asked)]
    fitting = [one for one in found if one.fits]
    best = fitting[0] if fitting else max(found, key=lambda one: one.free)
    passed = [one for one in found if one is not best]
    compiled = float8 = None
    if best.levers.torch_compile:
        eager = counter.estimate(replace(best.levers, torch_compile=False), asked)
        compiled = best.tokens_per_second / eager.tokens_per_second
    if _may_propose_float8(asked, best):
        faster = counter.estimate(best.levers, asked, float8=True)
        ratio = faster.tokens_per_second / best.tokens_per_second
        float8 = ratio if ratio >= WORTH else None
    return Plan(asked, counter.shape, batch, best, passed, compiled, float8)


def _may_propose_float8(asked: Asked, best: Estimate) -> bool:
    """Where weights are trained and products are in bf16."""
    model = asked.model
    able = asked.gpu.float8 and model.bf16 is not False and best.levers.method == "full"
    return best.fits and able and not model.float8


class _Counter:
    """Counts of one model, each made once."""

    def __init__(self, model: ModelConfig, gpu: Gpu):
        self._model, self._gpu, self.shape = model, gpu, read_shape(model)
        self._known: dict[str, Counts] = {}

    def batch(self, asked: Asked) -> Batch:
        shape = self.shape
        return Batch(asked.rows, asked.negatives, shape.max_query_length, shape.max_passage_length)

    def estimate(self, levers: Levers, asked: Asked, *, float8: bool = False) -> Estimate:
        """For the GPU of `asked`; times are those of the one that was counted for.

        Args:
            float8: as if it were set, if it is not.
        """
        # What is compiled is counted with what is not.
        model = replace(levers, torch_compile=False).model(self._model)
        key = repr(model)
        if key not in self._known:
            half = model.bf16 is not False
            self._known[key] = count(self.shape, model, self._gpu, bf16=half)
        return estimate(
            self._known[key], levers, self.shape, asked.gpu, self.batch(asked),
            shard=asked.shard, processes=asked.processes,
            host_bytes=asked.host_bytes or HOST_SIZE * asked.gpu.bytes,
            float8=float8 or model.float8,
        )  # fmt: skip

    def fitting(self, asked: Asked) -> Levers | None:
        """What fits, of the ways to train the one that takes least first; None: nothing."""
        for way in reversed(ways_of(asked)):
            for levers in reversed(way):
                if self.estimate(levers, asked).fits:
                    return levers
        return None


def _best(found: list[Estimate]) -> Estimate:
    """The fastest that fits; of those nearly as fast the plainest, which comes first."""
    fitting = [one for one in found if one.fits]
    if not fitting:
        return max(found, key=lambda one: one.free)
    fastest = max(one.tokens_per_second for one in fitting)
    plain = sorted(fitting, key=lambda one: len(one.levers.offload) + one.levers.torch_compile)
    return next(one for one in plain if WORTH * one.tokens_per_second >= fastest)


def would_fit(asked: Asked) -> list[str]:
    """What to change where nothing fits: each line names one thing that would suffice."""
    lines = []
    counter = _Counter(asked.model, asked.gpu)
    shape, length = counter.shape, counter.shape.longest // 2
    while length >= SHORTEST:
        limits = [min(n, length) for n in (shape.max_query_length, shape.max_passage_length)]
        shorter = replace(asked.model, max_query_length=limits[0], max_passage_length=limits[1])
        if _Counter(shorter, asked.gpu).fitting(replace(asked, model=shorter)):
            lines.append(f"texts of at most {length:,} tokens (--max_passage_length {length})")
            break
        length //= 4
    for processes in (2, 4, 8):
        several = replace(asked, shard="full", processes=processes * asked.processes)
        if asked.optim != "adamw" or "optimizer" in asked.offload:
            break  # which --shard does not take
        if counter.fitting(several):
            lines.append(f"{several.processes} such GPUs that share the weights (--shard full)")
            break
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.bytes):
        if gpu.bytes > asked.gpu.bytes and counter.fitting(replace(asked, gpu=gpu)):
            lines.append(f"one {gpu.name} ({gpu.bytes / GIB:.0f} GiB)")
            break
    if asked.method is not None and (other := counter.fitting(replace(asked, method=None))):
        lines.append(f"{other.name} (--method {other.method})")
    return lines


def ways_of(asked: Asked) -> list[list[Levers]]:
    """`levers.ways` of what is asked."""
    return ways(asked.model, asked.optim, asked.offload, asked.method, asked.shard, asked.processes)
