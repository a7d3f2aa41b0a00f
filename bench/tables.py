"""How a result is read: one list of columns for the terminal, the HTML pages and README."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rankpo_fast.errors import InputError

from .questions import Result, Row


@dataclass(frozen=True)
class Column:
    """What rows have of one kind; `text` is empty where a row has nothing."""

    name: str  # the Row's field, by which the column is chosen
    head: str
    says: str  # for a reader who sees it for the first time
    text: Callable[[Row], str]
    words: bool = False  # rather than numbers: set to the left


def number(x: float) -> str:
    """Three digits, or all of those before the point."""
    if not x or not math.isfinite(x):
        return f"{x:g}"
    if abs(x) < 1e-3:
        return f"{x:.1e}"
    x = float(f"{x:.3g}") if abs(x) < 100 else x
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def percent(x: float) -> str:
    return f"{number(100 * x)}%"


def times(x: float) -> str:
    """So many times as much."""
    return f"{x:.2f}" if abs(x) < 10 else number(x)


def mebibytes(x: float) -> str:
    return f"{x:.1f}" if abs(x) < 10 else number(x)


def duration(seconds: float, low: float | None = None, high: float | None = None) -> str:
    """13.5 ms (13.1-14.2): the spread in the median's unit."""
    units = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
    unit, name = next((each for each in units if seconds >= each[0]), units[-1])
    return f"{number(seconds / unit)} {name}" + _spread(low, high, lambda x: number(x / unit))


def _spread(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Nothing where a single value is all there is."""
    return "" if low is None or high is None or low == high else f" ({write(low)}-{write(high)})"


def _one(field: str, write: Callable[[Any], str] = number) -> Callable[[Row], str]:
    return lambda row: "" if getattr(row, field) is None else write(getattr(row, field))


def _spreads(field: str, write: Callable[[float], str]) -> Callable[[Row], str]:
    """A field with the percentiles that stand beside it."""

    def text(row: Row) -> str:
        value, low, high = (getattr(row, field + end) for end in ("", "_low", "_high"))
        return "" if value is None else write(value) + _spread(low, high, write)

    return text


def _time(row: Row) -> str:
    return "" if row.seconds is None else duration(row.seconds, row.low, row.high)


def _sizes(row: Row) -> str:
    return f"{row.axis} {row.sizes[0]} to {row.sizes[-1]}" if row.sizes else ""


def _all(field: str, write: Callable[[Any], str] = number) -> Callable[[Row], str]:
    return _one(field, lambda values: ", ".join(map(write, values)))


def _power(field: str) -> Callable[[Row], str]:
    return _one(field, lambda x: f"^{x:.2f}")


def _exponential(x: float) -> str:
    return f"{x:.1e}"


COLUMNS = (
    Column("seconds", "time", "the median of the rounds (their 20th to 80th percentile)", _time),
    Column("ratio", "ratio", "time over that of the lower bound, or of the first row where there "
           "is none: taken within each round (20th to 80th percentile)", _spreads("ratio", times)),
    Column("cold", "cold", "time with the caches emptied before", _one("cold", duration)),
    Column("gemm", "of GEMM", "useful flops a second, over what a large matrix product reached "
           "here at the start of the run", _one("gemm", percent)),
    Column("copy", "of copy", "useful bytes a second, over what a large copy reached here",
           _one("copy", percent)),
    Column("peak_mib", "MiB", "peak memory above inputs and gradients; of a training: of weights, "
           "gradients, optimizer and activations together", _one("peak_mib", mebibytes)),
    Column("error", "error", "relative, against fp64, the worst of loss and gradients, on data "
           "early in a training", _one("error", _exponential)),
    Column("converged", "converged", "the same error on data of a finished training",
           _one("converged", _exponential)),
    Column("queries", "queries/s", "queries a second", _one("queries")),
    Column("tokens", "tokens/s", "tokens of texts a second; padding does not count",
           _one("tokens")),
    Column("mfu", "MFU", "the model's flops a second, over the measured GEMM rate",
           _one("mfu", percent)),
    Column("ndcg", "nDCG", "of held-out queries (least to most of the rounds)",
           _spreads("ndcg", lambda x: f"{x:.3f}")),
    Column("watts", "W", "mean power of the GPU", _one("watts")),
    Column("joules", "J/Mtoken", "energy of a million tokens; of an end-to-end run, all it took",
           _one("joules")),
    Column("sizes", "sizes", "what grows in a scaling, from where to where", _sizes, words=True),
    Column("work", "flops/MND", "of a rank, counted, at each of the sizes; N is that of all",
           _all("work", times)),
    Column("messages", "messages", "that a rank sends, forward and backward",
           _all("messages", str)),
    Column("sent", "MiB sent", "in these messages", _all("sent")),
    Column("exponent", "grows", "^2: four times the time at twice the size; over the upper half of "
           "the sizes. Of ranks: what is sent", _power("exponent")),
    Column("memory_exponent", "memory grows", "the same of peak memory", _power("memory_exponent")),
    Column("limit", "limit", "the first size that was not reached, and why: 8192: out of memory",
           _one("limit", str), words=True),
    Column("throttled", "throttled", "why the GPU slowed down meanwhile: such a time is too long",
           _one("throttled", str), words=True),
    Column("note", "note", "why there is no time", lambda row: row.note, words=True),
)  # fmt: skip
NEVER_LEFT_OUT = {"throttled", "note"}


def shown(rows: Sequence[Row], names: Sequence[str] = ()) -> list[Column]:
    """The columns that some row has; of those named, and what no reader may miss, if any is.

    InputError if a name is none of a column.
    """
    known = [column.name for column in COLUMNS]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no column {unknown[0]!r}: there are {', '.join(known)}")
    return [
        column
        for column in COLUMNS
        if (not names or column.name in {*names, *NEVER_LEFT_OUT})
        and any(column.text(row) for row in rows)
    ]


def table(result: Result, names: Sequence[str] = ()) -> str:
    """For the terminal; ends in a newline."""
    columns = shown(result.rows, names)
    lines = [["", *(column.head for column in columns)]]
    lines += [
        [row.implementation, *(column.text(row) for column in columns)] for row in result.rows
    ]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    left = [True, *(column.words for column in columns)]
    return "".join(
        "  ".join(
            ["", *(f"{text:{'<' if to_left else '>'}{width}}"
                   for text, to_left, width in zip(line, left, widths, strict=True))]
        ).rstrip() + "\n"
        for line in lines
    )  # fmt: skip


def markdown(results: Sequence[Result], names: Sequence[str] = ()) -> str:
    """One table of several results, each under its name; ends in a newline."""
    columns = shown([row for result in results for row in result.rows], names)
    lines = [["", *(column.head for column in columns)]]
    lines.append(["---", *("---" if column.words else "---:" for column in columns)])
    for result in results:
        lines.append([f"**{_in_a_cell(result.name)}**", *([""] * len(columns))])
        for row in result.rows:
            texts = [row.implementation, *(column.text(row) for column in columns)]
            lines.append([_in_a_cell(text) for text in texts])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", r"\<").split())
