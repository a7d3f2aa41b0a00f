"""How good a ranking is. M queries, k passages retrieved for each, best first; cutoff c <= k.

hit_r = 1 if the passage at rank r = 1 .. c is a positive of the query, else 0; P positives.

    nDCG@c    sum_r hit_r / log2(r + 1), divided by the same sum with all min(P, c) positives on top
    MRR@c     1 / r of the first hit, 0 without one
    recall@c  hits / P

The original RankPO code divides differently (`legacy`), and so reads as high or higher: its ideal
nDCG puts on top only the positives that were retrieved among the k, and recall divides by
min(c, k, P). So nDCG differs only where some positives were not retrieved within k, and recall only
where a query has more than c of them (or k, if that is less).
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def retrieval_metrics(
    indices: Tensor,
    positives: Sequence[Sequence[int]],
    cutoffs: Sequence[int],
    *,
    legacy: bool = False,
) -> dict[str, float]:
    """Means over the queries, under "ndcg@20", "mrr@20", "recall@20" for a cutoff of 20.

    Args:
        indices: [M, k] corpus rows retrieved, best first; a cutoff above k counts what there is.
        positives: for each query its positive corpus rows, at least one.
        cutoffs: ranks at which to measure.
        legacy: the original code's definitions.
    """
    assert len(indices) == len(positives), (len(indices), len(positives))
    assert all(positives), "a query without positives"
    measure = _legacy if legacy else _trec
    metrics: dict[str, float] = {}
    for cutoff in cutoffs:
        ndcg, mrr, recall = measure(indices, positives, cutoff)
        metrics |= {f"ndcg@{cutoff}": ndcg, f"mrr@{cutoff}": mrr, f"recall@{cutoff}": recall}
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
    indices: Tensor, positives: Sequence[Sequence[int]], cutoff: int
) -> tuple[float, float, float]:
    import pytrec_eval

    judged = {str(row): {str(p): 1 for p in found} for row, found in enumerate(positives)}
    # trec_eval breaks ties by the name of a document: give it ranks, which have none.
    run = {
        str(row): {str(passage): float(-rank) for rank, passage in enumerate(passages)}
        for row, passages in enumerate(indices[:, :cutoff].tolist())
    }
    names = (f"ndcg_cut_{cutoff}", "recip_rank", f"recall_{cutoff}")
    evaluator = pytrec_eval.RelevanceEvaluator(judged, set(names))
    rows = evaluator.evaluate(run).values()
    return tuple(float(np.mean([row[name] for row in rows])) for name in names)


def _legacy(
    indices: Tensor, positives: Sequence[Sequence[int]], cutoff: int
) -> tuple[float, float, float]:
    pairs = zip(indices.numpy(force=True), positives, strict=True)
    hits = np.array([np.isin(found, wanted) for found, wanted in pairs], dtype=float)  # [M, k]
    ideal = -np.sort(-hits, axis=1)
    ranks = np.arange(1, hits.shape[1] + 1)
    gains = np.where(ranks <= cutoff, 1 / np.log2(ranks + 1), 0)  # [k]
    ndcg = (hits @ gains) / np.maximum(ideal @ gains, 1e-12)
    reciprocal = (hits * (ranks <= cutoff) / ranks).max(axis=1)
    wanted = np.array([min(cutoff, len(ranks), len(found)) for found in positives])
    recall = hits[:, :cutoff].sum(axis=1) / wanted
    return float(ndcg.mean()), float(reciprocal.mean()), float(recall.mean())
