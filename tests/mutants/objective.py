"""What all implementations of the losses over a batch share."""

from mutants.mutant import Mutant
from mutants.suites import CHUNKED_OPTIONS, chunked, in_batch, info_nce

OBJECTIVE = "kernels/rankpo_kernels/objective.py"
RELATIONS = "kernels/rankpo_kernels/relations.py"

MUTANTS = [
    Mutant(
        "merge-without-other-mean", OBJECTIVE,
        "+ (b.lse - finite).exp() * b.mean",
        "+ b.mean",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "merge-keeps-the-first-top", OBJECTIVE,
        "torch.maximum(a.top, b.top)",
        "a.top",
        chunked("hardest"),
    ),
    Mutant(
        "smoothing-without-pull", OBJECTIVE,
        "slope_P += omega_P * smooth_P * count_P",
        "pass",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "known-twice", RELATIONS,
        "torch.searchsorted(text_of_run, text_N, right=True)",
        "torch.searchsorted(text_of_run, text_N)",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "others-are-counted-by-text", RELATIONS,
        "scatter_add(0, stop_N, -ones_N)",
        "scatter_add(0, stop_N, -0 * ones_N)",
        in_batch("counted"),
    ),
    Mutant(
        "rounding-finds-duplicates", OBJECTIVE,
        "- reach + rounding",
        "- reach",
        info_nce("as_similar_as"),
    ),
]  # fmt: skip
