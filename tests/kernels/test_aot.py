"""`python -m bench.aot` passes kernels that may be shipped, and names those that may not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("aot") / "aot.json"


@pytest.fixture(scope="module")
def refused(output):
    return aot(output, "good", "spill", "spill", "shared", "matrix", "narrow", "no-dot", "error")


@pytest.fixture(scope="module")
def shipped(output, refused):  # after it, so that there is something to reuse
    return aot(output, "good", "good")


def aot(output: Path, *samples: str) -> subprocess.CompletedProcess:
    """Compile samples by name for sm_90, in a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = map(str, (ROOT / "kernels", ROOT, ROOT / "tests"))
    env |= {"SAMPLES": " ".join(samples), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench.aot", "--arch", "90", "--output", output]
    return subprocess.run(
        [*command, "--launches", "support.aot_samples"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_good_kernels_pass_each_once(shipped, output):
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    kernels = [row["kernel"] for row in json.loads(output.read_text())]
    assert kernels == ["copy_kernel", "gemm_kernel"]
    assert "0 faults" in shipped.stdout


def test_a_row_says_what_a_kernel_takes(shipped, output):
    copy, gemm = json.loads(output.read_text())
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    assert gemm["tiles"] == tiles and (gemm["arch"], gemm["dtype"]) == (90, "bf16")
    # Two tiles in flight at least, of 64 x 64 in bf16
    assert gemm["shared"] >= 2 * 2 * 64 * 64 * 2 and gemm["registers"] > 32
    assert gemm["matrix"] == "wgmma" and gemm["spill_bytes"] == 0
    assert copy["matrix"] is None and copy["shared"] == 0


@pytest.mark.parametrize(
    "fault",
    [
        "centred_kernel of spill, sm_90, bf16, N16384 warps1 stages3: spills ",
        "gemm_kernel of shared, sm_90, bf16, M128 N128 K128 warps4 stages5: takes 327680 bytes",
        "gemm_kernel of matrix, sm_90, bf16, M16 N16 K32 warps1 stages2: multiplies by mma",
        "gemm_kernel of narrow, sm_90, bf16, M64 N64 K64 warps4 stages3: loads two bytes a ",
        "no-dot, sm_90, bf16: none of its kernels has a dot",
        "broken_kernel of error, sm_90, bf16, N16 warps4 stages3: does not compile",
    ],
    ids=["spill", "shared-memory", "no-wgmma", "narrow-loads", "no-dot", "does-not-compile"],
)
def test_fault_is_named_with_kernel_card_and_tile(fault, refused):
    assert refused.returncode == 1
    assert f"FAILED {fault}" in refused.stdout


def test_nothing_else_is_refused_nor_anything_twice(refused):
    assert refused.stdout.count("FAILED") == 6
    assert "no_such_name is not defined" in refused.stdout


def test_what_was_compiled_before_is_not_compiled_again(refused, shipped):
    assert "compile:" in refused.stderr and "compile:" not in shipped.stderr


def test_interpreted_kernels_are_refused(interpreted, monkeypatch, capsys):
    if not interpreted:
        pytest.skip("kernels are compiled here")
    from bench import aot

    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
