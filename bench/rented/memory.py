"""Does a training take of the GPU what `rankpo-fast plan` predicts from its config.json?

One micro-batch forward and backward, beside weights, gradients and AdamW's states: predicted by
counting, measured as torch's allocator has it at most. Seconds stand beside; the predicted ones are
a model and no gate.
"""

import gc
import json
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.model.attention import KERNELS, Kernel, Needs
from rankpo_fast.model.precision import zero_gradient
from rankpo_fast.plan.count import Counts, count, run_micro_batch, timed
from rankpo_fast.plan.counter import Meter
from rankpo_fast.plan.gpus import gpu_here
from rankpo_fast.plan.parameters import stored
from rankpo_fast.plan.skeleton import Shape, read_shape
from rankpo_fast.train.optim import make_optimizer

from ..planned import real_encoder, some_texts
from ..questions import NOT_INSTALLED, Result, Row
from ..training.backbones import TINY, config_of
from .plan import Plan
from .runner import Part
from .state import Found

CLOSE = 0.1  # predicted and measured may differ by that
PART_S = 40.0
ASKS = "Does a training take what the plan predicts?"
MEASURED, PREDICTED = "measured", "the plan"
LORA: dict[str, Any] = {"lora_rank": 16}


@dataclass(frozen=True)
class Case:
    backbone: str
    texts: int
    length: int
    levers: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in self.levers.items())
        return f"{self.backbone} {self.texts}x{self.length} {flags}".strip()


# Some 20 to 40 GB each, of which the graph is a good part: what is predicted worst decides.
CASES = (
    Case("Qwen3-0.6B", 16, 512),
    Case("Llama-3.2-1B", 16, 1024, {"gradient_checkpointing": True}),
    Case("Llama-3.2-1B", 16, 512, {"weights_dtype": "bf16", **LORA}),
)
REHEARSED = (Case(TINY, 4, 32), Case(TINY, 4, 32, LORA))


def parts(plan: Plan) -> list[Part]:
    cases = REHEARSED if plan.rehearsal else CASES
    return [Part(case.name, partial(compared, case, plan), PART_S) for case in cases]


def compared(case: Case, plan: Plan) -> Found:
    shape = {"texts": case.texts, "tokens": case.length, "backbone": case.backbone, **case.levers}
    if "lora_rank" in case.levers and find_spec("peft") is None:
        note = f"peft {NOT_INSTALLED}"
        return Found([Result("memory", "memory", ASKS, shape, (Row(MEASURED, note),))], says=note)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case.backbone).to_dict()
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            folder, max_query_length=case.length, max_passage_length=case.length,
            **{"bf16": plan.device == "cuda", "gradient_checkpointing": False} | case.levers,
        )  # fmt: skip
        of = read_shape(model)
        gpu = gpu_here(torch.device("cuda")) if plan.device == "cuda" else None
        counts = count(of, model, gpu, bf16=model.bf16 is True)
        bytes, seconds = measured(model, of, case, plan.device)
    tokens = case.texts * case.length
    expected = predicted_bytes(counts, tokens)
    ratio = expected / bytes
    modelled = sum(
        counts.seconds[timed(phase, compiled=False, float8=False)].at(tokens)
        for phase in ("forward", "backward")
    )
    rows = (
        Row(MEASURED, seconds=seconds, peak_mib=bytes / 2**20),
        Row(PREDICTED, seconds=modelled, peak_mib=expected / 2**20),
    )
    says = (f"{expected / 2**30:.2f} GiB predicted, {bytes / 2**30:.2f} measured: "
            f"{ratio - 1:+.1%}")  # fmt: skip
    result = Result(
        "memory", "memory", ASKS, shape, rows, about={"predicted over measured bytes": ratio}
    )
    return Found([result], says=says, red="" if abs(ratio - 1) <= CLOSE else says)


def predicted_bytes(counts: Counts, tokens: int) -> float:
    lasting = counts.weights + counts.adapters + counts.gradients + counts.states["adamw"]
    return lasting + counts.peak(tokens)


def measured(model: ModelConfig, shape: Shape, case: Case, device: str) -> tuple[float, float]:
    """(bytes at most, seconds of forward and backward) of a micro-batch once all is warm."""
    gc.collect()  # what the part before left would be freed meanwhile
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    encoder = real_encoder(model, shape.pooling, kernel_for(shape, device), device)
    optimizer = make_optimizer(encoder, TrainingConfig("none"))
    for parameter in optimizer.parameters:
        parameter.grad = zero_gradient(parameter)
    batch = some_texts(case.texts, case.length)
    if device == "cpu":
        run_micro_batch(encoder, batch, Meter())  # libraries set themselves up
        states = [x for p in optimizer.parameters for x in optimizer.state_of(p).values()]
        gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
        tensors = [*encoder.parameters(), *encoder.buffers(), *gradients, *states]
        started = time.perf_counter()
        peak = run_micro_batch(encoder, batch, Meter()).peak
        return stored(tensors) + peak, time.perf_counter() - started

    def run() -> None:
        vectors = encoder(batch)
        vectors.backward(torch.zeros_like(vectors))
        torch.cuda.synchronize()

    run()  # cuBLAS and Triton take their own now
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return torch.cuda.max_memory_allocated() - before, seconds


def kernel_for(shape: Shape, device: str) -> Kernel:
    """The first that serves this model here, as for a training."""
    config = shape.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needs = Needs(torch.device(device), device == "cuda", dim, False, False, False)
    return next(kernel for kernel in KERNELS if kernel.why_not(needs) is None)
