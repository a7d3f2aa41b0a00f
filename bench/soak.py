"""Does a long training hold on to what it should let go? Memory, open files, threads, children.

    python -m bench.soak [--steps 5000] [--every 25] [--bf16] [--picture docs/soak.png]

A tiny encoder is trained on the demo's world, with an evaluation and a checkpoint each 100 steps,
in this process, which is looked at on the way. Of each figure the slope over the steps is printed,
with its 95 % interval: of the means of 12 parts of the run, but for the first fifth, in which the
pools of allocators fill. Flat is what grows by less than 1 % over the run, by the interval's upper
end. In bf16, oneDNN compiles a product for every number of tokens that comes, and keeps it: the
pools are full later.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from rankpo_fast.demo.figure import DASHED, LOOK
from rankpo_fast.demo.steps import QUICK, RANDOM, UNTRAINED, Demo
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.contrastive import train_contrastive

PERIOD = 100  # steps between two evaluations, and between two checkpoints
PARTS = 12
STUDENT = 2.228  # t of 97.5 % with 10 degrees of freedom, which a line through 12 means leaves
FILLING = 0.2  # of the run
MOST = 0.01  # of growth over the run
FIGURES = ("resident memory, MiB", "open files", "threads", "child processes")


@dataclass(frozen=True)
class Slope:
    """Of a figure, a step; `low` to `high` is the 95 % interval."""

    mean: float  # of the figure
    value: float
    low: float
    high: float

    def flat(self, steps: int) -> bool:
        return self.high * steps <= MOST * max(self.mean, 1)


def look() -> tuple[float, ...]:
    """FIGURES of this process, now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    tasks = os.listdir("/proc/self/task")
    children = 0
    for task in tasks:
        with open(f"/proc/self/task/{task}/children") as file:
            children += len(file.read().split())
    files = len(os.listdir("/proc/self/fd"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, len(tasks), children


class Looks(Callback):
    """What was seen at each line of the log."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.seen: list[tuple[float, ...]] = []

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)
        self.seen.append(look())


def slope(steps: Sequence[int], values: Sequence[float]) -> Slope:
    """Of the line through the means of PARTS parts, since neighbours are alike."""
    x, y = (
        np.array([part.mean() for part in np.array_split(np.array(of, float), PARTS)])
        for of in (steps, values)
    )
    centred = x - x.mean()
    value = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - value * centred
    error = math.sqrt(float((rest**2).sum()) / (PARTS - 2) / float((centred**2).sum()))
    return Slope(float(y.mean()), value, value - STUDENT * error, value + STUDENT * error)


def soak(folder: Path, steps: int, every: int, bf16: bool) -> Looks:
    """The training, in `folder`."""
    demo, looks = Demo(folder, 0, QUICK), Looks()
    demo.make_world()
    data = folder / "data"
    queries, corpus = (str(data / f"validation_{name}.jsonl") for name in ("queries", "corpus"))
    train_contrastive(
        ModelConfig(str(folder / UNTRAINED), pooling="mean", from_scratch=True, bf16=bf16),
        ContrastiveDataConfig([str(data / f"{RANDOM}.jsonl")], num_negatives=1),
        ContrastiveLossConfig(),
        TrainingConfig(
            str(folder / "out"), max_steps=steps, per_device_train_batch_size=4,
            learning_rate=1e-4, logging_steps=every, eval_steps=PERIOD, save_steps=PERIOD,
        ),
        EvaluationConfig(queries, corpus),
        ComputeConfig("cpu", no_cache=True),
        callbacks=[looks],
    )  # fmt: skip
    return looks


def picture(looks: Looks, slopes: Sequence[Slope]) -> Figure:
    """A panel a figure."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(10, 6), layout="constrained")
        for axes, name, values, line in zip(
            figure.subplots(2, 2).flat, FIGURES, zip(*looks.seen, strict=True), slopes, strict=True
        ):
            axes.plot(looks.steps, values, color="#0072B2", linewidth=1)
            axes.axvline(FILLING * looks.steps[-1], **DASHED)
            axes.set_ylim(0, 1.3 * max(max(values), 1))
            axes.set_title(f"{name}: {_said(line)}", loc="left", fontsize=9)
            axes.set_xlabel("step")
        return figure


def _said(line: Slope) -> str:
    return (
        f"{1000 * line.value:+.3g} [{1000 * line.low:+.3g}, {1000 * line.high:+.3g}] / 1,000 steps"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks")
    parser.add_argument("--bf16", action="store_true", help="matrices in bf16")
    parser.add_argument("--picture", type=Path, help="a .png of all looks")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        looks = soak(Path(folder), options.steps, options.every, options.bf16)
    kept = [i for i, step in enumerate(looks.steps) if step > FILLING * options.steps]
    if len(kept) < 2 * PARTS:
        parser.error(f"{len(kept)} looks after the first fifth: --every must be smaller")
    steps = [looks.steps[i] for i in kept]
    by_figure = list(zip(*looks.seen, strict=True))
    slopes = [slope(steps, [values[i] for i in kept]) for values in by_figure]
    many = options.steps // PERIOD
    print(f"{options.steps:,} steps in {time.perf_counter() - began:.0f} s, {many} evaluations, as "
          f"many checkpoints, {len(looks.steps)} looks")  # fmt: skip
    for name, values, line in zip(FIGURES, by_figure, slopes, strict=True):
        verdict = "flat" if line.flat(options.steps) else "GROWS"
        median = statistics.median(values[i] for i in kept)
        print(f"{name:22} {median:8.1f}  {_said(line)}  {verdict}")
    if options.picture is not None:
        picture(looks, slopes).savefig(options.picture, dpi=110)
    return 0 if all(line.flat(options.steps) for line in slopes) else 1


if __name__ == "__main__":
    sys.exit(main())
