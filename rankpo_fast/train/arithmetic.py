"""What decides how sums are rounded, beside the settings: two runs that share all of it give equal
bits."""

from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from rankpo_fast import __version__
from rankpo_fast.data.files import sha256_of
from rankpo_fast.threads import fit_threads
from rankpo_kernels.chunked import native


def arithmetic(device: torch.device) -> dict[str, str]:
    """By names for the user."""
    programs = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "rankpo-fast": __version__,
    }
    if device.type == "cuda":
        triton = {"triton": version("triton")} if torch.version.cuda else {}
        return {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda or torch.version.hip),
            **triton,
            **programs,
        }
    fit_threads()  # as a model that is loaded does
    return {
        "threads": str(torch.get_num_threads()),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "losses": native_backend(),
        "native library": _native_content(),
        **programs,
    }


def native_backend() -> str:
    """What computes losses on the CPU."""
    library = native.library()
    if library is None:
        return "in torch"
    return f"native ({library.rankpo_instruction_set().decode()})"


@cache
def _native_content() -> str:
    library = native.library()
    return "none" if library is None else sha256_of(Path(library._name))[:16]
