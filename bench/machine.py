"""What a reader needs to know of the machine to judge the numbers, and what it reaches at best."""

import contextlib
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rankpo_kernels import native

from .measure import cache_bytes, seconds_of
from .questions import Rates

PACKAGES = (  # whatever of them is installed can change a figure
    "triton", "transformers", "liger-kernel", "cut-cross-entropy", "inf-cl", "quack-kernels",
    "sentence-transformers", "open_clip_torch", "flash-attn", "flash-attn-4",
)  # fmt: skip
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # rows, columns and depth of the product
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}
COPY_BYTES = {"cpu": 8, "cuda": 20}  # times the last cache
RUNS = 5


def about(device: str) -> dict[str, Any]:
    """Device, versions, commit and date."""
    if device == "cuda":
        card = torch.cuda.get_device_properties()
        found = {
            "device": card.name,
            "memory": f"{card.total_memory / 2**30:.0f} GiB",
            "compute capability": f"{card.major}.{card.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    else:
        library = native.library()
        rows = library.rankpo_instruction_set().decode() if library else "torch"
        cores = f"{torch.get_num_threads()} threads, {cache_bytes('cpu') >> 20} MiB of cache"
        found = {"device": f"{_processor()}, {cores}, rows by {rows}"}
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return found | {
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure_rates(device: str) -> Rates:
    """Medians of a large product by dtype, and of a copy much larger than the caches."""
    size = GEMM_SIZE[device]
    gemm = {}
    for name in DTYPES[device]:
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        out = torch.empty_like(a)
        seconds = _median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        gemm[name] = 2 * size**3 / seconds
    source = torch.zeros(COPY_BYTES[device] * cache_bytes(device), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # pages that exist
    return Rates(gemm, 2 * source.nbytes / _median(lambda: target.copy_(source), device))


def _median(run, device: str) -> float:
    run()
    return statistics.median(seconds_of(run, device) for _ in range(RUNS))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    if named := os.environ.get("COMMIT"):  # of a tree that came without .git
        return named
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # no git
        said = subprocess.run(describe, capture_output=True, text=True, check=False).stdout
        return said.strip() or "unknown"
    return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    return platform.machine()


def _driver() -> str:
    try:
        import pynvml  # nvidia-ml-py

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # a figure to note, not to fail for
        return f"unknown ({type(error).__name__})"
