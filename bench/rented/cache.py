"""Triton's cache, filled on a machine without a GPU: it travels beside the checkout.

    python -m bench.rented.cache [DIRECTORY] [--arch 90] [--seconds 600]

The steps themselves run, on tensors without memory: what they would launch is compiled for a GPU
that is not here. It takes the Triton and the Python of that machine, see `carried`.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.cache import FileCacheManager

from ..aot import Job, recording
from ..cases import tiles
from .carried import CACHE, STAMP, fingerprint, is_complete, mebibytes, settle
from .correctness import described, sizes_of
from .pipelines import PIPELINES
from .plan import Plan, real
from .probes import launch_the_known_kernel
from .speed import of_size

MOST_MIB = 40
SYMBOL = re.compile(r"\bcu[A-Z]\w+")


# --- what is launched ---


def launches(plan: Plan) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of the probes, correctness, speed and tiles, in the order of the steps; other steps take the
    same kernels, or some of their own."""
    yield "the known kernel", partial(launch_the_known_kernel, "meta")
    for pipeline in PIPELINES:
        for size in sizes_of(pipeline, plan):
            batch = pipeline.of_nothing(*size, plan.dtype)
            yield f"{pipeline.name} {described(size)}", partial(pipeline.run, batch)
    for size in plan.sizes:
        for pipeline in of_size(size, plan):
            batch = pipeline.of_nothing(*size, plan.dtype)
            yield f"{pipeline.name} {described(size)}", partial(pipeline.run, batch)
    for question in tiles.QUESTIONS:
        for shape in question.shapes("cuda", "default"):
            case = question.case(shape, "meta")
            for name, run in case.implementations.items():
                if name != case.lower_bound:
                    yield f"{name} {described(tuple(shape.values())[:-1])}", run


def jobs(plan: Plan, arch: int) -> tuple[list[Job], list[str]]:
    """Each kernel of all launches once, and what could not be launched."""
    found: dict[str, Job] = {}
    wrong = []
    for name, run in launches(plan):
        with recording(arch) as made:
            try:
                run()
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}"[:200])
        found |= {job.key: job for job in made if job.key not in found}
    return list(found.values()), wrong


# --- compiled into the cache ---


class Used(FileCacheManager):
    """Triton's own, which remembers what it was asked for."""

    names: set[str] = set()

    def __init__(self, key: str, override: bool = False, dump: bool = False):
        super().__init__(key, override, dump)
        self.names.add(Path(self.cache_dir).name)


_inherited: list[Job] = []  # of a worker process
_stub: list[Path | None] = []


def _compile_inherited(place: int) -> tuple[str, set[str], str]:
    """(kernel, folders of the cache that it takes, why it does not compile)."""
    job, error = _inherited[place], ""
    Used.names.clear()
    try:
        kernel = triton.compile(job.source, target=job.target, options=job.options)
        if _stub[0] is not None:
            make_launcher(kernel, _stub[0])
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"[:300]
    return job.kernel, set(Used.names), error


def make_launcher(kernel: Any, stub: Path) -> None:
    """The C module by which Triton 3.6 launches every kernel of one signature. It is linked with a
    library that only has the names of CUDA's driver, and not loaded."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "make_launcher") or not hasattr(build, "_load_module_from_path"):
        return  # another Triton
    with (
        mock.patch.object(driver, "library_dirs", lambda: [str(stub)]),
        mock.patch.object(build, "_load_module_from_path", lambda *of: mock.MagicMock()),
    ):
        driver.CudaUtils()
        driver.CudaLauncher(kernel.src, kernel.metadata)


def make_stub(directory: Path) -> Path | None:
    """libcuda.so.1 with every name that Triton's C sources have; None without a compiler."""
    from triton.backends.nvidia import driver

    sources = [Path(driver.__file__), Path(driver.__file__).with_name("driver.c")]
    names = {name for source in sources if source.exists()
             for name in SYMBOL.findall(source.read_text())}  # fmt: skip
    code = directory / "stub.c"
    code.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(names)))
    target = directory / "libcuda.so.1"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(code), "-o"]
    subprocess.run([*command, str(target)], check=True)
    return directory


def fill(directory: Path, plan: Plan, arch: int, seconds: float, workers: int) -> list[str]:
    """Compile what the directory lacks; why kernels do not compile, or are left."""
    stop = time.monotonic() + seconds
    directory.mkdir(parents=True, exist_ok=True)
    settle(directory)
    todo, wrong = jobs(plan, arch)
    used: set[str] = set()
    print(f"{len(todo)} kernels for sm_{arch}, {workers} at a time", flush=True)
    fork = multiprocessing.get_context("fork")  # the source of a kernel cannot be sent
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(triton.knobs.cache, "dir", str(directory)),
        mock.patch.object(triton.knobs.cache, "manager_class", Used),
        fork.Pool(workers, _inherit, (todo, make_stub(Path(place)))) as pool,
    ):
        results = pool.imap(_compile_inherited, range(len(todo)))
        for number in range(len(todo)):
            try:
                kernel, names, error = results.next(max(0.01, stop - time.monotonic()))
            except multiprocessing.TimeoutError:
                wrong.append(f"{len(todo) - number} kernels are left after {seconds:g} s")
                break
            used |= names
            if error:
                wrong.append(f"{kernel}: {error}")
        else:
            prune(directory, used)
            (directory / STAMP).write_text(fingerprint(arch))
    settle(directory)
    return wrong


def _inherit(todo: list[Job], stub: Path | None) -> None:
    _inherited.extend(todo)
    _stub.append(stub)
    torch.set_num_threads(1)


def prune(directory: Path, used: set[str]) -> None:
    """What an earlier state of the kernels left."""
    for folder in directory.iterdir():
        if folder.is_dir() and folder.name not in used:
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rented.cache", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=CACHE)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--missing", action="store_true", help="nothing if the cache is complete")
    args = parser.parse_args()
    start = time.monotonic()
    if args.missing and is_complete(args.directory, args.arch):
        print("nothing: the carried cache has every kernel of this source")
        return 0
    wrong = fill(args.directory, real(), args.arch, args.seconds, args.workers)
    size = mebibytes(args.directory)
    for line in wrong:
        print(f"FAILED {line}")
    print(
        f"{args.directory}: {size:.1f} MiB, {time.monotonic() - start:.0f} s, "
        f"Triton {triton.__version__}, Python {sys.version_info[0]}.{sys.version_info[1]}"
    )
    if size > MOST_MIB:
        print(f"FAILED {size:.0f} MiB are more than {MOST_MIB}")
    return 1 if wrong or size > MOST_MIB else 0


if __name__ == "__main__":
    sys.exit(main())
