"""A report as one picture: figures with their intervals, similarities, reliability of margins."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

from rankpo_fast.retrieval.report import BINS, Report

# Okabe and Ito's colours, which can be told apart with any colour vision.
COLOURS = ["#0072B2", "#E69F00"]
DPI = 130


def png(report: Report) -> bytes:
    from matplotlib.figure import Figure

    panels: list[Callable[[Any, Report], None]] = [_figures]
    if any(system.found.similarities for system in report.systems):
        panels.append(_similarities)
    if any(system.calibration for system in report.systems):
        panels.append(_reliability)
    figure = Figure(figsize=(4.6 * len(panels), 4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
    written = BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    return written.getvalue()


def _figures(axes: Any, report: Report) -> None:
    """nDCG at each cutoff and the alignment, with their intervals."""
    names = [name for name in report.systems[0].intervals if name.startswith(("ndcg", "align"))]
    for number, system in enumerate(report.systems):
        places = [place + 0.12 * number for place in range(len(names))]
        values = [system.found.figures[name] for name in names]
        bounds = [system.intervals[name] for name in names]
        lows, highs = zip(*bounds, strict=True)
        spread = [
            [max(0.0, value - low) for value, low in zip(values, lows, strict=True)],
            [max(0.0, high - value) for value, high in zip(values, highs, strict=True)],
        ]
        axes.errorbar(places, values, yerr=spread, fmt="o", capsize=3, color=COLOURS[number],
                      label=system.name)  # fmt: skip
    axes.set_xticks(range(len(names)), [name.replace("ndcg", "nDCG") for name in names])
    axes.set_ylim(0, 1)
    axes.set_title("figures, 95 % over queries", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def _similarities(axes: Any, report: Report) -> None:
    for number, system in enumerate(report.systems):
        for (name, values), style in zip(system.found.similarities.items(), ("-", ":"),
                                         strict=False):  # fmt: skip
            axes.hist(values, bins=BINS, density=True, histtype="step", linestyle=style,
                      color=COLOURS[number],
                      label=name if number == 0 else None)  # fmt: skip
    cosines = (v for s in report.systems for v in s.found.similarities.values() if v.size)
    axes.set_xlim(left=max(-1, min((v.min() for v in cosines), default=-1) - 0.05), right=1)
    axes.set_xlabel("cosine with the query")
    axes.set_yticks([])
    axes.set_title("similarities", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def _reliability(axes: Any, report: Report) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    for number, system in enumerate(report.systems):
        if system.calibration is not None:
            bins = system.calibration.bins
            axes.plot([b.predicted for b in bins], [b.observed for b in bins], "o-",
                      color=COLOURS[number])  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("predicted probability of the choice")
    axes.set_ylabel("share preferred")
    axes.set_title("reliability of margins", loc="left", fontsize=10)
