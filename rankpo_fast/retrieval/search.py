"""Exact search by inner product (cosine, for unit vectors). M queries, N passages, D dims.

A score and its passage are one integer, the score's bits above the row's, so that the largest are
the best, and of equal scores the one in the earlier row: the same whatever the chunks.
"""

import torch
from torch import Tensor

from rankpo_fast import signals
from rankpo_fast.errors import InputError

ROW_BITS = 32
NONE = torch.iinfo(torch.int64).min  # below every key


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


@torch.no_grad()
def _search(queries: Tensor, corpus: Tensor, k: int, chunk: int) -> Tensor:
    """The largest keys [chunk of M, k], the largest first."""
    best = Best(len(queries), k, queries.device)
    room = queries.new_empty(len(queries) * min(chunk, len(corpus)))  # pages are cleared once
    for start, part in zip(range(0, len(corpus), chunk), corpus.split(chunk), strict=True):
        scores = room[: len(queries) * len(part)].view(len(queries), len(part))
        torch.mm(queries, part.to(queries.device, queries.dtype).T, out=scores)
        best.take(scores, start)
        signals.ask()
    return best.sorted()


class Best:
    """The k largest keys of each query among all that were taken.

    A score that comes later must be above the k-th so far, as its row is behind: few are, and only
    those become keys. They gather in room for k more, and are sorted once that is full.
    """

    def __init__(self, rows: int, k: int, device: torch.device):
        self.k = k
        self.keys = torch.full((rows, 2 * k), NONE, device=device)
        self.filled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = 0  # passages
        self.floor = torch.empty(rows, 1, device=device)  # the k-th score when last sorted

    def take(self, scores: Tensor, start: int) -> None:
        """Scores [M, chunk of N] of passages from row `start` on, which follow those before."""
        first, last = 0, scores.shape[1]
        while first < last:  # of the first chunk few at a time: a third would pass a young floor
            end = min(last, first + max(self.k, self.seen))
            self._take(scores[:, first:end], start + first)
            self.seen += end - first
            first = end

    def _take(self, scores: Tensor, start: int) -> None:
        places = self._above(scores) if self.seen >= self.k else None
        if places is None:
            return self._sort_with(scores, start)
        rows = places // scores.shape[1]
        columns = places - rows * scores.shape[1]
        counts = torch.bincount(rows, minlength=len(scores))  # [M]
        most = int((self.filled + counts).max())
        if most > 2 * self.k:
            if int(counts.max()) > self.k:
                return self._sort_with(scores, start)
            self._sort()
        # Rows ascend, so the n-th place of a row has n - 1 of the same before it.
        behind = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        slots = self.filled[rows] + behind
        self.keys[rows, slots] = _keys(scores[rows, columns], start + columns)
        self.filled += counts
        return None

    def _above(self, scores: Tensor) -> Tensor | None:
        """Places in the flattened scores that are above the floor, ascending; None where they are
        so many that sorting all is no more work."""
        size = scores.numel()
        bits = torch.zeros(-(-size // 8) * 8, dtype=torch.bool, device=scores.device)
        torch.gt(scores, self.floor, out=bits[:size].view_as(scores))
        words = bits.view(torch.int64).nonzero().squeeze(1)  # eight at a time: most are empty
        if len(words) > self.k * len(scores):
            return None
        found = bits.view(-1, 8)[words].nonzero()
        return 8 * words[found[:, 0]] + found[:, 1]

    def _sort_with(self, scores: Tensor, start: int) -> None:
        rows = torch.arange(start, start + scores.shape[1], device=scores.device)
        self._sort(_keys(scores, rows))

    def _sort(self, *more: Tensor) -> None:
        best = torch.cat([self.keys, *more], dim=1).topk(self.k, dim=1).values
        self.keys.fill_(NONE)
        self.keys[:, : self.k] = best
        self.filled.fill_(self.k)
        self.floor = _scores(best[:, -1:])

    def sorted(self) -> Tensor:
        """[M, k], the largest first."""
        return self.keys.topk(self.k, dim=1).values


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """[chunk of M, chunk of N] int64, in the order of the scores, then against that of the rows."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes 0.0 of -0.0, its equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # else negative ones ascend in size
    return (bits.long() << ROW_BITS) + ((1 << ROW_BITS) - 1 - rows)


def _scores(keys: Tensor) -> Tensor:
    bits = (keys >> ROW_BITS).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
