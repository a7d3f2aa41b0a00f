"""What every Triton kernel takes on the GPUs it is shipped for, asked of the compiler without one.

`python -m bench.aot [--arch 80 90 100] [--output build/aot.json]` compiles the launches that
`rankpo_kernels.triton.launches` lists, as their launchers specialise them, and runs nothing. It
exits with 1 where a kernel does not compile or would be refused or slow on its GPU: see `faults`;
and where a pipeline is predicted above its target: see `hopper`. What was compiled before, by the
same Triton from the same source, is read from a file beside the output.

Of each kernel and tile that multiplies, beside registers, shared memory and spills:

    programs_per_sm        that fit a multiprocessor at once
    tma, warp_specialized  operands come by bulk copies; warps have roles, registers of their own
    proxy_fence            wgmma sees what was written: `sass.proxy_fence`
    epilogue_instructions  a thread of a consumer, after a tile's last product: `sass.tile_code`
    tensor_clocks, epilogue_clocks    of a tile of 1024 dims, predicted, on sm_90: `hopper`
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
from dataclasses import asdict, dataclass
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

from rankpo_kernels.triton import tiles

from . import hopper, sass
from .hopper import PIPELINES, ScoreKernel

LAUNCHES = "rankpo_kernels.triton.launches"
HOPPER = 90
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # what a block can have
SHARED_BYTES_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED_BYTES = 1024  # of shared memory, that the driver takes of each block
# Of a multiprocessor, on all three: CUDA programming guide, "Technical Specifications per Compute
# Capability". A scheduler of the 4 has a quarter of the registers, and gives a warp 256 at once.
REGISTERS, THREADS, BLOCKS, SCHEDULERS, REGISTER_UNIT = 65536, 2048, 32, 4, 256
TENSOR_COLUMNS = 512  # of tensor memory, sm_100
MATRIX = {90: "wgmma", 100: "tcgen05"}  # what a GEMM in bf16 must use to be worth its name
INSTRUCTIONS = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}
LOW = {"bf16", "fp16", "bfloat16", "float16", "torch.bfloat16", "torch.float16"}
BF16 = {name for name in LOW if "bf" in name}
NARROW = re.compile(
    r"\bld\.global\S*\.[bu]16\b"
)  # two bytes a thread: what is not aligned or in order


KEYS = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"}  # of a tile of scores
DOT = re.compile(r"\b(?:warp_group_dot|tc_gen5_mma|tt\.dot)\b(?!_wait)")


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
    this_file = Path(__file__).read_text() + Path(sass.__file__).read_text()

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
    triton.runtime.driver.set_active(Driver(job.target.arch))  # whom a kernel may ask for its GPU
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
    row = {
        "shared": compiled.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", ptxas)),
        "spill_bytes": sum(int(n) for pair in spills for n in pair),
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        # None without a tl.dot, "fma" where it takes no matrix instruction
        "matrix": ("+".join(used) or "fma") if "tt.dot" in compiled.asm["ttir"] else None,
        "narrow_loads": len(NARROW.findall(ptx)),
        "warps": compiled.metadata.num_warps,  # all, also those that the compiler added
    }
    row["programs_per_sm"] = programs_per_sm(job.target.arch, row)
    return row | (_of_products(compiled, ptx) if used else {})


def programs_per_sm(arch: int, row: dict) -> int:
    """How many programs of a kernel a multiprocessor holds at once."""
    warps, registers = row["warps"], max(1, row["registers"])
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    fits = [
        SCHEDULERS * (REGISTERS // SCHEDULERS // a_warp) // warps,
        SHARED_BYTES_PER_SM[arch] // (row["shared"] + RESERVED_BYTES),
        THREADS // (32 * warps),
        BLOCKS,
    ]
    if row["tensor_columns"]:
        fits.append(TENSOR_COLUMNS // row["tensor_columns"])
    return min(fits)


def _of_products(compiled: Any, ptx: str) -> dict:
    """What PTX, TTGIR and SASS say of a kernel with tensor instructions."""
    ttgir, warps = compiled.asm["ttgir"], compiled.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = sass.read(sass.disassemble(Path(file.name), triton.knobs.nvidia.nvdisasm.path))
    tiles = sass.tile_code(code)
    specialized = "setmaxnreg" in ptx or "ttg.warp_specialize(" in ttgir
    row = {
        "tma": "cp.async.bulk.tensor" in ptx,
        "warp_specialized": specialized,
        "proxy_fence": sass.proxy_fence(ptx),
    }
    if not tiles:
        return row
    longest = max(tiles, key=lambda tile: tile.epilogue.all)
    return row | {
        "epilogue_instructions": longest.epilogue.all,
        "epilogue_reachable": longest.reachable,
        "epilogue": asdict(longest.epilogue),
        "prologue": asdict(longest.prologue),
        "persistent": longest.loops,
        "consumers": len(tiles),
        "epilogue_warps": _consumer_warps(ttgir, warps) if specialized else warps,
    }


def _consumer_warps(ttgir: str, warps: int) -> int:
    """Of a specialised kernel, those that multiply."""
    first, *partitions = re.split(r"^\s+partition\d+\(", ttgir, flags=re.MULTILINE)
    sizes = [
        int(size[1])
        for text in partitions
        if DOT.search(text) and (size := re.search(r"\bnum_warps\((\d+)\)", text))
    ]
    if DOT.search(first) and (size := re.search(r'"ttg.num-warps" = (\d+)', first)):
        sizes.append(int(size[1]))
    return sum(sizes) or warps


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
    if low and "wgmma" in (row["matrix"] or "") and not row["proxy_fence"]:
        yield "multiplies by wgmma what no fence.proxy.async made visible to it"
    meant = row["programs_meant"]
    if low and arch == HOPPER and meant > 1 and row["programs_per_sm"] < meant:
        most = REGISTERS // (32 * row["warps"] * meant) // 8 * 8
        yield (
            f"fits {row['programs_per_sm']} times, not {meant}: {row['registers']} registers of "
            f"{most}, {row['shared']} bytes of shared memory of "
            f"{SHARED_BYTES_PER_SM[arch] // meant - RESERVED_BYTES}"
        )


def programs_meant(row: dict) -> int:
    """Of a multiprocessor, by the table of tiles."""
    if row.get("warp_specialized") or not row.get("matrix"):
        return 1
    of = row["tiles"]
    table = [each for each in vars(tiles).values() if isinstance(each, tiles.Tiles)]
    same = [each for each in table if all(getattr(each, key) == of.get(key) for key in KEYS)]
    return max((each.programs for each in same), default=1)


def is_score(row: dict) -> bool:
    """Whether a kernel multiplies tiles of scores, and is understood well enough to predict it: of
    the rest there is none, as a rule, and a program looks after many tiles."""
    return "epilogue" in row and row["tiles"].keys() >= KEYS and row["kernel"] != "rest_kernel"


def _clocks(row: dict) -> dict:
    """Of a tile of 1024 dims on sm_90."""
    if row["arch"] != HOPPER or not is_score(row):
        return {}
    kernel = ScoreKernel.of(row)
    return {
        "tensor_clocks": round(hopper.tensor_clocks(kernel, 1024)),
        "epilogue_clocks": round(hopper.epilogue_clocks(kernel)),
    }


def pipeline_faults(rows: list[dict], wanted: Iterable[str]) -> list[str]:
    return [
        f"pipeline {name}, sm_{HOPPER}: {fault}"
        for name in wanted
        for fault in hopper.faults(name, hopper.kernels_of(rows, name))
    ]


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
    kind = (row["matrix"] or "") + "+ws" * row.get("warp_specialized", False)
    after = f" {row['epilogue_instructions']}e" if row.get("epilogue_instructions") else ""
    taken = f"{row['shared'] / 1024:.0f}K {row['registers']}r {row['programs_per_sm']}p {kind}"
    return taken.rstrip() + after + spilled


def record_all(module: str, archs: Iterable[int]) -> list[tuple[int, Any, list[Job]]]:
    """(arch, launch, its jobs) of what the module's `launches()` lists."""
    made = []
    for arch in archs:
        for launch in importlib.import_module(module).launches():
            if arch != HOPPER and not launch.everywhere:
                continue
            with recording(arch) as jobs:
                launch.run()
            made.append((arch, launch, jobs))
    return made


def judge(
    made: list[tuple[int, Any, list[Job]]], measured: dict[str, dict], wanted: Iterable[str]
) -> tuple[list[dict], list[str]]:
    """(a row a kernel and tile, what is wrong); `wanted`: pipelines that must be there."""
    rows: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    seen = set(wanted)
    for arch, launch, jobs in made:
        for job in jobs:
            if job.key in rows:
                continue
            row = {"kernel": job.kernel, "arch": arch, "dtype": launch.dtype, "tiles": job.tiles}
            row |= {"options": launch.options} | measured[job.key]
            row["programs_meant"] = programs_meant(row)
            rows[job.key] = row = row | _clocks(row) | {"pipelines": {}}
            where = f"{job.kernel} of {launch.name}, sm_{arch}, {launch.dtype}, {tile_text(row)}"
            broken += [f"{where}: {fault}" for fault in faults(row)]
        of_launch = [rows[job.key] for job in jobs]
        if launch.matrix and not any(row.get("matrix") or "error" in row for row in of_launch):
            broken.append(
                f"{launch.name}, sm_{arch}, {launch.dtype}: none of its kernels has a dot"
            )
        if arch == HOPPER and (pipeline := getattr(launch, "pipeline", None)):
            seen.add(pipeline)
            for position, row in enumerate(row for row in of_launch if is_score(row)):
                for D in launch.dims:  # and its place among the pipeline's kernels
                    row["pipelines"].setdefault(pipeline, {})[str(D)] = position
    made_rows = list(rows.values())
    return made_rows, broken + pipeline_faults(made_rows, sorted(seen))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    archs = sorted(SHARED_BYTES)
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs)
    parser.add_argument("--output", type=Path, default=Path("build/aot.json"))
    parser.add_argument("--launches", default=LAUNCHES, help="module with `launches()`")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")

    made = record_all(args.launches, args.arch)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cache = args.output.with_name(f"{args.output.stem}-cache.json")
    # What a kernel without products is made of all these GPUs have: one stands for the others.
    first = args.arch[0]
    measured = compile_all([job for arch, _, jobs in made if arch == first for job in jobs], cache)
    alike = {
        job.kernel
        for arch, _, jobs in made
        for job in jobs
        if arch == first and measured[job.key].get("matrix", "") is None
    }
    made = [
        (arch, launch, [job for job in jobs if arch == first or job.kernel not in alike])
        for arch, launch, jobs in made
    ]
    measured |= compile_all([job for _, _, jobs in made for job in jobs], cache)
    ours = args.launches == LAUNCHES and HOPPER in args.arch
    rows, broken = judge(made, measured, PIPELINES if ours else ())
    args.output.write_text(json.dumps(rows, indent=1) + "\n")

    print(table(rows))
    print("K: KiB of shared memory, r: registers a thread, p: programs a multiprocessor,")
    print("e: instructions a thread after a tile's last product, ws: warp specialised")
    for fault in broken:
        print(f"FAILED {fault}")
    print(f"{len(rows)} kernels, {len(broken)} faults, written to {args.output}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
