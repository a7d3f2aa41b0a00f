"""In-batch RankPO and SigLIP: Triton, chunks of plain torch, native rows, op."""

from mutants.mutant import Mutant
from mutants.suites import in_batch, of, ranks

TRITON = "kernels/rankpo_kernels/triton/in_batch.py"
TILES = "kernels/rankpo_kernels/triton/pairs.py"
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
        "pairs-past-the-end", TILES,
        "closed(x_mn, masks, first_m, first_n, R, N,",
        "closed(x_mn, masks, first_m, first_n, R, first_n + BLOCK_N,",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "pairs-without-reference", TILES,
        "x_mn -= scale * UNIT * r_mn",
        "x_mn -= 0.0 * r_mn",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "pairs-without-the-label", TILES,
        "element_r = -slope_r",
        "element_r = 0.0 * slope_r",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "siglip-without-its-positive", TILES,
        "loss_r += softplus(z_r)",
        "loss_r += 0.0",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "hinge-swallows-nan", TILES,
        "tl.where(x_mn <= -1.0, 0.0, 1.0 + x_mn)",
        "tl.where(x_mn > -1.0, 1.0 + x_mn, 0.0)",
        in_batch("nan_in and triton"),
    ),
    Mutant(
        "pairs-of-fp16-underflow", TILES,
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
        "no-last-row-of-pairs-stands-in", TILES,
        "safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)",
        "safe_m, safe_n = offs_m, offs_n",
        of(KERNEL_TESTS, "outside"),
    ),
    Mutant(
        "later-parts-forgotten", TILES,
        "loss_pr += tl.load(sums.loss",
        "loss_pr = tl.load(sums.loss",
        of(KERNEL_TESTS, "small-chunks"),
    ),
    Mutant(
        "pairs-without-the-references-label", TILES,
        "offset_m += scale * tl.load(reference_R + rows)",
        "offset_m += 0.0",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "softplus-of-pairs-lacks-a-power", TILES,
        "for place in tl.static_range(1, 9):",
        "for place in tl.static_range(1, 8):",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "softplus-of-pairs-is-1e-5-off", TILES,
        "0.9999999403953552",
        "0.99999",
        in_batch("triton_passes"),
    ),
    Mutant(
        "sigmoid-of-pairs-falls", TILES,
        "return f, tl.exp2(x - f)",
        "return f, tl.exp2(-f)",
        EACH_OPTION_TRITON,
    ),
    Mutant(
        "pairs-of-the-last-part", TILES,
        "top_m, wins_m, total_m = tl.maximum(top_m, top), wins_m + wins, total_m + total",
        "top_m, wins_m, total_m = tl.maximum(top_m, top), wins, total",
        of(KERNEL_TESTS, "shipped-tiles"),
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
