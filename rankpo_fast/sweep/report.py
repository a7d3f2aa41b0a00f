"""What a sweep found: settings chosen on validation, their figures on the test data, frontiers.

A choice is a setup and an alpha. Validation, averaged over seeds, decides which choices make a
method's frontier and which one is named best; test data decide nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankpo_fast.sweep.frontier import Interval, Point, area, height, undominated, width
from rankpo_fast.sweep.run import TEST, VALIDATION, Figures, Runner
from rankpo_fast.sweep.spec import START, Job, Setup

ALIGNMENT = "alignment"
LEVELS = 3  # of one figure, evenly apart, at which the other one is compared


@dataclass(frozen=True)
class Choice:
    """A setup, and how much of its change of weights is taken."""

    setup: Setup
    alpha: float

    def __str__(self) -> str:
        return f"{self.setup}{'' if self.alpha == 1 else f', alpha {self.alpha:g}'}"


class Results:
    """What was measured, by choice and seed."""

    def __init__(self, runner: Runner):
        self._runner, self.sweep = runner, runner.sweep
        self._jobs: dict[tuple[Setup, int], Job] = {(j.setup, j.seed): j for j in self.sweep.jobs}
        self.setups = list(dict.fromkeys(job.setup for job in self.sweep.jobs))
        self.methods = list(dict.fromkeys(setup.method for setup in self.setups))
        others = [name for name in self.sweep.choose if name != ALIGNMENT]
        self.axes = (ALIGNMENT, others[0]) if others else None

    def choices(self, method: str) -> list[Choice]:
        """Those that were measured on validation with every seed."""
        choices = [Choice(setup, alpha) for setup in self.setups if setup.method == method
                   for alpha in self._jobs[setup, self.sweep.seeds[0]].alphas]  # fmt: skip
        return [choice for choice in choices if self.of_seeds(VALIDATION, choice) is not None]

    def of_seeds(self, split: str, choice: Choice | None) -> list[Figures] | None:
        """Figures of each seed, of the start for None; None where any seed's are missing."""
        found = []
        for seed in self.sweep.seeds:
            job = None if choice is None else self._jobs[choice.setup, seed]
            alpha = 0.0 if choice is None else choice.alpha
            found.append(self._runner.figures(split, job, alpha, seed))
        measured = [figures for figures in found if figures is not None]
        return measured if len(measured) == len(found) else None

    def mean(self, split: str, choice: Choice | None) -> Figures:
        of_seeds = self.of_seeds(split, choice)
        assert of_seeds is not None
        return {name: statistics.fmean(one[name] for one in of_seeds) for name in of_seeds[0]}

    def best(self, method: str) -> Choice | None:
        """Of the highest weighted mean of figures on validation."""
        return max(self.choices(method), key=self._worth, default=None)

    def _worth(self, choice: Choice) -> float:
        figures, weights = self.mean(VALIDATION, choice), self.sweep.choose
        return sum(w * figures[name] for name, w in weights.items()) / sum(weights.values())

    def frontier(self, method: str) -> list[Choice]:
        """Choices that no other of the method beats on validation, by alignment."""
        choices = self.choices(method)
        points = [self._point(self.mean(VALIDATION, choice)) for choice in choices]
        return [choices[i] for i in undominated(points)]

    def chosen(self) -> dict[Job, list[float]]:
        """The alphas of each training that are to be measured on the test data."""
        alphas: dict[str, set[float]] = {}
        jobs: dict[str, Job] = {}
        for method in self.methods:
            best = self.best(method)
            choices = [best] if best is not None else []
            choices += self.frontier(method) if self.axes is not None else []
            for choice in dict.fromkeys(choices):
                for seed in self.sweep.seeds:
                    job = self._jobs[choice.setup, seed]
                    jobs[job.folder] = job
                    alphas.setdefault(job.folder, set()).add(choice.alpha)
        return {job: sorted(alphas[folder]) for folder, job in jobs.items()}

    def points(self, split: str, choices: Sequence[Choice | None]) -> list[list[Point]]:
        """Of each seed the points of those choices that were measured."""
        measured = [found for choice in choices if (found := self.of_seeds(split, choice))]
        return [[self._point(found[i]) for found in measured] for i in range(len(self.sweep.seeds))]

    def _point(self, figures: Figures) -> Point:
        assert self.axes is not None
        return figures[self.axes[0]], figures[self.axes[1]]


@dataclass(frozen=True)
class Comparison:
    """A method's frontier less another's, on the test data."""

    method: str
    than: str
    area: Interval
    heights: dict[float, Interval]  # by alignment
    widths: dict[float, Interval]  # by the other figure


def comparisons(results: Results, than: str) -> list[Comparison]:
    """Each other method beside `than`, as far as all go that gain anything; any may also leave the
    start as it is."""
    frontiers = {m: results.points(TEST, [None, *results.frontier(m)]) for m in results.methods}
    start_x, start_y = (statistics.fmean(points[0][axis] for points in frontiers[than])
                        for axis in (0, 1))  # fmt: skip
    reach = {method: min(max(x for x, _ in points) for points in seeds)
             for method, seeds in frontiers.items()}  # fmt: skip
    gaining = [method for method in results.methods if reach[method] > start_x]
    if than not in gaining or len(gaining) < 2:
        return []
    high = min(reach[method] for method in gaining)
    bottom = max(min(y for _, y in points) for m in gaining for points in frontiers[m])
    # A seed that stays below a level would count there as `least`, however near it comes.
    top = min(max(y for _, y in points) for m in gaining for points in frontiers[m])
    found = []
    for method in gaining:
        if method == than:
            continue
        pairs = list(zip(frontiers[method], frontiers[than], strict=True))
        found.append(Comparison(
            method,
            than,
            Interval.of([area(a, start_x, high) - area(b, start_x, high) for a, b in pairs]),
            {x: Interval.of([height(a, x) - height(b, x) for a, b in pairs])
             for x in _between(start_x, high)},
            {y: Interval.of([width(a, y) - width(b, y) for a, b in pairs])
             for y in _between(bottom, start_y) if bottom < start_y and y <= top},
        ))  # fmt: skip
    return found


def _between(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (LEVELS + 1) for i in range(1, LEVELS + 1)]


def as_json(results: Results) -> dict[str, Any]:
    """All that was measured."""
    rows = []
    for method in results.methods:
        frontier = results.frontier(method) if results.axes is not None else []
        for choice in results.choices(method):
            row: dict[str, Any] = {
                "method": method, "settings": dict(choice.setup.settings), "alpha": choice.alpha,
                "best": choice == results.best(method), "frontier": choice in frontier,
            }  # fmt: skip
            for split in (VALIDATION, TEST):
                if (found := results.of_seeds(split, choice)) is not None:
                    row[split] = found
            rows.append(row)
    start = {split: results.of_seeds(split, None) for split in (VALIDATION, TEST)}
    return {"seeds": list(results.sweep.seeds), START: start, "choices": rows}


def as_markdown(results: Results, *, figure: str | None) -> str:
    """The report a person reads."""
    names, tested = list(results.sweep.choose), results.sweep.test is not None
    split = TEST if tested else VALIDATION
    lines = ["# What the sweep found", "", f"{len(results.sweep.jobs)} trainings, seeds "
             f"{', '.join(map(str, results.sweep.seeds))}. Settings were chosen on validation; "
             + ("the test data were read for those chosen alone." if tested else
                "no test data were given: these figures are those by which they were chosen."),
             ""]  # fmt: skip
    lines += [f"| method | settings | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    rows = [(START, "", results.of_seeds(split, None))]
    for method in results.methods:
        best = results.best(method)
        if best is None:
            lines.append(f"| {method} | no settings were measured with every seed |"
                         + " |" * len(names))  # fmt: skip
            continue
        chosen = ", ".join(f"{k} {v}" for k, v in best.setup.settings)
        alpha = "" if best.alpha == 1 else f"alpha {best.alpha:g}"
        rows.append(
            (method, ", ".join(filter(None, [chosen, alpha])), results.of_seeds(split, best))
        )
    for name, settings, found in rows:
        figures = [_spread([one[axis] for one in found]) if found else "" for axis in names]
        lines.append(f"| {name} | {settings} | {' | '.join(figures)} |")
    lines += ["", "Means over seeds, and standard deviations."]
    if figure is not None:
        lines += ["", f"![Frontiers of the methods]({figure})"]
    if results.axes is not None and tested and len(results.methods) > 1:
        lines += _compared(results)
    return "\n".join(lines) + "\n"


def _compared(results: Results) -> list[str]:
    assert results.axes is not None
    x, y = results.axes
    lines: list[str] = []
    for than in results.methods:
        found = comparisons(results, than)
        if not found:
            lines += ["", f"{than} is not compared: it has no {x} above the start's with every "
                      f"seed, or is alone in that."]  # fmt: skip
            continue
        lines += ["", f"## Beside {than}", "", "Test data; mean over seeds with 95 % intervals "
                  "(Student's t), differences seed by seed.", ""]  # fmt: skip
        heights = [f"{y} at {x} {level:.3f}" for level in found[0].heights]
        widths = [f"{x} at {y} {level:.3f}" for level in found[0].widths]
        lines.append(f"| method | {' | '.join([*heights, *widths])} | area |")
        lines.append("|---" * (2 + len(heights) + len(widths)) + "|")
        for one in found:
            cells = [*one.heights.values(), *one.widths.values(), one.area]
            lines.append(f"| {one.method} | {' | '.join(map(_marked, cells))} |")
        areas = [f"{one.method} {one.area.bootstrap_low:+.3f} to {one.area.bootstrap_high:+.3f}"
                 for one in found if one.area.seeds > 1]  # fmt: skip
        if areas:
            lines += ["", f"Areas by the bootstrap over seeds: {'; '.join(areas)}."]
    return lines


def _marked(interval: Interval) -> str:
    """Bold where the interval leaves out 0."""
    return f"**{interval}**" if interval.sign else str(interval)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
