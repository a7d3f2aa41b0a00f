"""In-batch RankPO and SigLIP: Triton, chunks of plain torch, native rows, op."""

from mutants.mutant import Mutant
from mutants.suites import in_batch, of, ranks

TRITON = "kernels/rankpo_kernels/triton/in_batch.py"
CHUNKED = "kernels/rankpo_kernels/chunked/in_batch.py"
NATIVE = "kernels/native/in_batch.cpp"
OP = "rankpo_fast/ops/in_batch.py"
RANKS = "rankpo_fast/ops/ranks.py"

KERNEL_TESTS = "tests/kernels/test_triton_in_batch.py"
EACH_OPTION_TRITON = in_batch("each_option and triton")
EACH_OPTION_CPU = in_batch("each_option and not triton")
RANKS_PAIRS = ranks("pair and 2-")

MUTANTS = [
    Mutant(
        "pairs-past-the-end", TRITON,
        "open_mn = open_mn & write_mn",
        "pass",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "pairs-without-reference", TRITON,
        "over_mn -= r_mn",
        "over_mn -= 0.0 * r_mn",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "pairs-without-the-label", TRITON,
        "element_r = -slope_r",
        "element_r = 0.0 * slope_r",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "siglip-without-its-positive", TRITON,
        "loss_r += softplus(z_r)",
        "loss_r += 0.0",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "hinge-swallows-nan", TRITON,
        "tl.where(x_mn <= -1.0, 0.0, 1.0 + x_mn)",
        "tl.where(x_mn > -1.0, 1.0 + x_mn, 0.0)",
        in_batch("nan_in and triton"),
    ),
    Mutant(
        "pairs-of-fp16-underflow", TRITON,
        "1.0 / tl.where(size_r < 1e-30, 1e-30, size_r) * SUM",
        "1.0 + 0.0 * size_r",
        of(KERNEL_TESTS, "small_gradients"),
    ),
    Mutant(
        "pair-chunks-overwrite-dp", TRITON,
        "product(out, q_RD, dp_ND, not first,",
        "product(out, q_RD, dp_ND, False,",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "no-last-row-of-pairs-stands-in", TRITON,
        "safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)",
        "safe_m, safe_n = offs_m, offs_n",
        of(KERNEL_TESTS, "outside"),
    ),
    Mutant(
        "later-parts-forgotten", TRITON,
        "loss_pr += tl.load(sums.loss",
        "loss_pr = tl.load(sums.loss",
        of(KERNEL_TESTS, "small-chunks"),
    ),
    Mutant(
        "cpu-pair-chunks-overwrite-dp", CHUNKED,
        "beta=0 if rows.start == 0 else 1",
        "beta=0",
        EACH_OPTION_CPU,
    ),
    Mutant(
        "native-keeps-known-passages", NATIVE,
        "s[in.known_columns[k]] = kMasked",
        "(void)k",
        EACH_OPTION_CPU,
    ),
    Mutant(
        "gradients-of-the-sum", OP,
        "dtype) * share",
        "dtype) * 1.0",
        EACH_OPTION_CPU,
    ),
    Mutant(
        "ranks-pairs-weighted-twice", RANKS,
        'check(replace(call, reduction="sum"))',
        "check(call)",
        RANKS_PAIRS,
    ),
    Mutant(
        "ranks-pairs-gradients-forgotten", RANKS,
        "dp = sum_rows(dp, self.ranks.passages, self.ranks.group)",
        "dp = dp[self.ranks.own(self.ranks.passages)]",
        RANKS_PAIRS,
    ),
    Mutant(
        "ranks-pairs-of-two-losses", RANKS,
        '_comparable(problem) | terms(call)',
        '_comparable(problem)',
        RANKS_PAIRS,
    ),
]  # fmt: skip
