"""The model of an H200: bounds that hold whatever its constants are, and its targets' gate."""

from dataclasses import replace

import pytest

from bench import hopper
from bench.hopper import DIMS, PIPELINES, ScoreKernel, tile_clocks
from bench.sass import Counts

SIZE = hopper.SIZE
STORES = Counts(all=700, alu=200, special=64, memory=60, stored_bytes=128)
ONE = ScoreKernel(
    "plain", M=128, N=128, K=64, stages=3, warps=8, programs=1, consumers=0, persistent=False,
    prologue=Counts(all=250), epilogue=STORES,
)  # fmt: skip
TWO = replace(ONE, programs=2)
ROLES = replace(
    ONE, N=256, consumers=2, persistent=True, epilogue=replace(STORES, all=1200, special=128)
)
KERNELS = {"one": ONE, "two": TWO, "roles": ROLES, "ordered": replace(ROLES, ordered=True)}


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_no_tile_is_faster_than_its_products_at_either_rate(kernel, D):
    clocks = tile_clocks(kernel, D)
    assert clocks >= hopper.tensor_clocks(kernel, D)
    tiles = (SIZE // kernel.M) * (SIZE // kernel.N)
    assert clocks * tiles / hopper.SMS / hopper.CLOCK >= 0.999 * 2 * SIZE * SIZE * D / hopper.GEMM


def test_peak_is_that_of_the_datasheet():
    peak = 2 * hopper.TENSOR * hopper.SMS * hopper.CLOCK
    assert peak == pytest.approx(989.4e12, rel=1e-3)


@pytest.mark.parametrize("D", DIMS)
def test_what_overlaps_more_takes_no_longer(D):
    assert tile_clocks(TWO, D) <= tile_clocks(ONE, D)
    assert tile_clocks(KERNELS["ordered"], D) <= tile_clocks(ROLES, D)
    exposed = tile_clocks(replace(ROLES, consumers=1), D)
    assert tile_clocks(ROLES, D) <= exposed <= tile_clocks(replace(ROLES, consumers=0), D)


def test_consumers_with_halves_of_a_tile_wait_but_for_an_instruction_each():
    epilogue = hopper.epilogue_clocks(ROLES) + hopper.issue_clocks(ROLES.prologue, 8)
    instruction = 64 * 256 * 16 / hopper.TENSOR
    expected = hopper.main_clocks(ROLES, 384) + epilogue - 2 * instruction
    assert tile_clocks(ROLES, 384) == pytest.approx(expected)


def test_scores_are_written_no_faster_than_memory_takes_them():
    quick = replace(TWO, programs=8, epilogue=Counts(all=1, stored_bytes=128))
    assert hopper.score_seconds(quick, SIZE, SIZE, 64) > 2 * SIZE * SIZE / hopper.COPY


def test_one_program_waits_for_all_of_its_epilogue():
    longer = replace(ONE, epilogue=replace(STORES, all=1700))
    more = 1000 * hopper.STALL * ONE.warps / 4
    assert tile_clocks(longer, 384) == pytest.approx(tile_clocks(ONE, 384) + more)


def test_two_programs_cannot_issue_more_than_there_are_slots():
    """However much they overlap."""
    huge = replace(TWO, epilogue=replace(STORES, all=20_000))
    issued = hopper.issue_clocks(huge.epilogue, 8) + hopper.issue_clocks(huge.prologue, 8)
    assert tile_clocks(huge, 384) >= issued


@pytest.mark.parametrize(
    ("counts", "clocks"),
    [(Counts(all=100), 200), (Counts(all=100, alu=80), 320), (Counts(all=100, special=30), 480),
     (Counts(all=100, memory=40), 320)],
    ids=["issue", "integers", "special-functions", "memory"],
)  # fmt: skip
def test_the_slowest_pipe_decides(counts, clocks):
    """Of 8 warps, two a scheduler."""
    assert hopper.issue_clocks(counts, 8) == pytest.approx(clocks * hopper.STALL)


def test_stored_tiles_are_traffic():
    none = replace(TWO, epilogue=replace(STORES, stored_bytes=8))
    assert none.tile_bytes == 0 and TWO.tile_bytes == 2 * 128 * 128
    assert tile_clocks(none, 1024) < tile_clocks(TWO, 1024)
    by_bulk = replace(STORES, stored_bytes=0, bulk_stores=2)
    assert replace(ROLES, epilogue=by_bulk).tile_bytes == 2 * 128 * 256


def test_a_step_is_what_is_slowest_for_it():
    """128 x 128 tiles wait for L2, and 128 x 256 for little more than the tensor cores."""
    tensor = hopper.tensor_clocks(ONE, 64)
    assert tensor == 512
    assert hopper.step_clocks(ONE) == pytest.approx(2 * 128 * 64 * 2 / hopper.L2)
    assert hopper.step_clocks(ROLES) / hopper.tensor_clocks(ROLES, 64) < 1.2


def test_a_published_kernel_is_predicted_within_the_error():
    """Kernel 6 of github.com/pranjalssh/fast.cu: a bf16 GEMM of 8192^3 by 192 x 192 tiles, three
    consumers, no multicast; 777 TFLOP/s on an H100, which has the same multiprocessors."""
    stores = Counts(all=300, alu=48, memory=96, stored_bytes=192)
    kernel = replace(ROLES, M=192, N=192, consumers=3, warps=12, stages=4, epilogue=stores)
    seconds = hopper.score_seconds(kernel, 8192, 8192, 8192)
    assert 2 * 8192**3 / seconds == pytest.approx(777e12, rel=0.15)


def test_products_take_whole_waves_or_their_bytes():
    whole = hopper.product_seconds(132 * 128, 256, 8192, 0, 0)
    assert hopper.product_seconds(132 * 128 - 1, 256, 8192, 0, 0) == pytest.approx(whole, rel=1e-3)
    one_more = hopper.product_seconds(132 * 128 + 1, 256, 8192, 0, 0)
    assert one_more > 1.3 * whole
    assert hopper.product_seconds(128, 256, 64, int(4.3e12), 0) == 1.0
    # the last wave's sums have nothing to run beside: here it is the only one
    with_sums = hopper.product_seconds(132 * 128, 256, 8192, 0, adds=43_000_000)
    assert whole + 5e-6 < with_sums <= whole + 1e-5
    rate = 2 * 8192**3 / hopper.product_seconds(8192, 8192, 8192, 0, 0)
    assert rate == pytest.approx(hopper.GEMM)


@pytest.mark.parametrize("name", PIPELINES)
def test_rows_of_all_chunks_are_all_rows(name):
    for D in DIMS:
        rows = hopper.chunks(name, SIZE, SIZE, D)
        assert sum(rows) == SIZE and 2 * SIZE * max(rows) <= hopper.WORKSPACE


@pytest.mark.parametrize("name", PIPELINES)
def test_gate_names_what_is_predicted_above_its_target(name):
    free = replace(ROLES, ordered=True, epilogue=Counts(1), prologue=Counts(1))
    kernels = [free, free] if name == hopper.BOTH else [free]
    if name != hopper.KEPT:  # what it keeps moves as long as a product of 1024 dims takes
        assert not list(hopper.faults(name, dict.fromkeys(DIMS, kernels)))
    slow = [replace(ONE, epilogue=replace(STORES, all=3000)) for _ in kernels]
    faults = list(hopper.faults(name, dict.fromkeys(DIMS, slow)))
    products, targets = 2 * PIPELINES[name].products, PIPELINES[name].targets
    assert len(faults) == len(targets)
    least, target = next(iter(targets.items()))
    assert f"of {products}MND at D={least}, target {target:.2f}" in faults[0]
    assert "none of its kernels" in next(hopper.faults(name, {}))


def test_what_misses_its_target_may_not_rise(monkeypatch):
    kernels = {D: [ONE] for D in DIMS}
    predicted = {D: hopper.ratio(hopper.FORWARD, [ONE], D) for D in DIMS}
    above = [D for D in DIMS if predicted[D] > 1.10]
    assert above
    missed = {(hopper.FORWARD, D): predicted[D] + 0.01 for D in above}
    monkeypatch.setattr(hopper, "MISSED", missed)
    assert not list(hopper.faults(hopper.FORWARD, kernels))
    monkeypatch.setattr(hopper, "MISSED", {key: x - 0.02 for key, x in missed.items()})
    assert len(list(hopper.faults(hopper.FORWARD, kernels))) == len(above)


def test_a_target_that_is_met_is_not_called_missed():
    """By the figures of MISSED themselves, which `make aot` holds against the kernels."""
    assert all(figure > PIPELINES[name].targets[D] for (name, D), figure in hopper.MISSED.items())


def test_targets_leave_out_what_whole_steps_have():
    for name in PIPELINES:
        for D in DIMS:
            bare, whole = (hopper.ratio(name, [ROLES, ROLES], D, whole=x) for x in (False, True))
            assert 1.0 <= bare < whole < bare + 0.25


def test_a_row_of_aot_becomes_a_kernel():
    row = {
        "kernel": "x", "tiles": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 3},
        "epilogue_warps": 8, "programs_per_sm": 3, "programs_meant": 2, "consumers": 2,
        "warp_specialized": True,
        "persistent": True, "prologue": {"all": 5}, "epilogue": {"all": 7, "alu": 2},
    }  # fmt: skip
    kernel = ScoreKernel.of(row)
    assert (kernel.consumers, kernel.epilogue.alu) == (2, 2)
    # as many as a persistent kernel launches, or as fit
    assert kernel.programs == 2 and ScoreKernel.of(row | {"persistent": False}).programs == 3
    assert ScoreKernel.of(row | {"warp_specialized": False}).consumers == 0
