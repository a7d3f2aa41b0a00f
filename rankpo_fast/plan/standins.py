"""What a GPU does otherwise than the CPU, for tensors that have shapes alone.

T tokens of S texts; H heads, K heads of keys and values, E dims of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rankpo_fast.model.attention import Asked, Kernel
from rankpo_fast.plan.counter import Meter

BLOCK, NESTED = 64, 256  # weights that share a scale, scales that share one (double quantisation)
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED)  # of a weight


class FlashAttention:
    """A flash kernel: for the backward it keeps queries, keys, values, output and log-sum-exps.

    Attributes:
        meter: hears of the operations, which no op shows.
    """

    def __init__(self) -> None:
        self.meter: Meter | None = None

    @property
    def kernel(self) -> Kernel:
        return Kernel("flash attention, counted", "packed_counted", lambda: self.attend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
        products = 4.0 * query.shape[1] * query.shape[2] * _pairs(asked)  # two of them
        return _Flash.apply(query, key, value, self._add, products)

    def _add(self, flops: float, *tensors: Tensor) -> None:
        if self.meter is not None:
            self.meter.costs[flops, sum(x.numel() * x.element_size() for x in tensors)] += 1


def _pairs(asked: Asked) -> float:
    """Of tokens and tokens that they see."""
    total = 0.0
    for length in asked.texts.lengths:
        window = min(asked.window or length, length)
        before = window * (window + 1) / 2 + (length - window) * window  # itself included
        total += before if asked.causal else 2 * before - length
    return total


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor,
        add: Callable[..., None], flops: float,
    ) -> Tensor:  # fmt: skip
        output = torch.empty_like(query)  # [T, H, E]
        sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)  # [H, T]
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.add, ctx.flops = add, flops
        add(flops, query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (query, key, value)]
        products = 2.5 * ctx.flops  # five products, the forward's two once more
        ctx.add(products, query, key, value, output, sums, gradient, *results)
        return (*results, None, None)


class FourBitLinear(nn.Linear):
    """bitsandbytes' Linear4bit: its weight is made whole in bf16 for each product, and not kept."""

    def forward(self, states: Tensor) -> Tensor:
        half = states.to(torch.bfloat16)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return _FourBit.apply(half, self.weight.detach(), bias).to(states.dtype)


class _FourBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        with torch.autocast("cpu", enabled=False):
            return F.linear(states, _whole(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return gradient @ _whole(ctx.weight).to(gradient.dtype), None, None


def _whole(weight: Tensor) -> Tensor:
    """Written as a copy of the whole weight: 2 bytes read that are 0.5."""
    return torch.zeros_like(weight, dtype=torch.bfloat16)


def quantise(backbone: nn.Module) -> None:
    """Its linear layers as FourBitLinear, in place, without values."""
    for module in backbone.modules():
        if type(module) is nn.Linear:
            module.__class__ = FourBitLinear


# Of CUDA's autocast that CPUs' lacks: computed in fp32, and so kept for the backward.
IN_FP32 = ("layer_norm", "group_norm", "pow", "rsqrt", "softmax", "log_softmax", "sum", "cumsum",
           "exp", "log", "norm", "softplus")  # fmt: skip


class _CudaAutocast(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_fp32(x) for x in args)
        return func(*args, **(kwargs or {}))


def _fp32(value: Any) -> Any:
    lower = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if lower else value


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, autocast on the CPU, where fake tensors lie, casts as it does on a GPU."""
    with _CudaAutocast():
        yield
