"""InfoNCE's kernels that make scores, and sums over them."""

from mutants.mutant import Mutant
from mutants.suites import FAR_APART, MEMORY, STREAMED, TRITON_OPTIONS, triton

SCORES = "kernels/rankpo_kernels/triton/scores.py"
STATISTICS = "kernels/rankpo_kernels/triton/statistics.py"

MUTANTS = [
    Mutant(
        "label-is-a-negative", SCORES,
        "!= offs_n[None, :])",
        ">= 0)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "known-pairs-are-negatives", SCORES,
        "class_m[:, None] == key_n[None, :]",
        "class_m[:, None] == -3",
        TRITON_OPTIONS,
    ),
    Mutant(
        "first-key-alone", SCORES,
        "        # mostly none or one: a passage is a positive of few texts\n"
        "        for step in range(0, tl.max(stop_n - start_n, 0)):",
        "        for step in range(0, 1):",
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
        "columns-past-the-end", SCORES,
        "open_mn = mask_n[None, :]",
        "open_mn = (offs_n >= 0)[None, :]",
        TRITON_OPTIONS,
    ),
    Mutant(
        "rows-past-the-end", SCORES,
        "open_mn = open_mn & mask_m[:, None]",
        "pass",
        TRITON_OPTIONS,
    ),
    Mutant(
        "tiles-without-their-labels", SCORES,
        "holds = holds | (tl.max(here_m.to(tl.int32), 0) > 0)",
        "pass",
        TRITON_OPTIONS,
    ),
    Mutant(
        "tiles-without-their-keys", SCORES,
        "holds = holds | (tl.max(near_n.to(tl.int32), 0) > 0)",
        "pass",
        TRITON_OPTIONS,
    ),
    Mutant(
        "tiles-with-their-first-keys", SCORES,
        "2**31 - 1), 0), tl.max(class_m, 0)",
        "2**31 - 1), 0), tl.min(class_m, 0)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "tiles-never-end", SCORES,
        "holds = first_n + BLOCK_N > N",
        "holds = first_n > N",
        TRITON_OPTIONS,
    ),
    Mutant(
        "tiles-of-rows-never-end", SCORES,
        "holds = holds | (first_m + BLOCK_M > R)",
        "pass",
        (STREAMED, "-k", "pass_the_gates and both-directions"),
    ),
    Mutant(
        "right-before-left", SCORES,
        "left, right = tl.split",
        "right, left = tl.split",
        triton("pass_the_gates and shipped and bf16"),
    ),
    Mutant(
        "no-last-row-is-judged", SCORES,
        "mask_n, safe_m = offs_n < N, tl.minimum(first_m + tl.arange(0, BLOCK_M), R - 1)",
        "mask_n, safe_m = offs_n < N, first_m + tl.arange(0, BLOCK_M)",
        MEMORY,
    ),
    Mutant(
        "no-last-row-stands-in", STATISTICS,
        "safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)",
        "safe_m, safe_n = offs_m, offs_n",
        MEMORY,
    ),
    Mutant(
        "hardest-with-hardness", STATISTICS,
        "hardest_m = tl.maximum(hardest_m, tl.max(t_mn, 1))",
        "hardest_m = tl.maximum(hardest_m, tl.max(h_mn, 1))",
        triton("hardest"),
    ),
    Mutant(
        "closed-pairs-have-moments", STATISTICS,
        "under_mn = tl.maximum(t_mn - expand, -1e4, propagate_nan=tl.PropagateNan.ALL)",
        "under_mn = t_mn - expand",
        TRITON_OPTIONS,
    ),
    Mutant(
        "moments-beside-the-top", STATISTICS,
        " + tl.sum(e_mn, AXIS) * beside",
        "",
        TRITON_OPTIONS,
    ),
    Mutant(
        "sums-of-the-last-part", STATISTICS,
        "z_m, zs_m = z_m + tl.sum(e_mn, 1), zs_m + zs",
        "z_m, zs_m = tl.sum(e_mn, 1), zs",
        triton("pass_the_gates and shipped and bf16"),
    ),
    Mutant(
        "stored-beyond-fp32", STATISTICS,
        "SHIFT = tl.constexpr(30.0)",
        "SHIFT = tl.constexpr(60.0)",
        triton("huge_norm"),
    ),
    Mutant(
        "stored-without-norms", STATISTICS,
        "e_mn *= (by_n * (1.0 / tl.load(inverse_top)))[None, :]",
        "pass",
        FAR_APART,
    ),
]  # fmt: skip
