"""The tables and the picture of results in README.md and docs/, from the result files they name.

`python -m bench.readme` rewrites what stands between two comments of a page:

    <!-- bench: bench/results/2026-11-24-cpu.json: info_nce; rankpo 8192x2048 | ratio peak_mib -->
    <!-- end -->

Names, with semicolons between, take a case or some of its shapes (by the words that they begin
with), columns are those of bench/tables.py; without names all are taken, without columns all that
have something. Who lacked a GPU or a package has no row here, but in the file.

    <!-- picture: bench/results/2026-11-24-cpu.json: info_nce 4096x4096x768 -->
    ![what it shows](docs/losses-cpu.svg)
    <!-- end -->

draws one result into that SVG: time, memory and error of each implementation.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rankpo_fast.errors import InputError

from .questions import Result, Row
from .results import Run, read
from .tables import markdown, mebibytes, times

ROOT = Path(__file__).parents[1]
MARKED = re.compile(
    r"(?P<start><!-- bench: (?P<file>[^\s:|]+)(: (?P<names>[^|>]+?))?( \| (?P<columns>[^|>]+?))?"
    r" -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
PICTURE = re.compile(
    r"(?P<start><!-- picture: (?P<file>[^\s:|]+): (?P<name>[^|>]+?) -->\n"
    r"!\[[^\]]*\]\((?P<svg>[^)\s]+\.svg)\)\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
VERSIONS = ("driver", "cuda", "torch", "triton", "sentence-transformers")  # those told of a file


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rewritten(text: str, root: Path) -> str:
    """`text` with every table, and the line below every picture, as the files in `root` have it.

    InputError if a comment cannot be understood, or a file or a name in it is not there.
    """
    for kind, pattern in (("bench", MARKED), ("picture", PICTURE)):
        if text.count(f"<!-- {kind}:") != len(pattern.findall(text)):
            raise InputError(f"a comment '<!-- {kind}: FILE: NAMES ... -->' without its end, or "
                             "with something else in it")  # fmt: skip

    def table(found: re.Match) -> str:
        run = read(root / found["file"])
        names = [name.strip() for name in (found["names"] or "").split(";") if name.strip()]
        results = [r for name in names for r in named(name, run, found["file"])] or run.results
        rows = markdown(list(map(_of_those_here, results)), (found["columns"] or "").split())
        return f"{found['start']}{rows}\n{source(run, found['file'])}\n{found['end']}"

    def below(found: re.Match) -> str:
        run = read(root / found["file"])
        return f"{found['start']}\n{source(run, found['file'])}\n{found['end']}"

    return PICTURE.sub(below, MARKED.sub(table, text))


def pictures(text: str, root: Path) -> dict[str, str]:
    """{path of a picture, as the text has it: its SVG}. InputError as from `rewritten`."""
    drawn = {}
    for found in PICTURE.finditer(text):
        run = read(root / found["file"])
        [result, *more] = named(found["name"], run, found["file"])
        if more:
            raise InputError(f"{found['file']}: a picture shows one shape of {found['name']!r}")
        device = ", ".join(str(run.machine.get("device", "unknown")).split(", ")[:2])
        drawn[found["svg"]] = drawing(_of_those_here(result), device)
    return drawn


def named(name: str, run: Run, file: str) -> Sequence[Result]:
    found = [result for result in run.results if result.case == name]
    found = found or [r for r in run.results if f"{r.name} ".startswith(f"{name} ")]
    if not found:
        has = ", ".join(dict.fromkeys(result.case for result in run.results))
        raise InputError(f"{file}: no case or shape {name!r}: it has {has}")
    return found


def _of_those_here(result: Result) -> Result:
    return dataclasses.replace(result, rows=tuple(row for row in result.rows if not row.absent))


def source(run: Run, file: str) -> str:
    """Device, versions and commit of a file, in a line."""
    about = {key: str(run.machine.get(key, "unknown")) for key in ("device", "commit", "date")}
    versions = (f"{key} {run.machine[key]}" for key in VERSIONS if key in run.machine)
    return (
        f"From `{file}`: {about['device']}; {', '.join(versions)}; commit {about['commit']}, "
        f"{about['date'][:10]}."
    )


# --- the picture: a row an implementation; pixels ---

WIDTH, ROW, TOP, BAR = 960, 27, 62, 15
NAMES, TIME, MEMORY, FRESH, CONVERGED = 250, 264, 536, 830, 936  # where each column begins or ends
LONGEST = 185  # of a bar
BAD = 1e-2  # an error from which on a gradient says little


def drawing(result: Result, device: str) -> str:
    """An SVG of time over the lower bound's, peak memory and error, the lower bound as a line."""
    rows = [row for row in result.rows if not result.is_lower_bound(row) and row.ratio is not None]
    slowest = max(row.ratio or 0 for row in rows)
    largest = max(row.peak_mib or 0 for row in rows)
    bottom = TOP + ROW * len(rows)
    bound = TIME + LONGEST / slowest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 52}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(24, 24, f"{result.name}, forward and backward; {device}", weight="bold", size=15),
        _text(TIME, TOP - 12, "time over the lower bound's", colour="#555"),
        _text(MEMORY, TOP - 12, "peak memory, MiB", colour="#555"),
        _text(FRESH, TOP - 12, "error, fresh", colour="#555", anchor="end"),
        _text(CONVERGED, TOP - 12, "converged", colour="#555", anchor="end"),
    ]
    for number, row in enumerate(rows):
        parts += _row(row, TOP + ROW * number, LONGEST / slowest, LONGEST / (largest or 1))
    parts += [
        f'<path d="M{bound:.1f} {TOP - 4} V{bottom + 4}" stroke="#555" stroke-dasharray="3 3"/>',
        _text(bound, bottom + 22, f"1 = lower bound: {result.lower_bound}", colour="#555"),
        _text(CONVERGED, bottom + 42, "memory above inputs and gradients; relative error against "
              "fp64, the worst of loss and gradients", colour="#555", anchor="end"),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _row(row: Row, y: int, per_ratio: float, per_mib: float) -> list[str]:
    """One implementation: its name, two bars with their numbers, two errors."""
    colour, weight = ("#c2571a", "bold") if row.ours else ("#8a97a8", "normal")
    middle = y + ROW // 2 + 4
    parts = [_text(NAMES, middle, row.implementation, anchor="end", weight=weight)]
    for x, value, unit, write in (
        (TIME, row.ratio, per_ratio, times),
        (MEMORY, row.peak_mib, per_mib, mebibytes),
    ):
        if value is not None:
            long, top = max(value * unit, 1), y + (ROW - BAR) // 2
            parts += [
                f'<rect x="{x}" y="{top}" width="{long:.1f}" height="{BAR}" fill="{colour}"/>',
                _text(x + long + 5, middle, write(value), weight=weight),
            ]
    for x, error in ((FRESH, row.error), (CONVERGED, row.converged)):
        if error is not None:
            red = "#b00020" if error >= BAD else "#222"
            text = f"{error:.0e}" if error < BAD else "100 %" if error >= 1 else f"{error:.0%}"
            parts.append(_text(x, middle, text, anchor="end", weight=weight, colour=red))
    return parts


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal",
    colour: str = "#222", size: int = 13,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def main() -> int:
    for page in pages(ROOT):
        text = page.read_text(encoding="utf-8")
        try:
            new = rewritten(text, ROOT)
            for svg, content in pictures(text, ROOT).items():
                (page.parent / svg).write_text(content, encoding="utf-8")
        except InputError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
