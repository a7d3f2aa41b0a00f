"""Candidates that a cross-encoder finds as relevant as a positive: they may be answers.

A candidate is dropped whose score is above s+ - margin, s+ the lowest score of a positive of its
query. C candidates of each of U queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rankpo_fast.config import ComputeConfig, MiningConfig
from rankpo_fast.model.reranker import Reranker
from rankpo_fast.progress import progress

PAIRS_AT_ONCE = 8192  # whose token ids are in memory
LENGTH_FLAG = "--reranker_max_length"


@dataclass(frozen=True, eq=False)
class RerankerFilter:
    """A cross-encoder and its margin."""

    reranker: Reranker
    margin: float = 0.0
    max_tokens: int | None = None  # through it at once, padding included

    @classmethod
    def asked(
        cls, config: MiningConfig, compute: ComputeConfig, device: torch.device
    ) -> "RerankerFilter | None":
        """None without --reranker; InputError where it cannot be used."""
        if config.reranker is None:
            return None
        reranker = Reranker.load(
            config.reranker, device=device, max_length=config.reranker_max_length,
            bf16=config.reranker_bf16, length_flag=LENGTH_FLAG,
        )  # fmt: skip
        reranker.check_budget(compute.max_tokens_per_micro_batch, LENGTH_FLAG)
        return cls(reranker, config.reranker_margin, compute.max_tokens_per_micro_batch)

    def drops(
        self,
        left: np.ndarray,
        queries: Sequence[str],
        positives: Sequence[Sequence[str]],
        candidates: np.ndarray | Sequence[Sequence[int]],
        corpus: Sequence[str],
        *,
        shown: bool = False,
    ) -> tuple[np.ndarray, int]:
        """Which of the candidates that are left are dropped, [U, C]; how many pairs were cut.

        Pairs are scored a portion at a time, those of a query that has nothing left not at all.

        Args:
            left: [U, C] bool, the candidates to judge.
            queries: [U].
            positives: of each query, at least one.
            candidates: [U, C] rows of the corpus.
            shown: with a bar.
        """
        drops, cut = np.zeros_like(left), 0
        asked = [query for query in range(len(left)) if left[query].any()]
        size = int(left.sum()) + sum(len(positives[query]) for query in asked)
        label = "scoring with --reranker" if shown else None
        with progress(label, size, "pair") as advance:
            score = partial(self.reranker.scores, max_tokens=self.max_tokens, advance=advance)
            for part in _portions(asked, left, positives):
                pairs = []
                for query in part:
                    texts = [corpus[candidates[query][i]] for i in left[query].nonzero()[0]]
                    pairs += [(queries[query], text) for text in (*positives[query], *texts)]
                scores, cut_here = score(pairs)
                cut += cut_here
                scored = np.array(scores, np.float64)
                for query in part:
                    known, own = len(positives[query]), int(left[query].sum())
                    ceiling = scored[:known].min() - self.margin
                    drops[query, left[query]] = scored[known : known + own] > ceiling
                    scored = scored[known + own :]
        return drops, cut


def _portions(
    asked: Sequence[int], left: np.ndarray, positives: Sequence[Sequence[str]]
) -> Iterator[list[int]]:
    """Queries of about PAIRS_AT_ONCE pairs."""
    part, pairs = [], 0
    for query in asked:
        part.append(query)
        pairs += int(left[query].sum()) + len(positives[query])
        if pairs >= PAIRS_AT_ONCE:
            yield part
            part, pairs = [], 0
    if part:
        yield part
