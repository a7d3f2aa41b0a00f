"""InfoNCE in chunks of plain torch, and its native rows."""

from mutants.mutant import Mutant
from mutants.suites import CHUNKED_OPTIONS, RANKS_OPTIONS, chunked, info_nce, of

BLOCKS = "kernels/rankpo_kernels/chunked/blocks.py"
GENERAL = "kernels/rankpo_kernels/chunked/info_nce_general.py"
OBJECTIVE = "kernels/rankpo_kernels/objective.py"
PLAIN = "kernels/rankpo_kernels/chunked/info_nce_plain.py"
KEPT = "kernels/rankpo_kernels/chunked/info_nce_both.py"
ROW_PASS = "kernels/rankpo_kernels/chunked/row_pass.py"
NORMS = "kernels/rankpo_kernels/chunked/norms.py"
NATIVE = "kernels/native/info_nce.cpp"
ROW_MATH = "kernels/native/row_math.h"

SMALL_CHUNKS = info_nce("gates and nothing-round and float32 and native")
FORMS_BOTH, FORMS = (f"tests/kernels/test_chunked_{name}.py" for name in ("both", "forms"))
BOTH = of(FORMS_BOTH, "options or gates")
OWN = of(FORMS, "test_own_negatives")
PREFIXES = of(FORMS, "test_prefixes")
LONG_ROWS = of("tests/kernels/test_native.py", "long_rows")

MUTANTS = [
    Mutant(
        "columns-do-not-fade", BLOCKS,
        "self.e_C.mul_(fade_C)",
        "self.e_C",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "kept-logits-are-scaled-again", GENERAL,
        "logits=number in kept)",
        "logits=False)",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "a-chunk-is-kept-for-all", GENERAL,
        "block.chunks(at_once=keep)",
        "block.chunks()",
        chunked("small_scores_once"),
    ),
    Mutant(
        "cpu-curated-are-not-exempt", BLOCKS,
        "masked_rC = masked_rC & ~mine_rC",
        "pass",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "cpu-columns-with-hardness", BLOCKS,
        "columns[level].add(x_rC, *want)",
        "columns[level].add(self.hardened(x_rC, slab), *want)",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "cpu-chunks-overwrite-dp", PLAIN,
        "beta=0 if rows.start == 0 else 1",
        "beta=0",
        SMALL_CHUNKS,
    ),
    Mutant(
        "cpu-labels-have-gaps", ROW_PASS,
        "relations.labels_M.contiguous()",
        "relations.labels_M",
        info_nce("have_gaps"),
    ),
    Mutant(
        "filter-drops-negative-rows", OBJECTIVE,
        "torch.expm1(-loss_R.double())).abs()",
        "-torch.expm1(-loss_R.double()))",
        info_nce("are_odd"),
    ),
    Mutant(
        "filter-takes-more", OBJECTIVE,
        "> share * STEPS",
        "> 1.1 * share * STEPS",
        of("tests/kernels/test_objective.py", "share"),
    ),
    Mutant(
        "filter-takes-nan", OBJECTIVE,
        "torch.where(share_R >= 0, share_R, 1.0)",
        "torch.where(share_R >= 0, share_R, 0.0)",
        of("tests/kernels/test_objective.py", "nan"),
    ),
    Mutant(
        "filter-forgets-passages-of-others", PLAIN,
        "unit_RD[kept_K]",
        "unit_RD[: len(kept_K)]",
        info_nce("filter"),
    ),
    Mutant(
        "native-norms-in-one-running-sum", ROW_MATH,
        "kBlock = 256", "kBlock = 1 << 20", LONG_ROWS,
    ),
    Mutant(
        "norms-in-one-running-sum", NORMS,
        ".square_().sum(1).sqrt_()", ".norm(dim=1)", LONG_ROWS,
    ),
    Mutant(
        "native-keeps-known-pairs", NATIVE,
        "s[in.known_columns[k]] = kMasked",
        "(void)k",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "native-moment-with-hardness", NATIVE,
        "(s[j] > kMasked ? s[j] : kMasked) - hardest",
        "hard(s[j], j) - hardest",
        CHUNKED_OPTIONS,
    ),
    Mutant(
        "ranks-columns-of-own-queries", GENERAL,
        "whole = of_all_ranks(whole, settings)",
        "pass",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-slopes-of-own-pairs", GENERAL,
        "zip(lines, add_ranks_(own, settings), strict=True)",
        "zip(lines, own, strict=True)",
        RANKS_OPTIONS,
    ),
    Mutant(
        "ranks-queries-of-own-as-columns", GENERAL,
        "column_lists(keys, self.problem.relations.labels_M)\n            blocks.append(block(\n"
        "                queries, self.all_queries,",
        "column_lists(keys, relations.labels_M)\n            blocks.append(block(\n"
        "                queries, queries,",
        RANKS_OPTIONS,
    ),
    Mutant(
        "column-sums-without-row-shares", NATIVE,
        "of_rows[j] += share * e[j]",
        "of_rows[j] += e[j]",
        BOTH,
    ),
    Mutant(
        "column-sums-of-whole-blocks-of-rows", NATIVE,
        "in.rows ? kRows : in.rows - row;",
        "in.rows ? kRows : 0;",
        BOTH,
    ),
    Mutant(
        "both-directions-without-labels", NATIVE,
        "e[in.labels[i]] = in.label_slopes[i];",
        "",
        BOTH,
    ),
    Mutant(
        "columns-out-of-range-are-taken", KEPT,
        "if columns.out_of_range(M)[of.labels_M].any():",
        "if False:",
        of(FORMS_BOTH, "far_below"),
    ),
    Mutant(
        "columns-whose-zeros-may-count-are-taken", KEPT,
        "SMALLEST + ROUNDING + math.log(M)",
        "SMALLEST",
        of(FORMS_BOTH, "far_below"),
    ),
    Mutant(
        "the-last-chunk-is-read-again", KEPT,
        "for number in (len(self.chunks) - 1, *range(len(self.chunks) - 1)):",
        "for number in range(len(self.chunks)):",
        of(FORMS_BOTH, "made_again"),
    ),
    Mutant(
        "gradients-are-taken-for-exponentials", KEPT,
        "self.places[place] != number",
        "self.places[place] is None",
        of(FORMS_BOTH, "options"),
    ),
    Mutant(
        "columns-relative-to-each-chunk", KEPT,
        "self.sums_N *= math.exp(self.top - top)",
        "pass",
        BOTH,
    ),
    Mutant(
        "scale-gradient-past-the-norms", KEPT,
        "vecdot(dq_MD[rows], unit_RD)",
        "vecdot(dq_MD[rows], of.q_MD[rows])",
        BOTH,
    ),
    Mutant(
        "missing-own-negatives-are-negatives", NATIVE,
        ": -INFINITY;",
        ": 0.0f;",
        OWN,
    ),
    Mutant(
        "own-gradients-without-norms", NATIVE,
        "d_unit[d] += slope * (own[d] * inverse);",
        "d_unit[d] += slope * own[d];",
        OWN,
    ),
    Mutant(
        "prefixes-without-longer-ones", NATIVE,
        "s[j] += longer[j]",
        "s[j] += 0 * longer[j]",
        PREFIXES,
    ),
    Mutant(
        "prefixes-without-shorter-ones", NATIVE,
        "s[j] += shorter[j]",
        "s[j] += 0 * shorter[j]",
        PREFIXES,
    ),
    Mutant(
        "prefixes-along-the-gradients-alone", NATIVE,
        "sum[j] += dots[j] * s[j]",
        "sum[j] += s[j]",
        PREFIXES,
    ),
    Mutant(
        "prefixes-with-one-norm", NATIVE,
        "in.row_scale ? in.scale * in.row_scale[i] : in.scale;",
        "in.scale;",
        PREFIXES,
    ),
]  # fmt: skip
