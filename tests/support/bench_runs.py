"""A run by hand, as a GPU would give it: whose peers have limits, win, are missing and break."""

from bench.questions import Result, Row
from bench.results import Run

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.65",
    "torch": "2.13.0+cu130",
    "commit": "0123abc",
    "date": "2026-11-24T10:00:00+00:00",
    "rates": {"gemm": {"bfloat16": 7.4e14}, "copy": 2.9e12},
    "left out": "from siglip on, after 8 minutes",
}


def timed(implementation: str, seconds: float, lower_bound: float, **more) -> Row:
    """A row of seconds, whose percentiles are a tenth away."""
    ratio = seconds / lower_bound
    spread = {} if seconds == lower_bound else {"ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio}
    return Row(implementation, seconds=seconds, low=0.9 * seconds, high=1.1 * seconds, ratio=ratio,
               **{**spread, **more})  # fmt: skip


def info_nce(M: int, ours: float = 1.1, commit: str = "") -> Result:
    """At M = N the plain loss needs 2 bytes a score, for which 2**17 are too many."""
    seconds, large = M * M * 1e-11, M >= 2**17
    plain = {"peak_mib": M * M * 4 / 2**20, "error": 4e-3, "converged": 0.5, "gemm": 0.4}
    rows = (
        timed("3 GEMMs", seconds, seconds, gemm=0.95),
        timed("rankpo-fast", ours * seconds, seconds, peak_mib=280.0, error=2e-3, converged=3e-3,
              gemm=0.85, copy=0.12, cold=1.3 * ours * seconds),
        Row("torch cross_entropy", "out of memory", error=4e-3) if large
        else timed("torch cross_entropy", 2 * seconds, seconds, **plain),
        timed("quack", 0.9 * ours * seconds, seconds, peak_mib=512.0, error=4e-3),
        Row("liger-kernel", "liger_kernel not installed"),
    )  # fmt: skip
    shape = {"M": M, "N": M, "D": 1024, "dtype": "bfloat16"}
    asks = "Does InfoNCE cost more than its GEMMs?"
    return Result("info_nce", "loss", asks, shape, rows, lower_bound="3 GEMMs", gate=5e-3)


LADDER = Result(
    "training ladder",
    "training",
    "What does each lever buy?",
    {"backbone": "1B", "batch": 256},
    (
        timed("sentence-transformers", 2.0, 2.0, peak_mib=61000.0, tokens=41000.0, queries=128.0,
              mfu=0.21, ndcg=0.251, ndcg_low=0.24, ndcg_high=0.26, watts=610.0, joules=14000.0),
        timed("rankpo-fast", 1.0, 2.0, peak_mib=40000.0, tokens=82000.0, queries=256.0, mfu=0.42,
              throttled="power cap"),
        timed("rankpo-fast, + checkpointing", 1.3, 2.0, peak_mib=9000.0, tokens=63000.0),
        Row("rankpo-fast, + 8-bit AdamW", r"RuntimeError: <b>bad & $\broken$</b>"),
    ),
    about={"median tokens": 56},
)  # fmt: skip
SCALING = Result(
    "scaling of the loss over M",
    "scaling",
    "What is the limit of each?",
    {"D": 1024, "dtype": "bfloat16"},
    (
        Row("rankpo-fast", axis="M", sizes=(1024, 4096, 16384), times=(1e-4, 1e-3, 1.6e-2),
            peaks=(10.0, 20.0, 280.0), exponent=1.98, memory_exponent=1.01),
        Row("torch cross_entropy", axis="M", sizes=(1024, 4096, 16384), times=(2e-4, 3e-3),
            peaks=(6.0, 96.0), exponent=1.9, memory_exponent=2.0,
            limit="16384: out of memory"),
    ),
)  # fmt: skip
RUN = Run(MACHINE, [*(info_nce(M) for M in (4096, 16384, 2**17)), LADDER, SCALING])
