"""How good a ranking is. M queries, k passages retrieved for each, best first; cutoff c <= k.

g_r is the grade of the passage at rank r = 1 .. c, 0 if it is not relevant to the query, and
hit_r = 1 where it is; P relevant passages, whether they can be retrieved or not.

    nDCG@c    sum_r g_r / log2(r + 1), divided by the same sum of the best order of the P grades
    MRR@c     1 / r of the first hit, 0 without one
    recall@c  hits / P

The original RankPO code knows no grades and divides differently (`legacy`): its ideal nDCG puts on
top only the passages that were retrieved among the k, and recall divides by min(c, k, P). Without
grades it so reads as high or higher: nDCG differs only where some relevant passages were not
retrieved within k, and recall only where a query has more than c of them (or k, if that is less).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

NAMES = ("ndcg", "mrr", "recall")
Figures = tuple[np.ndarray, np.ndarray, np.ndarray]  # nDCG, MRR and recall, each [M]


def retrieval_metrics(
    rankings: Sequence[Sequence[int]],
    grades: Sequence[Mapping[int, int]],
    cutoffs: Sequence[int],
    *,
    legacy: bool = False,
) -> dict[str, float]:
    """The means of `query_metrics` over the queries."""
    by_query = query_metrics(rankings, grades, cutoffs, legacy=legacy)
    return {name: float(np.mean(values)) for name, values in by_query.items()}


def query_metrics(
    rankings: Sequence[Sequence[int]],
    grades: Sequence[Mapping[int, int]],
    cutoffs: Sequence[int],
    *,
    legacy: bool = False,
) -> dict[str, np.ndarray]:
    """Of each query [M], under "ndcg@20", "mrr@20", "recall@20" for a cutoff of 20.

    Args:
        rankings: for each query corpus rows, best first; a cutoff above their number counts what
            there is.
        grades: for each query {corpus row: grade above 0}, at least one.
        cutoffs: ranks at which to measure.
        legacy: the original code's definitions, to which all grades are 1.
    """
    assert len(rankings) == len(grades), (len(rankings), len(grades))
    assert all(grades), "a query without a relevant passage"
    measure = _legacy if legacy else _trec
    metrics: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        of_cutoff = zip(NAMES, measure(rankings, grades, cutoff), strict=True)
        metrics |= {f"{name}@{cutoff}": values for name, values in of_cutoff}
    return metrics


def alignment(margins: Tensor, weights: Tensor | None = None) -> float:
    """Share of preference pairs ranked as preferred: those with margins [B] above 0.

    A margin is the similarity of the chosen passage less that of the rejected one; with weights
    [B] pairs count by weight.
    """
    aligned = (margins > 0).double()
    if weights is None:
        return aligned.mean().item()
    return ((aligned * weights).sum() / weights.double().sum()).item()


def _trec(
    rankings: Sequence[Sequence[int]], grades: Sequence[Mapping[int, int]], cutoff: int
) -> Figures:
    import pytrec_eval

    judged = {
        str(query): {str(passage): grade for passage, grade in of_query.items()}
        for query, of_query in enumerate(grades)
    }
    # trec_eval breaks ties by the name of a document: give it ranks, which have none.
    run = {
        str(query): {str(passage): float(-rank) for rank, passage in enumerate(ranking[:cutoff])}
        for query, ranking in enumerate(rankings)
    }
    names = (f"ndcg_cut_{cutoff}", "recip_rank", f"recall_{cutoff}")
    evaluator = pytrec_eval.RelevanceEvaluator(judged, set(names))
    found = evaluator.evaluate(run)
    rows = [found[str(query)] for query in range(len(rankings))]
    ndcg, mrr, recall = (np.array([row[name] for row in rows]) for name in names)
    return ndcg, mrr, recall


def _legacy(
    rankings: Sequence[Sequence[int]], grades: Sequence[Mapping[int, int]], cutoff: int
) -> Figures:
    longest = max(map(len, rankings))
    hits = np.zeros((len(rankings), longest))  # [M, k]
    for row, ranking, of_query in zip(hits, rankings, grades, strict=True):
        row[: len(ranking)] = [passage in of_query for passage in ranking]
    ideal = -np.sort(-hits, axis=1)
    ranks = np.arange(1, longest + 1)
    gains = np.where(ranks <= cutoff, 1 / np.log2(ranks + 1), 0)  # [k]
    ndcg = (hits @ gains) / np.maximum(ideal @ gains, 1e-12)
    reciprocal = (hits * (ranks <= cutoff) / ranks).max(axis=1, initial=0)
    pairs = zip(rankings, grades, strict=True)
    wanted = np.array([max(1, min(cutoff, len(r), len(g))) for r, g in pairs])
    recall = hits[:, :cutoff].sum(axis=1) / wanted
    return ndcg, reciprocal, recall
