"""Exact search by inner product (cosine, for unit vectors). M queries, N passages, D dims."""

import torch
from torch import Tensor


def search(queries: Tensor, corpus: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The k best passages of each query, best first; all N of them if N < k.

    Works on the device of `queries`, with chunk x chunk scores at a time and never M x N; the
    corpus may lie elsewhere.

    Args:
        queries: [M, D].
        corpus: [N, D].
        chunk: rows of queries and of corpus to multiply at once.

    Returns:
        (scores [M, k], indices [M, k] int64 into the corpus).
    """
    assert queries.shape[1] == corpus.shape[1], (queries.shape, corpus.shape)
    k = min(k, len(corpus))
    found = [_search(part, corpus, k, chunk) for part in queries.split(chunk)]
    scores, indices = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(indices)


def _search(queries: Tensor, corpus: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    best_indices = torch.empty_like(best, dtype=torch.int64)
    for start, part in zip(range(0, len(corpus), chunk), corpus.split(chunk), strict=True):
        scores = queries @ part.to(queries.device).T  # [chunk of M, chunk of N]
        indices = torch.arange(start, start + len(part), device=queries.device)
        best = torch.cat([best, scores], dim=1)
        best_indices = torch.cat([best_indices, indices.expand_as(scores)], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        best_indices = best_indices.gather(1, order)
    return best, best_indices
