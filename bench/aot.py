"""What every Triton kernel takes on the GPUs it is shipped for, asked of the compiler without one.

`python -m bench.aot [--arch 80 90 100] [--output build/aot.json]` compiles the launches that
`rankpo_kernels.triton.launches` lists, as their launchers specialise them, and runs nothing. It
exits with 1 where a kernel does not compile or would be refused or slow on its GPU: see `faults`.
What was compiled before, by the same Triton from the same source, is read from a file beside the
output.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import get_cache_key, make_backend
from triton.runtime.jit import KernelInterface

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # what a block can have
TENSOR_COLUMNS = 512  # of tensor memory, sm_100
MATRIX = {90: "wgmma", 100: "tcgen05"}  # what a GEMM in bf16 must use to be worth its name
INSTRUCTIONS = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}
LOW = {"bf16", "fp16", "bfloat16", "float16", "torch.bfloat16", "torch.float16"}
BF16 = {name for name in LOW if "bf" in name}
NARROW = re.compile(
    r"\bld\.global\S*\.[bu]16\b"
)  # two bytes a thread: what is not aligned or in order


@dataclass(frozen=True)
class Job:
    """One kernel to compile; `key` changes with its source, constants, options, Triton."""

    source: Any  # of Triton, an ASTSource
    target: GPUTarget
    options: dict
    key: str

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__

    @property
    def tiles(self) -> dict[str, int]:
        names = self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in self.source.constants.items()}
        blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_")}
        return blocks | {name: self.options[name] for name in ("num_warps", "num_stages")}


class Driver:
    """Stands in for Triton's driver: a GPU that is asked for its kind and for nothing else."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Job]]:
    """Launches in here, on any tensors, become jobs for `arch`."""
    jobs: list[Job] = []
    this_file = Path(__file__).read_text()

    def record(source: Any, target: GPUTarget, options: dict) -> Job:
        backend = make_backend(target)
        parsed = backend.parse_options(options)
        key = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
        return Job(source, target, options, hashlib.sha256((key + this_file).encode()).hexdigest())

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **kwargs)
            jobs.extend(made if isinstance(made, list) else [made])  # a list where autotuned

        return launch

    triton.runtime.driver.set_active(Driver(arch))
    with (
        mock.patch.object(triton.compiler, "compile", record),
        mock.patch.object(KernelInterface, "__getitem__", launcher),
    ):
        yield jobs


def measure(job: Job) -> dict:
    """Compile, and read what the compiler and ptxas say; `error` instead if they refuse."""
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel from Triton's cache has no log
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(job.source, target=job.target, options=job.options)
    except Exception as error:  # whatever stage it comes from, it is this kernel's
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"error": "\n".join([type(error).__name__, *lines[-6:]])}
    ptxas, ptx = log.getvalue(), compiled.asm["ptx"]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    assert spills, f"no figures in the log of ptxas: {ptxas!r}"
    used = [short for name, short in INSTRUCTIONS.items() if name in ptx]
    return {
        "shared": compiled.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", ptxas)),
        "spill_bytes": sum(int(n) for pair in spills for n in pair),
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        # None without a tl.dot, "fma" where it takes no matrix instruction
        "matrix": ("+".join(used) or "fma") if "tt.dot" in compiled.asm["ttir"] else None,
        "narrow_loads": len(NARROW.findall(ptx)),
    }


def faults(row: dict) -> Iterator[str]:
    """Why a kernel must not be shipped for its GPU."""
    if "error" in row:
        yield f"does not compile: {row['error']}"
        return
    arch, low, bf16 = row["arch"], row["dtype"] in LOW, row["dtype"] in BF16
    if low and row["spill_bytes"]:
        yield f"spills {row['spill_bytes']} bytes"
    if row["shared"] > SHARED_BYTES[arch]:
        yield f"takes {row['shared']} bytes of shared memory of {SHARED_BYTES[arch]}"
    if row["tensor_columns"] > TENSOR_COLUMNS:
        yield f"takes {row['tensor_columns']} columns of tensor memory of {TENSOR_COLUMNS}"
    if bf16 and row["matrix"] and row["narrow_loads"]:
        yield f"loads two bytes a thread in {row['narrow_loads']} places"
    if bf16 and row["matrix"] and (wanted := MATRIX.get(arch)) and wanted not in row["matrix"]:
        yield f"multiplies by {row['matrix']} and not by {wanted}"


_inherited: list[Job] = []  # of a worker process


def _measure_inherited(index: int) -> dict:
    return measure(_inherited[index])


def compile_all(jobs: Iterable[Job], cache: Path) -> dict[str, dict]:
    """What each job takes, by key: from the cache, the rest compiled on all cores."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    missing = list({job.key: job for job in jobs if job.key not in known}.values())
    if missing:
        workers = min(len(missing), os.cpu_count() or 1)
        # Forked, since the source of a kernel cannot be sent to another process.
        fork = multiprocessing.get_context("fork")
        with (
            tempfile.TemporaryDirectory() as scratch,
            mock.patch.object(triton.knobs.cache, "dir", scratch),
            fork.Pool(workers, _inherited.extend, (missing,)) as pool,
        ):
            results = pool.imap(_measure_inherited, range(len(missing)))
            for job, result in zip(missing, tqdm(results, "compile", len(missing)), strict=True):
                known[job.key] = result
        kept = {key: result for key, result in known.items() if "error" not in result}
        cache.write_text(json.dumps(kept))
    return known


def table(rows: list[dict]) -> str:
    """A line a kernel and tile, a column an architecture."""
    archs = sorted({row["arch"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key = (row["kernel"], row["dtype"], row["options"], tile_text(row))
        lines.setdefault(key, {})[row["arch"]] = _cell(row)
    cells = [["kernel", "dtype", "options", "tiles", *(f"sm_{arch}" for arch in archs)]]
    cells += [[*key, *(by_arch.get(arch, "") for arch in archs)] for key, by_arch in lines.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def tile_text(row: dict) -> str:
    tiles = ((name.rpartition("_")[2], value) for name, value in row["tiles"].items())
    return " ".join(f"{name}{value}" for name, value in tiles)


def _cell(row: dict) -> str:
    if "error" in row:
        return "does not compile"
    spilled = f" {row['spill_bytes']}B spilled" if row["spill_bytes"] else ""
    return (
        f"{row['shared'] / 1024:.0f}K {row['registers']}r {row['matrix'] or ''}".strip() + spilled
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    archs = sorted(SHARED_BYTES)
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs)
    parser.add_argument("--output", type=Path, default=Path("build/aot.json"))
    parser.add_argument(
        "--launches", default="rankpo_kernels.triton.launches", help="module with `launches()`"
    )
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")

    made = []  # (arch, launch, its jobs)
    for arch in args.arch:
        for launch in importlib.import_module(args.launches).launches():
            with recording(arch) as jobs:
                launch.run()
            made.append((arch, launch, jobs))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cache = args.output.with_name(f"{args.output.stem}-cache.json")
    measured = compile_all([job for _, _, jobs in made for job in jobs], cache)

    rows: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    for arch, launch, jobs in made:
        for job in jobs:
            row = {"kernel": job.kernel, "arch": arch, "dtype": launch.dtype, "tiles": job.tiles}
            row |= {"options": launch.options} | measured[job.key]
            if job.key not in rows:
                where = (
                    f"{job.kernel} of {launch.name}, sm_{arch}, {launch.dtype}, {tile_text(row)}"
                )
                broken += [f"{where}: {fault}" for fault in faults(row)]
            rows.setdefault(job.key, row)
        results = [measured[job.key] for job in jobs]
        if launch.matrix and not any(r.get("matrix") or "error" in r for r in results):
            broken.append(
                f"{launch.name}, sm_{arch}, {launch.dtype}: none of its kernels has a dot"
            )
    args.output.write_text(json.dumps(list(rows.values()), indent=1) + "\n")

    print(table(list(rows.values())))
    print("K: KiB of shared memory, r: registers a thread")
    for fault in broken:
        print(f"FAILED {fault}")
    print(f"{len(rows)} kernels, {len(broken)} faults, written to {args.output}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
