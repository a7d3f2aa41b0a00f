"""Metrics against numbers worked out by hand."""

from math import log2

import pytest
import torch

from rankpo_fast.retrieval.metrics import alignment, retrieval_metrics

# Corpus rows retrieved, best first. Row 10 > row 9 as numbers, but "10" < "9" as trec_eval's names.
RANKINGS = [[10, 9, 3, 4], [5, 6, 7, 8], [2, 1, 0, 3]]
GRADES = [
    {9: 1, 4: 1, 77: 1},
    {1: 1},
    {2: 1},
]  # hits at ranks 2 and 4, with one missed; none; at rank 1


def test_trec_definitions():
    metrics = retrieval_metrics(RANKINGS, GRADES, [1, 2, 4])
    ideal_2, ideal_4 = 1 + 1 / log2(3), 1 + 1 / log2(3) + 1 / log2(4)
    expected = {
        "ndcg@1": 1 / 3,
        "ndcg@2": (1 / log2(3) / ideal_2 + 1) / 3,
        "ndcg@4": ((1 / log2(3) + 1 / log2(5)) / ideal_4 + 1) / 3,
        "mrr@1": 1 / 3,
        "mrr@2": (1 / 2 + 1) / 3,
        "mrr@4": (1 / 2 + 1) / 3,
        "recall@1": 1 / 3,
        "recall@2": (1 / 3 + 1) / 3,
        "recall@4": (2 / 3 + 1) / 3,
    }
    assert metrics == pytest.approx(expected)


def test_grades_weigh_in_the_gain_and_in_the_ideal():
    """Of grades 1 and 2 the lower one stands first, the higher one second, third, or is missed."""
    ideal = 2 + 1 / log2(3)
    for ranking, gain in [([0, 1], 1 + 2 / log2(3)), ([0, 7, 1], 2), ([0, 7], 1)]:
        metrics = retrieval_metrics([ranking], [{0: 1, 1: 2}], [10])
        assert metrics["ndcg@10"] == pytest.approx(gain / ideal)
    assert round(2 / ideal, 4) == 0.7602
    assert metrics["mrr@10"] == 1 and metrics["recall@10"] == 0.5
    legacy = retrieval_metrics([[7, 1, 0]], [{0: 1, 1: 2}], [10], legacy=True)
    assert legacy["ndcg@10"] == pytest.approx((1 / log2(3) + 1 / log2(4)) / (1 + 1 / log2(3)))


@pytest.mark.parametrize("legacy", [False, True])
def test_rankings_may_be_of_unequal_length_or_empty(legacy):
    metrics = retrieval_metrics([[3, 1], [2], []], [{1: 1}, {2: 1}, {0: 1}], [2], legacy=legacy)
    expected = {"ndcg@2": (1 / log2(3) + 1) / 3, "mrr@2": (1 / 2 + 1) / 3, "recall@2": 2 / 3}
    assert metrics == pytest.approx(expected)


def test_legacy_definitions_know_only_the_retrieved_positives():
    metrics = retrieval_metrics(RANKINGS, GRADES, [2, 4], legacy=True)
    ideal = 1 + 1 / log2(3)  # two positives were retrieved
    expected = {
        "ndcg@2": (1 / log2(3) / ideal + 1) / 3,
        "ndcg@4": ((1 / log2(3) + 1 / log2(5)) / ideal + 1) / 3,
        "mrr@2": (1 / 2 + 1) / 3,
        "mrr@4": (1 / 2 + 1) / 3,
        "recall@2": (1 / 2 + 1) / 3,  # of min(cutoff 2, 4 retrieved, 3 positives)
        "recall@4": (2 / 3 + 1) / 3,
    }
    assert metrics == pytest.approx(expected)


def test_legacy_recall_asks_for_no_more_than_was_retrieved():
    few, many = [[1, 2]], [{1: 1, 2: 1, 3: 1}]
    assert retrieval_metrics(few, many, [5], legacy=True)["recall@5"] == 1
    assert retrieval_metrics(few, many, [5])["recall@5"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_cutoff_beyond_the_retrieved_counts_what_there_is(legacy):
    metrics = retrieval_metrics(RANKINGS, GRADES, [4, 100], legacy=legacy)
    assert metrics["mrr@100"] == metrics["mrr@4"]
    assert metrics["recall@100"] == pytest.approx(metrics["recall@4"])
    assert metrics["ndcg@100"] == pytest.approx(metrics["ndcg@4"])


def test_alignment_is_the_share_by_weight_and_a_tie_is_not_aligned():
    margins = torch.tensor([0.5, -0.1, 0.0, 0.2])
    assert alignment(margins) == 0.5
    assert alignment(margins, torch.tensor([0.1, 0.1, 0.2, 0.1])) == pytest.approx(0.4)
