"""What a GPU does otherwise than the CPU, for tensors that have shapes alone.

Nothing here computes values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rankpo_fast.model.attention import KERNELS, Attend, Kernel

BLOCK, NESTED = 64, 256  # weights that share a scale, scales that share one (double quantisation)
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED)  # of a weight


def _attend() -> Attend:
    """torch's own kernel for packed texts, whose op says what it keeps: queries, keys, values,
    output and log-sum-exps, as every flash kernel. Other ones of these have soft caps and dropout,
    which take no memory."""
    [varlen] = [kernel for kernel in KERNELS if kernel.name == "varlen_attn"]
    attend = varlen.make()
    return lambda query, key, value, asked: attend(
        query, key, value, replace(asked, softcap=None, dropout=0.0)
    )


FLASH = Kernel("flash attention, counted", "packed_counted", _attend)


def attention_flops(length: int) -> dict[Any, Callable[..., float]]:
    """Of the ops of `FLASH`, by op, where all texts are of so many tokens: from what they take."""

    import torch.nn.attention.varlen  # whose import makes the ops

    def forward(query: Tensor, **given: Any) -> float:
        before, after = (
            length - 1 if side < 0 else min(side, length - 1) for side in given["window_size"]
        )
        seen = _pairs(length, before) + _pairs(length, after) - length  # itself is in both
        texts, heads, dims = query.shape[0] / length, *query.shape[1:]
        return 4.0 * texts * heads * dims * seen  # two products

    def backward(**given: Any) -> float:
        return 2.5 * forward(**given)  # five products, two of them the forward's once more

    return {
        torch.ops.torch_attn._varlen_attn: forward,
        torch.ops.torch_attn._varlen_attn_backward: backward,
    }


def _pairs(length: int, before: int) -> float:
    """Of each token and itself and those `before` it."""
    full = before + 1  # what a token far from the start sees
    return full * (full + 1) / 2 + (length - full) * full


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
