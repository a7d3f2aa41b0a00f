"""InfoNCE's kernels that make gradients of scores."""

from mutants.mutant import Mutant
from mutants.suites import FAR_APART, MEMORY, STREAMED, TRITON_OPTIONS, of, triton

GRADIENTS = "kernels/rankpo_kernels/triton/gradients.py"

FEW = triton("in_few_launches")

MUTANTS = [
    Mutant(
        "gradients-without-hardness", GRADIENTS,
        "softmax_slopes(h_mn, row_slopes",
        "softmax_slopes(t_mn, row_slopes",
        TRITON_OPTIONS,
    ),
    Mutant(
        "gradients-without-columns", GRADIENTS,
        "row_slopes.lse is None else g_mn + of_columns_mn",
        "row_slopes.lse is None else g_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "closed-pairs-are-smoothed", GRADIENTS,
        'g_mn = tl.where(t_mn == -float("inf"), 0.0, g_mn)',
        "pass",
        TRITON_OPTIONS,
    ),
    Mutant(
        "rows-without-negatives-pull", GRADIENTS,
        "lse = finite(tl.load(slopes.lse + at, mask=mask, other=other)) * LOG2E",
        "lse = tl.load(slopes.lse + at, mask=mask, other=other) * LOG2E",
        triton("everything_masked"),
    ),
    Mutant(
        "no-last-row-has-gradients", GRADIENTS,
        "safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)",
        "safe_m, safe_n = offs_m, offs_n",
        MEMORY,
    ),
    Mutant(
        "gradients-overrun-their-rows", GRADIENTS,
        "write_mn = write_m[:, None] & (part_n < out_stride)[None, :]",
        "write_mn = write_m[:, None] & (part_n >= 0)[None, :]",
        MEMORY,
    ),
    Mutant(
        "labels-are-not-written", GRADIENTS,
        "tl.store(at_m, slope_m.to(out.dtype.element_ty), mask=here_m)",
        "tl.store(at_m, slope_m.to(out.dtype.element_ty), mask=here_m & (label_m < 0))",
        TRITON_OPTIONS,
    ),
    Mutant(
        "labels-without-the-row-factor", GRADIENTS,
        "slope_m = tl.load(label_slope_R + rows) * by_m",
        "slope_m = tl.load(label_slope_R + rows)",
        TRITON_OPTIONS,
    ),
    Mutant(
        "labels-without-their-norm", GRADIENTS,
        "slope_m *= inverse_m",
        "pass",
        TRITON_OPTIONS,
    ),
    Mutant(
        "labels-beside-no-top", GRADIENTS,
        "inverse_m *= 1.0 / tl.load(inverse_top)",
        "pass",
        FAR_APART,
    ),
    Mutant(
        "labels-of-rows-that-fit", GRADIENTS,
        "(label_m < first_n + BLOCK_N) & write_m",
        "(label_m < first_n + BLOCK_N) & (rows >= 0)",
        MEMORY,
    ),
    Mutant(
        "columns-beside-no-top", GRADIENTS,
        "by_n *= 1.0 / tl.load(inverse_top)",
        "pass",
        FAR_APART,
    ),
    Mutant(
        "scatter-in-32-bits", GRADIENTS,
        "level = tl.program_id(1).to(tl.int64)",
        "level = tl.program_id(1)",
        triton("beyond_32"),
    ),
    Mutant(
        "prefixes-without-suffix-sums", GRADIENTS,
        "sum_mn += tl.load(out_mn",
        "sum_mn = tl.load(out_mn",
        TRITON_OPTIONS,
    ),
    Mutant(
        "overflow-not-mended", GRADIENTS,
        "mask=offs_m < R, other=0.0) != 0",
        "mask=offs_m < R, other=0.0) > 2",
        FAR_APART,
    ),
    Mutant(
        "rows-that-fit-are-mended", GRADIENTS,
        "number(scale), pid_m, pid_n, rest_m, R",
        "number(scale), pid_m, pid_n, offs_m < R, R",
        FAR_APART,
    ),
    Mutant(
        "negative-slopes-not-mended", GRADIENTS,
        "tl.load(rest_R + offs_m, mask=offs_m < R, other=0.0) < 0",
        "tl.load(rest_R + offs_m, mask=offs_m < R, other=0.0) < -1e30",
        of(STREAMED, "may_be_negative"),
    ),
    Mutant(
        "overflow-mended-in-the-first-tile", GRADIENTS,
        "for pid_n in range(0, tl.cdiv(N, BLOCK_N)):",
        "for pid_n in range(0, 1):",
        FAR_APART,
    ),
    Mutant(
        "along-without-dots", GRADIENTS,
        "along_mn = rounded_mn.to(tl.float32) * parts[part]",
        "along_mn = rounded_mn.to(tl.float32)",
        FEW,
    ),
    Mutant(
        "along-before-rounding", GRADIENTS,
        "along_mn = rounded_mn.to(tl.float32) * parts[part]",
        "along_mn = g_mn * parts[part]",
        triton("(in_one_dimension or pass_the_gates) and few"),
    ),
    Mutant(
        "along-past-the-end", GRADIENTS,
        "along_mn = tl.where(write_mn, along_mn, 0.0)",
        "pass",
        FEW,
    ),
    Mutant(
        "along-the-last-part", GRADIENTS,
        "along_m += tl.sum(along_mn, 1)",
        "along_m = tl.sum(along_mn, 1)",
        triton("pass_the_gates and shipped and few"),
    ),
    Mutant(
        "few-launches-without-labels", GRADIENTS,
        "g_mn = with_labels(g_mn, slope_R, masks, safe_m, at_n, WIDTH)",
        "pass",
        FEW,
    ),
]  # fmt: skip
