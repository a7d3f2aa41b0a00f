"""Do the tests notice? Breaks a copy of the code in known ways and runs the tests that should see.

    python tests/mutants.py [name ...]

Prints what caught each mutant; exits with 1 if one survived. Not part of `make test`: each takes as
long as its tests take to fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_mutants import BENCH
from mutant import Mutant, of

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels/rankpo_kernels/"
CHUNKED, OBJECTIVE = KERNELS + "chunked.py", KERNELS + "objective.py"
SCORES, SLOPES, ROWS = (KERNELS + f"gpu/{name}.py" for name in ("scores", "slopes", "rows"))
PRODUCTS, BLOCKS = KERNELS + "gpu/products.py", KERNELS + "gpu/blocks.py"
LAUNCHER = KERNELS + "gpu/info_nce.py"
COMMON, BATCH = "rankpo_fast/ops/common.py", "rankpo_fast/ops/batch.py"
NATIVE = "kernels/native/rows.cpp"
ST = "rankpo_fast/integrations/sentence_transformers/"
ACROSS, RING = "rankpo_fast/ops/ranks.py", KERNELS + "ring.py"
PAIRS, PAIR_CHUNKS = KERNELS + "gpu/pointwise.py", KERNELS + "pointwise.py"
PAIR_OPS, PAIR_NATIVE = "rankpo_fast/ops/in_batch.py", "kernels/native/pointwise.cpp"
GPU_PAIRS, NATIVE_PAIRS = KERNELS + "gpu/pairs.py", "kernels/native/pairs.cpp"


def gpu(names: str) -> tuple[str, ...]:
    both = (f"tests/kernels/test_gpu_info_nce{more}.py" for more in ("", "_edges"))
    return (*both, "-k", names)


def ops(names: str) -> tuple[str, ...]:
    return of("tests/ops/test_info_nce.py", names)


OPTIONS = gpu("options_in_fp32")
FAR_APART = gpu("too_far or zero_vector")
SMALL_CHUNKS = gpu("chunks_smaller or summed_beforehand")
FILTER = gpu("filter")
MEMORY = gpu("outside")
CPU = of("tests/kernels/test_chunked.py", "options_in_fp64 or options_in_fp32")
CPU_CHUNKS = ops("gates and nothing-round and float32 and native")
OPS_GRADIENTS = ops("gradcheck")
RANKS = of("tests/ops/test_ranks.py", "every_option and 2-")
RANKS_PAIRS = of("tests/ops/test_ranks.py", "pair and 2-")
RANKS_RING = of("tests/ops/test_ranks.py", "a_ring_gives and 2-")
PAIR_OPTIONS = of("tests/ops/test_in_batch.py", "each_option and triton")
PAIR_OPTIONS_CPU = of("tests/ops/test_in_batch.py", "each_option and not triton")
PAIR_MEMORY = of("tests/kernels/test_gpu_pointwise.py", "outside")
LONG_ROWS = of("tests/kernels/test_native.py", "long_rows")
PAIR_LOSS = of("tests/ops/test_rankpo.py", "gates or upstream or extreme or nan")
GROUPS = of("tests/ops/test_rankpo_group.py", "gates or padding or two_passages")
RANKED = of("tests/kernels/test_gpu_pairs.py", "gates or norms or nan or padding or outside")
SANITIZER = of("tests/kernels/test_sanitizer.py", "strays")


MUTANTS = [
    # kernels/rankpo_kernels/gpu/scores.py
    Mutant(
        "label-is-a-negative", SCORES,
        "!= offs_n[None, :])",
        ">= 0)",
        OPTIONS,
    ),
    Mutant(
        "known-pairs-are-negatives", SCORES,
        "open_mn = open_mn & ~(same_mn",
        "open_mn = open_mn | (same_mn",
        OPTIONS,
    ),
    Mutant(
        "curated-are-not-exempt", SCORES,
        "if CURATED == 1:",
        "if CURATED == 3:",
        OPTIONS,
    ),
    Mutant(
        "curated-repel", SCORES,
        "if CURATED == 2:",
        "if CURATED == 3:",
        OPTIONS,
    ),
    Mutant(
        "apart-repel", SCORES,
        " & (owner_n != APART)[None, :]",
        "",
        OPTIONS,
    ),
    Mutant(
        "gradients-without-hardness", SCORES,
        "hard_mn - tl.load(row_slopes.lse",
        "s_mn - tl.load(row_slopes.lse",
        OPTIONS,
    ),
    Mutant(
        "columns-past-the-end", SCORES,
        "left_mn & mask_n[None, :]",
        "left_mn",
        OPTIONS,
    ),
    Mutant(
        "rows-past-the-end", SCORES,
        "left_mn & mask_m[:, None]",
        "left_mn",
        OPTIONS,
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
        gpu("nan_is"),
    ),
    Mutant(
        "filter-takes-negative-rows", SCORES,
        "tl.load(row_slopes.soft + safe_m) != 0\n        mass_m",
        "tl.load(row_slopes.soft + safe_m) > 0\n        mass_m",
        FILTER,
    ),
    Mutant(
        "negative-rows-without-label", SLOPES,
        "tl.where(slope_k != 0, -1.0, 0.0)",
        "tl.where(slope_k < 0, -1.0, 0.0)",
        gpu("are_odd"),
    ),
    Mutant(
        "stored-up-to-gaps-of-50", SLOPES,
        "OVER = tl.constexpr(35.0)",
        "OVER = tl.constexpr(50.0)",
        gpu("keep_their_digits"),
    ),
    Mutant(
        "scatter-in-32-bits", SCORES,
        "level = tl.program_id(1).to(tl.int64)",
        "level = tl.program_id(1)",
        gpu("beyond_32"),
    ),
    Mutant(
        "prefixes-without-suffix-sums", SCORES,
        "sum_mn += tl.load(out_mn",
        "sum_mn = tl.load(out_mn",
        OPTIONS,
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
        gpu("in_few_launches"),
    ),
    # kernels/rankpo_kernels/gpu/slopes.py
    Mutant(
        "parts-merge-without-rescale", SLOPES,
        "by = tl.exp(tl.load(parts.top + at, mask=live, other=-float(\"inf\")) - floor[None, :])",
        "by = tl.where(live, 1.0, 0.0)",
        OPTIONS,
    ),
    Mutant(
        "first-parts-alone", SLOPES,
        "none, none, none, none\n    for first in range(0, n_parts, PARTS):",
        "none, none, none, none\n    for first in range(0, 1):",
        gpu("more_parts"),
    ),
    Mutant(
        "losses-forget-log1p", SLOPES,
        "tl.where(one == 1.0, e, ",
        "tl.where(one == 1.0, 0.0, ",
        gpu("gates and converged and fp32"),
    ),
    Mutant(
        "weights-forgotten", SLOPES,
        "omega_m = tl.load(weights.at + safe_m)",
        "omega_m = none + 1.0",
        OPTIONS,
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
        "soft, slope = pull * tl.exp(_lse(sums) - _finite(lse)), -pull",
        "soft, slope = pull * tl.exp(_lse(sums) - _finite(lse)), pull",
        OPTIONS,
    ),
    Mutant(
        "union-keeps-the-first-top", SLOPES,
        "tl.maximum(a[0], b[0])\n    floor",
        "a[0]\n    floor",
        FAR_APART,
    ),
    Mutant(
        "union-keeps-the-first-hardest", SLOPES,
        "tl.maximum(a[5], b[5])",
        "a[5]",
        gpu("hardest"),
    ),
    Mutant(
        "hardest-by-its-logit", SLOPES,
        "(of_rows if QP else of_qq)[5]",
        "(of_rows if QP else of_qq)[0]",
        gpu("hardest"),
    ),
    Mutant(
        "positive-listed-once", SLOPES,
        "COPIES: tl.constexpr = 2 if",
        "COPIES: tl.constexpr = 1 if",
        OPTIONS,
    ),
    Mutant(
        "rows-with-fewer-pairs-count", SLOPES,
        "omega_k = tl.where(live_m, omega_m * share_m, 0.0)",
        "omega_k = omega_m * share_m",
        OPTIONS,
    ),
    Mutant(
        "last-pairs-alone-pull-columns", SLOPES,
        "soft_n += tl.sum(tl.where(hit_pn",
        "soft_n = tl.sum(tl.where(hit_pn",
        gpu("columns_have_more_pairs"),
    ),
    Mutant(
        "rows-past-the-end-are-left", SLOPES,
        "tl.store(found.loss_LM + level * M + offs_m, weight * loss_m, mask=mask_m)",
        "tl.store(found.loss_LM + level * M + offs_m, weight * loss_m)",
        MEMORY,
    ),
    Mutant(
        "factor-meets-the-norm-first", SLOPES,
        "inverse_m = tl.load(stored.inverse_q + safe_m)",
        "inverse_m, factor_m = none + 1.0, factor_m * tl.load(stored.inverse_q + safe_m)",
        gpu("huge_norm"),
    ),
    # kernels/rankpo_kernels/gpu/rows.py
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
        gpu("overflow"),
    ),
    Mutant(
        "no-tangent", ROWS,
        "g -= along_r[:, None] * unit",
        "g -= 0.0 * unit",
        OPTIONS,
    ),
    # kernels/rankpo_kernels/gpu/products.py
    Mutant(
        "finished-without-tangent", PRODUCTS,
        "acc_rd -= (along_r * inverse_r)",
        "acc_rd -= (0.0 * inverse_r)",
        gpu("in_few_launches"),
    ),
    Mutant(
        "totals-forget-the-weight", PRODUCTS,
        "total *= totals.weights.value",
        "total *= 1.0",
        gpu("one_weight"),
    ),
    Mutant(
        "one-program-too-few", PRODUCTS,
        "(rows * triton.cdiv(D, PRODUCT.BLOCK_N) + 1,)",
        "(rows * triton.cdiv(D, PRODUCT.BLOCK_N),)",
        gpu("one_weight"),
    ),
    Mutant(
        "filtered-product-overwrites", PRODUCTS,
        "    if ADD:\n",
        "    if ADD and False:\n",
        FILTER,
    ),
    Mutant(
        "own-negatives-without-tangent", PRODUCTS,
        "- tl.load(gs_LH + level * H + h) * n_unit",
        "- 0.0 * n_unit",
        OPTIONS,
    ),
    Mutant(
        "own-gradients-side-by-side", PRODUCTS,
        "d_own + h * stride_do",
        "d_own + h * D",
        OPTIONS,
    ),
    # kernels/rankpo_kernels/gpu/info_nce.py
    Mutant(
        "top-forgotten", LAUNCHER,
        "(ready, p.dims, top, p.scale)",
        "(ready, p.dims, torch.ones_like(top) if relative else None, p.scale)",
        FAR_APART,
    ),
    Mutant(
        "chunks-overwrite-dp", LAUNCHER,
        "product(out, left_RD, dp_ND, not first,",
        "product(out, left_RD, dp_ND, False,",
        SMALL_CHUNKS,
    ),
    Mutant(
        "pairs-of-the-first-chunk", LAUNCHER,
        "value_LK, part.start, R, K",
        "value_LK, 0, R, K",
        OPTIONS,
    ),
    Mutant(
        "past-the-last-prefix", LAUNCHER,
        "torch.zeros_like if p.dims[-1] < D else torch.empty_like",
        "torch.empty_like",
        OPTIONS,
    ),
    Mutant(
        "chunks-need-all-memory", LAUNCHER,
        "out_RN = p.new(R0, padded(N)",
        "out_RN = p.new(M, padded(N)",
        gpu("never_stored"),
    ),
    Mutant(
        "host-waits", BLOCKS,
        "largest = factor_R.abs().amax().clamp(min=LEAST)",
        "largest = factor_R.abs().amax().clamp(min=LEAST).item()",
        gpu("does_not_wait"),
    ),
    Mutant(
        "unasked-gradient", LAUNCHER,
        "if own_HD is not None and need_own:",
        "if own_HD is not None:",
        gpu("without_the_others"),
    ),
    Mutant(
        "workspace-exceeded", BLOCKS,
        "// row_bytes) < 1:",
        "// row_bytes) < 0:",
        gpu("refused"),
    ),
    Mutant(
        "few-launches-with-a-sum", LAUNCHER,
        "needs[:2])\n    tiles",
        "needs[:2]) and False\n    tiles",
        gpu("launches"),
    ),
    Mutant(
        "integers-have-gaps", LAUNCHER,
        "else x.contiguous() for x in relations",
        "else x for x in relations",
        gpu("have_gaps"),
    ),
    Mutant(
        "weights-have-gaps", LAUNCHER,
        "expand(len(q_MD)).contiguous() if on_device",
        "expand(len(q_MD)) if on_device",
        gpu("have_gaps"),
    ),
    Mutant(
        "zero-passages", BLOCKS,
        "inverse_LN.amax().clamp(min=LEAST)",
        "inverse_LN.amax()",
        gpu("all_be_zero"),
    ),
    Mutant(
        "negative-factors", BLOCKS,
        "factor_R.abs().amax()",
        "factor_R.amax()",
        gpu("are_odd"),
    ),
    Mutant(
        "dead-tiles-are-read", BLOCKS,
        "of_chunk, False, transpose=True, **of_live)",
        "of_chunk, False, transpose=True)",
        FILTER,
    ),
    # kernels/rankpo_kernels/objective.py
    Mutant(
        "merge-without-other-mean", OBJECTIVE,
        "+ (b.lse - finite).exp() * b.mean",
        "+ b.mean",
        CPU,
    ),
    Mutant(
        "merge-keeps-the-first-top", OBJECTIVE,
        "torch.maximum(a.top, b.top)",
        "a.top",
        of("tests/kernels/test_chunked.py", "hardest"),
    ),
    Mutant(
        "smoothing-without-pull", OBJECTIVE,
        "slope_P += omega_P * smooth_P * count_P",
        "pass",
        CPU,
    ),
    Mutant(
        "known-twice", OBJECTIVE,
        "torch.searchsorted(text_of_run, text_N, right=True)",
        "torch.searchsorted(text_of_run, text_N)",
        CPU,
    ),
    # kernels/rankpo_kernels/chunked.py
    Mutant(
        "columns-do-not-fade", CHUNKED,
        "self.e_C.mul_(fade_C)",
        "self.e_C",
        CPU,
    ),
    Mutant(
        "kept-logits-are-scaled-again", CHUNKED,
        "logits=number in kept)",
        "logits=False)",
        CPU,
    ),
    Mutant(
        "a-chunk-is-kept-for-all", CHUNKED,
        "block.chunks(at_once=keep)",
        "block.chunks()",
        of("tests/kernels/test_chunked.py", "small_scores_once"),
    ),
    Mutant(
        "cpu-curated-are-not-exempt", CHUNKED,
        "masked_rC = masked_rC & ~mine_rC",
        "pass",
        CPU,
    ),
    Mutant(
        "cpu-columns-with-hardness", CHUNKED,
        "columns[level].add(x_rC, *want)",
        "columns[level].add(self.hardened(x_rC, slab), *want)",
        CPU,
    ),
    Mutant(
        "cpu-chunks-overwrite-dp", CHUNKED,
        "beta=0 if rows.start == 0 else 1",
        "beta=0",
        CPU_CHUNKS,
    ),
    Mutant(
        "cpu-labels-have-gaps", CHUNKED,
        "relations.labels_M.contiguous()",
        "relations.labels_M",
        ops("have_gaps"),
    ),
    Mutant(
        "cpu-filter-keeps-negative-rows", CHUNKED,
        "pull_R.abs() *",
        "pull_R *",
        ops("are_odd"),
    ),
    # kernels/native/row_math.h, norms.py
    Mutant(
        "native-norms-in-one-running-sum", "kernels/native/row_math.h",
        "kBlock = 256", "kBlock = 1 << 20", LONG_ROWS,
    ),
    Mutant(
        "norms-in-one-running-sum", KERNELS + "norms.py",
        ".square_().sum(1).sqrt_()", ".norm(dim=1)", LONG_ROWS,
    ),
    # kernels/native/rows.cpp
    Mutant(
        "native-keeps-known-pairs", NATIVE,
        "s[in.known_columns[k]] = kMasked",
        "(void)k",
        CPU,
    ),
    Mutant(
        "native-moment-with-hardness", NATIVE,
        "moment += e * (s[j] - hardest)",
        "moment += e * (hard(s[j], j) - hardest)",
        CPU,
    ),
    # rankpo_fast/ops/common.py and batch.py
    Mutant(
        "grad-output-forgotten", COMMON,
        "times(grad, by.to(grad.device)).to(dtype)",
        "grad.to(dtype)",
        OPS_GRADIENTS,
    ),
    Mutant(
        "upstream-rows-forgotten", COMMON,
        "ctx.settings, grad_loss_M.contiguous(), needs",
        "ctx.settings, torch.ones_like(grad_loss_M), needs",
        OPS_GRADIENTS,
    ),
    Mutant(
        "guides-of-two-dtypes", BATCH,
        "x.detach().to(dtype) for x in guide",
        "x.detach() for x in guide",
        ops("guide"),
    ),
    Mutant(
        "guide-loses-fp64", BATCH,
        "dtype = compute_dtype(embeddings)",
        "dtype = torch.float32",
        ops("guide"),
    ),
    Mutant(
        "own-offsets-start-anywhere", BATCH,
        "relations.own_offsets[0] == 0",
        "relations.own_offsets[0] >= 0",
        ops("device_asserts"),
    ),
    Mutant(
        "workspace-of-a-fraction", BATCH,
        "not isinstance(self.workspace_bytes, int)",
        "False",
        ops("bad_arguments"),
    ),
    # several ranks
    Mutant(
        "ranks-labels-of-own-passages", ACROSS,
        "column + own.start",
        "column",
        RANKS,
    ),
    Mutant(
        "ranks-repelled-by-others-apart", ACROSS,
        "own_N.clamp(max=-1)",
        "own_N.clamp(-1, -1)",
        RANKS,
    ),
    Mutant(
        "ranks-keys-of-others-forgotten", ACROSS,
        "== class_K, column_K, labels_M[0])",
        "!= class_K, column_K, labels_M[0])",
        RANKS,
    ),
    Mutant(
        "ranks-gradients-of-others-forgotten", ACROSS,
        "return parts.sum(0, dtype=compute_dtype(grad.dtype)).to(grad.dtype)",
        "return parts[group.rank()]",
        RANKS,
    ),
    Mutant(
        "ranks-mean-of-own-queries", ACROSS,
        "group.size() / ranks.weight if",
        "1 / ranks.weight if",
        RANKS,
    ),
    Mutant(
        "ranks-refusal-kept-quiet", ACROSS,
        "        refusal = error\n",
        "        raise error\n",
        of("tests/ops/test_ranks.py", "wrong and 2-"),
    ),
    Mutant(
        "ranks-columns-of-own-queries", CHUNKED,
        "whole = of_all_ranks(whole, settings)",
        "pass",
        RANKS,
    ),
    Mutant(
        "ranks-columns-of-own-queries-gpu", LAUNCHER,
        "sums = sums | {PQ: _of_all_ranks(p, sums[PQ])}",
        "pass",
        of("tests/ops/test_ranks.py", "triton and 2"),
    ),
    Mutant(
        "ranks-slopes-of-own-pairs", CHUNKED,
        "zip(lines, add_ranks_(of_own, settings), strict=True)",
        "zip(lines, of_own, strict=True)",
        RANKS,
    ),
    Mutant(
        "ranks-slopes-of-own-pairs-gpu", LAUNCHER,
        "            add_ranks_(x, settings)",
        "            pass",
        of("tests/ops/test_ranks.py", "triton and 2"),
    ),
    Mutant(
        "ranks-queries-of-own-as-columns", CHUNKED,
        "of = (queries, all_queries, None, each_M, _lists(keys, of_all.labels_M), None)",
        "of = (queries, queries, None, each_M, _lists(keys, relations.labels_M), None)",
        RANKS,
    ),
    Mutant(
        "ring-gradients-left-behind", RING,
        "own if dp is None else own.add_(dp)",
        "own",
        RANKS_RING,
    ),
    # kernels/rankpo_kernels/gpu/pointwise.py
    Mutant(
        "pairs-past-the-end", PAIRS,
        "open_mn = open_mn & write_mn",
        "pass",
        PAIR_OPTIONS,
    ),
    Mutant(
        "pairs-without-reference", PAIRS,
        "over_mn -= r_mn",
        "over_mn -= 0.0 * r_mn",
        PAIR_OPTIONS,
    ),
    Mutant(
        "pairs-without-the-label", PAIRS,
        "element_r = -slope_r",
        "element_r = 0.0 * slope_r",
        PAIR_OPTIONS,
    ),
    Mutant(
        "siglip-without-its-positive", PAIRS,
        "loss_r += softplus(z_r)",
        "loss_r += 0.0",
        PAIR_OPTIONS,
    ),
    Mutant(
        "hinge-swallows-nan", PAIRS,
        "tl.where(x_mn <= -1.0, 0.0, 1.0 + x_mn)",
        "tl.where(x_mn > -1.0, 1.0 + x_mn, 0.0)",
        of("tests/ops/test_in_batch.py", "nan_in and triton"),
    ),
    Mutant(
        "pairs-of-fp16-underflow", PAIRS,
        "1.0 / tl.where(size_r < 1e-30, 1e-30, size_r) * SUM",
        "1.0 + 0.0 * size_r",
        of("tests/kernels/test_gpu_pointwise.py", "small_gradients"),
    ),
    Mutant(
        "pair-chunks-overwrite-dp", PAIRS,
        "product(out, q_RD, dp_ND, not first,",
        "product(out, q_RD, dp_ND, False,",
        PAIR_OPTIONS,
    ),
    Mutant(
        "no-last-row-of-pairs-stands-in", PAIRS,
        "safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)",
        "safe_m, safe_n = offs_m, offs_n",
        PAIR_MEMORY,
    ),
    Mutant(
        "later-parts-forgotten", PAIRS,
        "loss_pr += tl.load(sums.loss",
        "loss_pr = tl.load(sums.loss",
        of("tests/kernels/test_gpu_pointwise.py", "small-chunks"),
    ),
    # kernels/rankpo_kernels/pointwise.py, objective.py, kernels/native/pointwise.cpp
    Mutant(
        "cpu-pair-chunks-overwrite-dp", PAIR_CHUNKS,
        "beta=0 if rows.start == 0 else 1",
        "beta=0",
        PAIR_OPTIONS_CPU,
    ),
    Mutant(
        "others-are-counted-by-text", OBJECTIVE,
        "scatter_add(0, stop_N, -ones_N)",
        "scatter_add(0, stop_N, -0 * ones_N)",
        of("tests/ops/test_in_batch.py", "counted"),
    ),
    Mutant(
        "native-keeps-known-passages", PAIR_NATIVE,
        "s[in.known_columns[k]] = kMasked",
        "(void)k",
        PAIR_OPTIONS_CPU,
    ),
    # rankpo_fast/ops/in_batch.py
    Mutant(
        "gradients-of-the-sum", PAIR_OPS,
        "dtype) * share",
        "dtype) * 1.0",
        PAIR_OPTIONS_CPU,
    ),
    Mutant(
        "ranks-pairs-weighted-twice", PAIR_OPS,
        'replace(options, reduction="sum") if several else options',
        "options",
        RANKS_PAIRS,
    ),
    Mutant(
        "ranks-pairs-gradients-forgotten", PAIR_OPS,
        "dp = ranks.sum_rows(dp, of_all.passages, of_all.group)",
        "dp = dp[of_all.own(of_all.passages)]",
        RANKS_PAIRS,
    ),
    Mutant(
        "ranks-pairs-of-two-losses", PAIR_OPS,
        '{"process_group": None} | terms',
        '{"process_group": None}',
        RANKS_PAIRS,
    ),
    # kernels/rankpo_kernels/gpu/pairs.py
    Mutant(
        "squares-do-not-fade", GPU_PAIRS,
        "square_k = square_k * fade_k * fade_k",
        "square_k = square_k",
        RANKED,
    ),
    Mutant(
        "padding-is-compared", GPU_PAIRS,
        "live_k = live_k & (grade_k == grade_k)",
        "pass",
        RANKED,
    ),
    Mutant(
        "losers-are-not-pushed", GPU_PAIRS,
        "(tl.sum(slope, 1) - tl.sum(slope, 0)) / pairs",
        "tl.sum(slope, 1) / pairs",
        RANKED,
    ),
    Mutant(
        "weights-of-rows-forgotten", GPU_PAIRS,
        "slope_k = slope_k * tl.load(weights_ptr + row)",
        "pass",
        RANKED,
    ),
    Mutant(
        "last-dims-unmasked", GPU_PAIRS,
        "mask_d = offs_d < D\n    q =",
        "mask_d = offs_d < D + 1\n    q =",
        RANKED,
    ),
    # kernels/native/pairs.cpp
    Mutant(
        "native-radial-part-kept", NATIVE_PAIRS,
        "sum[d] = -radial * widen(x[d])",
        "sum[d] = 0",
        PAIR_LOSS,
    ),
    Mutant(
        "native-half-infinity-is-a-number", NATIVE_PAIRS,
        "magnitude >= 0x0f800000u",
        "magnitude > 0x7f800000u",
        of("tests/ops/test_rankpo.py", "every_number"),
    ),
    Mutant(
        "native-ties-count", NATIVE_PAIRS,
        "!(grades[a] > grades[b]) : a >= b",
        "!(grades[a] >= grades[b]) : a >= b",
        GROUPS,
    ),
    Mutant(
        "native-blocks-overrun", NATIVE_PAIRS,
        "in.dims - start < kBlock ? in.dims - start : kBlock;\n        const T* x",
        "kBlock;\n        const T* x",
        SANITIZER,
    ),
    # rankpo_fast/ops/rankpo.py
    Mutant(
        "upstream-pairs-forgotten", "rankpo_fast/ops/rankpo.py",
        "ctx.rule, loss_grads_B.contiguous(), needs",
        "ctx.rule, torch.ones_like(loss_grads_B), needs",
        PAIR_LOSS,
    ),
    # rankpo_fast/ops/common.py
    Mutant(
        "any-upstream-gradient-is-one", COMMON,
        'by.device.type == "cpu" and by == 1',
        'by.device.type == "cpu"',
        PAIR_LOSS,
    ),
    # the training engine
    Mutant(
        "dropout-is-drawn-anew", "rankpo_fast/train/cache.py",
        "        set_random_states(states, device)\n        yield",
        "        yield",
        of("tests/train/test_cache.py", "no_bit and dropout"),
    ),
    Mutant(
        "objectives-weigh-alike", "rankpo_fast/train/step.py",
        "* (work.share * work.of_loss)",
        "* work.of_loss",
        of("tests/train/test_replay.py", "weighted_sum"),
    ),
    Mutant(
        "nan-stops-one-step-alone", "rankpo_fast/train/optim.py",
        'getattr(optimizer, "found_inf", bad.float())',
        "bad.float()",
        of("tests/train/test_loop.py", "not_finite"),
    ),
    Mutant(
        "small-gradients-are-scaled-up", "rankpo_fast/train/optim.py",
        ".clamp(min=1.0)",
        "",
        of("tests/train/test_loop.py", "scaled_down"),
    ),
    Mutant(
        "window-wider-by-one", "rankpo_fast/model/attention.py",
        "    return asked.window - 1, 0 if",
        "    return asked.window, 0 if",
        of("tests/model/test_attention.py", "alone and fp64"),
    ),
    Mutant(
        "packs-take-one-token-more", "rankpo_fast/data/packing.py",
        "(length, -1)",
        "(length - 1, -1)",
        ("tests/data/test_packing.py",),
    ),
    # integrations
    Mutant(
        "rounding-finds-duplicates", OBJECTIVE,
        "- reach + rounding",
        "- reach",
        ops("as_similar_as"),
    ),
    Mutant(
        "scale-has-its-gradient-too-soon", ST + "ranking.py",
        "before, self.scale.grad = self.scale.grad, None",
        "before = self.scale.grad",
        of("tests/integrations/test_sentence_transformers_losses.py", "learnt"),
    ),
    Mutant(
        "ranks-add-up-the-scale", ST + "ranking.py",
        "grad / dist.get_world_size()",
        "grad",
        of("tests/integrations/test_sentence_transformers_ranks.py", "learnt"),
    ),
    Mutant(
        "cut-for-good", ST + "matryoshka.py",
        "            del self.loss.prefixes",
        "            pass",
        of("tests/integrations/test_sentence_transformers_losses.py", "two_matryoshkas"),
    ),
    Mutant(
        "ids-of-padding", ST + "duplicates.py",
        ") * mask).sum(1)",
        ")).sum(1)",
        of("tests/integrations/test_sentence_transformers.py", "one_id"),
    ),
    Mutant(
        "the-guide-writes-into-the-model", ST + "guided.py",
        "[dict(column) for column in features]",
        "features",
        of("tests/integrations/test_sentence_transformers_losses.py", "their_matryoshka"),
    ),
    *BENCH,
]  # fmt: skip


def copied(to: Path) -> Path:
    """The tree as it stands, the native library included, without what is not source."""
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info",
        "build", "dist", "outputs",
    )  # fmt: skip
    return Path(shutil.copytree(ROOT, to / "tree", ignore=skipped))


def mutated(tree: Path, mutant: Mutant) -> str:
    """The text of its file with the replacement."""
    text = (tree / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {count} times in {mutant.file}: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    """Python in the copy, which PYTHONPATH puts before the editable install of this tree."""
    paths = os.pathsep.join([str(tree / "kernels"), str(tree)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def first_failure(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The test that failed first, None if all passed."""
    options = ["-x", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    try:
        result = run(tree, "-m", "pytest", *options, *tests)
    except subprocess.TimeoutExpired as expired:
        return f"no end within {expired.timeout} s"
    if result.returncode == 0:
        return None
    # a test, and not a file that cannot be imported: that would prove nothing
    if found := re.search(r"^(?:FAILED|ERROR) (.*?::.*?)(?: - |$)", result.stdout, re.MULTILINE):
        return found[1]
    raise RuntimeError(f"pytest {' '.join(tests)}:\n{result.stdout}{result.stderr}")


def caught_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        (tree / mutant.file).write_text(mutated(tree, mutant))
        if mutant.file.startswith("kernels/native/"):
            run(tree, "setup.py", "--quiet", "build_ext", "--inplace").check_returncode()
        return first_failure(tree, mutant.tests)


def check_whole(suites: set[tuple[str, ...]]) -> None:
    """A mutant that a red test catches, or one that is not imported, would prove nothing."""
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        code = "import bench as a, rankpo_fast as b, rankpo_kernels as c\n"
        code += "print(a.__file__, b.__file__, c.__file__)"
        for file in run(tree, "-c", code).stdout.split():
            if not Path(file).resolve().is_relative_to(tree.resolve()):
                raise SystemExit(f"{file} is imported, and not its copy in {tree}")
        for tests in suites:
            if (failure := first_failure(tree, tests)) is not None:
                raise SystemExit(f"fails without a mutant: {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="default: all")
    names = parser.parse_args().names
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]

    for mutant in chosen:
        mutated(ROOT, mutant)  # a row that has aged is told of before the long wait
    width = max(len(mutant.name) for mutant in chosen)
    survived = 0
    check_whole({mutant.tests for mutant in chosen})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, caught in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += caught is None
            print(f"{mutant.name:{width}}  {caught or 'SURVIVED'}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
