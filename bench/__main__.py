"""The bench: what the losses and the training cost, beside peers and lower bounds.

    rankpo-fast bench [run] [--quick | --full]   measure, print, write a result file and a report
    rankpo-fast bench compare BEFORE AFTER       did it get worse? [--threshold 0.05]
    rankpo-fast bench report FILE                the report of a result file: one page, its pictures
    rankpo-fast bench history [DIRECTORY]        the figures over time, from result files

Exit codes: 0; 1 if a gate is red, an implementation raised, or ours got worse; 2 for bad input,
which is named.
"""

import argparse
import dataclasses
import gc
import itertools
import math
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rankpo_fast.errors import InputError
from rankpo_fast.flags import closest

if TYPE_CHECKING:
    from .questions import Question, Shape

GPU_SECONDS = 3.0  # rounds of a loss on a GPU stop then
TRAINING_SHARE = 0.1  # of --minutes: rounds of a training stop then
RESULTS = Path("bench/results")
ROUNDS = {"quick": 3, "default": 7, "full": 7}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command, *flags = argv if argv and argv[0] in COMMANDS else ["run", *argv]
    try:
        return COMMANDS[command](flags)
    except InputError as error:
        print(f"rankpo-fast bench: error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser(command: str) -> _Parser:
    return _Parser(
        prog=f"rankpo-fast bench {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# --- run: heavy imports inside, so that the others are quick ---


def run(flags: list[str]) -> int:
    from .registry import QUESTIONS

    args = _run_parser().parse_args(flags)
    if args.list:
        for question in QUESTIONS.values():
            print(f"{question.name:36}{question.family:12}{question.asks}")
        return 0
    device = _device(args.device)
    if args.compile:
        if device != "cuda":
            raise InputError("--compile, but there is no GPU to compile for: see bench.aot")
        from .cases import tiles

        tiles.compile_all(args.compile)
        return 0
    level = "quick" if args.quick else "full" if args.full else "default"
    return _measure(args, device, level, _asked(args, device, level))


def _run_parser() -> _Parser:
    parser = _parser("run")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--quick", action="store_true", help="few, small shapes: 90 s on two cores")
    much.add_argument("--full", action="store_true", help="every shape")
    parser.add_argument("--list", action="store_true", help="say what can be asked")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these alone")
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help="these, and the lower bounds"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE",
        help="of the cases that have such: 4096x4096x1024, or 4096x4096x1024:float16",
    )  # fmt: skip
    parser.add_argument("--model", metavar="DIRECTORY", help="to train, in case pretrained")
    parser.add_argument("--texts", metavar="FILE", help="rows of stage 1 for it, as JSONL")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=_positive, help="timed runs of each implementation")
    parser.add_argument(
        "--minutes", type=_minutes, default=math.inf, help="start no case later than this"
    )
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("build/bench"))
    parser.add_argument(
        "--note", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"),
        help="what the result file says besides, of tests for instance",
    )  # fmt: skip
    parser.add_argument(
        "--compile", type=_positive, metavar="D", help="only compile the kernels for so many dims"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number >= 1, got {text}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text}")
    return minutes


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU")
    return name


def _asked(args: argparse.Namespace, device: str, level: str) -> list[tuple]:
    """(question, shape): the first shape of every question, then the second: time may run out."""
    from .registry import QUESTIONS

    for name in args.cases or []:
        if name not in QUESTIONS:
            raise InputError(f"--cases: unknown case {name!r}{closest(name, list(QUESTIONS))}")
    questions = [q for q in QUESTIONS.values() if not args.cases or q.name in args.cases]
    questions = [_of_users_model(args, question) for question in questions]
    of = {question.name: question.implementations(device) for question in questions}
    names = {name for known in of.values() for name in known}
    for name in args.implementations or []:
        if name not in names:
            raise InputError(
                f"--implementations: {name!r} is in none of these cases{closest(name, list(names))}"
            )
    shapes = [
        [(question, shape) for shape in _shapes(question, args.shapes, device, level)]
        for question in questions
        if not args.implementations or set(args.implementations) & set(of[question.name])
    ]
    found = [pair for wave in itertools.zip_longest(*shapes) for pair in wave if pair is not None]
    if not found:
        what = " ".join(args.shapes) if args.shapes else f"{level} on {device}"
        raise InputError(f"nothing to measure: these cases have no shape {what}")
    return found


def _of_users_model(args: argparse.Namespace, question: "Question") -> "Question":
    """The question about a model that --model names, with its shape; others as they are."""
    from .training import pretrained

    if question.name != pretrained.NAME:
        return question
    if args.model and args.texts:
        return pretrained.question(Path(args.model), Path(args.texts))
    if args.model or args.texts or args.cases:
        raise InputError(
            f"--cases {pretrained.NAME} needs --model DIRECTORY, and --texts ROWS.jsonl of stage 1"
        )
    return question


def _shapes(
    question: "Question", asked: list[str] | None, device: str, level: str
) -> "list[Shape]":
    from .cases.loss import LossQuestion

    if asked is None:
        return question.shapes(device, level)
    if not isinstance(question, LossQuestion):
        return []
    return [shape for text in asked if (shape := question.shape(text, device)) is not None]


def _measure(args: argparse.Namespace, device: str, level: str, asked: list[tuple]) -> int:
    import torch

    from . import machine, results
    from .measure import noting
    from .questions import OURS, Result, Row, Settings, described
    from .report import failures, rates_in_words, write_report
    from .tables import table, times

    started = time.monotonic()
    _make(args.output_dir)
    about = machine.about(device)
    rates = machine.measure_rates(device)
    about |= {"level": level, "rates": dataclasses.asdict(rates)} | dict(args.note)
    slow = machine.emulated(device)
    if slow:
        words = [f"{name} ({times(x)} times the time of float32)" for name, x in slow.items()]
        about["emulated"] = ", ".join(words)
    asked, without, left_out = _what_time_allows(args, device, level, asked, slow)
    said = {key: value for key, value in about.items() if key != "rates"}
    said["measured here"] = rates_in_words(about["rates"])
    print("\n".join(f"{key:22}{value}" for key, value in said.items()) + "\n")
    settings = Settings(
        device, level, args.rounds or ROUNDS[level], rates,
        frozenset(args.implementations) if args.implementations else None, without,
        GPU_SECONDS if device == "cuda" else math.inf, 60 * args.minutes * TRAINING_SHARE,
    )  # fmt: skip
    now = datetime.now(UTC)
    path = args.output_dir / f"{now:%Y-%m-%d-%H%M%S}-{_slug(about['device'], device)}.json"
    done: list[Result] = []
    run = results.Run(about, done)
    results.write(path, run)
    torch.manual_seed(0)
    for number, (question, shape) in enumerate(asked):
        if time.monotonic() - started > 60 * args.minutes:
            left = [f"{question.name} {described(shape)}" for question, shape in asked[number:]]
            left_out.append(f"after {args.minutes:g} minutes: {', '.join(left)}")
            break
        gc.collect()
        gc.freeze()  # what libraries hold: to go through it at every peak takes longer than runs
        notes: dict[str, str] = {}
        with noting(OURS, notes):
            result = question.answer(shape, settings)
        if notes:  # a question that cannot be asked is our failure, whatever stopped it
            rows = (Row(OURS, notes[OURS]),)
            result = Result(question.name, question.family, question.asks, shape, rows)
        print(f"{result.name}: {result.question}\n{table(result)}", flush=True)
        done.append(result)
        results.write(path, run)  # what is measured stays, whatever comes
        if (lost := machine.lost(device)) is not None:
            left_out.append(f"what comes after {result.name}, which lost the device: {lost}")
            break
    gc.unfreeze()
    if left_out:
        about["left out"] = "; ".join(left_out)
        print(f"left out: {about['left out']}")
        results.write(path, run)
    page = write_report(run, args.output_dir)
    red = failures(run)
    for name in red:
        print(f"FAILED {name}")
    print(f"{path}\n{page}\n{time.monotonic() - started:.0f} s")
    return 1 if red else 0


def _what_time_allows(
    args: argparse.Namespace, device: str, level: str, asked: list[tuple], slow: dict[str, float]
) -> tuple[list[tuple], frozenset[str], list[str]]:
    """(question, shape) that are measured, implementations that are not, and words on what is left
    out: all that nobody named and that compiles for seconds, or is emulated, in one of the dtypes
    `slow` for minutes."""
    from .peers import COMPILED
    from .questions import described
    from .training.steps import IN_BF16

    without: set[str] = set()
    left_out = []
    names = {name for q, _ in asked for name in q.implementations(device)}
    if level == "quick" and device == "cpu" and not args.implementations:
        without |= COMPILED & names
        left_out += [f"{name} (compiles for seconds)" for name in sorted(without)]
    if "bfloat16" in slow and level != "quick" and not args.implementations:
        without |= IN_BF16 & names
        left_out += [f"{name} (emulated here)" for name in sorted(IN_BF16 & names)]
    if not args.shapes:
        emulated = [(q, shape) for q, shape in asked if shape.get("dtype") in slow]
        asked = [pair for pair in asked if pair not in emulated]
        left_out += [f"{q.name} {described(shape)} (emulated here)" for q, shape in emulated]
    return asked, frozenset(without), left_out


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {directory}: {error.strerror}") from None


def _slug(name: str, device: str) -> str:
    return "cpu" if device == "cpu" else name.replace(" ", "-")


# --- what is made of result files ---


def compare(flags: list[str]) -> int:
    from .compare import THRESHOLD, compare, table
    from .results import read

    parser = _parser("compare")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="0.05: five per cent")
    args = parser.parse_args(flags)
    comparison = compare(read(args.before), read(args.after), args.threshold)
    print(table(comparison), end="")
    return comparison.code


def report(flags: list[str]) -> int:
    from .report import write_report
    from .results import read

    parser = _parser("report")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="[beside the file]")
    args = parser.parse_args(flags)
    directory = args.output_dir or args.file.parent
    _make(directory)
    print(write_report(read(args.file), directory))
    return 0


def history(flags: list[str]) -> int:
    from .history import write_history

    parser = _parser("history")
    parser.add_argument("directory", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("build/bench"))
    args = parser.parse_args(flags)
    _make(args.output_dir)
    print(write_history(args.directory, args.output_dir))
    return 0


COMMANDS = {"run": run, "compare": compare, "report": report, "history": history}

if __name__ == "__main__":
    sys.exit(main())
