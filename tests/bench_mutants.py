"""Mutants of bench/ that would make its figures dishonest."""

from mutant import Mutant, of

MEASURE, COMPARE, APART = "bench/measure.py", "bench/compare.py", "bench/apart.py"
TRAINING = "bench/training/steps.py"


def measuring(names: str) -> tuple[str, ...]:
    return of("tests/bench/test_bench.py", names)


def comparing(names: str) -> tuple[str, ...]:
    return of("tests/bench/test_compare.py", names)


def growing(names: str) -> tuple[str, ...]:
    return of("tests/bench/test_scaling.py", names)


def training(names: str) -> tuple[str, ...]:
    return of("tests/bench/test_training.py", names)


BENCH = [
    # times
    Mutant(
        "ratios-across-rounds", MEASURE,
        "seconds / of_floor for seconds, of_floor in zip(hot, floor, strict=True)",
        "seconds / statistics.median(floor) for seconds in hot",
        measuring("slow_round"),
    ),
    Mutant(
        "the-floor-is-always-first", MEASURE,
        "for name in turned(list(peaks), number):",
        "for name in list(peaks):",
        measuring("is_first"),
    ),
    Mutant(
        "repeated-runs-count-as-one", MEASURE,
        "(time.perf_counter() - start) / repeats",
        "time.perf_counter() - start",
        measuring("runs_that_are_repeated"),
    ),
    Mutant(
        "an-error-in-a-later-round-is-forgotten", MEASURE,
        "        if name in notes:\n"
        "            rows.append(Row(name, notes[name], **errors[name]))\n"
        "            continue\n"
        "        found = _times(hot[name], cold[name], of_floor)",
        "        if name in notes and (case.floor in notes or not hot.get(name)):\n"
        "            rows.append(Row(name, notes[name], **errors[name]))\n"
        "            continue\n"
        "        found = _times(hot[name], cold[name], of_floor[: len(hot[name])])",
        measuring("error_in_one_round"),
    ),
    Mutant(
        "cold-is-hot", MEASURE,
        "case.device, before=evict)",
        "case.device)",
        measuring("without_it"),
    ),
    Mutant(
        "caches-are-emptied-of-a-byte", MEASURE,
        "torch.empty(2 * size,",
        "torch.empty(1,",
        measuring("emptied"),
    ),
    Mutant(
        "the-floor-makes-a-product-more", "bench/cases/loss.py",
        "range(count - 2 * backward)",
        "range(count - backward)",
        measuring("no_product_more"),
    ),
    Mutant(
        "shares-of-the-fastest-dtype", MEASURE,
        'settings.rates.gemm.get(str(case.dtype).removeprefix("torch."))',
        "max(settings.rates.gemm.values())",
        measuring("shares_are_of"),
    ),
    Mutant(
        "exponent-over-all-sizes", MEASURE,
        "[-max(2, (len(values) + 1) // 2) :]",
        "",
        growing("upper_half"),
    ),
    # errors and memory
    Mutant(
        "ours-is-timed-above-the-gate", MEASURE,
        "if (note := above_the_gate(case, name)) is not None:",
        "if (note := above_the_gate(case, name)) == name:",
        measuring("red_gate"),
    ),
    Mutant(
        "the-gate-stops-peers", MEASURE,
        "    if not name.startswith(OURS):\n"
        "        return None  # a peer",
        "    if name == case.floor:\n"
        "        return None  # a peer",
        measuring("red_gate"),
    ),
    Mutant(
        "memory-with-the-gradients", MEASURE,
        " - case.keep_bytes  # and",
        "  # and",
        measuring("known_memory"),
    ),
    Mutant(
        "memory-freed-meanwhile-does-not-count", MEASURE,
        'status_bytes("VmHWM")',
        'status_bytes("VmRSS")',
        measuring("freed_by_its_end"),
    ),
    Mutant(
        "no-limit-of-memory", APART,
        "if memory is not None:",
        "if memory == 0:",
        growing("limit_of_memory"),
    ),
    # what is no time
    Mutant(
        "out-of-memory-is-an-error", MEASURE,
        "if lack or any(words in str(error) for words in LACK):",
        "if lack:",
        growing("limit_of_memory"),
    ),
    Mutant(
        "errors-are-out-of-memory", MEASURE,
        "torch.OutOfMemoryError | MemoryError)",
        "RuntimeError | MemoryError)",
        measuring("stops_a_contender"),
    ),
    Mutant(
        "the-dead-said-all", APART,
        "note = OUT_OF_MEMORY if process.exitcode == -9 else",
        'note = "" if process.exitcode == -9 else',
        growing("is_killed"),
    ),
    Mutant(
        "every-death-is-out-of-memory", APART,
        'OUT_OF_MEMORY if process.exitcode == -9 else f"exit code {process.exitcode}"',
        "OUT_OF_MEMORY",
        growing("crash"),
    ),
    Mutant(
        "a-size-that-took-too-long-is-reached", "bench/scaling.py",
        "    if seconds and seconds[-1] > limits.seconds:\n        seconds, note =",
        "    if seconds and seconds[-1] > math.inf:\n        seconds, note =",
        growing("too_long"),
    ),
    # training
    Mutant(
        "padding-is-tokens", "bench/training/corpus.py",
        "Batches(float(batch * of_a_row), flops",
        "Batches(float(np.mean(padded)), flops",
        training("padding"),
    ),
    Mutant(
        "mfu-doubled", "bench/training/backbones.py",
        "return 3 * (2 * matrices",
        "return 6 * (2 * matrices",
        training("useful_flops"),
    ),
    Mutant(
        "joules-of-all-steps-by-the-tokens-of-one", TRAINING,
        "(of.tokens * one.counted / 1e6)",
        "(of.tokens / 1e6)",
        training("joules"),
    ),
    Mutant(
        "only-the-first-round-is-throttled", TRAINING,
        "next((one.throttled for one in given if one.throttled), None)",
        "given[0].throttled",
        training("one_throttled"),
    ),
    Mutant(
        "a-round-that-failed-is-left-out", TRAINING,
        "        if notes := [one for one in given if isinstance(one, str)]:\n"
        "            rows.append(Row(name, notes[-1]))\n"
        "            continue\n"
        "        ratios = []",
        "        notes = [one for one in given if isinstance(one, str)]\n"
        "        given = [one for one in given if not isinstance(one, str)]\n"
        "        if not given:\n"
        "            rows.append(Row(name, notes[-1]))\n"
        "            continue\n"
        "        ratios = []",
        training("failed_in_one_round"),
    ),
    Mutant(
        "steps-before-the-clock-count", "bench/training/contenders.py",
        "task.device) / counted,",
        "task.device) / task.steps,",
        training("settled"),
    ),
    # what is made of the figures
    Mutant(
        "red-exits-with-0", "bench/__main__.py",
        "return 1 if red else 0",
        "return 0",
        measuring("red_row"),
    ),
    Mutant(
        "an-unknown-case-is-left-out", "bench/__main__.py",
        "if name not in QUESTIONS:",
        "if not set(args.cases) & set(QUESTIONS):",
        measuring("bad_input"),
    ),
    Mutant(
        "older-formats-are-read", "bench/results.py",
        ") != FORMAT:",
        ") > FORMAT:",
        of("tests/bench/test_history.py", "cannot_be_read"),
    ),
    Mutant(
        "nan-passes-the-gate", MEASURE,
        "max(errors) if all(map(math.isfinite, errors)) else math.inf",
        "max(errors)",
        measuring("not_finite"),
    ),
    Mutant(
        "moments-made-early-are-no-memory", "bench/training/contenders.py",
        " - self.of_optimizer\n",
        "\n",
        training("whenever_they_are_made"),
    ),
    Mutant(
        "an-evaluation-is-training", "bench/training/end_to_end.py",
        "        self.memory.settle()  # an evaluation is no part of a training\n",
        "",
        of("tests/bench/test_end_to_end.py", "first_evaluation_above"),
    ),
    Mutant(
        "a-faster-peer-is-a-slower-us", COMPARE,
        "    floor = now.result.floor\n"
        "    if was.result.floor == floor != b.contender",
        "    floor = now.result.floor or now.result.rows[0].contender\n"
        "    if floor != b.contender",
        comparing("became_faster"),
    ),
    Mutant(
        "a-row-that-is-gone-is-forgotten", COMPARE,
        "    changes += _gone(was, now)\n",
        "",
        comparing("that_is_gone"),
    ),
    Mutant(
        "slower-is-better", COMPARE,
        'change("time", quotient > 1, says',
        'change("time", quotient < 1, says',
        comparing("became_better"),
    ),
    Mutant(
        "compare-across-dtypes", COMPARE,
        "json.dumps(result.shape, sort_keys=True)",
        'str(result.shape.get("M"))',
        comparing("a_dtype"),
    ),
    Mutant(
        "compare-without-threshold", COMPARE,
        "if not _beyond(1 + threshold, quotient):",
        "if quotient == 1:",
        comparing("below_the_threshold"),
    ),
    Mutant(
        "compare-without-noise", COMPARE,
        "UNCLEAR if not sure else WORSE",
        "WORSE",
        comparing("unclear"),
    ),
    Mutant(
        "errors-of-peers-are-green", "bench/report.py",
        "for row in result.rows if row.red]",
        "for row in result.rows if row.red and row.ours]",
        of("tests/bench/test_report.py", "error_of_a_peer"),
    ),
    Mutant(
        "notes-are-html", "bench/report.py",
        'f"<small>{escape(said)}</small>"',
        'f"<small>{said}</small>"',
        of("tests/bench/test_report.py", "escapes"),
    ),
    Mutant(
        "readme-reads-another-file", "bench/readme.py",
        'run = read(root / found["file"])',
        'run = read(min((root / found["file"]).parent.glob("*.json")))',
        of("tests/bench/test_readme.py", "another_file"),
    ),
    Mutant(
        "the-trend-is-of-all-devices", "bench/history.py",
        "key = device, result.name,",
        'key = "any", result.name,',
        of("tests/bench/test_history.py", "one_device"),
    ),
]  # fmt: skip
