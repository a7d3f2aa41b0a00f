"""Both directions in Triton from exponentials that are kept."""

from mutants.mutant import Mutant
from mutants.suites import of

KERNELS = "kernels/rankpo_kernels/triton/kept.py"
TESTS = "tests/kernels/test_triton_kept.py"

GATES = of(TESTS, "pass_the_gates and within and 0.05")
AGAIN = of(TESTS, "computed_again")

MUTANTS = [
    Mutant(
        "kept-columns-of-any-sign", KERNELS,
        "g_mn = sign_n[None, :] * tl.exp2(",
        "g_mn = tl.exp2(",
        of(TESTS, "may_be_negative"),
    ),
    Mutant(
        "kept-without-columns", KERNELS,
        "g_mn = e_mn * (g_mn + (",
        "g_mn = e_mn * (0 * g_mn + (",
        GATES,
    ),
    Mutant(
        "kept-without-labels", KERNELS,
        "label_m[:, None] == offs_n[None, :], slope_m",
        "label_m[:, None] < 0 * offs_n[None, :], slope_m",
        GATES,
    ),
    Mutant(
        "kept-norms-stay-divided", KERNELS,
        "by_m *= tl.load(inverse_top)",
        "pass",
        GATES,
    ),
    Mutant(
        "kept-beside-no-positive", KERNELS,
        "undo_m = (scale * tl.load(positive_R + safe_m) - SHIFT) * LOG2E",
        "undo_m = (scale * tl.load(positive_R) - SHIFT) * LOG2E + 0.0 * safe_m",
        GATES,
    ),
    Mutant(
        "kept-rows-overflow", KERNELS,
        "row_slopes.lse[0] - positive_M > OVER.value",
        "row_slopes.lse[0] > 1e30",
        AGAIN,
    ),
    Mutant(
        "kept-columns-are-zero", KERNELS,
        "low_N & (column_slopes.soft[0] != 0)",
        "low_N & (column_slopes.soft[0] > 1e30)",
        AGAIN,
    ),
    Mutant(
        "kept-beyond-the-workspace", KERNELS,
        'return "" if needed <= has else',
        'return "" if needed else',
        of(TESTS, "of_the_form"),
    ),
]  # fmt: skip
