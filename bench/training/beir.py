"""Both stages on any collection with grades: what does stage 2 gain, and at what cost in retrieval?

    python -m bench.training.beir --beir DIR [--model NAME_OR_DIR] [--seeds 3] [--preferences FILE]

Queries go to train, validation and test by a hash of their text, 6 : 2 : 2, whatever splits the
directory has. Stage 1 is any grade above 0, beside negatives that the model itself mines.
Preferences are the order of grades: pairs of documents that a query's judge graded differently,
grade 0 too. Then a sweep of methods of stage 2, chosen on validation, and the test read once.

    OUTPUT/beir/        the collection again, with the splits of this run
    OUTPUT/*.jsonl      rows of both stages
    OUTPUT/stage1-SEED  the models that the sweep starts from
    OUTPUT/sweep/       rankpo-fast sweep, with its report and figure; OUTPUT/report.md the table

What is there already is not made again.
"""

import argparse
import hashlib
import itertools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankpo_fast.cli import main as rankpo_fast
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.jsonl import objects
from rankpo_fast.data.retrieval import beir_files, read_judged, read_qrels, text_files
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.sweep.frontier import Interval
from rankpo_fast.sweep.report import Choice, Results
from rankpo_fast.sweep.run import TEST, Runner
from rankpo_fast.sweep.spec import START, read_sweep
from rankpo_fast.sweep.worker import measure, train

TRAIN, VALIDATION = "train", "validation"
SHARES = {TRAIN: 6, VALIDATION: 2, TEST: 2}
PAIRS = 16  # of a query, drawn where it has more: their number grows with the square of documents
NEGATIVES, DEEPEST = 5, 100  # mined of a query, among so many
SETTINGS = "settings.json"
AXES = ("ndcg@20", "alignment")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def part(query: str) -> str:
    """The split of a query, by its text: the same one in whatever file it stands."""
    place = int(hashlib.sha256(query.encode()).hexdigest(), 16) % sum(SHARES.values())
    ends = itertools.accumulate(SHARES.values())
    return next(name for name, end in zip(SHARES, ends, strict=True) if place < end)


# --- data ---


def write_splits(source: Path, directory: Path) -> None:
    """The collection with qrels of our splits, its texts linked."""
    corpus, queries = text_files(source)
    texts = {str(row.get("_id")): row.get("text") for _, row in objects(queries)}
    found: dict[str, list[str]] = {name: [] for name in SHARES}
    for file in beir_files(source)[2:]:
        for query, judged in read_qrels(file).items():
            if isinstance(text := texts.get(query), str):
                lines = found[part(text)]
                lines += [f"{query}\t{document}\t{grade}\n" for document, grade in judged.items()]
    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    for file in (corpus, queries):
        (directory / file.name).unlink(missing_ok=True)
        (directory / file.name).symlink_to(file.resolve())
    for name, lines in found.items():
        with whole_file(directory / "qrels" / f"{name}.tsv") as temporary:
            temporary.write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")


def preferences(judged: Sequence[tuple[str, Sequence[str], Sequence[float]]]) -> list[dict]:
    """Pairs of documents of different grades, at most `PAIRS` of a query; either may come first."""
    rows = []
    for query, texts, grades in judged:
        pairs = [(a, b) for a, b in itertools.combinations(range(len(texts)), 2)
                 if grades[a] != grades[b] and texts[a] != texts[b]]  # fmt: skip
        draw = random.Random(query)
        for pair in draw.sample(pairs, min(PAIRS, len(pairs))):
            a, b = draw.sample(pair, 2)
            rows.append({"query": query, "passage1": texts[a], "passage2": texts[b],
                         "preferred": "A" if grades[a] > grades[b] else "B"})  # fmt: skip
    return rows


def write_rows(path: Path) -> dict[str, int]:
    """Rows of both stages; how many. InputError where a split has none."""
    counts = {"documents": sum(1 for _ in objects(text_files(path / "beir")[0]))}
    for name in SHARES:
        judged = read_judged(path / "beir", name, "--beir")
        pairs = preferences(judged)
        positive = [(query, [t for t, grade in zip(texts, grades, strict=True) if grade > 0])
                    for query, texts, grades in judged]  # fmt: skip
        rows = [{"query": query, "positives": texts, "negatives": []}
                for query, texts in positive if texts]  # fmt: skip
        for what, there in (("a document of a grade above 0", rows),
                            ("documents of different grades", pairs)):  # fmt: skip
            if not there:
                raise InputError(
                    f"--beir: none of the {len(judged)} queries of the {name} split has {what}: "
                    f"the collection is too small, or has no grades"
                )
        counts |= {f"{name} queries": len(rows), f"{name} pairs": len(pairs)}
        write_jsonl(path / f"{name}-pairs.jsonl", pairs)
        if name == TRAIN:
            write_jsonl(path / "positives.jsonl", rows)
    return counts


# --- training ---


def lengths(options: argparse.Namespace) -> list[str]:
    """Flags of stage 1, whose model says them to all that starts from it."""
    roles = ("query", "passage") if options.max_length else ()
    return [f"--max_{role}_length={options.max_length}" for role in roles]


def stage1(options: argparse.Namespace, seed: int, documents: int) -> None:
    """The model that stage 2 of a seed starts from."""
    path = options.output_dir
    rows, model = path / f"stage1-{seed}.jsonl", path / f"stage1-{seed}"
    if not rows.exists():
        wanted = min(NEGATIVES, documents - 1)
        code = rankpo_fast([
            "mine", f"--model_name_or_path={options.model}", f"--device={options.device}",
            f"--train_data={path / 'positives.jsonl'}",
            f"--corpus_data={text_files(path / 'beir')[0]}",
            f"--search_range=0-{min(DEEPEST, documents)}", f"--num_negatives={wanted}",
            f"--seed={seed}", f"--output_file={rows}", f"--bf16={options.bf16}", *lengths(options),
        ])  # fmt: skip
        if code:
            raise InputError(f"mining with {options.model} failed, see above")
    flags = [
        f"--model_name_or_path={options.model}", f"--train_data={rows}", f"--seed={seed}",
        f"--max_steps={options.stage1_steps}", f"--learning_rate={options.stage1_rate}",
        f"--per_device_train_batch_size={options.batch_size}", f"--device={options.device}",
        f"--eval_steps={max(1, options.stage1_steps // 4)}", f"--query_data={path / 'beir'}",
        f"--split={VALIDATION}", "--cutoffs=20", *lengths(options),
    ]  # fmt: skip
    train({"command": "contrastive", "flags": flags, "output_dir": str(model)})


def sweep_of(options: argparse.Namespace) -> dict[str, Any]:
    """As `rankpo-fast sweep` reads it; examples/frontier.yaml is its like on the demo's world."""
    path, reference = options.output_dir, {"loss_type": "hinge", "reference_free": False}
    stage1_rows = str(path / "stage1-<seed>.jsonl")

    def split(name: str) -> dict[str, Any]:
        pairs = str(path / f"{name}-pairs.jsonl")
        return {"query_data": str(path / "beir"), "split": name, "preference_data": pairs,
                "cutoffs": 20, "device": options.device, "bf16": options.bf16}  # fmt: skip

    return {
        "start": str(path / "stage1-<seed>"),
        "settings": {
            "train_data": str(path / f"{TRAIN}-pairs.jsonl"), "max_steps": options.steps,
            "per_device_train_batch_size": options.batch_size, "device": options.device,
        },
        "grid": {"learning_rate": options.learning_rates},
        "methods": {
            "SFT": {"sft_weight": 1.0, "rankpo_weight": 0.0},
            "SimRankPO": {"loss_type": "hinge"},
            "RankPO": reference,
            "RankPO + replay": {
                **reference, "replay_data": stage1_rows, "alphas": [0.5, 1],
                "grid": {"replay_weight": [0.1, 0.3]},
            },
            "RankPO + merging": {**reference, "alphas": [0.25, 0.5, 0.75, 1]},
            "stage 1 continued": {
                "command": "contrastive", "train_data": stage1_rows,
                "grid": {"learning_rate": [options.stage1_rate]},
            },
        },
        "seeds": list(range(options.seeds)),
        "validation": split(VALIDATION),
        "test": split(TEST),
    }  # fmt: skip


# --- what comes out ---


def before(options: argparse.Namespace) -> list[float]:
    """Of --model as it is: figures on the test queries, and with --preferences its alignment."""
    of_test = sweep_of(options)[TEST]
    found = []
    for name, axes, flags in (
        ("test", AXES, [f"--{key}={value}" for key, value in of_test.items()]),
        ("preferences", AXES[1:], [f"--preference_data={options.preferences}",
                                   f"--device={options.device}", f"--bf16={options.bf16}"]),
    ):  # fmt: skip
        if name == "preferences" and options.preferences is None:
            continue
        file = options.output_dir / f"before-{name}.json"
        if name == "preferences" or not file.exists():  # there may be other preferences now
            measure({"start": options.model, "alphas": [0.0], "figures": str(file),
                     "output_dir": "", "evaluation": [*flags, *lengths(options)]})  # fmt: skip
        figures = json.loads(file.read_text(encoding="utf-8"))
        found += [figures[axis] for axis in axes]
    return found


def agreements(options: argparse.Namespace, results: Results, choice: Choice | None) -> list[float]:
    """With --preferences, of each seed: the alignment of the start, for None, or of a choice."""
    sweep, found = results.sweep, []
    for seed in sweep.seeds:
        start, job = sweep.start.replace("<seed>", str(seed)), None
        alpha = 0.0 if choice is None else choice.alpha
        if choice is not None:
            job = next(j for j in sweep.jobs if (j.setup, j.seed) == (choice.setup, seed))
        name = f"start-{seed}" if job is None else Path(job.folder).name
        pattern = str(options.output_dir / "preferences" / f"{name}-alpha-{{alpha}}.json")
        Path(pattern).parent.mkdir(exist_ok=True)
        measure({
            "start": start, "alphas": [alpha], "figures": pattern,
            "output_dir": start if job is None else str(options.output_dir / "sweep" / job.folder),
            "evaluation": [f"--preference_data={options.preferences}",
                           f"--device={options.device}", f"--bf16={options.bf16}"],
        })  # fmt: skip
        file = Path(pattern.replace("{alpha}", format(alpha, "g")))
        found.append(json.loads(file.read_text(encoding="utf-8"))["alignment"])
    return found


def table(options: argparse.Namespace, results: Results, counts: dict[str, int]) -> str:
    held_out = f"alignment with {options.preferences.name}" if options.preferences else None
    heads = ["method", "settings", *AXES, *([held_out] if held_out else [])]
    lines = [f"# Both stages on {options.beir.resolve().name}, from {options.model}", "",
             ", ".join(f"{count:,} {what}" for what, count in counts.items()) + ".", "",
             f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]  # fmt: skip
    cells = [spread([figure]) for figure in before(options)]
    lines.append(f"| before stage 1 |  | {' | '.join(cells)} |")
    for name in (START, *results.methods):
        choice = None if name == START else results.best(name)
        found = results.of_seeds(TEST, choice) if choice or name == START else None
        if found is None:
            lines.append(f"| {name} | not measured with every seed |" + " |" * (len(heads) - 2))
            continue
        columns = [[figures[axis] for figures in found] for axis in AXES]
        if held_out:
            columns.append(agreements(options, results, choice))
        settings = "" if choice is None else str(choice).removeprefix(name).strip(" (),")
        lines.append(f"| {name} | {settings.replace('),', ',')} | "
                     f"{' | '.join(map(spread, columns))} |")  # fmt: skip
    seeds = f"{options.seeds} seeds of training" if options.seeds > 1 else "one seed"
    lines += ["", f"Test queries, read once; settings were chosen on validation. Means of {seeds}"
              + (", and 95 % intervals over them (Student's t), of the same queries: other queries "
                 "vary more." if options.seeds > 1 else ", which has no interval."),
              f"`{START}` is stage 1. Methods beside each other: sweep/report.md."]  # fmt: skip
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    interval = Interval.of(values)
    return f"{mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


# --- all of it ---


def run(options: argparse.Namespace) -> int:
    """InputError before anything is trained for what cannot be used."""
    path = options.output_dir
    if not options.beir.is_dir():
        raise InputError(f"--beir {options.beir}: no such directory")
    if options.preferences and not options.preferences.is_file():
        raise InputError(f"--preferences {options.preferences}: no such file")
    if path.resolve() == options.beir.resolve():
        raise InputError(f"--output_dir {path}: is the collection itself")
    settings = checked_settings(options)
    write_splits(options.beir, path / "beir")
    counts = write_rows(path)
    file = path / "sweep.yaml"
    file.write_text(json.dumps(sweep_of(options), indent=1) + "\n", encoding="utf-8")
    sweep = read_sweep(file)  # JSON is YAML
    (path / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()), flush=True)
    for seed in sweep.seeds:
        stage1(options, seed, counts["documents"])
    code = rankpo_fast(["sweep", f"--sweep={file}", f"--output_dir={path / 'sweep'}",
                        f"--parallel={options.parallel}"])  # fmt: skip
    results = Results(Runner(sweep, path / "sweep", 1, print))
    report = table(options, results, counts)
    with whole_file(path / "report.md") as temporary:
        temporary.write_text(report, encoding="utf-8")
    print(f"\n{report}\nin {path}")
    return code


def checked_settings(options: argparse.Namespace) -> dict[str, str]:
    """Of which a directory holds one set alone; InputError where it holds what others made."""
    free = ("output_dir", "seeds", "parallel", "preferences", "device")  # more seeds may come
    given = {name: str(value) for name, value in vars(options).items() if name not in free}
    given["beir"] = str(options.beir.resolve())
    file = options.output_dir / SETTINGS
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else given
    for name, value in given.items():
        if value != before.get(name):
            raise InputError(f"--{name} {value}: {options.output_dir} was made with "
                             f"{before.get(name)}; give another --output_dir")  # fmt: skip
    return given


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--beir", type=Path, required=True, help="a BEIR directory with grades")
    add("--model", default=MODEL, help="hub name or directory that stage 1 starts from")
    add("--preferences", type=Path, help="preference rows that are measured on alone")
    add("--seeds", type=int, default=3, help="trainings of each setting")
    add("--output_dir", type=Path, help="[outputs/beir/ and the collection's name]")
    add("--parallel", type=int, default=1, help="trainings of the sweep at once")
    add("--stage1_steps", type=int, default=200)
    add("--stage1_rate", type=float, default=2e-5)
    add("--steps", type=int, default=100, help="of stage 2")
    add("--learning_rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4], help="of stage 2")
    add("--batch_size", type=int, default=32)
    add("--max_length", type=int, help="tokens kept of a text [as the model says]")
    add(
        "--bf16",
        choices=["auto", "true", "false"],
        default="false",
        help="when mining and measuring: vectors good to two digits; stage 1 and 2 choose alone",
    )
    add("--device", default="auto")
    options = parser.parse_args(argv)
    for name in ("seeds", "parallel", "stage1_steps", "steps", "batch_size", "max_length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    options.output_dir = options.output_dir or Path("outputs/beir") / options.beir.resolve().name
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    try:
        return run(options)
    except TrainingStopped as stop:
        print(f"{stop}; the same command goes on", file=sys.stderr)
        return stop.exit_code
    except InputError as error:
        print(f"bench.training.beir: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
