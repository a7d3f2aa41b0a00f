"""How sure figures are, and whether those of two models differ. Q queries, R draws.

Every figure is a ratio of sums over queries, sum_q n_q / sum_q d_q: a mean where d_q is 1; of the
alignment n_q is the weight of the aligned pairs of a query and d_q that of all. Queries are what is
drawn, since the pairs of one query are no independent observations.

    interval   of the figures of R draws of Q queries with replacement, quantiles 2.5 % and 97.5 %
    p          of the sums of differences with random signs, the share as far from 0 as the
               observed one: Fisher's paired randomisation. All 2^Q signs where these are no more
               than R; else the observed one counts among the draws, so that p is never 0.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from rankpo_fast.errors import InputError

DRAWS = 5000
AT_ONCE = 1 << 22  # numbers drawn at a time
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Sums:
    """What figures are ratios of, over the same Q queries."""

    names: tuple[str, ...]  # of K figures
    numerators: np.ndarray  # [Q, K]
    denominators: np.ndarray  # [Q]

    @property
    def figures(self) -> np.ndarray:
        """[K]"""
        return self.numerators.sum(axis=0) / self.denominators.sum()


def intervals(sums: Sums, *, seed: int = 0, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
    """Of each figure."""
    queries, random = len(sums.denominators), np.random.default_rng(seed)
    parts = []
    for rows in _portions(draws, queries):
        counts = np.stack([
            np.bincount(random.integers(queries, size=queries), minlength=queries)
            for _ in range(rows)
        ])  # fmt: skip
        parts.append((counts @ sums.numerators) / (counts @ sums.denominators)[:, None])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail], axis=0)
    rows_of = zip(sums.names, low.tolist(), high.tolist(), strict=True)
    return {name: (of_low, of_high) for name, of_low, of_high in rows_of}


def p_values(difference: Sums, *, seed: int = 0, draws: int = DRAWS) -> dict[str, float]:
    """Of each figure of a difference between two models, two-sided."""
    values = difference.numerators  # [Q, K]
    queries, random = len(values), np.random.default_rng(seed)
    observed = np.abs(values.sum(axis=0))
    # Sums in another order are equal but for rounding.
    least = observed - 1e-9 * np.abs(values).sum(axis=0)
    every = 2**queries <= draws if queries < 60 else False
    if every:
        signs = np.array(list(product((-1, 1), repeat=queries)))
        reached, of = (np.abs(signs @ values) >= least).sum(axis=0), len(signs)
    else:
        reached, of = np.ones(len(observed), int), draws + 1
        for rows in _portions(draws, queries):
            signs = 2 * random.integers(2, size=(rows, queries)) - 1
            reached += (np.abs(signs @ values) >= least).sum(axis=0)
    shares = (reached / of).tolist()
    return dict(zip(difference.names, shares, strict=True))


def difference(one: Sums, two: Sums) -> Sums:
    """Of the second less the first, over the same queries."""
    if one.names != two.names or not np.array_equal(one.denominators, two.denominators):
        raise InputError("models are compared on the same data, but these were not measured so")
    return Sums(one.names, two.numerators - one.numerators, one.denominators)


def _portions(draws: int, queries: int) -> list[int]:
    """Draws at a time."""
    most = max(1, AT_ONCE // max(1, queries))
    return [min(most, draws - start) for start in range(0, draws, most)]


@dataclass(frozen=True)
class Bin:
    """Pairs whose preferred passage was predicted with a probability between `low` and `high`."""

    low: float
    high: float
    pairs: int
    predicted: float  # mean
    observed: float  # share in which the model's choice was preferred


@dataclass(frozen=True)
class Calibration:
    """How far predicted probabilities can be trusted.

    Attributes:
        scale: beta / temperature: sigmoid(scale * margin) is the predicted probability.
        error: mean distance of predicted and observed over the bins, by their pairs.
        log_loss: -log of the probability of what was preferred, the mean; log 2 of a coin.
    """

    scale: float
    error: float
    log_loss: float
    bins: tuple[Bin, ...]


def calibration(
    margins: np.ndarray, weights: np.ndarray, scale: float, bins: int = 10
) -> Calibration:
    """Of margins [B] of chosen over rejected passages, counted by weight.

    The probability of the passage that the model chooses is that of |margin|, from 1/2 to 1; it is
    right where the margin is above 0.
    """
    confidence = 1 / (1 + np.exp(-np.minimum(scale * np.abs(margins), 700)))  # [B]
    right = (margins > 0).astype(float)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    made = []
    for number in np.unique(place).tolist():
        inside = place == number
        predicted, observed = (
            float(np.average(values[inside], weights=weights[inside]))
            for values in (confidence, right)
        )
        made.append(Bin(float(edges[number]), float(edges[number + 1]), int(inside.sum()),
                        predicted, observed))  # fmt: skip
    shares = [float(weights[place == n].sum() / weights.sum()) for n in np.unique(place).tolist()]
    error = sum(s * abs(b.predicted - b.observed) for s, b in zip(shares, made, strict=True))
    losses = np.logaddexp(0, -scale * margins)
    return Calibration(
        scale, error, float(np.average(losses, weights=weights)), tuple(made)
    )  # fmt: skip
