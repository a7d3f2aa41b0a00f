"""InfoNCE's launcher in Triton, its chunks, norms and products."""

from mutants.mutant import Mutant
from mutants.suites import FAR_APART, FILTER, RANKS_IN_TRITON, TRITON_OPTIONS, of, triton

LAUNCHER = "kernels/rankpo_kernels/triton/info_nce.py"
PLAIN = "kernels/rankpo_kernels/triton/info_nce_plain.py"
GENERAL = "kernels/rankpo_kernels/triton/info_nce_general.py"
PASSES = "kernels/rankpo_kernels/triton/passes.py"
BLOCKS = "kernels/rankpo_kernels/triton/blocks.py"
ROWS = "kernels/rankpo_kernels/triton/rows.py"
PRODUCTS = "kernels/rankpo_kernels/triton/products.py"
SCORES = "kernels/rankpo_kernels/triton/scores.py"

INPUTS = "kernels/rankpo_kernels/triton/inputs.py"

FP8 = of("tests/kernels/test_triton_fp8.py", "test")
SMALL_CHUNKS = triton("chunks_smaller or summed_beforehand")

MUTANTS = [
    Mutant(
        "zero-vectors-have-a-direction", ROWS,
        "inverse = tl.where(length == 0, 0.0,",
        "inverse = tl.where(length == 0, 1.0,",
        FAR_APART,
    ),
    Mutant(
        "squares-overflow", ROWS,
        "    top_x, top_y = tl.where(top_x > TINY, top_x, 1.0), tl.where(top_y > TINY, top_y, "
        "1.0)\n",
        "    top_x, top_y = tl.where(top_x > TINY, 1.0, 1.0), tl.where(top_y > TINY, 1.0, "
        "1.0)\n",
        triton("overflow"),
    ),
    Mutant(
        "no-tangent", ROWS,
        "g -= along_r[:, None] * unit",
        "g -= 0.0 * unit",
        TRITON_OPTIONS,
    ),
    Mutant(
        "finished-without-tangent", PRODUCTS,
        "acc_rd -= (along_r * inverse_r)",
        "acc_rd -= (0.0 * inverse_r)",
        triton("in_few_launches"),
    ),
    Mutant(
        "totals-forget-the-weight", PRODUCTS,
        "total *= totals.weights.value",
        "total *= 1.0",
        triton("one_weight"),
    ),
    Mutant(
        "one-program-too-few", PRODUCTS,
        "(rows * cdiv(D, tiles.BLOCK_N) + 1,)",
        "(rows * cdiv(D, tiles.BLOCK_N),)",
        triton("one_weight"),
    ),
    Mutant(
        "filtered-product-overwrites", PRODUCTS,
        "    if ADD:\n",
        "    if ADD and False:\n",
        FILTER,
    ),
    Mutant(
        "filtered-rows-are-not-zeroed", PRODUCTS,
        "out.zero_()",
        "pass",
        FILTER,
    ),
    Mutant(
        "filtered-passages-miss-a-row", PRODUCTS,
        "mask_m, steps = offs_m < N, count",
        "mask_m, steps = offs_m < N, tl.maximum(count - 1, 0)",
        FILTER,
    ),
    Mutant(
        "filtered-queries-miss-a-row", PRODUCTS,
        "mask_m = offs_m < count",
        "mask_m = offs_m < tl.maximum(count - 1, 0)",
        FILTER,
    ),
    Mutant(
        "tf32-without-small-parts", SCORES,
        "input_precision=PRECISION",
        'input_precision="tf32" if PRECISION == "tf32x3" else PRECISION',
        of("tests/kernels/test_triton_tf32.py", "three_products"),
    ),
    Mutant(
        "fp8-out-of-range", INPUTS,
        "(8 - exponent_R).clamp(max=120)",
        "0 * exponent_R",
        FP8,
    ),
    Mutant(
        "fp8-gradients-stay-scaled", LAUNCHER,
        "grad *= factor[:, None]",
        "pass",
        FP8,
    ),
    Mutant(
        "fp8-in-few-launches", LAUNCHER,
        "few = False  # that finish",
        "pass  # that finish",
        FP8,
    ),
    Mutant(
        "fp8-is-bf16", INPUTS,
        'settings.precision == "fp8"',
        "False",
        FP8,
    ),
    Mutant(
        "split-products-by-cublas", BLOCKS,
        "if chosen is not None or precision != \"ieee\":",
        "if chosen is not None:",
        of("tests/kernels/test_triton_tf32.py", "ours"),
    ),
    Mutant(
        "own-negatives-without-tangent", PRODUCTS,
        "- tl.load(gs_LH + level * H + h) * n_unit",
        "- 0.0 * n_unit",
        TRITON_OPTIONS,
    ),
    Mutant(
        "own-gradients-side-by-side", PRODUCTS,
        "d_own + h * stride_do",
        "d_own + h * D",
        TRITON_OPTIONS,
    ),
    Mutant(
        "top-forgotten", PLAIN,
        "(ready, p.dims, memory.inverse_top, p.scale)",
        "(ready, p.dims, torch.ones(()) if memory.relative else None, p.scale)",
        FAR_APART,
    ),
    Mutant(
        "chunks-overwrite-dp", PLAIN,
        "G_RN, left_RD, memory.dp_ND, not first,",
        "G_RN, left_RD, memory.dp_ND, False,",
        SMALL_CHUNKS,
    ),
    Mutant(
        "pairs-of-the-first-chunk", GENERAL,
        "value_LK, part.start, R, K",
        "value_LK, 0, R, K",
        TRITON_OPTIONS,
    ),
    Mutant(
        "past-the-last-prefix", GENERAL,
        "torch.zeros_like if p.dims[-1] < x.shape[1] else torch.empty_like",
        "torch.empty_like",
        TRITON_OPTIONS,
    ),
    Mutant(
        "chunks-need-all-memory", PLAIN,
        "p.new(R, padded(N)",
        "p.new(M, padded(N)",
        triton("never_stored"),
    ),
    Mutant(
        "host-waits", BLOCKS,
        "largest = factor_R.abs().amax().clamp(min=LEAST)",
        "largest = factor_R.abs().amax().clamp(min=LEAST).item()",
        triton("does_not_wait"),
    ),
    Mutant(
        "unasked-gradient", GENERAL,
        "if own_HD is not None and needs.own:",
        "if own_HD is not None:",
        triton("without_the_others"),
    ),
    Mutant(
        "workspace-exceeded", BLOCKS,
        "// row_bytes) < 1:",
        "// row_bytes) < 0:",
        triton("refused"),
    ),
    Mutant(
        "few-launches-with-a-sum", LAUNCHER,
        "few = few and not stored and products_needed",
        "few = False",
        triton("launches"),
    ),
    Mutant(
        "integers-have-gaps", LAUNCHER,
        ".with_integers(Tensor.contiguous)",
        "",
        triton("have_gaps"),
    ),
    Mutant(
        "weights-have-gaps", LAUNCHER,
        "expand(len(q_MD)).contiguous() if on_device",
        "expand(len(q_MD)) if on_device",
        triton("have_gaps"),
    ),
    Mutant(
        "zero-passages", BLOCKS,
        "inverse_LN.amax().clamp(min=LEAST)",
        "inverse_LN.amax()",
        triton("all_be_zero"),
    ),
    Mutant(
        "negative-factors", BLOCKS,
        "factor_R.abs().amax()",
        "factor_R.amax()",
        triton("are_odd"),
    ),
    Mutant(
        "filtered-rows-are-read", BLOCKS,
        "of_chunk, False, transpose=True, chosen=chosen)",
        "of_chunk, False, transpose=True)",
        FILTER,
    ),
    Mutant(
        "ranks-columns-of-own-queries-gpu", PASSES,
        "sums = sums | {PQ: _of_all_ranks(p, sums[PQ])}",
        "pass",
        RANKS_IN_TRITON,
    ),
    Mutant(
        "ranks-slopes-of-own-pairs-gpu", PASSES,
        "            add_ranks_(x, settings)",
        "            pass",
        RANKS_IN_TRITON,
    ),
]  # fmt: skip
