"""Result files over time: whether ours got worse."""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rankpo_fast.errors import InputError

from . import plots
from .questions import Result, Row
from .report import box, picture, section, write_page
from .results import Run, read

PAGE, PICTURE = "history.html", "history.png"
SHOWN = ("ratio", "seconds", "peak_mib", "tokens")


def history(directory: Path) -> tuple[list[Run], list[str]]:
    """The runs of a directory's JSON files, the oldest first, and why others could not be read.

    InputError if there is no such directory.
    """
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no directory of result files")
    runs, unread = [], []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            runs.append(read(path))
        except InputError as error:
            unread.append(str(error))
    return sorted(runs, key=lambda run: str(run.machine.get("date", ""))), unread


def trends(runs: Sequence[Run]) -> list[Result]:
    """Of each of ours at each shape on each device its rows, named by day and commit; what was
    measured most often first."""
    found: dict[tuple[str, str, str], tuple[Result, list[Row]]] = {}
    for run in runs:
        device = str(run.machine.get("device", "unknown device"))
        for result in run.results:
            for row in result.rows:
                if row.ours:
                    key = device, result.name, row.implementation
                    found.setdefault(key, (result, []))[1].append(_dated(row, run))
    lines = [
        Result(result.case, "history", f"{implementation} on {device}", result.shape, tuple(rows))
        for (device, _, implementation), (result, rows) in found.items()
    ]
    return sorted(lines, key=lambda line: -len(line.rows))


def _dated(row: Row, run: Run) -> Row:
    date, commit = (str(run.machine.get(key, "unknown")) for key in ("date", "commit"))
    return dataclasses.replace(row, implementation=f"{date[:10]} {commit}")


def write_history(results: Path, directory: Path) -> Path:
    """history.html in `directory`, and history.png where a trend has two points; the page."""
    runs, unread = history(results)
    found = trends(runs)
    figure = plots.trend(found)
    body = [
        "<h1>What ours cost, from result file to result file</h1>",
        f"<p class=soft>{escape(f'{len(runs)} files of {results}')}; of each of ours at each shape "
        "on each device, the oldest first. A ratio is to the lower bound of the same run.</p>",
        box("failed", "Not read", unread),
        "" if figure is None else picture(figure, directory / PICTURE, "Trend"),
        *(section(result, SHOWN) for result in found),
    ]
    return write_page(directory / PAGE, "rankpo-fast bench, history", body)
