"""An encoder's training -> bytes and seconds, counted on few layers and few tokens.

Everything that is counted grows as a line in the layers n and as one in the tokens T of a
micro-batch (texts of one length), so two of each give all, a and b being few layers:

    count(n, T) = count(a, T) + (n - a) / (b - a) * (count(b, T) - count(a, T))
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.packing import MicroBatch
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import KERNELS
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.plan.counter import PHASES, Costs, Meter, seconds
from rankpo_fast.plan.gpus import Gpu
from rankpo_fast.plan.parameters import HOST, STATES, parameter_bytes
from rankpo_fast.plan.skeleton import Shape, build
from rankpo_fast.plan.standins import FLASH, attention_flops, cuda_autocast

PEAK = "peak "  # before the name of a phase
TIME = "seconds "
TOKENS = 4096  # in the smaller of the two counts, or one text if that is longer
MANY = 16  # times as many in the other: as many as go at once. Where another moment becomes the
# peak between them, the line lies above it.


@dataclass(frozen=True)
class Line:
    """`start` + `slope` times the tokens of a micro-batch."""

    start: float
    slope: float

    def at(self, tokens: float) -> float:
        return self.start + self.slope * tokens


@dataclass(frozen=True)
class Counts:
    """Of an encoder with all its layers; bytes, but for seconds and parameters."""

    weights: float
    adapters: float
    gradients: float
    states: dict[str, float]  # by --optim, on the GPU
    host_states: float  # of paged_adamw_8bit
    trained: float  # parameters
    layer_weights: float  # of one layer
    graph: Line  # that a micro-batch leaves for its backward
    peaks: tuple[Line, ...]  # of the phases, the graph included: the largest holds
    seconds: dict[str, Line]  # by `timed`; the backward with what is computed again

    def peak(self, tokens: float) -> float:
        return max(peak.at(tokens) for peak in self.peaks)

    def most_tokens(self, bytes: float) -> int:
        """Those whose peak takes no more; 0 where none does."""
        fit = min((bytes - peak.start) / peak.slope for peak in self.peaks if peak.slope > 0)
        return max(0, int(fit)) if self.peak(0) <= bytes else 0


def count(shape: Shape, model: ModelConfig, gpu: Gpu | None, *, bf16: bool) -> Counts:
    """Of texts of the longest length.

    Args:
        gpu: whose speed counts; None: the CPU, whose attention keeps other things, and no speed.

    Raises:
        InputError: what the backbone does depends on values, so it cannot be counted.
    """
    few = max(1, TOKENS // shape.longest) * shape.longest
    low, high = _layers(shape, model)
    found = []
    for tokens in (few, MANY * few):
        least = measure(shape, model, gpu, low, tokens, bf16=bf16)
        most = measure(shape, model, gpu, high, tokens, bf16=bf16) if high > low else least
        layer = {key: (most[key] - least[key]) / max(1, high - low) for key in least}
        found.append({key: least[key] + (shape.layers - low) * layer[key] for key in least})
    here, there = found

    def line(key: str) -> Line:
        slope = (there[key] - here[key]) / ((MANY - 1) * few)
        return Line(here[key] - slope * few, slope)

    return Counts(
        weights=here["weights"],
        adapters=here["adapters"],
        gradients=here["gradients"],
        states={key.removeprefix(STATES): n for key, n in here.items() if key.startswith(STATES)},
        host_states=here[HOST],
        trained=here["trained"],
        layer_weights=layer["weights"] if high > low else here["weights"] / shape.layers,
        graph=line("graph"),
        peaks=tuple(line(PEAK + phase) for phase in PHASES),
        seconds={key: line(key) for key in here if key.startswith(TIME)},
    )


def _layers(shape: Shape, model: ModelConfig) -> tuple[int, int]:
    """The two numbers that are counted; all layers twice where that many are needed.

    Of one layer alone, which is the first and the last, the peak may be where no other has it.
    """
    frozen, period = model.freeze_layers, shape.period
    few = frozen + 2 * period + (shape.layers - frozen) % period
    if frozen % period or few + period >= shape.layers:
        return shape.layers, shape.layers
    return few, few + period


def measure(
    shape: Shape, model: ModelConfig, gpu: Gpu | None, layers: int, tokens: int, *, bf16: bool
) -> dict[str, float]:
    """Of the first layers and so many tokens, by name."""
    kernel = KERNELS[-1] if gpu is None else FLASH
    try:
        with FakeTensorMode(), nullcontext() if gpu is None else cuda_autocast():
            encoder = build(shape, model, layers, kernel, bf16=bf16)
            meter = Meter(attention_flops(shape.longest))
            with meter.fusion.of(encoder.layers.parts()):
                ran = run_micro_batch(encoder, _batch(tokens, shape.longest), meter)
    except DataDependentOutputException as error:
        kind = shape.config.model_type
        raise InputError(
            f"{MODEL_FLAG} {model.model_name_or_path}: what {kind} computes depends on values "
            f"({error.func}), so it cannot be counted without weights"
        ) from error
    times = {
        timed(phase, compiled=bool(compiled), float8=float8):
        0.0 if gpu is None else seconds(costs, partial(gpu.seconds, half=bf16, float8=float8))
        for phase, both in (("forward", ran.forward), ("backward", ran.backward))
        for compiled, costs in enumerate(both)
        for float8 in (False, True)
    }  # fmt: skip
    return ran.bytes | times | parameter_bytes(encoder)


def timed(phase: str, *, compiled: bool, float8: bool) -> str:
    """The name of its seconds."""
    return f"{TIME}{phase}{' compiled' * compiled}{' float8' * float8}"


@dataclass(frozen=True)
class MicroBatchRun:
    bytes: dict[str, float]  # "graph", and of each phase "peak ...": see Counts, Meter
    forward: tuple[Costs, Costs]  # as it ran, and where layers are compiled
    backward: tuple[Costs, Costs]

    @property
    def peak(self) -> float:
        return max(size for name, size in self.bytes.items() if name.startswith(PEAK))


def run_micro_batch(encoder: Encoder, batch: MicroBatch, meter: Meter) -> MicroBatchRun:
    """Forward and backward of any encoder whose gradients are there, metered."""
    with meter:
        vectors = encoder(batch)
        graph, forward = meter.live, meter.take_costs()
        meter.enter_phase("backward")
        vectors.backward(torch.zeros_like(vectors))
        del vectors
    peaks = {PEAK + phase: float(size) for phase, size in meter.peaks.items()}
    return MicroBatchRun({"graph": float(graph)} | peaks, forward, meter.take_costs())


def _batch(tokens: int, length: int) -> MicroBatch:
    texts = tokens // length
    zeros = torch.zeros(1, texts * length, dtype=torch.int64)
    return MicroBatch(zeros, zeros, torch.zeros(texts + 1, dtype=torch.int32), (length,) * texts)
