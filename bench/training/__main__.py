"""The training engine beside sentence-transformers' trainer, on the CPU.

`python -m bench.training [--quick] [--rounds N] [--only CASE ...] [--output FILE]`

A contender trains in a process of its own; contenders take turns, and a round is a seed.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench.__main__ import failed, machine, rounded, version, write
from bench.training.apart import NOT_INSTALLED, OUT_OF_MEMORY, in_a_process
from bench.training.contenders import (
    CUTOFF,
    Contender,
    Measured,
    Task,
    ndcg,
    one_graph,
    rankpo_fast,
    sentence_transformers,
)
from bench.training.corpus import QUANTILES, Size, shape, write_corpus, write_model
from rankpo_fast.demo.world import SplitSize

PEERS = ("sentence-transformers", "transformers", "datasets", "accelerate")
LEARNING_RATE = 3e-3
SEED = 0  # of the corpora
MODEL = "model"
FULL = Size(rows=3200, held_out=SplitSize(300, 800), layers=2, hidden_size=64)
QUICK = Size(rows=160, held_out=SplitSize(30, 60), layers=1, hidden_size=32)
POOL, QUICK_POOL = SplitSize(800, 600), SplitSize(60, 120)  # where texts repeat

ST = {"sentence-transformers": sentence_transformers}
OURS = {"rankpo-fast": rankpo_fast}
CACHED = {
    f"sentence-transformers, cached by {rows}": partial(
        sentence_transformers, cached={"mini_batch_size": rows}
    )
    for rows in (32, 64)
}


@dataclass(frozen=True)
class Case:
    """One question; ratios are to the first contender."""

    name: str
    question: str
    contenders: dict[str, Contender]
    repeats: bool = False  # whether a text may stand in several rows
    batch_size: int = 64
    negatives: int = 1
    steps: int = 10
    rounds: int | None = None  # None: as the command line says
    ndcg: bool = False


def cases(quick: bool) -> list[Case]:
    learn = "Does ours train as well in less time?"
    size = {"batch_size": 16, "steps": 3, "rounds": 1} if quick else {}
    of_learning = {"steps": 100, "ndcg": True} | size
    large = {"steps": 3, "rounds": 1} | size | {"batch_size": 64 if quick else 1024}
    many_groups = {"batch_size": 256} | size  # of which to keep all or one
    forgetful = {
        "rankpo-fast, nothing kept": partial(rankpo_fast, training={"activation_memory_gb": 0.0})
    }
    padded = {"rankpo-fast, padded": partial(rankpo_fast, model={"packing": False})}
    return [
        Case("learning", f"{learn} (no text twice)", ST | OURS, **of_learning),
        Case(
            "repeats", f"{learn} (texts repeat)", ST | OURS, repeats=True,
            **{"rounds": 1} | of_learning,
        ),
        Case(
            "large batch", f"Does a batch of {large['batch_size']} fit?",
            ST | CACHED | OURS | forgetful, negatives=0, **large,
        ),
        Case(
            "recomputing", "What does recomputing cost?",
            {"one graph, autograd": one_graph} | OURS | forgetful, **many_groups,
        ),
        Case("padding", "What does padding cost?", padded | OURS, **size),
    ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One contender's result over all rounds; None where it gave none, and `note` says why."""

    contender: str
    seconds: float | None = None  # of a step, the median of rounds
    ratio: float | None = None  # of seconds, the median of rounds, then the least and the most
    low: float | None = None
    high: float | None = None
    queries: float | None = None  # per second
    tokens: float | None = None  # per second; of texts, not of padding, equal ones counted each
    peak_mib: float | None = None  # the most of all rounds
    ndcg: float | None = None  # the mean of rounds, then the least and the most
    ndcg_low: float | None = None
    ndcg_high: float | None = None
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    names = [case.name for case in cases(quick=False)]
    parser.add_argument("--quick", action="store_true", help="everything tiny: figures mean little")
    parser.add_argument("--rounds", type=int, default=3, help="seeds of each contender")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="cases to run")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: build/bench)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}")

    about = machine("cpu") | {name: v for name in PEERS if (v := version(name))}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("seconds: of a step, without the first; its ratio to the first row's, least and most of")
    print("rounds; tok/s: of texts, not of padding; MiB: the process's peak above what it had when")
    print(f"the first text entered the model; nDCG@{CUTOFF} of held-out queries, least and most\n")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    output = args.output or Path("build/bench") / f"{day}-training-cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    size, pool = (QUICK, QUICK_POOL) if args.quick else (FULL, POOL)
    results, red = [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpora = {
            repeats: write_corpus(directory / str(repeats), size, pool if repeats else None, SEED)
            for repeats in (False, True)
        }
        write_model(directory / MODEL, corpora[False], size)
        untrained = ndcg(directory / MODEL, directory / "False")
        about[f"untrained nDCG@{CUTOFF}"] = f"{untrained:.3f}"
        print(f"untrained, the model has an nDCG@{CUTOFF} of {untrained:.3f}\n")
        for case in cases(args.quick):
            if case.name not in args.only:
                continue
            batch = shape(
                corpora[case.repeats], directory / MODEL, case.batch_size, case.negatives, SEED
            )
            print(f"{case.name}: {case.question}\n{described(batch)}", flush=True)
            answers = compare(case, directory, case.rounds or args.rounds)
            rows = summary(case, answers, batch["tokens of a row"])
            print(table(rows), flush=True)
            red += [f"{case.name}: {row.contender}" for row in rows if is_red(row)]
            results.append(
                {"case": case.name, "question": case.question, "shape": rounded(batch)}
                | {"rows": [rounded(dataclasses.asdict(row)) for row in rows]}
            )
            write(output, about, results)
    print(f"written to {output}")
    return failed(red)


Answers = dict[str, list[Measured | str]]  # of each contender, in the order of rounds


def compare(case: Case, directory: Path, rounds: int) -> Answers:
    """What every contender measures in every round, or why it measures nothing."""
    answers: Answers = {name: [] for name in case.contenders}
    for seed in range(rounds):
        order = list(case.contenders)
        for name in order[seed % len(order) :] + order[: seed % len(order)]:
            with tempfile.TemporaryDirectory(dir=directory) as output:
                task = Task(
                    model=directory / MODEL,
                    corpus=directory / str(case.repeats),
                    output=Path(output) / "trained",
                    cache=directory / "cache",
                    batch_size=case.batch_size,
                    negatives=case.negatives,
                    steps=case.steps,
                    learning_rate=LEARNING_RATE,
                    seed=seed,
                    repeats=case.repeats,
                    ndcg=case.ndcg,
                )
                answers[name].append(in_a_process(case.contenders[name], task))
    return answers


def summary(case: Case, answers: Answers, tokens: float) -> list[Row]:
    """A row a contender; a round that failed anywhere fails it."""
    floor = answers[next(iter(case.contenders))]
    rows = []
    for name, given in answers.items():
        if notes := [one for one in given if isinstance(one, str)]:
            rows.append(Row(name, note=notes[0]))
            continue
        seconds = statistics.median(one.seconds for one in given)
        ratios = sorted(
            one.seconds / first.seconds
            for one, first in zip(given, floor, strict=True)
            if isinstance(first, Measured)
        )
        learnt = [one.ndcg for one in given if one.ndcg is not None]
        rows.append(
            Row(
                name,
                seconds,
                *((statistics.median(ratios), ratios[0], ratios[-1]) if ratios else [None] * 3),
                case.batch_size / seconds,
                case.batch_size * tokens / seconds,
                max(one.peak for one in given) / 2**20,
                *((statistics.mean(learnt), min(learnt), max(learnt)) if learnt else [None] * 3),
            )
        )
    return rows


def is_red(row: Row) -> bool:
    """Peers may be missing, or too large; ours may not."""
    excused = row.note == OUT_OF_MEMORY or row.note.endswith(NOT_INSTALLED)
    return bool(row.note) and not (excused and row.contender.startswith("sentence-transformers"))


def described(shape: dict) -> str:
    """Of a case's batches, in words."""
    percent = ", ".join(f"{100 * q:g}" for q in QUANTILES)
    lines = [
        f"{kind} tokens at {percent} %: {', '.join(f'{x:.0f}' for x in shape[f'{kind} tokens'])}"
        for kind in ("query", "passage")
    ]
    lines.append(
        f"batches of {shape['batch']} rows, {shape['tokens of a row']:.0f} tokens each; padded to "
        f"the longest, {shape['padding']:.0%} is padding; {shape['repeated texts']:.1%} of texts "
        "stand in the batch already"
    )
    return "\n".join(f"  {line}" for line in lines)


def table(rows: Sequence[Row]) -> str:
    lines = [f"  {'':36}{'seconds':>8}{'ratio':>7}{'':12}{'queries/s':>10}{'tok/s':>9}{'MiB':>8}"
             f"{'nDCG':>8}"]  # fmt: skip
    for row in rows:
        if row.seconds is None:
            lines.append(f"  {row.contender:36}{row.note}")
            continue
        ratio = f"{'':19}"
        if row.ratio is not None:
            ratio = f"{row.ratio:7.2f}{f'{row.low:.2f}-{row.high:.2f}':>12}"
        learnt = ""
        if row.ndcg is not None:
            learnt = f"{row.ndcg:8.3f}{f'{row.ndcg_low:.3f}-{row.ndcg_high:.3f}':>13}"
        speed = f"{row.queries:10.1f}{row.tokens:9,.0f}{row.peak_mib:8,.0f}"
        lines.append(f"  {row.contender:36}{row.seconds:8.3f}{ratio}{speed}{learnt}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
