"""Draws are those of the formula: all orders enumerated, and their frequencies counted."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from rankpo_fast.retrieval.draw import Drawing, cluster_weights, k_means, weighted_order

LABELS = np.array([2, 0, 2, 2, 0])
DRAWS = 40_000


def test_a_candidate_weighs_decay_to_those_of_its_cluster_above_it():
    assert cluster_weights(LABELS, 0.5).tolist() == [1, 1, 0.5, 0.25, 0.5]
    assert cluster_weights(LABELS, 1.0).tolist() == [1] * 5


def chance(order, weights) -> float:
    """Of drawing these in this order, each in proportion to the weights that are left."""
    left, product = dict(enumerate(weights / weights.sum())), 1.0
    for one in order:
        product *= left[one] / sum(left.values())
        del left[one]
    return product


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9])
def test_draws_come_as_often_as_the_formula_says(decay):
    """Of 20 ordered draws of 2 of 5: each within 4.5 standard errors."""
    weights = cluster_weights(LABELS, decay)
    exact = {order: chance(order, weights) for order in permutations(range(5), 2)}
    assert sum(exact.values()) == pytest.approx(1)
    random = np.random.default_rng(0)
    counts = Counter(tuple(weighted_order(weights, random)[:2].tolist()) for _ in range(DRAWS))
    for order, p in exact.items():
        assert abs(counts[order] / DRAWS - p) < 4.5 * np.sqrt(p * (1 - p) / DRAWS), order


def test_k_means_finds_clusters_that_are_apart():
    random = np.random.default_rng(0)
    centres = np.eye(10)
    labels = random.integers(10, size=100)
    vectors = centres[labels] + 0.01 * random.normal(size=(100, 10))
    found = k_means(vectors, 10, np.random.default_rng(1))
    same = found[:, None] == found
    # k-means++ may put two centres into one of ten clusters; it does not with this seed.
    assert np.array_equal(same, labels[:, None] == labels)


def test_k_means_of_close_vectors_is_as_good_as_sklearns():
    cluster = pytest.importorskip("sklearn.cluster")
    vectors = np.random.default_rng(0).normal(size=(100, 16))

    def spread(labels):
        parts = [vectors[labels == label] for label in np.unique(labels)]
        return sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts)

    ours = [spread(k_means(vectors, 10, np.random.default_rng(seed))) for seed in range(5)]
    theirs = [
        spread(cluster.KMeans(10, n_init=1, random_state=seed).fit(vectors).labels_)
        for seed in range(5)
    ]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.03)


def test_equal_vectors_are_one_cluster_and_fewer_candidates_make_fewer():
    assert set(k_means(np.ones((5, 3)), 10, np.random.default_rng(0))) == {0}
    assert len(set(k_means(np.eye(3), 10, np.random.default_rng(0)).tolist())) == 3


def test_a_row_draws_by_its_seed_and_number():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    for method in ("sample", "cluster"):
        one, other = Drawing(method, seed=1), Drawing(method, seed=2)
        order = one.order(vectors, 30, 0)
        assert sorted(order.tolist()) == list(range(30))
        assert np.array_equal(order, one.order(vectors, 30, 0))
        assert not np.array_equal(order, one.order(vectors, 30, 1))
        assert not np.array_equal(order, other.order(vectors, 30, 0))


def test_small_decays_take_the_best_of_each_cluster_first():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 6)
    vectors = 10 * np.eye(5)[labels] + 0.01 * random.normal(size=(30, 5))
    order = Drawing("cluster", clusters=5, decay=1e-9).order(vectors, 30, 0)
    assert sorted(order[:5].tolist()) == [0, 6, 12, 18, 24]
