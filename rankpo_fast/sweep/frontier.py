"""What can be had at once of two figures: frontiers, their areas, and how far two are apart.

A point is (x, y), both the more the better. A frontier is a set of points; what it gives at x is

    y(x) = max of y_i over points with x_i >= x, or `least` where there is none

which some trained model attains: nothing is interpolated. Figures of several seeds are paired: the
difference of two frontiers is taken for each seed, intervals are over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]
# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom; later ones are within 3 % of 2.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
BOOTSTRAPS = 10_000


def undominated(points: Sequence[Point]) -> list[int]:
    """Rows of points that no other one beats in one figure without losing in the other, by x."""
    by_x = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1]), reverse=True)
    kept, best = [], -math.inf
    for i in by_x:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept[::-1]


def height(points: Sequence[Point], x: float, least: float = 0.0) -> float:
    """The most y that a point with at least this x has."""
    return max((y for of_point, y in points if of_point >= x), default=least)


def width(points: Sequence[Point], y: float, least: float = 0.0) -> float:
    """The most x that a point with at least this y has."""
    return height([(b, a) for a, b in points], y, least)


def area(points: Sequence[Point], low: float, high: float) -> float:
    """Mean height over x from `low` to `high`."""
    if high <= low:
        raise ValueError(f"no area from {low} to {high}")
    edges = sorted({low, high, *(x for x, _ in points if low < x < high)})
    steps = zip(edges, edges[1:], strict=False)
    return sum((b - a) * height(points, b) for a, b in steps) / (high - low)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with 95 % intervals by Student's t and by the bootstrap over seeds. With
    few seeds the bootstrap's is too narrow; with one there is neither."""

    mean: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> "Interval":
        taken = np.asarray(values, dtype=np.float64)
        n, mean = len(taken), float(taken.mean())
        if n == 1:
            return cls(mean, math.nan, math.nan, math.nan, math.nan, 1)
        error = float(taken.std(ddof=1)) / math.sqrt(n)
        quantile = T_975[min(n - 1, len(T_975)) - 1]
        rows = np.random.default_rng(seed).integers(n, size=(BOOTSTRAPS, n))
        low, high = np.quantile(taken[rows].mean(axis=1), [0.025, 0.975])
        return cls(mean, mean - quantile * error, mean + quantile * error, float(low), float(high),
                   n)  # fmt: skip

    @property
    def sign(self) -> int:
        """1 or -1 where the interval by t leaves out 0, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"
