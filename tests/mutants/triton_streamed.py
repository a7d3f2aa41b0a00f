"""InfoNCE's kernels for Hopper, who takes them, and how many rows a chunk has."""

from mutants.mutant import Mutant
from mutants.suites import STREAMED, of

KERNELS = "kernels/rankpo_kernels/triton/streamed.py"
PASSES = "kernels/rankpo_kernels/triton/passes.py"
TILES = "kernels/rankpo_kernels/triton/tiles.py"
WAVES = "kernels/rankpo_kernels/triton/waves.py"

GATES = of(STREAMED, "pass_the_gates")
BOTH_DIRECTIONS = of(STREAMED, "pass_the_gates and both-directions")
REFUSED = of(STREAMED, "are_refused")
TABLE = of(STREAMED, "table")
FORM = of(STREAMED, "are_those_of_the_form")
CHUNKS = ("tests/kernels/test_waves.py",)
# of both kernels; what stands before tells them apart
WALK = "    for tile in tl.range(\n        tl.program_id(0), tiles_m * tiles_n, "

MUTANTS = [
    Mutant(
        "streamed-label-is-a-negative", KERNELS,
        "open_mn = label_m[:, None] != offs_n[None, :]",
        "open_mn = label_m[:, None] >= 0 * offs_n[None, :]",
        GATES,
    ),
    Mutant(
        "streamed-label-keeps-its-softmax", KERNELS,
        "g_mn = tl.where(label_m[:, None] == offs_n[None, :], slope_m[:, None], g_mn)",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-columns-past-the-end", KERNELS,
        "open_mn = open_mn & mask_n[None, :]",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-columns-never-end", KERNELS,
        "EDGE=N % tiles.BLOCK_N != 0",
        "EDGE=False",
        GATES,
    ),
    Mutant(
        "streamed-exponentials-without-norms", KERNELS,
        "e_mn *= (by_n * (1.0 / tl.load(inverse_top)))[None, :]",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-exponentials-beside-the-top", KERNELS,
        "e_mn *= beside_positive(top_m, positive_R, scale, safe_m, mask_m)[:, None]",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-gradients-without-column-norms", KERNELS,
        "g_mn *= by_n[None, :]",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-gradients-without-row-norms", KERNELS,
        "(tl.load(row_slopes.soft + safe_m) * by_m)",
        "tl.load(row_slopes.soft + safe_m)",
        GATES,
    ),
    Mutant(
        "streamed-labels-without-row-norms", KERNELS,
        "slope_m *= by_m",
        "pass",
        GATES,
    ),
    Mutant(
        "streamed-both-directions-without-row-norms", KERNELS,
        "g_mn *= by_m[:, None]",
        "pass",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-gradients-without-columns", KERNELS,
        "g_mn += tl.exp2(t_mn + over_n[None, :])",
        "pass",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-rows-without-sums", KERNELS,
        "tl.exp2(t_mn - lse_m[:, None])",
        "tl.exp2(t_mn)",
        GATES,
    ),
    Mutant(
        "streamed-both-directions-without-rows", KERNELS,
        "tl.exp2(t_mn + tl.load(row_over + safe_m)[:, None])",
        "tl.zeros_like(t_mn)",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-columns-of-any-sign", KERNELS,
        "lowest = torch.minimum(row_slopes.soft[0].amin(), column_slopes.soft[0].amin())",
        "lowest = row_slopes.soft[0].amax().abs()",
        of(STREAMED, "may_be_negative"),
    ),
    Mutant(
        "streamed-columns-without-pull", KERNELS,
        "torch.sub(slopes.soft[0].log2(), lse, alpha=LOG2E.value)",
        "lse * -LOG2E.value",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-sums-of-some-tiles", KERNELS,
        f"stored_stride, stored_stride, BLOCK_M, BLOCK_N)\n{WALK}tl.num_programs(0),",
        f"stored_stride, stored_stride, BLOCK_M, BLOCK_N)\n{WALK}tl.num_programs(0) + 1,",
        GATES,
    ),
    Mutant(
        "streamed-gradients-of-all-tiles-by-each", KERNELS,
        f"out_stride, out_stride, BLOCK_M, BLOCK_N)\n{WALK}tl.num_programs(0),",
        f"out_stride, out_stride, BLOCK_M, BLOCK_N)\n{WALK}1,",
        of(STREAMED, "lies_outside"),
    ),
    Mutant(
        "streamed-misaligned", KERNELS,
        "x.data_ptr() % 16 == 0",
        "x.data_ptr() >= 0",
        REFUSED,
    ),
    Mutant(
        "streamed-with-misaligned-rows", KERNELS,
        "x.stride(0) * x.element_size() % 16 == 0",
        "x.stride(0) >= 0",
        REFUSED,
    ),
    Mutant(
        "streamed-with-gaps", KERNELS,
        "x.stride(1) == 1",
        "x.stride(1) >= 1",
        REFUSED,
    ),
    Mutant(
        "callers-allocator-is-replaced", KERNELS,
        "contextvars.copy_context().run(launch)",
        "launch()",
        of(STREAMED, "allocator"),
    ),
    Mutant(
        "streamed-columns-end-and-have-slopes", PASSES,
        "whole = len(block.b) % p.streamed.BLOCK_N == 0",
        "whole = True",
        FORM,
    ),
    Mutant(
        "streamed-columns-end-and-are-forgotten", PASSES,
        "and (column_slopes is None or folded is not None)",
        "",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-columns-need-sums", PASSES,
        "if p.streamed is not None and row_parts is not None and column_parts is None:",
        "if p.streamed is not None and row_parts is not None:",
        BOTH_DIRECTIONS,
    ),
    Mutant(
        "streamed-elsewhere", TILES,
        "_architecture() != 90",
        "_architecture() < 90",
        TABLE,
    ),
    Mutant(
        "streamed-in-all-directions", TILES,
        "one_block = {*settings.directions} <= {QP, PQ}",
        "one_block = True",
        TABLE,
    ),
    Mutant(
        "streamed-with-ids", TILES,
        "if simple and relations.labels_alone else",
        "if simple else",
        TABLE,
    ),
    Mutant(
        "chunks-hold-more-than-most", WAVES,
        "return _best_rows(M, N, D, most // block, block, sms)",
        "return _best_rows(M, N, D, -(-most // block), block, sms)",
        CHUNKS,
    ),
    Mutant(
        "equal-chunks-hold-more-than-most", WAVES,
        "return min(-(-each // block) * block, most // block * block) if",
        "return -(-each // block) * block if",
        CHUNKS,
    ),
    Mutant(
        "chunks-end-within-a-block", WAVES,
        "-(-M // chunks // block) * block for",
        "-(-M // chunks) for",
        CHUNKS,
    ),
    Mutant(
        "two-chunks-where-one-fits", WAVES,
        "if most >= M:",
        "if most > M:",
        CHUNKS,
    ),
    Mutant(
        "waves-are-never-filled", WAVES,
        "            sizes.add(waves",
        "            continue\n            sizes.add(waves",
        CHUNKS,
    ),
    Mutant(
        "last-waves-are-full", WAVES,
        "return -(-tiles // sms)",
        "return tiles / sms",
        CHUNKS,
    ),
    Mutant(
        "ragged-chunks-are-free", WAVES,
        "(_chunk_clocks(rest, N, D, block, sms) if rest else 0)",
        "0",
        CHUNKS,
    ),
    Mutant(
        "launches-are-free", WAVES,
        "scores + dq + dp + LAUNCHES",
        "scores + dq + dp",
        CHUNKS,
    ),
    Mutant(
        "products-by-the-usual-tile", WAVES,
        "return (usual + min(usual, *others)) / 2",
        "return usual",
        CHUNKS,
    ),
]  # fmt: skip
