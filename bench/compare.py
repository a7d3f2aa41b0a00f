"""Did it get worse? Two result files, row by row.

Times are compared as ratios to the floor (in a training, to the first contender) of their own run:
another hour, or another machine of the kind, changes both alike. Slower is what is so by more than
the threshold and by more than the rounds' own noise: a Welch test on the logarithms of all rounds'
ratios, or, where a file has percentiles alone, bands that do not overlap.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from .questions import Result, Row
from .results import Run

DEVIATIONS = 3.5  # of the means' difference: one in some 200 by chance, of two times five rounds
FEWEST = 3  # rounds that tell anything about noise
LITTLE_MIB = 8.0  # what resident memory varies by on the CPU


@dataclass(frozen=True)
class Change:
    """What became of a row; `worse` are the reasons why it is worse."""

    name: str  # case, shape, contender
    ours: bool
    time: float | None  # after over before
    memory: float | None
    worse: tuple[str, ...] = ()
    better: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    alone: tuple[str, ...]  # rows of one file only
    machines: tuple[str, ...]  # what differs between the two

    @property
    def regressed(self) -> bool:
        """A peer that got slower is told, and is no fault of ours."""
        return any(change.worse and change.ours for change in self.changes)


def compare(before: Run, after: Run, threshold: float) -> Comparison:
    """threshold: 0.05 is five per cent, of time and of memory."""
    old, new = (dict(_rows(run)) for run in (before, after))
    changes = [_change(name, *old[name], *new[name], threshold) for name in old if name in new]
    alone = [f"only before: {name}" for name in old if name not in new]
    alone += [f"only after: {name}" for name in new if name not in old]
    keys = [key for key in before.machine if key not in ("rates", "date", "commit", "left out")]
    machines = [
        f"{key}: {before.machine[key]} -> {after.machine.get(key, 'unknown')}"
        for key in keys
        if before.machine[key] != after.machine.get(key)
    ]
    return Comparison(tuple(changes), tuple(alone), tuple(machines))


def table(comparison: Comparison) -> str:
    """Every row that changed, the worst first, and how many did not."""
    lines = [f"differs: {each}" for each in comparison.machines]
    ordered = sorted(comparison.changes, key=lambda change: (not change.worse, not change.better))
    for change in ordered:
        if change.worse:
            whose = "WORSE" if change.ours else "worse (a peer)"
            lines.append(f"{whose}: {change.name}: {', '.join(change.worse)}")
        elif change.better:
            lines.append(f"better: {change.name}: {', '.join(change.better)}")
    same = sum(not (change.worse or change.better) for change in ordered)
    return "\n".join([*lines, *comparison.alone, f"{same} of {len(ordered)} rows: no change"])


def _rows(run: Run) -> Iterator[tuple[str, tuple[Result, Row]]]:
    for result in run.results:
        for row in result.rows:
            yield f"{result.name}: {row.contender}", (result, row)


def _change(name: str, of: Result, old: Row, now_of: Result, new: Row, threshold: float) -> Change:
    if new.note and not old.note:
        return Change(name, new.ours, None, None, worse=(new.note,))
    if old.note and not new.note:
        return Change(name, new.ours, None, None, better=(f"was: {old.note}",))
    worse, better = [], []
    time = memory = None
    if old.ratio and new.ratio and of.floor == now_of.floor and not of.is_floor(old):
        time = new.ratio / old.ratio
        if abs(time - 1) > threshold and _beyond_noise(old, new):
            said = f"time {time - 1:+.0%} ({old.ratio:.3g} -> {new.ratio:.3g} of the floor)"
            (worse if time > 1 else better).append(said)
    if old.peak_mib is not None and new.peak_mib is not None:
        memory = new.peak_mib / old.peak_mib if old.peak_mib else None
        more = new.peak_mib - old.peak_mib
        if abs(more) > max(LITTLE_MIB, threshold * old.peak_mib):
            said = f"memory {old.peak_mib:.0f} -> {new.peak_mib:.0f} MiB"
            (worse if more > 0 else better).append(said)
    return Change(name, new.ours, time, memory, tuple(worse), tuple(better))


def _beyond_noise(old: Row, new: Row) -> bool:
    if not (old.ratios and new.ratios):
        bands = (old.ratio_low, old.ratio_high, new.ratio_low, new.ratio_high)
        return None not in bands and (bands[2] > bands[1] or bands[3] < bands[0])
    if min(len(old.ratios), len(new.ratios)) < FEWEST:
        return False
    sides = [[math.log(ratio) for ratio in row.ratios] for row in (old, new)]
    difference = statistics.mean(sides[1]) - statistics.mean(sides[0])
    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))
    return abs(difference) > DEVIATIONS * error
