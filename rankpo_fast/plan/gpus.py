"""GPUs that a plan may be made for, by their data sheets, and what of them a program gets.

Products run at EFFICIENCY of the dense peak, everything else at BANDWIDTH_SHARE of the memory's
speed: what well-written kernels reach, and no measurement of these. Data sheets that name a rate
"with sparsity" name twice the dense one, which is what stands here.
"""

from dataclasses import dataclass, replace

import torch

from rankpo_fast.errors import InputError
from rankpo_fast.model.float8 import CAPABILITY

GIB = 2**30
EFFICIENCY = 0.6  # of the peak that products reach
BANDWIDTH_SHARE = 0.8
FLOAT8_SPEED = 2.0  # of products in 8 bits, beside bf16: the data sheets' ratio
FLOAT8_CASTS = 2.5  # of an operand in bf16: read twice, and half of it written
LINK_SHARE = 0.8  # of the link to the host
HOST_BANDWIDTH = 50e9  # bytes a second that an optimizer on the host goes through
CONTEXT = 0.7 * GIB  # of CUDA itself, cuBLAS and Triton, outside torch's allocator: assumed
FRAGMENTATION = 0.1  # of what is free that is lost between blocks: 1 - GPU_SHARE of train/meters.py


@dataclass(frozen=True)
class Gpu:
    """Speeds are peaks of the data sheet, memory is what torch says there is."""

    name: str
    bytes: float
    bf16_flops: float  # a second, dense
    fp32_flops: float
    bandwidth: float  # bytes a second
    link: float  # bytes a second to the host, one way
    assumed: str = ""  # what was, where it is none of GPUS
    float8: bool = True  # whether it has products in 8 bits, as all of GPUS have

    def seconds(
        self, flops: float, bytes: float, operands: float, *, half: bool, float8: bool = False
    ) -> float:
        """Of an operation that does so many and reads and writes so many.

        Args:
            operands: bytes that a product of a linear layer reads, which `float8` makes one of 8
                bits: twice as fast, once both have been read for their largest value and read and
                written to be rounded.
        """
        peak = self.bf16_flops if half else self.fp32_flops
        bandwidth = BANDWIDTH_SHARE * self.bandwidth
        if not (float8 and operands):
            return max(flops / (EFFICIENCY * peak), bytes / bandwidth)
        bytes -= operands / 2
        product = max(flops / (EFFICIENCY * FLOAT8_SPEED * peak), bytes / bandwidth)
        return product + FLOAT8_CASTS * operands / bandwidth


GPUS = {
    "24": Gpu("RTX 4090", 23.6 * GIB, 165.2e12, 82.6e12, 1.008e12, 32e9),
    "48": Gpu("L40S", 44.4 * GIB, 362e12, 91.6e12, 0.864e12, 32e9),
    "80": Gpu("H100 SXM", 79.1 * GIB, 989e12, 66.9e12, 3.35e12, 64e9),
    "141": Gpu("H200 SXM", 139.8 * GIB, 989e12, 66.9e12, 4.8e12, 64e9),
}


def gpu_of(text: str | None) -> Gpu:
    """The GPU of so many GB; None: the one that is here.

    Raises:
        InputError: neither a number nor a GPU here.
    """
    if text is None:
        if not torch.cuda.is_available():
            raise InputError(f"--gpu is needed where there is none: {', '.join(GPUS)} or any "
                             f"number of GB")  # fmt: skip
        return gpu_here(torch.device("cuda"))
    if text in GPUS:
        return GPUS[text]
    try:
        size = float(text.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 1 <= size <= 10_000:
        raise InputError(f"--gpu must be {', '.join(GPUS)} or another number of GB, got {text}")
    like = _like(size * 0.93 * GIB)
    return replace(
        like,
        name=f"a GPU of {size:g} GB",
        bytes=size * 0.93 * GIB,
        assumed=f"as fast as {like.name}, and 7 % of its memory not for programs",
    )


def gpu_here(device: torch.device) -> Gpu:
    """The one of a CUDA device, by its name; of another its memory, and speeds of one of GPUS."""
    found = torch.cuda.get_device_properties(device)
    for gpu in GPUS.values():
        if gpu.name.split()[-1 if "RTX" in gpu.name else 0] in found.name:
            return replace(gpu, name=found.name, bytes=found.total_memory)
    like = _like(found.total_memory)
    return replace(
        like, name=found.name, bytes=found.total_memory, assumed=f"as fast as {like.name}",
        float8=(found.major, found.minor) >= CAPABILITY,
    )  # fmt: skip


def _like(bytes: float) -> Gpu:
    """The largest of GPUS that is not larger, else the smallest."""
    smaller = [gpu for gpu in GPUS.values() if gpu.bytes <= bytes]
    return smaller[-1] if smaller else GPUS["24"]
