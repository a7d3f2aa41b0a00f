"""What is counted -> does it fit, in micro-batches of how many tokens, and how fast is it.

A step of N tokens in micro-batches of m, of which the graphs of K tokens are kept (train/cache.py):

    seconds = (N - K) / m * forward(m) + N / m * (forward(m) + backward(m)) + the optimizer's
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rankpo_fast.plan.count import Counts, timed
from rankpo_fast.plan.gpus import (
    BANDWIDTH_SHARE,
    CONTEXT,
    FRAGMENTATION,
    HOST_BANDWIDTH,
    LINK_SHARE,
    Gpu,
)
from rankpo_fast.plan.levers import Levers
from rankpo_fast.plan.skeleton import Shape
from rankpo_kernels.workspace import default_workspace

MOST_TOKENS = 65536  # at once, as in train/memory.py
VECTORS = 8  # copies of a batch's vectors: 5 around the loss, and at most 3 that it makes itself
HOST_UPDATE = 28  # bytes of a parameter that AdamW on the host reads and writes
LAYERS_HERE = 2  # whose activations, or gathered weights, are on the GPU at once


@dataclass(frozen=True)
class Batch:
    """The rows of a step on one GPU, whose texts are as long as may be."""

    rows: int
    negatives: int
    query_length: int
    passage_length: int

    @property
    def texts(self) -> int:
        return self.rows * self.texts_of_row

    @property
    def texts_of_row(self) -> int:
        return 2 + self.negatives

    @property
    def tokens(self) -> int:
        return self.rows * (self.query_length + (1 + self.negatives) * self.passage_length)


@dataclass(frozen=True)
class Estimate:
    """Of one set of levers; bytes on one GPU."""

    levers: Levers
    parts: dict[str, float]  # what is there all the time, and the parts of what is not
    graphs: float  # that are kept beyond one micro-batch's
    host: float
    free: float  # what nothing takes; below 0: how much there lacks, here or on the host
    graph_per_token: float
    peak_per_token: float
    max_tokens: int  # of a micro-batch, at most
    micro_batch: int  # tokens, as chosen
    max_rows: int  # of a batch
    kept_tokens: int  # of a step, that are computed once
    step_seconds: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def needed(self) -> float:
        """On the GPU, without graphs that need not be kept."""
        return sum(self.parts.values())


def estimate(
    counts: Counts, levers: Levers, shape: Shape, gpu: Gpu, batch: Batch, *,
    shard: str = "none", processes: int = 1, host_bytes: float = math.inf, float8: bool = False,
) -> Estimate:  # fmt: skip
    """
    Args:
        shard, processes: as --shard has it, and GPUs that share.
        host_bytes: for what is moved there.
        float8: whether linear layers multiply in 8 bits.
    """
    states, host_states = _states(counts, levers)
    part = 1 / processes
    whole = levers.weights_dtype == "nf4"  # 4 bits are no numbers, which alone lie in parts
    of_weights = part if shard == "full" and not whole else 1.0
    of_others = part if shard != "none" else 1.0
    static = {
        "weights": counts.weights * of_weights,
        "adapters": counts.adapters * (part if shard == "full" else 1.0),
        "gradients": counts.gradients * of_others,
        "optimizer": states * of_others,
    }
    if of_weights < 1:  # in bf16, those of the layers that compute and that come next
        static["weights"] += LAYERS_HERE * counts.layer_weights / 2
    moved = "activations" in levers.offload
    here = LAYERS_HERE / shape.layers if moved else 1.0
    graph = counts.graph.slope * here

    def peak(tokens: float) -> float:
        return counts.peak(tokens) - counts.graph.at(tokens) * (1 - here)

    # As train/meters.py has it: a share of what the lasting tensors leave is lost.
    room = gpu.bytes - CONTEXT - sum(static.values())
    lost = FRAGMENTATION * max(0.0, room)
    workspace = float(default_workspace("cuda", int(gpu.bytes)))
    row = VECTORS * batch.texts_of_row * shape.dim * 4.0
    loss = workspace + row * batch.rows
    room -= lost + loss
    most = _most_tokens(peak, room)
    micro_batch = _chosen(most, shape.longest)
    taken = peak(micro_batch)
    host = host_states * of_others
    kept = min(batch.tokens, micro_batch + max(0.0, room - taken) / max(1.0, graph))
    if moved:
        kept = min(kept, max(micro_batch, (host_bytes - host) / counts.graph.slope))
        host += counts.graph.slope * kept
    graphs = max(0.0, kept - micro_batch) * graph
    free = room - taken
    seconds = _seconds(counts, levers, gpu, batch, micro_batch, kept, float8)
    return Estimate(
        levers=levers,
        parts=static
        | {"micro-batch": taken, "loss": loss, "fragmentation": lost, "context": CONTEXT},
        graphs=graphs,
        host=host,
        free=min(free if free < 0 else max(0.0, free - graphs), host_bytes - host),
        graph_per_token=counts.graph.slope,
        peak_per_token=(peak(2 * shape.longest) - peak(shape.longest)) / shape.longest,
        max_tokens=most,
        micro_batch=micro_batch,
        max_rows=max(0, int((room + row * batch.rows - peak(shape.longest)) / row)),
        kept_tokens=int(kept),
        step_seconds=seconds,
        tokens_per_second=batch.tokens / seconds,
    )


def _states(counts: Counts, levers: Levers) -> tuple[float, float]:
    """On the GPU and on the host."""
    if "optimizer" in levers.offload:
        return 0.0, counts.states[levers.optim] + counts.weights + counts.gradients
    paged = levers.optim == "paged_adamw_8bit"
    return counts.states[levers.optim], counts.host_states if paged else 0.0


def _most_tokens(peak: Callable[[float], float], room: float) -> int:
    """The most whose peak fits, 0 where not even one does: the peak grows with the tokens."""
    low, high = 0, 1
    while peak(high) <= room and high < 1 << 40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= room else (low, middle)
    return low


def _chosen(most: int, longest: int) -> int:
    """As train/memory.py: the longest text, doubled until half of what is free is taken."""
    tokens = longest
    while 2 * tokens <= min(most // 2, MOST_TOKENS):
        tokens *= 2
    return tokens


def _seconds(
    counts: Counts, levers: Levers, gpu: Gpu, batch: Batch, micro_batch: int, kept: float,
    float8: bool,
) -> float:  # fmt: skip
    forward, backward = (
        counts.seconds[timed(phase, compiled=levers.torch_compile, float8=float8)].at(micro_batch)
        for phase in ("forward", "backward")
    )
    twice = max(0.0, batch.tokens - kept) / micro_batch * forward
    once = max(1.0, batch.tokens / micro_batch) * (forward + backward)
    link = LINK_SHARE * gpu.link
    if "activations" in levers.offload:  # there in the forward, back in the backward, meanwhile
        once = max(once, 2 * counts.graph.slope * batch.tokens / link)
    states, moved = counts.states[levers.optim], 2 * counts.gradients  # gradients and weights
    if "optimizer" in levers.offload:
        update = moved / link + HOST_UPDATE * counts.trained / HOST_BANDWIDTH
    else:
        update = (moved + counts.gradients + 2 * states) / (BANDWIDTH_SHARE * gpu.bandwidth)
    return math.fsum([twice, once, update])
