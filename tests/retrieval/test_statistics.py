"""Intervals, significance and calibration against plain computations and scipy."""

import numpy as np
import pytest

from rankpo_fast.retrieval import statistics
from rankpo_fast.retrieval.statistics import Sums, calibration, difference, intervals, p_values


def sums(values, denominators=None) -> Sums:
    values = np.asarray(values, float).reshape(len(values), -1)
    ones = np.ones(len(values)) if denominators is None else np.asarray(denominators, float)
    return Sums(tuple(f"f{i}" for i in range(values.shape[1])), values, ones)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).uniform(size=400)
    low, high = intervals(sums(values))["f0"]
    error = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - error, values.mean() + error], abs=0.004)


def test_an_interval_of_a_ratio_draws_queries_with_all_their_pairs():
    """One query has 90 of 100 pairs: single pairs as draws would give a tenth of the width."""
    low, high = intervals(sums([90, 0, 0], [90, 5, 5]))["f0"]
    assert low == 0 and high == 1


def test_what_is_drawn_at_a_time_decides_nothing(monkeypatch):
    values = np.random.default_rng(1).normal(size=(30, 2))
    whole = intervals(sums(values)), p_values(sums(values))
    monkeypatch.setattr(statistics, "AT_ONCE", 700)
    assert (intervals(sums(values)), p_values(sums(values))) == whole
    assert intervals(sums(values), seed=1) != whole[0]


@pytest.mark.parametrize("queries", [9, 60], ids=["all-signs", "drawn-signs"])
@pytest.mark.parametrize("tied", [False, True])
def test_p_is_that_of_scipys_permutation_test(queries, tied):
    """Tied: differences of few values, whose sums are equal but for rounding."""
    scipy = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(queries).normal(0.15, 0.5, size=queries)
    values = values.round(1) / 3 if tied else values
    theirs = scipy.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000
        if queries > 9 else np.inf, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    found = p_values(sums(values), draws=20_000)["f0"]
    assert found == pytest.approx(theirs, abs=1e-12 if queries == 9 else 0.012)


def test_equal_models_do_not_differ_and_p_is_never_0():
    same = sums(np.linspace(0, 1, 40))
    assert p_values(difference(same, same))["f0"] == 1
    far = sums(np.linspace(0, 1, 40) + 5)
    assert p_values(difference(same, far), draws=999)["f0"] == 1 / 1000


def test_calibration_is_of_the_models_choice_by_weight():
    scale = 20.0
    margins = np.array([0.05, -0.05, 0.05, 1.0])  # sigmoid(1) = 0.731 thrice, and 1
    found = calibration(margins, np.array([1.0, 1.0, 2.0, 4.0]), scale)
    first, last = found.bins
    assert (first.low, first.high, first.pairs) == (pytest.approx(0.7), pytest.approx(0.75), 3)
    assert first.predicted == pytest.approx(1 / (1 + np.exp(-1)))
    assert first.observed == pytest.approx(3 / 4) and last.observed == 1
    assert found.error == pytest.approx(0.5 * abs(0.75 - first.predicted), abs=1e-6)
    losses = [np.log1p(np.exp(-scale * m)) for m in margins]
    assert found.log_loss == pytest.approx(np.average(losses, weights=[1, 1, 2, 4]))


def test_probabilities_that_come_true_have_no_error():
    random = np.random.default_rng(0)
    size = np.abs(random.normal(0, 0.1, 20_000))
    margins = np.where(random.uniform(size=20_000) < 1 / (1 + np.exp(-20 * size)), size, -size)
    assert calibration(margins, np.ones(20_000), 20).error < 0.01
    assert calibration(margins, np.ones(20_000), 60).error > 0.05
