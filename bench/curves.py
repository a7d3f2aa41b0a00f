"""What implementations take at growing sizes, read from a run: its scalings, and its losses that
were measured at several batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .questions import Result, Row
from .results import Run


class Limit(NamedTuple):
    """The first size that an implementation did not reach, and why."""

    size: int
    why: str


@dataclass(frozen=True)
class Curve:
    """What an implementation takes at growing sizes."""

    implementation: str
    sizes: tuple[int, ...]
    times: tuple[float, ...]
    peaks: tuple[float, ...]  # MiB; NaN where unknown
    limit: Limit | None = None


@dataclass(frozen=True)
class Growth:
    """One case over one of its sizes."""

    title: str
    axis: str
    curves: tuple[Curve, ...]


class Batched(NamedTuple):
    """A result at the first of its shape's sizes, which is called `axis`."""

    axis: str
    size: int
    result: Result


def growths(run: Run) -> list[Growth]:
    """Scalings, then losses at several batches: of a case at the widest range of them."""
    scalings = [_scaling(result) for result in run.results if any(r.times for r in result.rows)]
    groups: dict[tuple[str, str], list[Batched]] = {}
    for result in run.results:
        if result.family == "loss" and (batched := _batched(result)) is not None:
            groups.setdefault((result.case, _but_the_batch(batched)), []).append(batched)
    widest: dict[str, list[Batched]] = {}
    for (case, _), group in groups.items():
        widest[case] = max(widest.get(case, []), group, key=len)  # the first of equals
    return scalings + [_over_batches(group) for group in widest.values() if len(group) > 1]


def _scaling(result: Result) -> Growth:
    rows = [row for row in result.rows if row.sizes]
    curves = []
    for row in rows:
        sizes, reached, peaks = row.sizes or (), row.times or (), row.peaks or ()
        limit = None
        if len(reached) < len(sizes):
            limit = Limit(sizes[len(reached)], row.limit or row.note)
        unknown = (math.nan,) * (len(reached) - len(peaks))
        curves.append(Curve(row.implementation, sizes[: len(reached)], tuple(reached),
                            (*peaks[: len(reached)], *unknown), limit))  # fmt: skip
    return Growth(result.name, rows[0].axis or "size", tuple(curves))


def _over_batches(group: Sequence[Batched]) -> Growth:
    ordered = sorted(group, key=lambda batched: batched.size)
    rows: dict[str, list[tuple[int, Row]]] = {}
    for batched in ordered:
        for row in batched.result.rows:
            if not row.absent:
                rows.setdefault(row.implementation, []).append((batched.size, row))
    curves = []
    for implementation, given in rows.items():
        sizes, times, peaks = [], [], []
        for size, row in given:
            if row.seconds is not None:
                sizes.append(size)
                times.append(row.seconds)
                peaks.append(math.nan if row.peak_mib is None else row.peak_mib)
        limit = next((Limit(size, row.note) for size, row in given if row.note), None)
        curves.append(Curve(implementation, tuple(sizes), tuple(times), tuple(peaks), limit))
    first = ordered[0]
    title = f"{first.result.case}, {_but_the_batch(first)}"
    return Growth(title, first.axis, tuple(curves))


def _batched(result: Result) -> Batched | None:
    sizes = ((key, x) for key, x in result.shape.items() if isinstance(x, int))
    return next((Batched(key, x, result) for key, x in sizes), None)


def _but_the_batch(batched: Batched) -> str:
    """N = 6 M, D = 384, float32: the passages go with the queries."""
    axis, size, result = batched
    texts = []
    for key, x in result.shape.items():
        if key == "N" and axis != "N":
            texts.append(f"N = {f'{x / size:g} ' if x != size else ''}{axis}")
        elif key != axis:
            texts.append(f"{key} = {x}" if isinstance(x, int) else str(x))
    return ", ".join(texts)
