"""What bench/ makes of its figures: comparisons, reports, exit codes."""

from mutants.mutant import Mutant
from mutants.suites import bench

COMMAND = "bench/__main__.py"
RESULTS = "bench/results.py"
COMPARE = "bench/compare.py"
REPORT = "bench/report.py"
README = "bench/readme.py"
HISTORY = "bench/history.py"

MUTANTS = [
    Mutant(
        "red-exits-with-0", COMMAND,
        "return 1 if red else 0",
        "return 0",
        bench("bench", "red_row"),
    ),
    Mutant(
        "an-unknown-case-is-left-out", COMMAND,
        "if name not in QUESTIONS:",
        "if not set(args.cases) & set(QUESTIONS):",
        bench("bench", "bad_input"),
    ),
    Mutant(
        "older-formats-are-read", RESULTS,
        ") != FORMAT:",
        ") > FORMAT:",
        bench("history", "cannot_be_read"),
    ),
    Mutant(
        "a-faster-peer-is-a-slower-us", COMPARE,
        "    bound = now.result.lower_bound\n"
        "    alike = bound is not None and was.result.lower_bound == bound != b.implementation",
        "    bound = now.result.lower_bound or now.result.rows[0].implementation\n"
        "    alike = bound != b.implementation",
        bench("compare", "became_faster"),
    ),
    Mutant(
        "a-row-that-is-gone-is-forgotten", COMPARE,
        "    changes += _gone(was, now)\n",
        "",
        bench("compare", "that_is_gone"),
    ),
    Mutant(
        "slower-is-better", COMPARE,
        'change("time", quotient > 1, says',
        'change("time", quotient < 1, says',
        bench("compare", "became_better"),
    ),
    Mutant(
        "compare-across-dtypes", COMPARE,
        "json.dumps(result.shape, sort_keys=True)",
        'str(result.shape.get("M"))',
        bench("compare", "a_dtype"),
    ),
    Mutant(
        "compare-without-threshold", COMPARE,
        "if not _beyond(1 + threshold, quotient):",
        "if quotient == 1:",
        bench("compare", "below_the_threshold"),
    ),
    Mutant(
        "compare-without-noise", COMPARE,
        "UNCLEAR if not sure else WORSE",
        "WORSE",
        bench("compare", "unclear"),
    ),
    Mutant(
        "errors-of-peers-are-green", REPORT,
        "for row in result.rows if row.red]",
        "for row in result.rows if row.red and row.ours]",
        bench("report", "error_of_a_peer"),
    ),
    Mutant(
        "notes-are-html", REPORT,
        'f"<small>{escape(said)}</small>"',
        'f"<small>{said}</small>"',
        bench("report", "escapes"),
    ),
    Mutant(
        "readme-reads-another-file", README,
        'run = read(root / found["file"])\n        names = ',
        'run = read(min((root / found["file"]).parent.glob("*.json")))\n        names = ',
        bench("readme", "another_file"),
    ),
    Mutant(
        "the-trend-is-of-all-devices", HISTORY,
        "key = device, result.name,",
        'key = "any", result.name,',
        bench("history", "one_device"),
    ),
]  # fmt: skip
