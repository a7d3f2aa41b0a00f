"""What the soak calls flat is, and what it says grows does."""

import random

import pytest

from bench.soak import FIGURES, look, slope

STEPS = range(1000, 5000, 25)


@pytest.mark.parametrize("growth, flat", [(0.0, True), (0.001, True), (0.02, False)])
def test_growth_is_told_from_noise(growth, flat):
    chance = random.Random(0)
    line = slope(STEPS, [600 + growth * step + chance.gauss(0, 1) for step in STEPS])
    assert line.low < growth < line.high and line.high - line.low < 0.001
    assert line.flat(5000) == flat


def test_a_file_that_stays_open_is_seen(tmp_path):
    before = dict(zip(FIGURES, look(), strict=True))
    with open(tmp_path / "file", "w"):
        after = dict(zip(FIGURES, look(), strict=True))
    assert after["open files"] == before["open files"] + 1
    assert before["resident memory, MiB"] > 10 and before["threads"] >= 1
