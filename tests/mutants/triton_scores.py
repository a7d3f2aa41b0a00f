"""InfoNCE's kernels that make scores and their gradients."""

from mutants.mutant import Mutant
from mutants.suites import FAR_APART, FILTER, MEMORY, TRITON_OPTIONS, triton

SCORES = "kernels/rankpo_kernels/triton/scores.py"

MUTANTS = [
    Mutant(
        "label-is-a-negative", SCORES,
        "!= offs_n[None, :])",
        ">= 0)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "known-pairs-are-negatives", SCORES,
        "open_mn = open_mn & ~(same_mn",
        "open_mn = open_mn | (same_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "curated-are-not-exempt", SCORES,
        "if CURATED == 1:",
        "if CURATED == 3:",
        TRITON_OPTIONS,
    ),
    Mutant(
        "curated-repel", SCORES,
        "if CURATED == 2:",
        "if CURATED == 3:",
        TRITON_OPTIONS,
    ),
    Mutant(
        "apart-repel", SCORES,
        " & (owner_n != APART)[None, :]",
        "",
        TRITON_OPTIONS,
    ),
    Mutant(
        "gradients-without-hardness", SCORES,
        "hard_mn - tl.load(row_slopes.lse",
        "s_mn - tl.load(row_slopes.lse",
        TRITON_OPTIONS,
    ),
    Mutant(
        "columns-past-the-end", SCORES,
        "left_mn & mask_n[None, :]",
        "left_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "rows-past-the-end", SCORES,
        "left_mn & mask_m[:, None]",
        "left_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "no-last-row-stands-in", SCORES,
        "    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)\n    "
        "open_mn",
        "    safe_m, safe_n = offs_m, offs_n\n    open_mn",
        MEMORY,
    ),
    Mutant(
        "filter-takes-more", SCORES,
        "mass_m > filter_mass",
        "mass_m > 2 * filter_mass",
        FILTER,
    ),
    Mutant(
        "filter-takes-labels", SCORES,
        " | holds_label",
        "",
        FILTER,
    ),
    Mutant(
        "filter-takes-nan", SCORES,
        "(mass_m != mass_m)",
        "(mass_m < 0)",
        triton("nan_is"),
    ),
    Mutant(
        "filter-takes-negative-rows", SCORES,
        "tl.load(row_slopes.soft + rows) != 0\n    mass_m",
        "tl.load(row_slopes.soft + rows) > 0\n    mass_m",
        FILTER,
    ),
    Mutant(
        "scatter-in-32-bits", SCORES,
        "level = tl.program_id(1).to(tl.int64)",
        "level = tl.program_id(1)",
        triton("beyond_32"),
    ),
    Mutant(
        "prefixes-without-suffix-sums", SCORES,
        "sum_mn += tl.load(out_mn",
        "sum_mn = tl.load(out_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "overflow-not-mended", SCORES,
        "write_m = mask_m & (tl.load(row_slopes.soft + safe_m) != 0)",
        "write_m = mask_m & (tl.load(row_slopes.soft + safe_m) > 2)",
        FAR_APART,
    ),
    Mutant(
        "along-before-rounding", SCORES,
        "tl.where(write_mn, rounded_mn.to(tl.float32) * dots_mn, 0.0)",
        "tl.where(write_mn, g_mn, 0.0)",
        triton("in_few_launches"),
    ),
]  # fmt: skip
