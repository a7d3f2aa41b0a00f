"""What decides how sums are rounded, beside the settings: two runs that share all of it give equal
bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


@contextmanager
def summed_in_order(wanted: bool) -> Iterator[None]:
    """Inside, torch and attention's kernels sum in one order, or refuse by name (RuntimeError).

    Of a step without it all but attention's backward pass does so.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch insists on
    memory: Any = torch.utils.deterministic  # whose attribute no stub knows
    before, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads what it has not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = filled


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
