"""The cost model counts what the launcher launches, and its flops."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import results
from bench.cost import (
    BATCHES,
    H100,
    PIPELINES,
    count,
    form,
    measurements,
    plain_torch,
    predictions,
)
from bench.launch import SYMMETRIC, launch
from bench.meter import Meter
from bench.questions import Result, Row
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.problem import DIRECTIONS
from rankpo_kernels.triton.tiles import against_storing
from support.launcher import SMALL, Work, launches

M, N, D = 40, 70, 24
HOW = {
    "exact": {"stored": False, "few": False},
    "few-launches": {"stored": False, "few": True},
    "few-launches-symmetric": {"few": True, "options": SYMMETRIC},
    "stored": {"stored": True},
    "forward": {"grads": False},
    "symmetric": {"options": SYMMETRIC, "few": False, "kept": False},
    "symmetric-kept": {"options": SYMMETRIC, "few": False, "kept": True},
    "four-directions": {"options": {"directions": DIRECTIONS}},
}


def on_meta(*sizes: int):
    q, p = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in sizes)
    return q, p, torch.empty(len(q), dtype=torch.int64, device="meta")


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("rows", [999, 16], ids=["one-chunk", "three-chunks"])
@pytest.mark.parametrize("name", HOW)
def test_kernels_and_products_are_those_that_run(interpreted, name, rows):
    options = HOW[name].get("options", {}) | {"workspace_bytes": rows * (N * 2 + 12 * 3)}
    how = HOW[name] | {"options": options, "tiles": SMALL}
    device = "cpu" if interpreted else "cuda"
    q, p = (torch.randn(n, D, device=device).to(torch.bfloat16) for n in (M, N))
    if name == "symmetric-kept" and rows < M:
        with pytest.raises(ValueError, match="kept=True: workspace_bytes=2816 of the"):
            launch(q, p, torch.arange(M, device=device), **how)
        return
    with launches() as kernels, Work() as work:
        launch(q, p, torch.arange(M, device=device), **how)
    with Meter(*(meta := on_meta(M, N))) as meter:
        launch(*meta, **how)
    counted = [name for name, _, _ in meter.launches]
    assert [name for name in counted if name.endswith("_kernel")] == kernels
    assert sum("mm" in name for name in counted) == sum("mm" in op for op in work.ops)


@pytest.mark.parametrize(
    ("pipeline", "multiple"),
    [("exact", 8), ("few launches", 8), ("stored", 6), ("forward", 2), ("symmetric", 8),
     ("symmetric, kept", 6),
     ("four directions", 24), ("plain torch", 6), ("liger-like", 6), ("fused on a CPU", 6)],
)  # fmt: skip
def test_flops_are_those_of_the_design(pipeline, multiple):
    size = 512
    meter = count(pipeline, size, size, D)
    assert sum(flops for _, flops, _ in meter.launches) == multiple * size * size * D


def test_flops_of_products_are_those_that_torch_counts():
    with Meter(*(meta := on_meta(M, N))) as meter:
        plain_torch(*meta)
    with FlopCounterMode(display=False) as counter:
        plain_torch(*on_meta(M, N))
    assert sum(flops for _, flops, _ in meter.launches) == counter.get_total_flops()


@pytest.mark.parametrize("pipeline", ["exact", "stored", "symmetric"])
def test_peak_of_memory_is_the_workspace_and_fp32_gradients(pipeline):
    size, D = 32768, 256
    meter = count(pipeline, size, size, D)
    gradients, fp32 = 2 * size * D * 2, 2 * size * D * 4
    assert 800 << 20 < meter.peak - gradients < (1 << 30) + 2 * fp32 < size * size * 2


def test_bytes_are_at_least_what_must_move():
    size, D = 4096, 1024
    moved = sum(size for _, _, size in count("forward", size, size, D).launches)
    assert 2 * size * D * 2 <= moved < 5 * 2 * size * D * 2
    chunk = size * size * 2  # written once, read twice
    assert sum(size for _, _, size in count("exact", size, size, D).launches) > moved + 3 * chunk


def test_the_cpu_is_counted_by_its_own_form():
    names = {name for name, _, _ in count("fused on a CPU", 512, 512, 64).launches}
    assert "info_nce_rows" in names and not any(name.endswith("_kernel") for name in names)
    assert PIPELINES["fused on a CPU"].keywords["function"] is chunked.info_nce


@pytest.mark.parametrize("D", [384, 4096])
def test_where_the_launcher_stores_the_model_finds_it_faster(D):
    """Not the other way round: a launch takes the host longer than the model says."""
    sizes = [n for n in (4096, 16384, 65536) if not against_storing(torch.bfloat16, n, D, n)]
    assert sizes
    for size in sizes:
        stored, exact = (H100.seconds(count(x, size, size, D)) for x in ("stored", "exact"))
        assert stored < exact


@pytest.mark.parametrize(
    ("batch", "size", "taken", "reason"),
    [
        ("one direction", 2048, "few launches", "not above"),
        ("one direction", 16384, "stored", "flops count"),
        ("one direction, fp32", 16384, "exact", "do not fit torch.float32"),
        ("both directions", 16384, "kept", "flops count"),
        ("both directions", 65536, "exact", "of the 9"),
        ("both directions, margin", 16384, "exact", "rows know more"),
    ],
)
def test_the_form_of_a_batch_and_what_is_against_others(batch, size, taken, reason):
    found, against = form(batch, size, 1024)
    assert batch in BATCHES and found == taken and found not in against
    assert reason in " ".join(against.values())


SCORES = {
    "kernel": "x", "arch": 90, "epilogue_warps": 8, "programs_per_sm": 1, "programs_meant": 1,
    "consumers": 2,
    "tiles": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "warp_specialized": True, "persistent": True,
    "prologue": {"all": 100}, "epilogue": {"all": 1500},
    "pipelines": {"forward": dict.fromkeys(("384", "1024", "2048", "4096"), 0)},
}  # fmt: skip


def test_predictions_stand_beside_targets_and_measurements(tmp_path):
    aot = tmp_path / "aot.json"
    aot.write_text(json.dumps([SCORES, SCORES | {"arch": 80}]))
    lines = predictions(aot, {("forward", 384): 1.23}).splitlines()
    first, last = lines[1].split(), lines[4].split()
    assert first[:2] == ["forward", "384"] and first[-1] == "1.23" and "above" in first
    assert last[:2] == ["forward", "4096"] and last[-1] == "-" and "above" not in last
    assert "no kernels" in lines[5]


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_what_an_h200_measured_is_found(tmp_path, device):
    n, D, rate = 16384, 1024, 800e12
    shape = {"M": n, "N": n, "D": D, "dtype": "bfloat16"}
    seconds = 1.25 * 6 * n * n * D / rate
    rows = (Row("3 GEMMs", seconds=1.0), Row("rankpo-fast", seconds=seconds))
    result = Result("info_nce", "loss", "?", shape, rows)
    machine = {"device": device, "rates": {"gemm": {"bfloat16": rate}, "copy": 4e12}}
    results.write(tmp_path / "a.json", results.Run(machine, [result]))
    (tmp_path / "b.json").write_text("{}")
    found = measurements(tmp_path)
    assert found == ({("stored", D): pytest.approx(1.25, rel=1e-3)} if "H200" in device else {})
