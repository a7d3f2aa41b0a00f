"""RankPO over pairs and groups: Triton, native rows, op."""

from mutants.mutant import Mutant
from mutants.suites import PAIRS, of, rankpo

TRITON = "kernels/rankpo_kernels/triton/rankpo.py"
NATIVE = "kernels/native/rankpo.cpp"
OP = "rankpo_fast/ops/rankpo.py"

GROUPS = of("tests/ops/test_rankpo_group.py", "gates or padding or two_passages")
KERNEL = of("tests/kernels/test_triton_rankpo.py", "gates or norms or nan or padding or outside")
SANITIZER = of("tests/kernels/test_sanitizer.py", "strays")

MUTANTS = [
    Mutant(
        "squares-do-not-fade", TRITON,
        "square_k = square_k * fade_k * fade_k",
        "square_k = square_k",
        KERNEL,
    ),
    Mutant(
        "padding-is-compared", TRITON,
        "live_k = live_k & (grade_k == grade_k)",
        "pass",
        KERNEL,
    ),
    Mutant(
        "losers-are-not-pushed", TRITON,
        "(tl.sum(slope, 1) - tl.sum(slope, 0)) / pairs",
        "tl.sum(slope, 1) / pairs",
        KERNEL,
    ),
    Mutant(
        "weights-of-rows-forgotten", TRITON,
        "slope_k = slope_k * tl.load(weights_ptr + row)",
        "pass",
        KERNEL,
    ),
    Mutant(
        "last-dims-unmasked", TRITON,
        "mask_d = offs_d < D\n    q =",
        "mask_d = offs_d < D + 1\n    q =",
        KERNEL,
    ),
    Mutant(
        "native-radial-part-kept", NATIVE,
        "sum[d] = -radial * widen(x[d])",
        "sum[d] = 0",
        PAIRS,
    ),
    Mutant(
        "native-half-infinity-is-a-number", NATIVE,
        "magnitude >= 0x0f800000u",
        "magnitude > 0x7f800000u",
        rankpo("every_number"),
    ),
    Mutant(
        "native-ties-count", NATIVE,
        "!(grades[a] > grades[b]) : a >= b",
        "!(grades[a] >= grades[b]) : a >= b",
        GROUPS,
    ),
    Mutant(
        "native-blocks-overrun", NATIVE,
        "in.dims - start < kBlock ? in.dims - start : kBlock;\n        const T* x",
        "kBlock;\n        const T* x",
        SANITIZER,
    ),
    Mutant(
        "upstream-pairs-forgotten", OP,
        "ctx.settings, loss_grads_B.contiguous(), needs",
        "ctx.settings, torch.ones_like(loss_grads_B), needs",
        PAIRS,
    ),
]  # fmt: skip
