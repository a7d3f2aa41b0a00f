"""`rankpo-fast demo`: both stages of RankPO on a synthetic world, measured and drawn, on the CPU.

    world -> stage 1 on the rules' labels -> hard negatives mined -> stage 1 goes on
          -> its candidates judged -> stage 2 from there: SimRankPO, and RankPO with replay of
             stage 1's rows; with --full SFT and RankPO alone as well
          -> nDCG@20 (what the rules say) and alignment (what the judge says) on the test split

The test split is measured once, at the end; what is followed while training is the validation
split.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankpo_fast.demo.steps import (
    FULL,
    METHODS,
    QUICK,
    RANDOM,
    REPLAY,
    SHORT,
    SIMRANKPO,
    STAGE1,
    UNTRAINED,
    Demo,
    Scale,
)
from rankpo_fast.errors import InputError
from rankpo_fast.flags import parse
from rankpo_fast.paths import check_writable
from rankpo_fast.train.lock import LOCK, held

LABELS = {
    UNTRAINED: "untrained",
    RANDOM: "stage 1, random negatives",
    STAGE1: "stage 1, mined negatives",
    "sft": "stage 1 + SFT",
    SIMRANKPO: "stage 1 + SimRankPO",
    "rankpo": "stage 1 + RankPO",
    REPLAY: "stage 1 + RankPO + replay",
}
RESULTS = ("metrics.json", "report.png")
FOLDERS = ("data", "cache", UNTRAINED, RANDOM, STAGE1, *METHODS)


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo goes, and how large it is."""

    _argument_group_name = "demo"

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "For the data, models, report.png, metrics.json."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of the world, the judge, and all that is random in training."}
    )
    quick: bool = field(
        default=False, metadata={"help": "A tiny world, to see it run; its figures mean nothing."}
    )
    full: bool = field(
        default=False,
        metadata={"help": "The study: a larger encoder, longer training, four forms of stage 2."},
    )

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"--seed must be >= 0, got {self.seed}")
        if self.quick and self.full:
            raise InputError("--quick and --full exclude each other: give one of them")

    @property
    def scale(self) -> Scale:
        if self.quick:
            return QUICK
        return FULL if self.full else SHORT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line. Raises InputError for flags it cannot use."""
    from transformers.utils.logging import disable_progress_bar

    flags = list(sys.argv[1:] if argv is None else argv)
    summary = "both stages of RankPO on a synthetic job-talent world"
    (config,) = parse("demo", summary, [DemoConfig], flags)
    disable_progress_bar()  # of saving and loading, which take no time here
    run_demo(config)
    return 0


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Make the world, train, measure, draw; prints the table, returns what metrics.json holds.

    Raises InputError where the directory holds something else, or another demo is at it.
    """
    path = Path(config.output_dir)
    _check(path)
    from rankpo_fast.threads import threads  # imports torch

    with held(path, "--output_dir"), threads(config.scale.threads):
        return _run_demo(path, config)


def _run_demo(path: Path, config: DemoConfig) -> dict[str, Any]:
    for name in RESULTS:  # of an earlier demo
        (path / name).unlink(missing_ok=True)
    began, began_cpu = time.perf_counter(), time.process_time()
    demo = Demo(path, config.seed, config.scale)
    _say("1/6  the world: jobs, talents, and rules that say who fits whom")
    demo.make_world()
    job, talent = demo.example()
    print(f"  a job:      {job}\n  a good fit: {talent}", file=sys.stderr)
    _say("2/6  stage 1 from random weights, with negatives drawn at random")
    demo.train_with_random_negatives()
    _say("3/6  stage 1 goes on with hard negatives: ranked high by the model, but misfits")
    demo.train_with_mined_negatives()
    _say("4/6  the judge compares candidates whom stage 1 retrieves")
    demo.judge_candidates()
    for method in demo.scale.methods:
        _say(f"5/6  stage 2: {LABELS[method]}")
        demo.align(method)
    _say("6/6  measuring on the test split: no model has seen its jobs or talents")
    metrics = demo.measure() | {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "training_seconds": round(demo.training_seconds, 1),
        "seed": config.seed,
        "quick": config.quick,
        "full": config.full,
        "scale": asdict(demo.scale),
        "versions": _versions(),
    }
    _report(demo, metrics)
    return metrics


def _report(demo: Demo, metrics: dict[str, Any]) -> None:
    """metrics.json, report.png, and the table on stdout."""
    from rankpo_fast.data.files import whole_file
    from rankpo_fast.demo import figure

    start = {"step": 0, **demo.evaluate(STAGE1, "validation")}
    curves = {name: demo.curve(name) for name in (RANDOM, STAGE1)}
    curves |= {name: [start, *demo.curve(name)] for name in demo.scale.methods}
    picture = demo.path / "report.png"
    figure.draw(metrics, curves, picture)
    with whole_file(demo.path / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\n{_table(metrics)}\n\n{figure.of_stage_1(metrics)}.")
    print(f"{figure.finding(metrics)}.\n{figure.verdict(metrics)}")
    if metrics["quick"]:
        print(
            "This was --quick: the models have hardly been trained, and the figures mean nothing."
        )
    print(f"{metrics['seconds']:.0f} s, {metrics['cpu_seconds']:.0f} s of CPU time: {picture}")


def _check(path: Path) -> None:
    """InputError unless a demo can be written there, or was."""
    check_writable("--output_dir", path, directory=True)
    there = {entry.name for entry in path.iterdir()} if path.exists() else set()
    foreign = sorted(there - {*RESULTS, *FOLDERS, LOCK})
    if foreign:
        names = ", ".join(foreign[:5])
        raise InputError(f"--output_dir {path} holds something else ({names}): choose another")


def _table(metrics: dict[str, Any]) -> str:
    lines = [f"{'on the test split':28}{'nDCG@20':>9}{'alignment':>11}"]
    for name, label in LABELS.items():
        if name in metrics:
            ndcg, alignment = metrics[name]["ndcg@20"], metrics[name]["alignment"]
            lines.append(f"{label:28}{ndcg:9.3f}{alignment:11.3f}")
    lines.append(f"{'most the noisy judge allows':28}{'':9}{metrics['judge_ceiling']:11.3f}")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from rankpo_fast import __version__

    return {
        "rankpo_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _say(text: str) -> None:
    print(f"\n[{text}]", file=sys.stderr, flush=True)
