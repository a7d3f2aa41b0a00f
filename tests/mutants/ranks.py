"""Losses over the batches of several ranks."""

from mutants.mutant import Mutant
from mutants.suites import RANKS_OPTIONS, ranks

RANKS = "rankpo_fast/ops/ranks.py"
RING = "kernels/rankpo_kernels/chunked/ring.py"

MUTANTS = [
    Mutant(
        "ranks-labels-of-own-passages", RANKS,
        "column + own.start",
        "column",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-repelled-by-others-apart", RANKS,
        "own_N.clamp(max=-1)",
        "own_N.clamp(-1, -1)",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-keys-of-others-forgotten", RANKS,
        "== class_K, column_K, labels_M[0])",
        "!= class_K, column_K, labels_M[0])",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-gradients-of-others-forgotten", RANKS,
        "return parts.sum(0, dtype=compute_dtype(grad.dtype)).to(grad.dtype)",
        "return parts[group.rank()]",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-mean-of-own-queries", RANKS,
        "group.size() / ranks.weight if",
        "1 / ranks.weight if",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-refusal-kept-quiet", RANKS,
        "        refusal = error\n",
        "        raise error\n",
        ranks("wrong and 2-"),
    ),
    Mutant(
        "ring-gradients-left-behind", RING,
        "own if dp is None else own.add_(dp)",
        "own",
        ranks("a_ring_gives and 2-"),
    ),
]  # fmt: skip
