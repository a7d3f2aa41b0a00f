"""Frontiers say what some model attains, and intervals say how sure that is."""

import numpy as np
import pytest

from rankpo_fast.sweep.frontier import Interval, area, height, undominated, width
from rankpo_fast.sweep.report import comparisons


def test_undominated_points_are_those_that_brute_force_finds():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 6, (40, 2)).tolist()]
    kept = {points[i] for i in undominated(points)}
    beaten = {p for p in points for o in points if o != p and o[0] >= p[0] and o[1] >= p[1]}
    assert kept == set(points) - beaten


def test_a_frontier_gives_what_a_point_attains_and_nothing_in_between():
    points = [(0.4, 0.9), (0.6, 0.5)]
    assert height(points, 0.4) == 0.9
    assert height(points, 0.41) == 0.5  # no line from one point to the other
    assert height(points, 0.61) == 0.0
    assert width(points, 0.6) == 0.4 and width(points, 0.5) == 0.6


def test_an_area_is_the_mean_of_the_heights():
    points = [(0.4, 0.9), (0.6, 0.5), (0.7, 0.1)]
    levels = np.linspace(0.3, 0.7, 100_001)[1:]
    mean = np.mean([height(points, level) for level in levels])
    assert area(points, 0.3, 0.7) == pytest.approx(mean, abs=1e-4)


def test_intervals_by_t_hold_the_true_mean_as_often_as_they_say():
    draws = np.random.default_rng(1).normal(0.3, 1, (2000, 5))
    held = [(i := Interval.of(row.tolist())).low <= 0.3 <= i.high for row in draws[:400]]
    assert 0.92 <= np.mean(held) <= 0.98  # 0.95, with 400 draws 0.011 apart


def test_one_seed_has_no_interval_and_no_sign():
    alone = Interval.of([0.2])
    assert str(alone) == "+0.200" and alone.sign == 0
    assert Interval.of([0.2, 0.21, 0.19]).sign == 1 == -Interval.of([-0.2, -0.21, -0.19]).sign


class Measured:
    """Of two seeds, whose starts are apart, and two methods that gain."""

    methods = ("a", "b")

    def frontier(self, method):
        return [method]

    def points(self, split, choices):
        starts, gained = [(0.5, 0.90), (0.5, 0.80)], {"a": [(0.7, 0.7), (0.7, 0.6)],
                                                      "b": [(0.6, 0.8), (0.6, 0.7)]}  # fmt: skip
        return [[starts[seed], gained[choices[1]][seed]] for seed in range(2)]


def test_methods_are_compared_where_every_seed_gets_to():
    """A start below the mean of starts attains no level near it, which says nothing of methods."""
    [found] = comparisons(Measured(), "b")
    assert found.than == "b" and found.method == "a"
    assert list(found.heights) == pytest.approx([0.525, 0.55, 0.575])
    levels = [*found.widths]  # of 0.8 to 0.85, the mean of starts: none that seed 1 attains
    assert levels == []
    assert all(abs(one.mean) < 0.2 for one in found.heights.values())
