"""A slowdown is found, noise is not one."""

import dataclasses
import random

import pytest

from bench import __main__ as bench
from bench.compare import compare, table
from bench.measure import percentiles
from bench.questions import OURS, Result, Row
from bench.results import Run, write

FLOOR = "3 GEMMs"
SHAPE = {"M": 8, "N": 8, "D": 4, "dtype": "float32"}


def row(contender: str, mean: float, noise: float, seed: int, rounds: int = 5, **more) -> Row:
    rng = random.Random(seed)
    ratios = tuple(mean * rng.lognormvariate(0, noise) for _ in range(rounds))
    spread = dict(zip(("ratio", "ratio_low", "ratio_high"), percentiles(ratios), strict=True))
    return Row(contender, seconds=1.0, **spread, ratios=ratios, **more)


def run(*rows: Row, floor: str = FLOOR, **machine) -> Run:
    rows = (Row(floor, seconds=1.0, ratio=1.0), *rows)
    return Run(
        {"device": "a", "date": "b"} | machine, [Result("c", "loss", "?", SHAPE, rows, floor)]
    )


def verdict(before: Row, after: Row) -> tuple[bool, bool]:
    (change,) = compare(run(before), run(after), 0.05).changes[1:]
    return bool(change.worse), bool(change.better)


def share(mean: float, noise: float, seeds: int = 300) -> float:
    """Of pairs of runs that are called worse."""
    pairs = (
        (row(OURS, 1.2, noise, 2 * s), row(OURS, 1.2 * mean, noise, 2 * s + 1))
        for s in range(seeds)
    )
    return sum(verdict(*pair)[0] for pair in pairs) / seeds


def test_a_planted_slowdown_of_ten_per_cent_is_found():
    assert share(1.10, noise=0.02) > 0.95
    assert share(1.10, noise=0.03) > 0.75  # of five rounds each


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1], ids=["quiet", "usual", "loud"])
def test_noise_is_no_slowdown(noise):
    assert share(1.0, noise) < 0.015


def test_a_speedup_is_better_and_below_the_threshold_nothing_is():
    assert verdict(row(OURS, 1.2, 0.01, 0), row(OURS, 1.0, 0.01, 1)) == (False, True)
    assert verdict(row(OURS, 1.0, 1e-4, 0), row(OURS, 1.03, 1e-4, 1)) == (False, False)


def test_percentiles_alone_must_not_overlap():
    old, new = (
        dataclasses.replace(row(OURS, mean, 0.02, seed), ratios=None)
        for mean, seed in ((1.0, 0), (1.2, 1))
    )
    assert verdict(old, new) == (True, False)
    assert verdict(old, dataclasses.replace(new, ratio_low=1.0)) == (False, False)


def test_too_few_rounds_tell_nothing():
    few = [row(OURS, mean, 0.0, 0, rounds=2) for mean in (1.0, 2.0)]
    assert verdict(*few) == (False, False)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Row(OURS, seconds=1.0, peak_mib=100.0), Row(OURS, seconds=1.0, peak_mib=120.0), "120 MiB"),
        (Row(OURS, seconds=1.0), Row(OURS, "out of memory"), "out of memory"),
    ],
    ids=["memory", "no-longer-runs"],
)
def test_more_than_time_can_get_worse(before, after, said):
    comparison = compare(run(before), run(after), 0.05)
    assert comparison.regressed and said in table(comparison)
    back = compare(run(after), run(before), 0.05)
    assert not back.regressed and "better" in table(back)


def test_little_memory_is_noise():
    rows = [Row(OURS, seconds=1.0, peak_mib=peak) for peak in (1.0, 8.0)]
    assert verdict(*rows) == (False, False)


def test_a_peer_that_got_worse_is_told_and_no_fault_of_ours():
    comparison = compare(run(row("torch", 1, 0.01, 0)), run(row("torch", 2, 0.01, 1)), 0.05)
    assert not comparison.regressed and "worse (a peer)" in table(comparison)


def test_what_stands_in_one_file_only_and_which_machine_are_told():
    said = table(compare(run(Row("a", seconds=1.0)), run(Row("b", seconds=1.0), device="z"), 0.05))
    assert "only before: c 8x8x4 float32: a" in said and "only after" in said
    assert "device: a -> z" in said and "date" not in said


def test_another_floor_is_not_compared():
    old, new = run(row(OURS, 1, 0.01, 0)), run(row(OURS, 2, 0.01, 1), floor="4 GEMMs")
    assert not compare(old, new, 0.05).regressed


def test_the_command_tells_by_its_exit_code(tmp_path, capsys):
    files = {}
    for name, mean in {"old": 1.0, "same": 1.01, "slow": 1.2}.items():
        files[name] = str(tmp_path / f"{name}.json")
        write(tmp_path / f"{name}.json", run(row(OURS, mean, 0.01, len(files))))
    assert bench.main(["compare", files["old"], files["same"]]) == 0
    assert bench.main(["compare", files["old"], files["slow"]]) == 1
    assert bench.main(["compare", files["old"], files["slow"], "--threshold", "0.5"]) == 0
    (tmp_path / "older.json").write_text('{"machine": {}, "results": []}')
    assert bench.main(["compare", files["old"], str(tmp_path / "older.json")]) == 2
    assert "older.json: a result file of format 1" in capsys.readouterr().err
    assert bench.main(["compare", files["old"], str(tmp_path / "none.json")]) == 2
    assert bench.main(["compare", files["old"], files["same"], "--threshold", "-1"]) == 2
