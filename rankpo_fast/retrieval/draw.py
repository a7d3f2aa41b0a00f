"""Which candidates of a row become its negatives. C candidates, best first, D dims.

topk      the best ranked
sample    all orders alike
cluster   the paper's: a candidate of whose k-means cluster k rank above it weighs decay^k; drawn
          without replacement, each draw with a chance in proportion to the weights that are left
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 50  # of k-means; it mostly ends after ten


@dataclass(frozen=True)
class Drawing:
    """How negatives are chosen."""

    method: str = "sample"
    seed: int = 42
    clusters: int = 10
    decay: float = 0.5

    def order(self, vectors: np.ndarray | None, count: int, row: int) -> np.ndarray:
        """The candidates [C] in the order in which they are taken.

        Args:
            vectors: [C, D] of the candidates, which "cluster" needs.
            count: C.
            row: its number, by which the random numbers of each row are its own.
        """
        if self.method == "topk":
            return np.arange(count)
        random = np.random.default_rng([self.seed, row])
        if self.method == "sample":
            return random.permutation(count)
        assert vectors is not None and len(vectors) == count
        weights = cluster_weights(k_means(vectors, self.clusters, random), self.decay)
        return weighted_order(weights, random)


def cluster_weights(labels: np.ndarray, decay: float) -> np.ndarray:
    """[C] decay^k, k of the same label [C] standing before it."""
    before = np.zeros(len(labels), int)
    for label in np.unique(labels):
        inside = labels == label
        before[inside] = np.arange(inside.sum())
    return decay ** before.astype(float)


def weighted_order(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All of them, drawn one after the other without replacement.

    Of exponential times at rates w the least is that of i with chance w_i / sum w, whatever has
    gone before: so the order of the times is that of such draws.
    """
    return np.argsort(random.exponential(size=len(weights)) / weights, kind="stable")


def k_means(vectors: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Labels [C] by Lloyd's rounds from centres that k-means++ draws; fewer clusters where fewer
    vectors differ."""
    x = vectors.astype(np.float64)
    centres = x[[random.integers(len(x))]]
    nearest = ((x - centres[0]) ** 2).sum(axis=1)  # [C] squared distance to the nearest centre
    while len(centres) < min(clusters, len(x)) and nearest.max() > 1e-12:
        drawn = random.choice(len(x), p=nearest / nearest.sum())
        centres = np.vstack([centres, x[drawn]])
        nearest = np.minimum(nearest, ((x - x[drawn]) ** 2).sum(axis=1))
    labels = np.full(len(x), -1)
    for _ in range(ROUNDS):
        distances = (centres**2).sum(axis=1) - 2 * x @ centres.T  # [C, K], - |x|^2
        closest = distances.argmin(axis=1)
        if np.array_equal(closest, labels):
            break
        labels = closest
        for label in np.unique(labels):
            centres[label] = x[labels == label].mean(axis=0)
    return labels
