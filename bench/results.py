"""The result file: one JSON a run, a line a case, so that two runs differ in lines of git."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import whole_file
from rankpo_fast.errors import InputError

from .questions import Result, Row

FORMAT = 2  # of the file; 1 had no number
DIGITS = 4
TEXTS = {"implementation", "note", "throttled", "axis", "limit"}  # of a Row; the rest are numbers


@dataclass(frozen=True)
class Run:
    """A whole result file: what a reader needs to judge the numbers, and the numbers."""

    machine: Mapping[str, Any]  # device, versions, driver, commit, date, rates, what was left out
    results: Sequence[Result] = field(default_factory=list)


def write(path: Path, run: Run) -> None:
    lines = ",\n".join(json.dumps(_rounded(_filled(result))) for result in run.results)
    machine = json.dumps(_rounded(run.machine), indent=1)
    with whole_file(path) as temporary:
        temporary.write_text(
            f'{{"format": {FORMAT},\n"machine": {machine},\n"results": [\n{lines}\n]}}\n'
        )


def read(path: Path) -> Run:
    """InputError if it is no result file, or one of another format."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "results" not in content:
        raise InputError(f"{path}: not a result file of the bench")
    if (found := content.get("format", 1)) != FORMAT:
        raise InputError(f"{path}: a result file of format {found}; this version reads {FORMAT}")
    try:
        results = [
            Result(**{**line, "rows": tuple(_row(row) for row in line["rows"])})
            for line in content["results"]
        ]
        return Run(dict(content["machine"]), results)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not a result file of the bench: {error}") from None


def _row(row: dict) -> Row:
    for key, x in row.items():
        if isinstance(x, str) is not (key in TEXTS):
            raise TypeError(f"{key} {x!r}")
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in row.items()}
    return Row(**fields)


def _filled(result: Result) -> dict:
    """Without what is None or empty."""
    given = dataclasses.asdict(result)
    given["rows"] = [
        {key: x for key, x in row.items() if x is not None and x != ""} for row in given["rows"]
    ]
    return {key: x for key, x in given.items() if x is not None and x != {}}


def _rounded(value: Any) -> Any:
    """Every float to four digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(x) for x in value]
    return value
