"""Times, memory and errors as bench/ measures them: mutants would make them dishonest."""

from mutants.mutant import Mutant
from mutants.suites import bench

MEASURE = "bench/measure.py"
APART = "bench/apart.py"
SCALING = "bench/scaling.py"
LOSS = "bench/cases/loss.py"

MUTANTS = [
    Mutant(
        "ratios-across-rounds", MEASURE,
        "seconds / of_bound for seconds, of_bound in zip(hot, lower_bound, strict=True)",
        "seconds / statistics.median(lower_bound) for seconds in hot",
        bench("bench", "slow_round"),
    ),
    Mutant(
        "the-lower-bound-is-always-first", MEASURE,
        "for name in turned(list(peaks), number):",
        "for name in list(peaks):",
        bench("bench", "is_first"),
    ),
    Mutant(
        "repeated-runs-count-as-one", MEASURE,
        "(time.perf_counter() - start) / repeats",
        "time.perf_counter() - start",
        bench("bench", "runs_that_are_repeated"),
    ),
    Mutant(
        "an-error-in-a-later-round-is-forgotten", MEASURE,
        "        if name in notes:\n"
        "            rows.append(Row(name, notes[name], **errors[name]))\n"
        "            continue\n"
        "        found = _times(hot[name], cold[name], of_bound)",
        "        if name in notes and (case.lower_bound in notes or not hot.get(name)):\n"
        "            rows.append(Row(name, notes[name], **errors[name]))\n"
        "            continue\n"
        "        found = _times(hot[name], cold[name], of_bound[: len(hot[name])])",
        bench("bench", "error_in_one_round"),
    ),
    Mutant(
        "cold-is-hot", MEASURE,
        "case.device, before=evict)",
        "case.device)",
        bench("bench", "without_it"),
    ),
    Mutant(
        "caches-are-emptied-of-a-byte", MEASURE,
        "torch.empty(2 * size,",
        "torch.empty(1,",
        bench("bench", "emptied"),
    ),
    Mutant(
        "the-lower-bound-makes-a-product-more", LOSS,
        "range(count - 2 * backward)",
        "range(count - backward)",
        bench("bench", "no_product_more"),
    ),
    Mutant(
        "shares-of-the-fastest-dtype", MEASURE,
        'settings.rates.gemm.get(str(case.dtype).removeprefix("torch."))',
        "max(settings.rates.gemm.values())",
        bench("bench", "shares_are_of"),
    ),
    Mutant(
        "exponent-over-all-sizes", MEASURE,
        "[-max(2, (len(values) + 1) // 2) :]",
        "",
        bench("scaling", "upper_half"),
    ),
    Mutant(
        "ours-is-timed-above-the-gate", MEASURE,
        "if (note := above_the_gate(case, name)) is not None:",
        "if (note := above_the_gate(case, name)) == name:",
        bench("bench", "red_gate"),
    ),
    Mutant(
        "the-gate-stops-peers", MEASURE,
        "    if not name.startswith(OURS):\n"
        "        return None  # a peer",
        "    if name == case.lower_bound:\n"
        "        return None  # a peer",
        bench("bench", "red_gate"),
    ),
    Mutant(
        "memory-with-the-gradients", MEASURE,
        " - case.keep_bytes  # and",
        "  # and",
        bench("bench", "known_memory"),
    ),
    Mutant(
        "memory-freed-meanwhile-does-not-count", MEASURE,
        'status_bytes("VmHWM")',
        'status_bytes("VmRSS")',
        bench("bench", "freed_by_its_end"),
    ),
    Mutant(
        "no-limit-of-memory", APART,
        "if memory is not None:",
        "if memory == 0:",
        bench("scaling", "limit_of_memory"),
    ),
    Mutant(
        "out-of-memory-is-an-error", MEASURE,
        "if lack or any(words in str(error) for words in LACK):",
        "if lack:",
        bench("scaling", "limit_of_memory"),
    ),
    Mutant(
        "errors-are-out-of-memory", MEASURE,
        "torch.OutOfMemoryError | MemoryError)",
        "RuntimeError | MemoryError)",
        bench("bench", "stops_an_implementation"),
    ),
    Mutant(
        "the-dead-said-all", APART,
        "note = OUT_OF_MEMORY if process.exitcode == -9 else",
        'note = "" if process.exitcode == -9 else',
        bench("scaling", "is_killed"),
    ),
    Mutant(
        "every-death-is-out-of-memory", APART,
        'OUT_OF_MEMORY if process.exitcode == -9 else f"exit code {process.exitcode}"',
        "OUT_OF_MEMORY",
        bench("scaling", "crash"),
    ),
    Mutant(
        "a-size-that-took-too-long-is-reached", SCALING,
        "    if seconds and seconds[-1] > budget.seconds:\n        seconds, note =",
        "    if seconds and seconds[-1] > math.inf:\n        seconds, note =",
        bench("scaling", "too_long"),
    ),
    Mutant(
        "nan-passes-the-gate", MEASURE,
        "max(errors) if all(map(math.isfinite, errors)) else math.inf",
        "max(errors)",
        bench("bench", "not_finite"),
    ),
]  # fmt: skip
