"""`python -m bench.aot` passes kernels that may be shipped, and names those that may not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot as tool
from bench.hopper import PIPELINES, ScoreKernel

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


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[list[dict], str]:
    """(rows, what was printed) of kernels whose machine code is read."""
    output = tmp_path_factory.mktemp("aot-read") / "aot.json"
    said = aot(output, "good", "specialized").stdout
    rows = json.loads(output.read_text())
    aot(output, "good", archs=("80", "100"))
    return rows + json.loads(output.read_text()), said


def aot(
    output: Path, *samples: str, archs: tuple[str, ...] = ("90",)
) -> subprocess.CompletedProcess:
    """Compile samples by name, in a process where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = map(str, (ROOT / "kernels", ROOT, ROOT / "tests"))
    env |= {"SAMPLES": " ".join(samples), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench.aot", "--arch", *archs, "--output", output]
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


@pytest.mark.long
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


def row_of(rows: list[dict], kernel: str, arch: int, BLOCK_M: int = 64) -> dict:
    same = (row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch))
    return next(row for row in same if row["tiles"].get("BLOCK_M", BLOCK_M) == BLOCK_M)


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_epilogue_of_a_gemm_stores_its_tile(read, arch):
    gemm = row_of(read[0], "gemm_kernel", arch)
    assert not gemm["persistent"] and not gemm["warp_specialized"] and not gemm["tma"]
    # 64 x 64 sums in fp32 of 128 threads, 16 bytes a store
    assert gemm["epilogue"]["stored_bytes"] == 64 * 64 * 4 / 128
    assert 2 * 8 <= gemm["epilogue_instructions"] < 400
    assert gemm["epilogue_instructions"] <= gemm["epilogue_reachable"]
    assert gemm["consumers"] == 1 and gemm["programs_per_sm"] >= 3


@pytest.mark.long
def test_clocks_of_a_tile_are_predicted_on_hopper_alone(read):
    gemm = row_of(read[0], "gemm_kernel", 90)
    assert gemm["tensor_clocks"] == 64 * 64 * 1024 / 2048
    assert gemm["epilogue_clocks"] > gemm["epilogue_instructions"]
    assert "tensor_clocks" not in row_of(read[0], "gemm_kernel", 80)


@pytest.mark.long
def test_consumers_of_a_specialised_kernel_are_read(read):
    row = row_of(read[0], "specialized_kernel", 90, 128)
    assert row["warp_specialized"] and row["tma"] and row["persistent"] and row["proxy_fence"]
    # a warp group of copies and two that multiply 64 x 256 each, an exponential a score
    assert (row["warps"], row["epilogue_warps"], row["consumers"]) == (12, 8, 2)
    assert row["epilogue"]["special"] == 64 * 256 / 128
    assert row["programs_per_sm"] == 1 and row["spill_bytes"] == 0
    assert row["pipelines"]["forward"] == dict.fromkeys(("384", "1024", "2048", "4096"), 0)
    assert ScoreKernel.of(row).consumers == 2


@pytest.mark.long
def test_pipeline_above_its_target_is_a_fault(read):
    assert "FAILED pipeline forward, sm_90: predicted 1." in read[1]
    assert "at D=384, target 1.10" in read[1] and "D=4096" not in read[1]


def test_tile_that_was_meant_to_fit_twice_is_a_fault():
    row = GOOD | {"arch": 90, "programs_meant": 2, "programs_per_sm": 1}
    assert any("fits 1 times, not 2" in fault for fault in tool.faults(row))


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    [
        pytest.param(90, 128, 8, 98_304, 2, id="two-of-128-registers"),
        pytest.param(90, 129, 8, 98_304, 1, id="one-of-a-register-more"),
        pytest.param(90, 128, 8, 115_712, 2, id="half-of-shared-memory"),
        pytest.param(90, 128, 8, 115_713, 1, id="a-byte-more-than-half"),
        pytest.param(80, 128, 8, 98_304, 1, id="less-of-shared-memory"),
        pytest.param(90, 168, 12, 148_440, 1, id="warp-specialised"),
        pytest.param(90, 16, 4, 0, 16, id="threads"),
        pytest.param(90, 16, 1, 0, 32, id="blocks"),
    ],
)
def test_programs_that_fit_a_multiprocessor(arch, registers, warps, shared, programs):
    row = {"registers": registers, "warps": warps, "shared": shared, "tensor_columns": 0}
    assert tool.programs_per_sm(arch, row) == programs


def test_tensor_memory_limits_programs():
    row = {"registers": 32, "warps": 4, "shared": 0, "tensor_columns": 256}
    assert tool.programs_per_sm(100, row) == 2


GOOD = {
    "arch": 90, "dtype": "bfloat16", "spill_bytes": 0, "shared": 98_304, "tensor_columns": 0,
    "matrix": "wgmma", "narrow_loads": 0, "registers": 128, "warps": 8, "programs_per_sm": 2,
    "proxy_fence": True, "warp_specialized": False, "programs_meant": 2,
    "tiles": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 9},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"proxy_fence": False}, "no fence.proxy.async"),
        ({"proxy_fence": False, "dtype": "float32"}, None),
        ({"programs_per_sm": 1, "registers": 136}, "136 registers of 128"),
        ({"programs_per_sm": 1, "programs_meant": 1}, None),
        ({"programs_per_sm": 1, "dtype": "float32"}, None),
        ({"spill_bytes": 4, "warp_specialized": True}, "spills 4 bytes"),
    ],
)
def test_faults_of_a_row(changed, fault):
    found = list(tool.faults(GOOD | changed))
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_table_of_tiles_says_how_many_programs_are_meant(monkeypatch):
    told = tool.tiles.Tiles(128, 128, 64, num_warps=8, num_stages=9, programs=3)
    monkeypatch.setattr(tool.tiles, "TOLD", told, raising=False)
    row = GOOD | {"tiles": GOOD["tiles"] | {"num_stages": 9}}
    assert tool.programs_meant(row) == 3
    assert tool.programs_meant(row | {"warp_specialized": True}) == 1
    assert tool.programs_meant(GOOD | {"tiles": GOOD["tiles"] | {"num_stages": 8}}) == 1


def test_no_pipeline_may_be_missing():
    faults = tool.pipeline_faults([], PIPELINES)
    assert len(faults) == sum(len(pipeline.targets) for pipeline in PIPELINES.values())
    assert all("none of its kernels" in fault for fault in faults)


def test_interpreted_kernels_are_refused(interpreted, monkeypatch, capsys):
    if not interpreted:
        pytest.skip("kernels are compiled here")
    from bench import aot

    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
