"""A result file as a page: one HTML file that needs nothing else, the pictures as PNGs beside it.

What failed stands first, then what a reader wants to know in a minute, the pictures, every table.
"""

import base64
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rankpo_fast.data.files import whole_file

from . import plots
from .questions import OUT_OF_MEMORY, Result, Row
from .results import Run
from .tables import COLUMNS, NEVER_LEFT_OUT, number, shown, times

PICTURES = {  # file beside the page: picture, what it asks
    "time_memory.png": (plots.time_memory, "Time and memory over the batch"),
    "lower_bound.png": (plots.lower_bound, "Time beside the lower bound"),
    "ladder.png": (plots.ladder, "Memory and speed of a training step"),
    "accuracy.png": (plots.accuracy, "Accuracy against speed"),
}
DPI = 160
READING = (
    "Implementations take turns in one run on one machine, so that a slow minute hits all of them; "
    "a ratio is taken within each round. Compare ratios rather than times of different pages.",
    "The lower bound is what any form of a loss must do: its matrix products, or a copy of what it "
    "reads and writes. A ratio of 1.1 leaves a tenth to be won, whoever wins it.",
    "Orange is ours. A peer that is missing or runs out of memory is a row that says so; a row of "
    "ours without a time, or an error of anyone, is red and makes the run fail.",
)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d8dee4;
  --ours: #fdf0e7; --ours-ink: #a84600; --red: #b3151b; --red-paper: #fdecec; --warn: #7a5200;
  --warn-paper: #fff6dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #9aa5b1; --paper: #12161b;
  --line: #323a44; --ours: #33241a; --ours-ink: #ff9a55; --red: #ff8d8d; --red-paper: #3a1c1e;
  --warn: #f0c667; --warn-paper: #362c14; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0; } a { color: inherit; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .1rem; } p { margin: .4rem 0; }
ul { padding-left: 1.2rem; }
.soft, figcaption, summary { color: var(--soft); } .soft { margin: 0 0 .4rem; font-size: .92rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; }
.box { border-left: 4px solid; padding: .5rem 1rem; margin: 1rem 0; border-radius: 4px; }
.box h2 { margin: 0; font-size: 1.1rem; } .box ul { margin: .3rem 0; }
.failed { color: var(--red); background: var(--red-paper); }
.warned { color: var(--warn); background: var(--warn-paper); }
figure { margin: 1rem 0 1.8rem; overflow-x: auto; }
figure img { width: 100%; min-width: 36rem; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .words { text-align: left; }
td:first-child { white-space: normal; min-width: 11rem; max-width: 24rem; }
td small { display: block; font-weight: 400; font-style: normal; color: var(--soft); }
tr.ours td { background: var(--ours); } tr.ours td:first-child { color: var(--ours-ink);
  font-weight: 600; } tr.bound td { color: var(--soft); font-style: italic; }
tr.red td { background: var(--red-paper); color: var(--red); font-weight: 600; }
tr.throttled td { background: var(--warn-paper); color: var(--warn); }
"""


def write_report(run: Run, directory: Path) -> Path:
    """report.html in `directory`, and those pictures that the run has something for; the page."""
    pictures = []
    for name, (draw, title) in PICTURES.items():
        if (figure := draw(run)) is not None:
            pictures.append(picture(figure, directory / name, title))
    device, date = (str(run.machine.get(key, "unknown")) for key in ("device", "date"))
    left_out = run.machine.get("left out")
    body = [
        f"<h1>What it costs: {escape(device)}</h1>",
        f"<p class=soft>rankpo-fast bench, {escape(date)}</p>",
        _facts(run.machine),
        box("warned", "Left out", [str(left_out)]) if left_out else "",
        box("failed", "Failed", failures(run)),
        box("warned", "Throttled: these times are too long", throttled(run)),
        f"<h2>In short</h2>{_list(in_short(run))}",
        f"<h2>How to read it</h2>{_list(READING)}{_legend(run)}",
        "<h2>Pictures</h2>" if pictures else "",
        *pictures,
    ]
    cases = list(dict.fromkeys(result.case for result in run.results))
    links = (f'<a href="#case{place}">{escape(case)}</a>' for place, case in enumerate(cases))
    body.append(f"<h2>Tables</h2><p>{' | '.join(links)}</p>" if cases else "")
    for place, case in enumerate(cases):
        body.append(f'<h2 id="case{place}">{escape(case)}</h2>')
        body += [section(result) for result in run.results if result.case == case]
    return write_page(directory / "report.html", f"rankpo-fast bench, {device}", body)


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    text = "\n".join(part for part in body if part)
    with whole_file(path) as temporary:
        temporary.write_text(
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{text}\n</body>\n'
            "</html>\n",
            encoding="utf-8",
        )
    return path


def picture(figure: Figure, path: Path, title: str) -> str:
    """Written to `path` as PNG; and the same for a page, inside it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(title)} ({escape(path.name)})</figcaption></figure>"
    )


def section(result: Result, names: Sequence[str] = ()) -> str:
    """A result's question and its table."""
    columns = [c for c in shown(result.rows, names) if c.name not in NEVER_LEFT_OUT]
    head = "".join(
        f'<th title="{escape(c.says)}"{_class(c.words)}>{escape(c.head)}</th>' for c in columns
    )
    rows = []
    for row in result.rows:
        said = "; ".join(filter(None, (row.note, row.throttled)))  # where no screen is too narrow
        name = escape(row.implementation) + (f"<small>{escape(said)}</small>" if said else "")
        cells = "".join(f"<td{_class(c.words)}>{escape(c.text(row))}</td>" for c in columns)
        rows.append(f'<tr class="{_kind(result, row)}"><td>{name}</td>{cells}</tr>')
    about = [result.question, *(f"{key}: {fact(x)}" for key, x in result.about.items())]
    if result.gate is not None:
        about.append(f"gate of ours: an error of {result.gate:.1e}")
    return (
        f"<h3>{escape(result.name)}</h3><p class=soft>{escape(' | '.join(about))}</p>"
        f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _kind(result: Result, row: Row) -> str:
    kinds = {"red": row.red, "throttled": row.throttled, "ours": row.ours,
             "bound": result.is_lower_bound(row)}  # fmt: skip
    return next((kind for kind, holds in kinds.items() if holds), "")


def _class(words: bool) -> str:
    return " class=words" if words else ""


def failures(run: Run) -> list[str]:
    return [f"{result.name}: {row.implementation}: {row.note}"
            for result in run.results for row in result.rows if row.red]  # fmt: skip


def throttled(run: Run) -> list[str]:
    return [f"{result.name}: {row.implementation}: {row.throttled}"
            for result in run.results for row in result.rows if row.throttled]  # fmt: skip


def in_short(run: Run) -> list[str]:
    """What a reader wants to know in a minute, for us and against us, from the numbers alone."""
    rows = [(result, row) for result in run.results for row in result.rows]
    said = [f"{len(run.results)} tables of {len(rows)} rows; {len(failures(run))} failed."]
    ratios = [row.ratio for row in (_first_of_ours(result) for result in run.results
                                    if result.family == "loss") if row and row.ratio]  # fmt: skip
    if ratios:
        said.append(
            f"Losses: ours takes {times(min(ratios))} to {times(max(ratios))} times as long as the "
            f"lower bound, {times(statistics.median(ratios))} at the median of "
            f"{len(ratios)} shapes."
        )
    for family in dict.fromkeys(result.family for result in run.results):
        said += _beside_peers(family, [r for r in run.results if r.family == family])
    full = Counter(row.implementation for _, row in rows if OUT_OF_MEMORY in row.note)
    if full:
        said.append(f"Out of memory: {_counted(full)}.")
    careless = Counter(
        row.implementation for result, row in rows if result.gate is not None and not row.ours
        and max(row.error or 0, row.converged or 0) > result.gate
    )  # fmt: skip
    if careless:
        said.append(f"Errors above the gate that ours must pass: {_counted(careless)}.")
    return said


def _first_of_ours(result: Result) -> Row | None:
    return next((row for row in result.rows if row.ours), None)


def _beside_peers(family: str, results: Sequence[Result]) -> list[str]:
    """Who is fastest where a peer ran as well, and who needs least memory."""
    compared, light = 0, 0
    lost: dict[str, list[tuple[float, str]]] = {}  # of each faster peer: its share of our time
    for result in results:
        timed = [r for r in result.rows if r.seconds is not None and not result.is_lower_bound(r)]
        ours, peers = ([r for r in timed if r.ours is mine] for mine in (True, False))
        if not ours or not peers:
            continue
        compared += 1
        best, peer = (min(rows, key=_cost) for rows in (ours, peers))
        if _cost(peer) < _cost(best):
            share = _cost(peer) / _cost(best)
            lost.setdefault(peer.implementation, []).append((share, result.name))
        least, of_peers = (
            min((row.peak_mib for row in rows if row.peak_mib is not None), default=None)
            for rows in (ours, peers)
        )
        light += least is not None and of_peers is not None and least < of_peers
    if not compared:
        return []
    won = compared - sum(map(len, lost.values()))
    said = [f"{family.capitalize()} beside peers: ours is the fastest at {won} of {compared} "
            f"shapes, with the least memory at {light}."]  # fmt: skip
    for name, shapes in lost.items():
        share, where = min(shapes)
        said.append(f"{name} is faster at {len(shapes)}: at best it takes {times(share)} of our "
                    f"time ({where}).")  # fmt: skip
    return said


def _cost(row: Row) -> float:
    return math.inf if row.cost is None else row.cost


def _counted(names: Counter) -> str:
    return ", ".join(f"{name} ({count} row{'s' * (count > 1)})" for name, count in names.items())


def fact(value: Any) -> str:
    """Of a machine or a case, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(x)}" for key, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value))
    if isinstance(value, float):
        return number(value)
    return str(value)


def rates_in_words(rates: Mapping[str, Any]) -> str:
    products = (f"{number(x / 1e12)} TFLOP/s in {key}" for key, x in rates["gemm"].items())
    return f"matrix products {', '.join(products)}; copies {number(rates['copy'] / 1e9)} GB/s"


def _facts(machine: Mapping[str, Any]) -> str:
    """Of the machine, with its rates in units that people use."""
    said = {key: fact(x) for key, x in machine.items() if key not in ("rates", "left out")}
    if rates := machine.get("rates"):
        said["measured here"] = rates_in_words(rates)
    terms = (f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in said.items())
    return f"<dl>{''.join(terms)}</dl>"


def _legend(run: Run) -> str:
    rows = [row for result in run.results for row in result.rows]
    used = shown(rows) if rows else COLUMNS
    terms = "".join(f"<dt>{escape(c.head)}</dt><dd>{escape(c.says)}</dd>" for c in used)
    return f"<details><summary>Every column</summary><dl>{terms}</dl></details>"


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def box(kind: str, title: str, texts: Sequence[str]) -> str:
    """Nothing if there is nothing to say."""
    return f'<div class="box {kind}"><h2>{escape(title)}</h2>{_list(texts)}</div>' if texts else ""
