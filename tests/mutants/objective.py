"""What all implementations of the losses over a batch share."""

from mutants.mutant import Mutant
from mutants.suites import CHUNKED_OPTIONS, TRITON_OPTIONS, chunked, in_batch, info_nce

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
        "equal-queries-have-two-numbers", RELATIONS,
        "    new[1:] = ids[1:] != ids[:-1]\n",
        "",
        TRITON_OPTIONS,
    ),
    Mutant(
        "numbers-of-other-queries", RELATIONS,
        "scatter_(0, order, new.cumsum(0) - 1)",
        "copy_(new.cumsum(0) - 1)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "exclusions-are-no-more-than-labels", RELATIONS,
        "self.passage_ids_N, self.excluded_offsets,",
        "self.passage_ids_N,",
        in_batch("each_option and excluded"),
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
