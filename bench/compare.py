"""Whether it got worse: two result files, row by row.

Times are compared as ratios to the lower bound, which every run takes within its own rounds:
neither a slower machine nor a noisy hour is a regression. Only the lower bound itself, and what has
none, since it stands beside a peer that may have changed, is compared in seconds, and only on the
same device.
A change is called one if it is

* larger than the threshold: the median of all quotients of a round after over a round before (the
  Hodges-Lehmann estimate, which a slow round moves little), and
* larger than noise: rounds of the one lie above rounds of the other so much more often than not
  that noise alone does it in a LEVEL of all rows (the exact rank-sum test, which asks nothing of
  how noise is distributed). Three rounds on either side can tell no less than a twentieth. Files
  that hold no rounds are told apart by their 20th and 80th percentiles, which must not overlap.

A scaling has one time a size: it is worse where all sizes, three at least, say so. What is counted
(flops, messages, what is sent) knows no noise.

An error is compared within one instruction set: in another, sums are rounded otherwise.

What is beyond the threshold and may be noise is "unclear": it is shown, so that it can be measured
with more rounds, and fails nothing. Of a hundred rows of noise alone, two may still be called.

Ours alone fail a comparison. That a peer became slower, or ran out of memory, is shown, since it
moves the picture that a reader has of ours, but it is not ours to mend; it is most often another
version of the peer, which the heading then names.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rankpo_fast.errors import InputError

from .questions import Result, Row
from .results import Run
from .tables import duration, number, times

THRESHOLD = 0.05
LEVEL = 0.02
ROUNDS = 3  # of fewer a row, nothing can be told from noise
# Two runs of the same code on a CPU were seen 8.5 MiB apart: allocators keep and round pages.
MEMORY_MIB = 16.0
SETS = "instruction set"  # of a machine
ERROR = 2.0  # times as large: rounding in another order moves an error, a lost digit does more
WORSE, BETTER, UNCLEAR = "worse", "better", "unclear"
NOT_COMPARED = {"date", "rates", "left out", "emulated", "level"}  # of what is said of a machine


@dataclass(frozen=True)
class Change:
    """Of one implementation at one shape in one respect: `quotient` is after over before."""

    result: str
    implementation: str
    respect: str  # time, memory, error, converged, nDCG, sizes, flops, messages, sent, note
    verdict: str
    says: str
    ours: bool
    quotient: float | None = None

    @property
    def fails(self) -> bool:
        return self.ours and self.verdict == WORSE


@dataclass(frozen=True)
class Comparison:
    """What changed; how many rows both have; which only one has; what differs of the machines."""

    changes: Sequence[Change]
    rows: int
    only_before: Sequence[str]
    only_after: Sequence[str]
    machines: Mapping[str, tuple[Any, Any]]
    threshold: float

    @property
    def code(self) -> int:
        """The exit code: 1 if ours got worse."""
        return int(any(change.fails for change in self.changes))


class _Key(NamedTuple):
    """What a row is known by in both files."""

    case: str
    shape: str
    implementation: str


@dataclass(frozen=True)
class _Side:
    result: Result
    row: Row
    device: Any
    sets: Any


def compare(before: Run, after: Run, threshold: float = THRESHOLD) -> Comparison:
    """Rows are matched by case, shape and implementation.

    threshold: the least share by which a change counts. InputError if it is none, or if the runs
    have no row in common.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"--threshold {threshold:g}: a share from 0 to 1; 0.05 is 5 %")
    was, now = _sides(before), _sides(after)
    both = [key for key in was if key in now]
    if not both:
        raise InputError("nothing to compare: no case, shape and implementation is in both files")
    changes = [change for key in both for change in _changes(was[key], now[key], threshold)]
    changes += _gone(was, now)
    keys = dict.fromkeys([*before.machine, *after.machine])
    pairs = {key: (before.machine.get(key), after.machine.get(key)) for key in keys}
    return Comparison(
        changes,
        len(both),
        [_name(side) for key, side in was.items() if key not in now],
        [_name(side) for key, side in now.items() if key not in was],
        {key: (a, b) for key, (a, b) in pairs.items() if a != b and key not in NOT_COMPARED},
        threshold,
    )


def table(found: Comparison) -> str:
    """For the terminal; ends in a newline. What fails comes first, what is better last."""
    lines = [f"{key}: {a or '-'} -> {b or '-'}" for key, (a, b) in found.machines.items()]
    if SETS in found.machines:
        lines.append("in another instruction set errors and ratios differ without a change of code")
    lines += [f"only before: {name}" for name in found.only_before]
    lines += [f"only after: {name}" for name in found.only_after]
    ours = [change for change in found.changes if change.fails]
    for head, changes in (
        ("WORSE", ours),
        ("worse, not ours: peers, and the machine's lower bounds", _of(found, WORSE, but=ours)),
        ("unclear: maybe noise, more --rounds would tell", _of(found, UNCLEAR)),
        ("better", _of(found, BETTER)),
    ):
        if changes:
            lines += ["", head, *_aligned(changes)]
    rest = found.rows - len({(change.result, change.implementation) for change in found.changes})
    within = f"within {100 * found.threshold:g} %, or noise"
    return "\n".join([*lines, "", f"{rest} of {found.rows} rows: no change ({within})"]) + "\n"


def _of(found: Comparison, verdict: str, but: Sequence[Change] = ()) -> list[Change]:
    return [change for change in found.changes if change.verdict == verdict and change not in but]


def _aligned(changes: Sequence[Change]) -> Iterator[str]:
    names = [f"{change.result}: {change.implementation}" for change in changes]
    width = max(map(len, names))
    for name, change in zip(names, changes, strict=True):
        by = "" if change.quotient is None else times(change.quotient)
        yield f"  {name:{width}}  {change.respect:9}  {by:>6}  {change.says}".rstrip()


def _sides(run: Run) -> dict[_Key, _Side]:
    return {
        _Key(result.case, json.dumps(result.shape, sort_keys=True), row.implementation): _Side(
            result, row, run.machine.get("device"), run.machine.get(SETS)
        )
        for result in run.results
        for row in result.rows
    }


def _gone(was: Mapping[_Key, _Side], now: Mapping[_Key, _Side]) -> Iterator[Change]:
    """Ours that are no more, of what was measured both times."""
    measured = {(key.case, key.shape) for key in now}
    for key, side in was.items():
        if side.row.ours and key not in now and (key.case, key.shape) in measured:
            name, implementation = side.result.name, side.row.implementation
            yield Change(name, implementation, "note", WORSE, "no row any more", ours=True)


def _name(side: _Side) -> str:
    return f"{side.result.name}: {side.row.implementation}"


# --- one row ---

RESPECTS = (  # name, field, the least quotient besides 1 + threshold, and the least difference
    ("memory", "peak_mib", 1.0, MEMORY_MIB),
    ("error", "error", ERROR, 0.0),
    ("converged", "converged", ERROR, 0.0),  # the error on such data
)


def _changes(was: _Side, now: _Side, threshold: float) -> Iterator[Change]:
    a, b = was.row, now.row

    def change(
        respect: str, worse: bool, says: str, quotient: float | None = None, sure: bool = True
    ) -> Change:
        verdict = UNCLEAR if not sure else WORSE if worse else BETTER
        return Change(now.result.name, b.implementation, respect, verdict, says, b.ours, quotient)

    if (found := _time(was, now, threshold)) is not None:
        quotient, says, sure = found
        yield change("time", quotient > 1, says, quotient, sure)
    for name, field, least_quotient, least in RESPECTS:
        low, high = getattr(a, field), getattr(b, field)
        if low is None or high is None or abs(high - low) <= least:
            continue
        quotient = _quotient(low, high)
        if _beyond(max(1 + threshold, least_quotient), quotient):
            sure = name == "memory" or was.sets == now.sets  # which rounds sums otherwise
            yield change(name, quotient > 1, f"{number(low)} -> {number(high)}", quotient, sure)
    if a.ndcg is not None and b.ndcg is not None:
        quotient, says = _quotient(a.ndcg, b.ndcg), f"{a.ndcg:.3f} -> {b.ndcg:.3f}"
        sure = _disjoint(a.ndcg_low, a.ndcg_high, b.ndcg_low, b.ndcg_high)
        if _beyond(1 + threshold, quotient):
            yield change("nDCG", quotient < 1, says, quotient, sure)
    if a.sizes == b.sizes:
        yield from _scaling(was, now, threshold, change)
    if bool(a.note) != bool(b.note):
        yield change("note", bool(b.note), b.note or f"runs; before: {a.note}")


def _quotient(before: float, after: float) -> float:
    """After over before, which may be nothing."""
    return after / before if before else math.inf if after else 1.0


def _beyond(limit: float, quotient: float) -> bool:
    """Whether it is so many times as large, or as small."""
    return not 1 / limit <= quotient <= limit


def _scaling(
    was: _Side, now: _Side, threshold: float, change: Callable[..., Change]
) -> Iterator[Change]:
    """Size by size; each respect by its worst."""
    a, b = was.row, now.row
    if len(a.times or ()) != len(b.times or ()):
        says = " -> ".join(row.limit or "every size" for row in (a, b))
        yield change("sizes", len(b.times or ()) < len(a.times or ()), f"{b.axis}: {says}")

    def quotients(field: str, least: float = 0.0) -> list[float]:
        pairs = zip(getattr(a, field) or (), getattr(b, field) or (), strict=False)
        return [_quotient(x, y) if abs(y - x) > least else 1.0 for x, y in pairs]

    of_times = quotients("times") if was.device == now.device else []
    least, most = min(of_times, default=1.0), max(of_times, default=1.0)
    every = least > 1 + threshold or most < 1 / (1 + threshold)
    for name, found, sure in (
        ("time", of_times, every and len(of_times) >= ROUNDS),
        ("memory", quotients("peaks", MEMORY_MIB), True),
        ("flops", quotients("work"), True),
        ("messages", quotients("messages"), True),
        ("sent", quotients("sent"), True),
    ):
        worst = max(found, key=lambda x: max(x, _quotient(x, 1.0)), default=1.0)
        if _beyond(1 + threshold, worst):
            pairs = zip(b.sizes or (), found, strict=False)
            sizes = ", ".join(f"{size} {times(x)}" for size, x in pairs)
            yield change(name, worst > 1, f"{b.axis}: {sizes}", worst, sure)


def _time(was: _Side, now: _Side, threshold: float) -> tuple[float, str, bool] | None:
    """(quotient, says, beyond noise); None if it is the same, or cannot be compared."""
    a, b = was.row, now.row
    if a.seconds is None or b.seconds is None:
        return None
    says = f"{duration(a.seconds)} -> {duration(b.seconds)}"
    bound = now.result.lower_bound
    alike = bound is not None and was.result.lower_bound == bound != b.implementation
    if alike and a.ratio is not None and b.ratio is not None:
        says = f"{times(a.ratio)} -> {times(b.ratio)} of {bound} ({says})"
        if a.ratios is not None and b.ratios is not None:
            quotient = shift(a.ratios, b.ratios)
            apart = beyond_noise(*((a.ratios, b.ratios) if quotient > 1 else (b.ratios, a.ratios)))
        else:
            quotient = b.ratio / a.ratio
            apart = _disjoint(a.ratio_low, a.ratio_high, b.ratio_low, b.ratio_high)
    elif was.device == now.device:
        quotient, apart = b.seconds / a.seconds, _disjoint(a.low, a.high, b.low, b.high)
    else:
        return None
    if not _beyond(1 + threshold, quotient):
        return None
    return quotient, says + (f"; after: {b.throttled}" if b.throttled else ""), apart


def shift(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times as large `after` is: the median over all pairs."""
    return statistics.median(y / x for x in before for y in after)


def beyond_noise(low: Sequence[float], high: Sequence[float]) -> bool:
    """Whether `high` lies above `low` by more than noise: the rank-sum test, of one side, exact."""
    m, n = len(low), len(high)
    if min(m, n) < ROUNDS:
        return False
    below = sum(y <= x for x in low for y in high)  # pairs in the wrong order; equal ones count
    orders = math.comb(m + n, m)
    chance = sum(_orders(m, n, pairs) for pairs in range(below + 1)) / orders
    return chance <= max(LEVEL, 1 / orders)


@functools.cache
def _orders(m: int, n: int, pairs: int) -> int:
    """In how many orders of m and n values so many of their m n pairs stand the wrong way."""
    if pairs < 0 or pairs > m * n:
        return 0
    if m == 0 or n == 0:
        return 1
    return _orders(m - 1, n, pairs - n) + _orders(m, n - 1, pairs)  # whichever comes last


def _disjoint(
    low: float | None, high: float | None, other_low: float | None, other_high: float | None
) -> bool:
    """Of two bands of percentiles. False where one has no width, and so says nothing of noise."""
    if low is None or high is None or other_low is None or other_high is None:
        return False
    if low == high or other_low == other_high:
        return False
    return high < other_low or other_high < low
