"""The demo's report: what stage 2 gains and gives up, under a title computed from the figures.

`metrics` is what metrics.json holds; `curves` gives for each training its evaluations on the
validation split, as dicts of step, ndcg@20 and, in stage 2, alignment.
"""

import math
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

NDCG, ALIGNMENT = "ndcg@20", "alignment"
NAMES = {
    "sft": "SFT",
    "simrankpo": "SimRankPO",
    "rankpo": "RankPO",
    "rankpo_replay": "RankPO + replay",
}
# Okabe and Ito's colours can be told apart with any colour vision; the marks differ as well.
STYLE = {
    "stage1": {"color": "#000000", "marker": "o"},
    "sft": {"color": "#E69F00", "marker": "s"},
    "simrankpo": {"color": "#0072B2", "marker": "^"},
    "rankpo": {"color": "#D55E00", "marker": "D"},
    "rankpo_replay": {"color": "#009E73", "marker": "P"},
}
GREY = "#6E6E6E"
DPI, COLOURS = 130, 128
LABEL = 0.075  # of the trade-off's height: two lines
DASHED: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": (0, (4, 3))}
LOOK: "dict[RcKeyType, Any]" = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "grid.color": "#E8E8E8",
}

Metrics = dict[str, Any]
Curves = dict[str, list[dict[str, float]]]


def methods(metrics: Metrics) -> list[str]:
    """Of stage 2, those that were measured."""
    return [name for name in NAMES if name in metrics]


def of_stage_1(metrics: Metrics) -> str:
    """Where it stood before and after its steps with mined negatives.

    That they did it is not said: part of it, or all, as many more steps with random ones would do.
    """
    random, mined = (metrics[name][NDCG] for name in ("stage1_random_negatives", "stage1"))
    return (
        f"Stage 1 stood at nDCG@20 {random:.2f} after its steps with random negatives, and at "
        f"{mined:.2f} after {metrics['scale']['mined_steps']} more with mined ones"
    )


def finding(metrics: Metrics) -> str:
    """Who agrees most with the judge, and who keeps most of the retrieval."""
    aligned = max(methods(metrics), key=lambda name: metrics[name][ALIGNMENT])
    kept = max(methods(metrics), key=lambda name: metrics[name][NDCG])
    before, after = metrics["stage1"][ALIGNMENT], metrics[aligned][ALIGNMENT]
    gain, cost = f"({before:.2f} to {after:.2f})", f"({_kept(metrics, kept):.0%})"
    if aligned == kept:
        name = NAMES[aligned]
        return f"{name} agrees most with the judge {gain} and keeps most of nDCG@20 {cost}"
    return (
        f"{NAMES[aligned]} agrees most with the judge {gain}, "
        f"{NAMES[kept]} keeps most of nDCG@20 {cost}"
    )


def verdict(metrics: Metrics) -> str:
    """Which method wins on both axes; or who loses to whom, and what the others trade."""
    names = methods(metrics)
    losses = {  # name -> who is no worse on either axis, and better on one
        name: [o for o in names if _no_worse(metrics, o, name) and not _no_worse(metrics, name, o)]
        for name in names
    }
    standing = [name for name, better in losses.items() if not better]
    if len(standing) == 1:
        return f"{NAMES[standing[0]]} wins: no other method is better on either axis."
    beaten = "".join(
        f" {NAMES[name]} is no better than {' or '.join(NAMES[o] for o in better)} on either."
        for name, better in losses.items()
        if better
    )
    figures = ", ".join(
        f"{NAMES[name]} {metrics[name][ALIGNMENT]:.2f} for {_kept(metrics, name):.0%}"
        for name in standing
    )
    return f"No method wins on both axes.{beaten} Agreement for nDCG@20 kept: {figures}."


def _kept(metrics: Metrics, name: str) -> float:
    return metrics[name][NDCG] / metrics["stage1"][NDCG]


def _no_worse(metrics: Metrics, one: str, other: str) -> bool:
    return all(metrics[one][axis] >= metrics[other][axis] for axis in (NDCG, ALIGNMENT))


def draw(metrics: Metrics, curves: Curves, path: Path) -> None:
    """Write the report to `path`, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from rankpo_fast.data.files import whole_file

    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(12, 7))
        grid = figure.add_gridspec(
            3, 2, width_ratios=(1.6, 1), left=0.07, right=0.98, top=0.83, bottom=0.165,
            hspace=0.6, wspace=0.16,
        )  # fmt: skip
        trade, stage1, alignment, ndcg = map(
            figure.add_subplot, (grid[:, 0], grid[0, 1], grid[1, 1], grid[2, 1])
        )
        _trade_off(trade, metrics)
        _stage1(stage1, curves)
        _stage2(alignment, curves, ALIGNMENT, "Stage 2: agreement with the judge")
        _stage2(ndcg, curves, NDCG, "Stage 2: nDCG@20")
        ndcg.set_xlabel("step")
        figure.text(0.02, 0.945, finding(metrics), fontsize=13.5, fontweight="bold")
        sentences = fill(verdict(metrics), 155)
        figure.text(0.02, 0.925, sentences, fontsize=10, color="#404040", va="top")
        figure.text(0.02, 0.02, _caption(metrics), fontsize=8.5, color="#505050", linespacing=1.4)
        with whole_file(path) as temporary:
            _save(figure, temporary)
        plt.close(figure)


def _save(figure: "Figure", path: Path) -> None:
    """As PNG of COLOURS colours, a quarter of one of all: it lies in the repository."""
    from PIL import Image

    picture = BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    whole = Image.open(picture).convert("RGB")
    few = whole.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, format="PNG", optimize=True)


def _caption(metrics: Metrics) -> str:
    size = metrics["scale"]["splits"]["test"]
    return (
        f"A synthetic world, seed {metrics['seed']}: {size['jobs']} test jobs search "
        f"{size['talents']} test talents, none of them seen in training. nDCG@20: do those come "
        "first who fit by place, rank and field?\n"
        "Agreement: a noisy simulated judge, who prefers evidence to phrases, compared "
        f"{metrics['test_pairs']:,} pairs of candidates retrieved by stage 1; which share does a "
        "model order alike?\n"
        "Horizontal bars are two standard errors. The curves on the right are of the validation "
        "split."
    )


def _trade_off(axes: Any, metrics: Metrics) -> None:
    from matplotlib.patheffects import withStroke

    names = ["stage1", *methods(metrics)]
    points = {name: (metrics[name][ALIGNMENT], metrics[name][NDCG]) for name in names}
    xs, ys = zip(*points.values(), strict=True)
    ceiling, room = metrics["judge_ceiling"], max(0.05, 0.2 * (max(ys) - min(ys)))
    axes.set_xlim(min(0.47, *xs) - 0.02, max(ceiling + 0.02, max(xs) + 0.12))
    axes.set_ylim(max(0, min(ys) - room), min(1, max(ys) + room))
    axes.set_title("Where each model ends (test split): up and right is better")
    axes.set_xlabel("agreement with the judge (alignment)")
    axes.set_ylabel("nDCG@20 by the rules")
    _mark(axes, 0.5, "coin\nflip", right=False)
    _mark(axes, ceiling, "most the noisy\njudge allows", right=False)
    bottom, top = axes.get_ylim()
    heights = _apart({name: points[name][1] for name in names[1:]}, LABEL * (top - bottom))
    for name, (x, y) in points.items():
        style = STYLE[name]
        if name != "stage1":
            arrow = {"arrowstyle": "-|>", "color": style["color"], "linewidth": 1.8, "alpha": 0.7,
                     "shrinkA": 9, "shrinkB": 9}  # fmt: skip
            axes.annotate("", (x, y), points["stage1"], arrowprops=arrow)
        error = 2 * math.sqrt(x * (1 - x) / metrics["test_pairs"])
        axes.errorbar(
            x, y, xerr=error, **style, markersize=11, markeredgecolor="white", capsize=3, zorder=3
        )
        # Right of the bar, which is clear of other points and bars; stage 1 has the arrows there.
        if name == "stage1":
            end, offset, anchor = (x, y), (9, 7), "bottom"
        else:
            end, offset, anchor = (x + error, heights[name]), (6, 0), "center"
        axes.annotate(
            f"{NAMES.get(name, 'stage 1')}\n{y:.2f} at {x:.2f}", end, offset, va=anchor,
            textcoords="offset points", color=style["color"], fontweight="bold", linespacing=1.2,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels: at their points, or as far below as keeps `gap` to the one above."""
    placed: dict[str, float] = {}
    lowest = math.inf
    for name in sorted(heights, key=heights.__getitem__, reverse=True):
        placed[name] = lowest = min(heights[name], lowest - gap)
    return placed


def _stage1(axes: Any, curves: Curves) -> None:
    before, after = curves["stage1_random_negatives"], curves["stage1"]
    mined_at = before[-1]["step"]
    after = [before[-1], *({**point, "step": point["step"] + mined_at} for point in after)]
    axes.set_title("Stage 1: nDCG@20")
    _plot(axes, before, NDCG, color=GREY, marker="o")
    _plot(axes, after, NDCG, **STYLE["stage1"])
    _mark(axes, mined_at, "hard negatives\nfrom here", right=True)


def _stage2(axes: Any, curves: Curves, axis: str, title: str) -> None:
    axes.set_title(title)
    for name, label in NAMES.items():
        if name in curves:
            _plot(axes, curves[name], axis, **STYLE[name], label=label)
    if axis == NDCG:  # which falls, and leaves room for it
        axes.legend(
            frameon=False, fontsize=8.5, handlelength=1.4, labelspacing=0.2, loc="lower left"
        )


def _plot(axes: Any, points: list[dict[str, float]], axis: str, **style: Any) -> None:
    steps, values = [point["step"] for point in points], [point[axis] for point in points]
    axes.plot(steps, values, markersize=4, linewidth=1.8, **style)


def _mark(axes: Any, x: float, text: str, *, right: bool) -> None:
    axes.axvline(x, **DASHED)
    axes.annotate(
        text, (x, 0), (4 if right else -4, 6), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="left" if right else "right", color=GREY, fontsize=9,
    )  # fmt: skip
