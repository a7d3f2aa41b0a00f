"""What a reader needs to know of the machine to judge the numbers, and what it reaches at best."""

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rankpo_fast.model.precision import half_speed
from rankpo_kernels.chunked import native

from .gpu import limits
from .measure import cache_bytes, seconds_of
from .questions import Rates

PACKAGES = (  # whatever of them is installed can change a figure
    "numpy", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "inf-cl",
    "quack-kernels", "sentence-transformers", "open_clip_torch", "flash-attn", "flash-attn-4",
)  # fmt: skip
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # rows, columns and depth of the product
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}
COPY_BYTES = {"cpu": 8, "cuda": 20}  # times the last cache
RUNS = 5
CPUINFO, TOPOLOGY = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu")
BUDGET_S = 0.5  # a rate takes no more runs then
# A dtype this many times as slow as fp32 has no instructions on a CPU: widening to fp32 and back
# takes less. Without even that, a product took 55 times as long on AVX2.
EMULATED = 4.0
HALVES = ("bfloat16", "float16")


def about(device: str) -> dict[str, Any]:
    """Device, versions, commit and date."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        found = {
            "device": gpu.name,
            "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
            "compute capability": f"{gpu.major}.{gpu.minor}",
            **limits(device),
            "cuda": torch.version.cuda,
            "C compiler": _compiler(),
            "host": _processor(),
        }
    else:
        rows = native.instruction_sets()["rows"]
        cores = f"{torch.get_num_threads()} threads, {cache_bytes('cpu') >> 20} MiB of cache"
        found = {"device": f"{_processor()}, {cores}, rows by {rows}"}
    found |= {"cores": _cores(), "instruction set": _instruction_set()}
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return found | {
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def emulated(device: str) -> dict[str, float]:
    """The dtypes in which a CPU's products are emulated: how many times fp32's time a small one
    takes. A large one, or a case, would take minutes and say no more."""
    if device != "cpu":
        return {}
    speeds = {name: half_speed(getattr(torch, name), device) for name in HALVES}
    return {name: speed for name, speed in speeds.items() if speed >= EMULATED}


def measure_rates(device: str) -> Rates:
    """Medians of a large product by dtype, none that is emulated, and of a copy much larger than
    the caches."""
    size = GEMM_SIZE[device]
    gemm = {}
    for name in [name for name in DTYPES[device] if name not in emulated(device)]:
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        out = torch.empty_like(a)
        seconds = _median(partial(torch.mm, a, b, out=out), device)
        gemm[name] = 2 * size**3 / seconds
    source = torch.zeros(COPY_BYTES[device] * cache_bytes(device), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # pages that exist
    return Rates(gemm, 2 * source.nbytes / _median(lambda: target.copy_(source), device))


def lost(device: str) -> str | None:
    """Why nothing runs on it any more: after an illegal access a process has no GPU."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def _median(run: Callable[[], Any], device: str) -> float:
    run()
    seconds: list[float] = []
    while not seconds or (len(seconds) < RUNS and sum(seconds) < BUDGET_S):
        seconds.append(seconds_of(run, device))
    return statistics.median(seconds)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    if named := os.environ.get("COMMIT"):  # of a tree that came without .git
        return named
    describe: list[str | Path] = [
        "git",
        "-C",
        Path(__file__).parent,
        "describe",
        "--always",
        "--dirty",
    ]
    with contextlib.suppress(OSError):  # no git
        said = subprocess.run(describe, capture_output=True, text=True, check=False).stdout
        return said.strip() or "unknown"
    return "unknown"


def _compiler() -> str:
    """Triton and torch.compile build the code that launches a kernel with it, unless their caches
    have that."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return found or "none: only kernels whose launchers are in Triton's cache run"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = CPUINFO.read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    return platform.machine()


def _cores() -> str:
    """2 (4 hardware threads, 3 of them ours)."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    siblings = TOPOLOGY.glob("cpu[0-9]*/topology/thread_siblings_list")
    cores = len({path.read_text() for path in siblings}) or "unknown"
    return f"{cores} ({os.cpu_count()} hardware threads, {ours} of them ours)"


def _instruction_set() -> str:
    """By which sums are rounded, and what makes products in bf16 fast: AVX512 in torch, avx512 in
    rows, amx_bf16."""
    sets = native.instruction_sets()
    found = [f"{sets[who]} in {who}" for who in ("torch", "rows")]
    with contextlib.suppress(OSError, StopIteration):
        lines = CPUINFO.read_text().splitlines()
        flags = next(line for line in lines if line.startswith("flags")).split()
        found += [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join(found)
