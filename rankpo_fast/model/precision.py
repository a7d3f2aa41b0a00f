"""bf16 or fp32: what --bf16 auto comes to on a device, and why; and what weights in bf16 ask for.

A GPU says whether it computes bf16. A CPU without AMX, AVX-512 BF16 or their like emulates it, up
to hundreds of times as slow as fp32, and tells nobody: there one small product is timed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.config import EncoderConfig

# --optim that round updates of bf16 weights at random: to nearest, those below 2^-9 of a weight
# would be lost.
ROUND_AT_RANDOM = ("adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8")
# Rows, dims in and out of the product: below a millisecond where it is native.
SHAPE = 256, 384, 384
REPEATS, PATIENCE = 6, 0.1  # times at most, and seconds after which no further one begins


@cache  # so that a process says the same each time
def half_speed(dtype: torch.dtype, device: str) -> float:
    """Seconds of a product in `dtype` over those in fp32, casts included as autocast makes them.
    Below 1, `dtype` is faster."""
    return _seconds(dtype, device) / _seconds(torch.float32, device)


@dataclass(frozen=True)
class Precision:
    """What an encoder computes in, and why that was chosen where nobody said."""

    bf16: bool
    reason: str | None = None

    @classmethod
    def of(cls, bf16: bool | Literal["auto"], device: torch.device) -> "Precision":
        """As asked for, else the faster one on `device`."""
        if bf16 != "auto":
            return cls(bf16)
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(able, None if able else "this GPU has no bf16")
        ratio = half_speed(torch.bfloat16, device.type)
        return cls(ratio < 1, f"bf16 products took {ratio:.3g} times fp32's time here")

    @classmethod
    def of_model(cls, config: EncoderConfig, device: torch.device) -> "Precision":
        """As `of`; of a model whose weights are in bf16 that."""
        if getattr(config, "weights_dtype", "fp32") == "bf16":
            return cls(True, "as its weights are stored")
        return cls.of(config.bf16, device)

    def __str__(self) -> str:
        name = "bf16" if self.bf16 else "fp32"
        return name if self.reason is None else f"{name} ({self.reason})"


def sum_in_fp32(parameters: Iterable[Tensor]) -> None:
    """The gradients of bf16 ones: in bf16 a sum of K backward passes could lose K * 2^-9."""
    for parameter in parameters:
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32


def zero_gradient(parameter: Tensor) -> Tensor:
    """Of the dtype in which its gradients are summed."""
    return torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)


def _seconds(dtype: torch.dtype, device: str) -> float:
    """The shortest time of the product: of some 0.1 s of them, or of two."""
    rows, dims, outs = SHAPE
    states = torch.ones(rows, dims, device=device)
    weights = torch.ones(outs, dims, device=device)
    times: list[float] = []
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        F.linear(states[:1, :1], weights[:1, :1])  # libraries set themselves up
        while len(times) < 2 or (len(times) < REPEATS and sum(times) < PATIENCE):
            began = perf_counter()
            F.linear(states, weights)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(perf_counter() - began)
    return min(times)
