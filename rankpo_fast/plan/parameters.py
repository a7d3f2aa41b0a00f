"""What parameters take while they are trained: weights, gradients, states of each optimizer.

Of any encoder, as it is built or loaded; bytes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankpo_fast.plan.skeleton import is_adapter
from rankpo_fast.plan.standins import NF4_BYTES, FourBitLinear

SMALL = 4096  # values of a tensor below which torchao and bitsandbytes keep states whole
PAGED = 100_000  # values from which bitsandbytes pages a state
# Of torchao's states: bits of a value, values that share an fp32 scale, fp32 values codes mean.
QUANTISED = {"adamw_8bit": (8, 256, 256), "adamw_4bit": (4, 128, 16), "adamw_fp8": (8, 256, 0)}
BLOCK = 256  # of bitsandbytes' states
STATES, HOST = "states ", "host states"  # the former before the name of an optimizer


def parameter_bytes(encoder: nn.Module) -> dict[str, float]:
    """By name; also how many parameters are "trained", which are no bytes."""
    four_bit = {id(m.weight) for m in encoder.modules() if isinstance(m, FourBitLinear)}
    numbers = {"weights": float(stored(encoder.buffers())), "adapters": 0.0}
    for name, parameter in encoder.named_parameters():
        part = "adapters" if is_adapter(name) else "weights"
        few_bits = id(parameter) in four_bit
        numbers[part] += NF4_BYTES * parameter.numel() if few_bits else stored([parameter])
    trained = [p for p in encoder.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Embedding)}
    numbers["trained"] = sum(p.numel() for p in trained)
    numbers["gradients"] = 4.0 * numbers["trained"]  # summed in fp32
    numbers[STATES + "adamw"] = 8.0 * numbers["trained"]  # in fp32, of bf16 weights too
    for name, kind in QUANTISED.items():
        numbers[STATES + name] = sum(_quantised(p, *kind) for p in trained)
    numbers[STATES + "muon"] = sum(
        4.0 * p.numel() * (1 if p.ndim >= 2 and id(p) not in embeddings else 2) for p in trained
    )
    paged = [p.numel() >= PAGED for p in trained]
    kept = [2 * p.numel() * (1 + 4 / BLOCK if p.numel() >= SMALL else 4) for p in trained]
    for name, where in ((STATES + "paged_adamw_8bit", False), (HOST, True)):
        numbers[name] = sum(size for size, on in zip(kept, paged, strict=True) if on is where)
    return numbers


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of their values."""
    return sum(x.numel() * x.element_size() for x in tensors)


def _quantised(parameter: Tensor, bits: int, block: int, table: int) -> float:
    """Both states of torchao's: whole, in the weight's dtype, where too small or not of blocks."""
    values = parameter.numel()
    if values < SMALL or values % block:
        return 2.0 * stored([parameter])
    return 2 * (values * bits / 8 + (values // block + table) * torch.float32.itemsize)
