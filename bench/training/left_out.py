"""What does `gradient_filter` leave out over a training, and what does that cost?

    python -m bench.training.left_out [--seeds 5] [--shares 0.00390625 0.05]

Trains stage 1 of `make demo` with each seed, exactly and with each share left out, and prints how
many queries had no product, and whether the curves lie apart from exact ones by more than seeds do.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankpo_fast.demo.steps import RANDOM, SHORT, STAGE1, Demo

NDCG = "eval/ndcg@20"
PARTS = 3  # of a training, whose shares are shown


def train(seed: int, share: float) -> list[dict[str, Any]]:
    """What both trainings of stage 1 logged."""
    with tempfile.TemporaryDirectory() as directory:
        demo = Demo(Path(directory), seed, replace(SHORT, gradient_filter=share))
        demo.make_world()
        demo.train_with_random_negatives()
        demo.train_with_mined_negatives()
        logs = [Path(directory) / name / "metrics.jsonl" for name in (RANDOM, STAGE1)]
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def curve(log: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


def apart(curves: Sequence[Sequence[float]], exact: Sequence[Sequence[float]]) -> list[float]:
    """At each point, the mean over seeds of the difference to the exact one."""
    points = zip(*curves, strict=True), zip(*exact, strict=True)
    return [statistics.fmean(x) - statistics.fmean(y) for x, y in zip(*points, strict=True)]


def spread(curves: Sequence[Sequence[float]]) -> list[float]:
    """At each point, the standard deviation over seeds."""
    return [statistics.stdev(values) for values in zip(*curves, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--shares", type=float, nargs="+", default=[2**-8, 0.05])
    options = parser.parse_args(argv)
    seeds = range(options.seeds)
    exact = [train(seed, 0.0) for seed in seeds]
    print(f"stage 1 of `make demo`, {options.seeds} seeds; at most: over all points of a curve\n")
    print(
        "| left out of the pull | queries left out, in thirds of the training | nDCG@20 at the end "
        "(exact) | nDCG@20 from exact at most, of the seeds' deviation | loss, the same |"
    )
    print("|---|---|---|---|---|")
    for share in options.shares:
        logs = [train(seed, share) for seed in seeds]
        left = [
            statistics.fmean(x)
            for x in zip(*(curve(log, "queries_left_out") for log in logs), strict=True)
        ]
        thirds = [
            statistics.fmean(left[len(left) * part // PARTS : len(left) * (part + 1) // PARTS])
            for part in range(PARTS)
        ]
        said = [f"{share:.2g}", ", ".join(f"{third:.0%}" for third in thirds)]
        ends = [statistics.fmean(curve(log, NDCG)[-1] for log in of) for of in (logs, exact)]
        said.append(f"{ends[0]:.3f} ({ends[1]:.3f})")
        for name in (NDCG, "loss"):
            ours, theirs = ([curve(log, name) for log in of] for of in (logs, exact))
            ratios = [abs(d) / s for d, s in zip(apart(ours, theirs), spread(theirs), strict=True)]
            said.append(f"{max(ratios):.2f}")
        print(f"| {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
