"""Exact search by inner product (cosine, for unit vectors). M queries, N passages, D dims.

A score and its passage are one integer, the score's bits above the row's, so that the largest are
the best, and of equal scores the one in the earlier row: the same whatever the chunks.
"""

import torch
from torch import Tensor

from rankpo_fast import signals
from rankpo_fast.errors import InputError

ROW_BITS = 32


def search(queries: Tensor, corpus: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The k best passages of each query, best first; all N of them if N < k.

    Works on the device of `queries`, with chunk x chunk scores at a time and never M x N; the
    corpus may lie elsewhere. Of equal scores that in the earlier row comes first.

    Args:
        queries: [M, D], finite; arrays will do.
        corpus: [N, D], finite; of another dtype, each chunk is brought to that of `queries`.
        chunk: rows of queries and of corpus to multiply at once.

    Returns:
        (scores [M, k] fp32, indices [M, k] int64 into the corpus).

    Raises:
        InputError: shapes that do not go together, or vectors that are not finite.
    """
    queries, corpus = torch.as_tensor(queries), torch.as_tensor(corpus)
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        shapes = f"{list(queries.shape)} and {list(corpus.shape)}"
        raise InputError(f"queries and corpus must be [M, D] and [N, D], got {shapes}")
    if k < 1:
        raise InputError(f"k must be >= 1, got {k}", "k")
    for name, vectors in {"queries": queries, "corpus": corpus}.items():
        # Part by part: a sum in fp16 overflows, and a corpus in a file is not to be copied.
        if not all(
            part.float().sum().isfinite() for part in vectors.split(chunk)
        ):  # NaN would rank first, or last, by its sign
            raise InputError(f"{name} must be finite: some are NaN or inf", name)
    k = min(k, len(corpus))
    keys = torch.cat([_search(part, corpus, k, chunk) for part in queries.split(chunk)])
    return _scores(keys), (1 << ROW_BITS) - 1 - (keys & ((1 << ROW_BITS) - 1))


def _search(queries: Tensor, corpus: Tensor, k: int, chunk: int) -> Tensor:
    """The largest keys [chunk of M, k], the largest first."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start, part in zip(range(0, len(corpus), chunk), corpus.split(chunk), strict=True):
        scores = queries @ part.to(queries.device, queries.dtype).T  # [chunk of M, chunk of N]
        rows = torch.arange(start, start + len(part), device=queries.device)
        best = torch.cat([best, _keys(scores, rows)], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
        signals.ask()
    return best


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """[chunk of M, chunk of N] int64, in the order of the scores, then against that of the rows."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes 0.0 of -0.0, its equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # else negative ones ascend in size
    return (bits.long() << ROW_BITS) + ((1 << ROW_BITS) - 1 - rows)


def _scores(keys: Tensor) -> Tensor:
    bits = (keys >> ROW_BITS).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
