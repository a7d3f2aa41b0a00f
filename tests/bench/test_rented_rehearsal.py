"""The steps for a rented GPU as far as a CPU can take them: every part runs, at tiny sizes, in
Triton's interpreter; what they launch is compiled for that GPU and found again where it arrives."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bench import results
from bench.rented.pipelines import PIPELINES
from bench.rented.speed import measured
from bench.rented.state import Record
from bench.rented.steps import SECONDS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


def rehearsed(out, *flags):
    environment = os.environ | {"OUT": str(out), "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    environment.pop("RESUME", None)
    command = [sys.executable, "-m", "bench.rented", "--rehearse", "--minutes", "30", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_step_runs_on_a_cpu_and_a_second_call_has_nothing_to_do(tmp_path):
    done = rehearsed(tmp_path)
    said = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, said
    record = Record.resumed(tmp_path / "results.json", None)
    run = results.read(record.path)
    assert {name: step["state"] for name, step in record.steps.items()} == dict.fromkeys(
        SECONDS, "done"
    ), said
    assert {each.pipeline for each in measured(run)} == {p.name for p in PIPELINES if p.gemms}
    files = [path for path in tmp_path.rglob("*")]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 1 << 20
    again = rehearsed(tmp_path)
    assert again.returncode == 0 and results.read(tmp_path / "results.json") == run
    assert "fine" not in again.stdout and again.stdout.count("(0.") == 0


def compiled(script, cache):
    """What a script prints in a process where kernels are compiled into this cache."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = f"{ROOT / 'kernels'}:{ROOT}"
    command = [sys.executable, "-c", textwrap.dedent(script), str(cache)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FILL = """
    import sys
    from pathlib import Path
    from bench.rented import cache, probes
    from bench.rented.plan import real
    known = lambda: probes.launch_the_known_kernel("meta")
    cache.launches = lambda plan: [("the known kernel", known)]
    print(cache.fill(Path(sys.argv[1]), real(), 90, 600, 1))
"""
LOOK = """
    import sys
    from pathlib import Path
    import triton
    from triton.runtime.jit import KernelInterface
    from bench.aot import Driver
    from bench.rented import carried, probes
    from bench.rented.plan import rehearsed
    triton.runtime.driver.set_active(Driver(90))
    KernelInterface.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: kernel.warmup(*args, grid=grid, **options)
    )
    carried.settle(Path(sys.argv[1]))
    print(carried.is_complete(Path(sys.argv[1]), 90), probes.cache(rehearsed()).says)
"""


def test_what_is_compiled_here_is_found_where_it_arrives(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    assert compiled(LOOK, there).startswith("False MISS")
    shutil.rmtree(there)
    (here / "OLD").mkdir()
    assert compiled(FILL, here).splitlines()[-1] == "[]"
    shutil.move(here, there)
    kept = {path.suffix for path in there.rglob("*") if path.is_file()}
    assert kept <= {".cubin", ".json", ".so", ".txt"} and ".cubin" in kept
    assert not (there / "OLD").exists()  # of an earlier state of the kernels
    assert compiled(LOOK, there).startswith("True hit in")
