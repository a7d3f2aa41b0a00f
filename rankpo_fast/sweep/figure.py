"""The frontiers of a sweep's methods, each seed's and their mean, beside the paper's curves."""

import csv
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rankpo_fast.sweep.frontier import Point, height
from rankpo_fast.sweep.report import Results
from rankpo_fast.sweep.run import TEST, VALIDATION
from rankpo_fast.sweep.spec import START

# Okabe and Ito's colours, told apart with any colour vision; the marks differ as well.
LOOKS = [
    ("#0072B2", "^"), ("#D55E00", "D"), ("#009E73", "P"), ("#E69F00", "s"), ("#CC79A7", "v"),
    ("#56B4E9", "X"), ("#6E6E6E", "*"), ("#000000", "h"),
]  # fmt: skip
PAPER = Path(__file__).with_name("paper.csv")
STEPS = 200  # of a band


def png(results: Results) -> bytes:
    """The picture; the results must have two axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    assert results.axes is not None
    x, y = results.axes
    split = TEST if results.sweep.test is not None else VALIDATION
    figure, (ours, paper) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(1.6, 1), layout="constrained"
    )
    start = [points[0] for points in results.points(split, [None])]
    ours.plot(*_means([start]), "o", color="black", markersize=8, label=START, zorder=5)
    for method, (colour, mark) in zip(results.methods, LOOKS * len(results.methods), strict=False):
        frontier = results.frontier(method)
        seeds = results.points(split, [None, *frontier])
        _band(ours, seeds, colour)
        by_choice = list(zip(*results.points(split, frontier), strict=True))
        ours.plot(*_means(by_choice), marker=mark, color=colour, linewidth=1, label=method)
    ours.set(xlabel=x, ylabel=y)
    ours.set_title(f"This sweep, {split} data: {len(results.sweep.seeds)} seeds, their mean and "
                   f"range", loc="left", fontsize=10)  # fmt: skip
    ours.legend(frameon=False, fontsize=8)
    _paper(paper)
    for axes in (ours, paper):
        axes.grid(color="#E8E8E8")
        axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return file.getvalue()


def _means(of_points: Sequence[Sequence[Point]]) -> tuple[list[float], list[float]]:
    """x and y of the mean of each group of points."""
    return (
        [statistics.fmean(x for x, _ in points) for points in of_points],
        [statistics.fmean(y for _, y in points) for points in of_points],
    )


def _band(axes: Any, seeds: Sequence[Sequence[Point]], colour: str) -> None:
    """Where the seeds' frontiers lie, as far as all of them reach."""
    low = min(x for points in seeds for x, _ in points)
    high = min(max(x for x, _ in points) for points in seeds)
    levels = [low + (high - low) * i / STEPS for i in range(STEPS + 1)]
    heights = [[height(points, level) for points in seeds] for level in levels]
    axes.fill_between(levels, list(map(min, heights)), list(map(max, heights)), color=colour,
                      alpha=0.15, linewidth=0)  # fmt: skip


def _paper(axes: Any) -> None:
    """What arXiv 2503.10723 shows of its own data: read off its figure, to 0.002, one seed."""
    lines = PAPER.read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    for method, (colour, mark) in zip(
        dict.fromkeys(r["method"] for r in rows), LOOKS, strict=False
    ):
        own = [row for row in rows if row["method"] == method]
        axes.plot([float(row["alignment"]) for row in own], [float(row["ndcg20"]) for row in own],
                  marker=mark, markersize=4, linewidth=1, color=colour, label=method)  # fmt: skip
    axes.set(xlabel="alignment", ylabel="nDCG@20")
    axes.set_title("The paper, its data, one seed, by learning rate", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7)
