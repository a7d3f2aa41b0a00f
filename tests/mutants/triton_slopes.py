"""InfoNCE's kernels that make losses and slopes of sums over rows and columns."""

from mutants.mutant import Mutant
from mutants.suites import FAR_APART, MEMORY, TRITON_OPTIONS, triton

SLOPES = "kernels/rankpo_kernels/triton/slopes.py"

MUTANTS = [
    Mutant(
        "negative-rows-without-label", SLOPES,
        "tl.where(slope_k != 0, -1.0, 0.0)",
        "tl.where(slope_k < 0, -1.0, 0.0)",
        triton("are_odd"),
    ),
    Mutant(
        "stored-up-to-gaps-of-50", SLOPES,
        "OVER = tl.constexpr(35.0)",
        "OVER = tl.constexpr(50.0)",
        triton("keep_their_digits"),
    ),
    Mutant(
        "parts-merge-without-rescale", SLOPES,
        "by = tl.exp(tl.load(parts.top + at, mask=live, other=-float(\"inf\")) - floor[None, :])",
        "by = tl.where(live, 1.0, 0.0)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "first-parts-alone", SLOPES,
        "none, none, none, none\n    for first in range(0, n_parts, PARTS):",
        "none, none, none, none\n    for first in range(0, 1):",
        triton("more_parts"),
    ),
    Mutant(
        "losses-forget-log1p", SLOPES,
        "tl.where(one == 1.0, e, ",
        "tl.where(one == 1.0, 0.0, ",
        triton("gates and converged and fp32"),
    ),
    Mutant(
        "weights-forgotten", SLOPES,
        "omega_m = tl.load(weights.at + safe_m)",
        "omega_m = none + 1.0",
        TRITON_OPTIONS,
    ),
    Mutant(
        "stored-weights-forgotten", SLOPES,
        "omega_m * sigmoid(-gap_m)",
        "sigmoid(-gap_m)",
        FAR_APART,
    ),
    Mutant(
        "overflow-without-factor", SLOPES,
        "tl.exp(-SHIFT), factor_m)",
        "tl.exp(-SHIFT), 0.0)",
        FAR_APART,
    ),
    Mutant(
        "label-pulls-the-other-way", SLOPES,
        "soft, slope = pull * tl.exp(_lse(sums) - finite(lse)), -pull",
        "soft, slope = pull * tl.exp(_lse(sums) - finite(lse)), pull",
        TRITON_OPTIONS,
    ),
    Mutant(
        "union-keeps-the-first-top", SLOPES,
        "tl.maximum(top_a, top_b)\n    floor",
        "top_a\n    floor",
        FAR_APART,
    ),
    Mutant(
        "union-keeps-the-first-hardest", SLOPES,
        "tl.maximum(hardest_a, hardest_b)",
        "hardest_a",
        triton("hardest"),
    ),
    Mutant(
        "hardest-by-its-logit", SLOPES,
        "_, _, _, _, _, top_m = of_rows if QP else of_qq",
        "top_m, _, _, _, _, _ = of_rows if QP else of_qq",
        triton("hardest"),
    ),
    Mutant(
        "positive-listed-once", SLOPES,
        "COPIES: tl.constexpr = 2 if",
        "COPIES: tl.constexpr = 1 if",
        TRITON_OPTIONS,
    ),
    Mutant(
        "rows-with-fewer-pairs-count", SLOPES,
        "omega_k = tl.where(live_m, omega_m * share_m, 0.0)",
        "omega_k = omega_m * share_m",
        TRITON_OPTIONS,
    ),
    Mutant(
        "last-pairs-alone-pull-columns", SLOPES,
        "soft_n += tl.sum(tl.where(hit_pn",
        "soft_n = tl.sum(tl.where(hit_pn",
        triton("columns_have_more_pairs"),
    ),
    Mutant(
        "rows-past-the-end-are-left", SLOPES,
        "tl.store(outputs.loss_LM + level * M + offs_m, weight * loss_m, mask=mask_m)",
        "tl.store(outputs.loss_LM + level * M + offs_m, weight * loss_m)",
        MEMORY,
    ),
    Mutant(
        "factor-meets-the-norm-first", SLOPES,
        "inverse_m = tl.load(stored.inverse_q + safe_m)",
        "inverse_m, factor_m = none + 1.0, factor_m * tl.load(stored.inverse_q + safe_m)",
        triton("huge_norm"),
    ),
]  # fmt: skip
