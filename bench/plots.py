"""Pictures of a result file, one question each. A function returns None where the run holds nothing
for its picture. Ours is one colour everywhere, a lower bound is grey; what a picture leaves out for
want of room, its title counts and the tables have.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from textwrap import fill, shorten
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from rankpo_fast.demo.figure import DASHED, GREY, LOOK

from .curves import Growth, Limit, growths
from .questions import OUT_OF_MEMORY, Result, Row, described
from .results import Run
from .tables import mebibytes, number, times

# Okabe and Ito's colours can be told apart with any colour vision; the marks differ as well.
OUR_COLOR, WINS, PEER = "#D55E00", "#0072B2", "#9DB7CB"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = "osD^vPX*"
WIDTH = 10  # inches; on a page of 800 pixels its letters have ten
MOST = 8  # panels of a picture
TICKS = 6
MARK = 0.09  # the height of one, of its panel
MOST_RATIO = 5  # where the axis of ratios ends
LEAST_MIB, LEAST_ERROR = 0.1, 1e-16  # no less on an axis that has no zero
MOST_ERROR = 1e9  # where what is not finite stands
PLAIN = {**LOOK, "text.parse_math": False}  # a note may hold any sign

Style = Mapping[str, Any]


def time_memory(run: Run) -> Figure | None:
    """Time and peak memory over the batch, a line an implementation."""
    growing = growths(run)
    if not growing:
        return None
    style, kept = styles(run.results), growing[:MOST]
    with matplotlib.rc_context(PLAIN):
        figure = _figure(
            2.4 * len(kept),
            "Time (left) and peak memory above inputs and gradients (right) over the batch, both "
            f"axes logarithmic{_left_out(kept, growing)}\n"
            "lower is better; \N{MULTIPLICATION SIGN}: the first size that an implementation did "
            "not reach",
        )
        axes = figure.subplots(len(kept), 2, squeeze=False)
        for (left, right), growth in zip(axes, kept, strict=True):
            _grow(left, growth, style, "times")
            _grow(right, growth, style, "peaks")
            left.set_title(growth.title)
        _legend(figure, style, {curve.implementation for growth in kept for curve in growth.curves})
    return figure


def lower_bound(run: Run) -> Figure | None:
    """Time over that of the lower bound, a bar an implementation, the fastest on top."""
    cases = _a_shape_a_case(run, lambda row: row.ratio is not None)
    if not cases:
        return None
    kept = cases[:MOST]
    with matplotlib.rc_context(PLAIN):
        figure, axes = _panels(
            [len(_bars(result)) for result in kept],
            "Time over the lower bound's: 1 (dashed) is what the products or copies that any form "
            f"needs take alone{_left_out(kept, cases)}\n"
            "bars: median, whiskers: 20th to 80th percentile of rounds; shorter is better; orange "
            "is ours, deep blue a peer that is faster",
        )
        for axis, result in zip(axes, kept, strict=True):
            _beside_the_bound(axis, result)
    return figure


def ladder(run: Run) -> Figure | None:
    """What each way to train takes in memory and gives in speed."""
    steps = [
        result
        for result in run.results
        if result.family == "training" and sum(row.peak_mib is not None for row in result.rows) > 1
    ]
    if not steps:
        return None
    kept = steps[:MOST]
    with matplotlib.rc_context(PLAIN):
        heights = [len(_present(result)) for result in kept]
        figure = _figure(
            sum(0.32 * height + 0.75 for height in heights),
            "A training step: peak memory in MiB, weights and optimizer included (left, shorter is "
            f"better) and tokens a second (right, longer is better){_left_out(kept, steps)}\n"
            "orange is ours",
        )
        axes = figure.subplots(len(kept), 2, squeeze=False, height_ratios=[h + 1 for h in heights])
        for (left, right), result in zip(axes, kept, strict=True):
            rows = _present(result)
            _bar(left, rows, [row.peak_mib for row in rows], mebibytes)
            _bar(right, rows, [row.tokens for row in rows], number)
            left.set_title(result.name)
            left.set_yticks(range(len(rows)), [row.implementation for row in rows])
            right.set_yticks(range(len(rows)), [])
    return figure


def accuracy(run: Run) -> Figure | None:
    """Error against time, a point an implementation, fresh data and converged."""
    cases = _a_shape_a_case(run, lambda row: row.seconds is not None and bool(_errors_of(row)))
    if not cases:
        return None
    style, kept = styles(run.results), cases[:MOST]
    with matplotlib.rc_context(PLAIN):
        figure, axes = _panels(
            [6] * len(kept),
            "Error against fp64, relative, the worst of loss and gradients, over time, both axes "
            f"logarithmic{_left_out(kept, cases)}\n"
            "left and low is better; filled: fresh data, hollow: data of a finished training; "
            "dashed: the gate of ours",
        )
        for axis, result in zip(axes, kept, strict=True):
            _errors(axis, result, style)
        _legend(figure, style, {r.implementation for result in kept for r in result.rows
                                if r.seconds is not None and _errors_of(r)})  # fmt: skip
    return figure


def trend(trends: Sequence[Result]) -> Figure | None:
    """Of history.trends: ours beside the lower bound, from result file to result file."""
    lasting = [result for result in trends if sum(r.ratio is not None for r in result.rows) > 1]
    if not lasting:
        return None
    kept = lasting[:MOST]
    with matplotlib.rc_context(PLAIN):
        figure, axes = _panels(
            [7] * len(kept),
            "Time of ours over the lower bound's, from result file to result file"
            f"{_left_out(kept, lasting)}\n"
            "lower is better; bars: 20th to 80th percentile of rounds; peak memory beside each",
        )
        for axis, result in zip(axes, kept, strict=True):
            _over_time(axis, result)
    return figure


def styles(results: Iterable[Result]) -> dict[str, Style]:
    """Of every implementation, the same in all pictures of a run."""
    results = list(results)
    names = dict.fromkeys(row.implementation for result in results for row in result.rows)
    bounds = {row.implementation for r in results for row in r.rows if r.is_lower_bound(row)}
    ours = {row.implementation for result in results for row in result.rows if row.ours}
    our_marks, marks, colors = cycle(MARKS), cycle(MARKS[1:]), cycle(COLORS)
    styled: dict[str, Style] = {}
    for name in names:
        if name in bounds:
            styled[name] = {"color": GREY, "marker": ".", "linestyle": "--"}
        elif name in ours:
            styled[name] = {"color": OUR_COLOR, "marker": next(our_marks), "zorder": 3}
        else:
            styled[name] = {"color": next(colors), "marker": next(marks)}
    return styled


def _a_shape_a_case(run: Run, tells: Callable[[Row], bool]) -> list[Result]:
    """Of each loss the shape at which most rows tell something, the largest of equals."""
    best: dict[str, tuple[tuple[int, int], Result]] = {}
    for result in run.results:
        count = sum(tells(row) for row in result.rows if not result.is_lower_bound(row))
        size = math.prod(x for x in result.shape.values() if isinstance(x, int))
        if result.family == "loss" and count:
            before = best.get(result.case)
            if before is None or (count, size) > before[0]:
                best[result.case] = (count, size), result
    return [result for _, result in best.values()]


def _present(result: Result) -> list[Row]:
    return [row for row in result.rows if not row.absent]


def _grow(axes: Axes, growth: Growth, style: Mapping[str, Style], field: str) -> None:
    """`field` of curves: times or peaks."""
    least, tick = (0, _seconds_tick) if field == "times" else (LEAST_MIB, _mib_tick)
    drawn: list[float] = []
    limits: list[tuple[str, Limit]] = []
    for curve in growth.curves:
        pairs = zip(curve.sizes, getattr(curve, field), strict=True)
        points = [(x, max(y, least)) for x, y in pairs if not math.isnan(y)]
        if points:
            axes.plot(*zip(*points, strict=True), markersize=5, linewidth=1.6,
                      **style[curve.implementation])  # fmt: skip
            drawn += [y for _, y in points]
        if curve.limit is not None:
            limits.append((curve.implementation, curve.limit))
    axes.loglog()
    reached = {x for curve in growth.curves for x in curve.sizes}
    sizes = sorted(reached | {limit.size for _, limit in limits})
    _ticks(axes.xaxis, sizes[:: math.ceil(len(sizes) / TICKS)], lambda x: f"{x:,.0f}")
    axes.set_xlabel(growth.axis)
    low, high = (min(drawn) / 1.5, max(drawn) * 1.5) if drawn else (1, 10)
    room = _mark_limits(axes, limits, style) if limits else 0
    axes.set_ylim(low, high * (high / low) ** (room / (1 - room)))
    _ticks(axes.yaxis, round_numbers(low, high), tick)


def _mark_limits(
    axes: Axes, limits: Sequence[tuple[str, Limit]], style: Mapping[str, Style]
) -> float:
    """At the top, one over the other where several end at one size; the share that they need."""
    across = axes.get_xaxis_transform()
    stacks: Counter[int] = Counter()
    for implementation, (size, _) in limits:
        color = style[implementation]["color"]
        axes.plot(size, 0.95 - MARK * stacks[size], marker="x", color=color, markersize=8,
                  markeredgewidth=2.2, transform=across, clip_on=False)  # fmt: skip
        stacks[size] += 1
    full = all(OUT_OF_MEMORY in limit.why for _, limit in limits)
    axes.annotate(
        OUT_OF_MEMORY if full else "not reached", (min(stacks), 0.95), (-9, 0), xycoords=across,
        textcoords="offset points", ha="right", va="center", fontsize=8, color=GREY,
    )  # fmt: skip
    return min(0.6, MARK * (max(stacks.values()) + 0.5))


def _ticks(axis: Axis, places: Sequence[float], write: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: write(x)))


def round_numbers(low: float, high: float) -> list[float]:
    """A few between two numbers of which one is twice the other or more."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades = [10.0**k for k in range(first, last + 1)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        found = [step * ten for ten in decades for step in steps if low <= step * ten <= high]
        if len(found) > 2:
            break
    return found[:: math.ceil(len(found) / TICKS)]


def _seconds_tick(x: float) -> str:
    unit, name = next((each for each in ((1, "s"), (1e-3, "ms")) if x >= 0.9999 * each[0]),
                      (1e-6, "us"))  # fmt: skip
    return f"{x / unit:.3g} {name}"


def _mib_tick(x: float) -> str:
    return f"{x:,.0f} MiB" if x >= 10 else f"{x:g} MiB"


def _bars(result: Result) -> list[Row]:
    """The fastest first, who gave no time last; without the lower bound itself."""
    rows = [row for row in _present(result) if row.implementation != result.lower_bound]
    return sorted(rows, key=lambda row: (row.ratio is None, row.ratio or 0))


def _beside_the_bound(axes: Axes, result: Result) -> None:
    rows = _bars(result)
    ours = [row.cost for row in rows if row.ours and row.cost is not None]
    most = max((row.ratio_high or row.ratio for row in rows if row.ratio is not None), default=1)
    end = min(MOST_RATIO, max(most, 1.2))
    for place, row in enumerate(rows):
        if row.ratio is None:
            axes.text(0.03 * end, place, shorten(row.note, 36, placeholder=" ..."), va="center",
                      fontsize=8.5, color=GREY)  # fmt: skip
            continue
        other_bound = result.is_lower_bound(row)
        wins = bool(ours) and row.ratio < min(ours) and not (row.ours or other_bound)
        color = OUR_COLOR if row.ours else GREY if other_bound else WINS if wins else PEER
        length = min(row.ratio, end)
        axes.barh(place, length, color=color, height=0.66)
        if row.ratio <= end and row.ratio_low is not None and row.ratio_high is not None:
            low, high = row.ratio_low, min(row.ratio_high, end)
            axes.hlines(place, low, high, color="black", linewidth=1)
            axes.vlines([low, high], place - 0.17, place + 0.17, color="black", linewidth=1)
        says = f"{times(row.ratio)}" + " \N{RIGHTWARDS ARROW}" * (row.ratio > end)
        says += ", beats ours" * wins
        right = min(max(row.ratio_high or 0, row.ratio), end)
        axes.text(right + 0.02 * end, place, says, va="center", fontsize=8.5,
                  fontweight="bold" if row.ours or wins else "normal")  # fmt: skip
    axes.axvline(1, **DASHED)
    axes.set_xlim(0, 1.3 * end)
    axes.xaxis.set_major_locator(FixedLocator(range(math.floor(end) + 1)))
    axes.set_yticks(range(len(rows)), [row.implementation for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    _name(axes, result)


def _bar(
    axes: Axes, rows: Sequence[Row], values: Sequence[float | None], write: Callable[[float], str]
) -> None:
    most = max((x for x in values if x is not None), default=0) or 1
    for place, (row, x) in enumerate(zip(rows, values, strict=True)):
        axes.barh(place, x or 0, color=OUR_COLOR if row.ours else PEER, height=0.66)
        says = shorten(row.note, 36, placeholder=" ...") if x is None else write(x)
        axes.text((x or 0) + 0.015 * most, place, says, va="center", fontsize=8.5,
                  color=GREY if x is None else "black")  # fmt: skip
    axes.set_xlim(0, 1.2 * most)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(False, axis="y")
    axes.invert_yaxis()


def _errors(axes: Axes, result: Result, style: Mapping[str, Style]) -> None:
    errors: list[float] = []
    seconds: list[float] = []
    for row in result.rows:
        found = _errors_of(row)
        if row.seconds is None or not found:
            continue
        look = {**style[row.implementation], "linestyle": "none", "markersize": 8}
        axes.plot([row.seconds] * len(found), list(found.values()),
                  color=look["color"], linewidth=1)  # fmt: skip
        for face, error in found.items():
            axes.plot(row.seconds, error, **look, markerfacecolor=face or look["color"])
        errors += found.values()
        seconds.append(row.seconds)
    if result.gate is not None:
        axes.axhline(result.gate, **DASHED)
        errors.append(result.gate)
    axes.loglog()
    low, high = min(seconds) / 1.4, max(seconds) * 1.4
    axes.set_xlim(low, high)
    _ticks(axes.xaxis, round_numbers(low, high), _seconds_tick)
    low, high = min(errors) / 12, max(errors) * 12  # so that what is as good as equal looks so
    axes.set_ylim(low, high)
    _ticks(axes.yaxis, round_numbers(low, high), lambda y: f"{y:.0e}")
    _name(axes, result)


def _errors_of(row: Row) -> dict[str | None, float]:
    """Those known, by what fills their marks: nothing of its own that on fresh data."""
    pair = {None: row.error, "white": row.converged}
    known = {face: error for face, error in pair.items() if error is not None}
    return {face: min(max(error, LEAST_ERROR), MOST_ERROR) for face, error in known.items()}


def _name(axes: Axes, result: Result) -> None:
    axes.set_title(f"{result.case}\n{described(result.shape)}")


def _over_time(axes: Axes, result: Result) -> None:
    rows = [(row, row.ratio) for row in result.rows if row.ratio is not None]
    for place, (row, ratio) in enumerate(rows):
        if row.ratio_low is not None and row.ratio_high is not None:
            axes.vlines(place, row.ratio_low, row.ratio_high, color=OUR_COLOR, linewidth=5,
                        alpha=0.25)  # fmt: skip
        memory = "" if row.peak_mib is None else f"\n{mebibytes(row.peak_mib)} MiB"
        axes.annotate(f"{times(ratio)}{memory}", (place, ratio), (0, 7), ha="center",
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
    axes.plot([ratio for _, ratio in rows], color=OUR_COLOR, marker="o", linewidth=1.6)
    axes.axhline(1, **DASHED)
    axes.set_xlim(-0.3, len(rows) - 0.7)
    axes.set_ylim(0, 1.35 * max(row.ratio_high or ratio for row, ratio in rows))
    skipped = math.ceil(len(rows) / TICKS)
    axes.set_xticks(
        range(0, len(rows), skipped),
        [row.implementation.replace(" ", "\n", 1) for row, _ in rows[::skipped]],
        fontsize=8,
    )
    axes.set_title(f"{result.name}\n{fill(result.question, 50)}")


def _figure(height: float, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height + 1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def _panels(heights: Sequence[int], title: str) -> tuple[Figure, list[Axes]]:
    """Two a row, each as high as so many bars need."""
    columns = min(2, len(heights))
    tallest = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    figure = _figure(sum(0.3 * height + 0.75 for height in tallest), title)
    grid = figure.subplots(
        len(tallest), columns, squeeze=False, height_ratios=[height + 1 for height in tallest]
    )
    axes = list(grid.flat)
    for spare in axes[len(heights) :]:
        spare.remove()
    return figure, axes[: len(heights)]


def _legend(figure: Figure, style: Mapping[str, Style], drawn: set[str]) -> None:
    lines = [Line2D([], [], label=name, **look) for name, look in style.items() if name in drawn]
    figure.legend(handles=lines, loc="outside lower left", ncols=4, frameon=False, fontsize=9)


def _left_out(kept: Sequence[Any], all_of: Sequence[Any]) -> str:
    return f" ({len(kept)} of {len(all_of)} cases)" if len(kept) < len(all_of) else ""
