"""What the rules did, for a person: report.md, and the same figures in report.json."""

import bisect
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import whole_file
from rankpo_fast.label.pairs import RuleCount

QUANTILES = (0, 25, 50, 75, 95, 100)
DOMINANT = 0.9  # of all pairs
SHOWN = 300  # characters of a text


@dataclass(frozen=True)
class Example:
    kind: str  # "match", or the rule that a near miss does not meet
    query_id: str
    query: str
    item_id: str
    item: str


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        records: how many there are of each side, and what became of the queries.
        positives: quantiles over queries.
        rules: each alone: share of all pairs, matches per query, what is odd about it.
        files: what was written.
        notes: what was left out, drawn or guessed.
    """

    records: dict[str, int]
    positives: dict[str, float]
    rules: list[dict[str, Any]]
    files: dict[str, Any]
    notes: list[str]
    examples: list[Example]

    def write(self, folder: Path) -> None:
        with whole_file(folder / "report.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n",
                            encoding="utf-8")  # fmt: skip
        with whole_file(folder / "report.md") as path:
            path.write_text(self.as_markdown(), encoding="utf-8")

    def as_markdown(self) -> str:
        records = [f"* {name}: {count:,}" for name, count in self.records.items()]
        lines = ["# Labels", "", *records]
        lines += ["", "## Positives of a query", "", *_table([self.positives])]
        lines += ["", "## Each rule alone", ""]
        rows = [
            {"rule": one["name"], "of all pairs": _percent(one), **one["per_query"],
             "": one["verdict"]}
            for one in self.rules
        ]  # fmt: skip
        lines += [*_table(rows), "", "min to max: items that a query matches by this rule."]
        lines += ["", "## Written", ""]
        lines += [f"* {name}: {_plain(value)}" for name, value in self.files.items()]
        if self.notes:
            lines += ["", "## To know", "", *(f"* {note}" for note in self.notes)]
        lines += ["", "## Examples"]
        for one in self.examples:
            title = "A match" if one.kind == "match" else f"A near miss: not {one.kind}"
            lines += ["", f"**{title}** ({one.query_id}, {one.item_id})", "",
                      f"> {_short(one.query)}", ">", f"> {_short(one.item)}"]  # fmt: skip
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """For the terminal."""
        half = self.positives["median"]
        lines = [f"{name}: {count:,}" for name, count in self.records.items()]
        lines.append(f"positives of a query: {half:,.0f} in the median, up to "
                     f"{self.positives['max']:,.0f}")  # fmt: skip
        lines += [f"rule {one['name']}: {_percent(one)} of all pairs" for one in self.rules]
        return "\n".join(lines)


def described(count: RuleCount) -> dict[str, Any]:
    verdict = ""
    if count.dead:
        verdict = "dead: matches nothing"
    elif count.matches_all:
        verdict = "matches everything"
    elif count.share >= DOMINANT:
        verdict = "dominant: hardly decides"
    return {
        "name": count.rule.name,
        "where": count.rule.where,
        "share": count.share,
        "exact": count.exact,
        "per_query": quantiles(count.counts),
        "verdict": verdict,
    }


def quantiles(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Of (value, how often), ascending: the least value that so many per cent do not exceed."""
    up_to = list(itertools.accumulate(often for _, often in counts))
    found: dict[str, float] = {}
    for percent in QUANTILES:
        place = bisect.bisect_left(up_to, max(1, percent / 100 * up_to[-1]))
        name = {0: "min", 50: "median", 100: "max"}.get(percent, f"{percent} %")
        found[name] = counts[place][0]
    return found


def _percent(one: dict[str, Any]) -> str:
    share = one["share"]
    text = f"{share:.2%}" if share == 0 or share >= 0.001 else f"{share:.1e}"
    return text if one["exact"] else f"about {text}"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = [*rows[0]]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(_plain(row[name]) for name in head)} |" for row in rows]


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
