"""The figures of evaluations as text, JSON and a report, with what they were taken of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankpo_fast.retrieval.statistics import DRAWS, Calibration, calibration

if TYPE_CHECKING:
    from rankpo_fast.data.retrieval import RetrievalSet
    from rankpo_fast.retrieval.evaluate import Difference, Evaluation

ROWS = {"nDCG": "ndcg", "MRR": "mrr", "recall": "recall"}
BINS = np.linspace(-1, 1, 41)  # of histograms of cosines
MAIN_CUTOFF = 20  # of what a report shows of groups, where it is measured


def table(figures: Mapping[str, float], counts: Mapping[str, dict[str, Any]]) -> str:
    """For people: a column a cutoff, then the alignment."""
    lines = []
    if "retrieval" in counts:
        cutoffs = [name.removeprefix("ndcg@") for name in figures if name.startswith("ndcg@")]
        lines.append(" " * 9 + "".join(f"{f'@{cutoff}':>9}" for cutoff in cutoffs))
        for title, key in ROWS.items():
            values = "".join(f"{figures[f'{key}@{cutoff}']:>9.4f}" for cutoff in cutoffs)
            lines.append(f"{title:9}{values}")
        lines += [f"{title:9}  {text}" for title, text in _taken_of(counts["retrieval"]).items()]
    if "preferences" in counts:
        pairs = counts["preferences"]
        lines.append(f"alignment{figures['alignment']:>9.4f}")
        if pairs["ties"]:
            lines[-1] += f"  ({pairs['ties']:,} of {pairs['pairs']:,} pairs are ties: not aligned)"
    return "\n".join(lines)


def _taken_of(counts: dict[str, Any]) -> dict[str, str]:
    lines = {}
    if "split" in counts:
        lines["split"] = f"{counts['split']}, of {', '.join(counts['splits'])}"
    if not counts:
        return lines
    lines["queries"] = f"{counts['queries']:,}" + _details(counts, {
        "absent_queries": "more are absent and skipped",
        "queries_without_relevant": "more have no relevant document and are skipped",
    })  # fmt: skip
    lines["documents"] = f"{counts['documents']:,}" + _details(counts, {
        "empty_documents": "without text, ranked last",
        "absent_documents": "more are judged but absent",
        "own_documents": "left out of the ranking of the query with their id",
    })  # fmt: skip
    judged = f"{counts['judged_pairs']:,} judged, " if "judged_pairs" in counts else ""
    lines["pairs"] = f"{judged}{counts['relevant_pairs']:,} relevant"
    return lines


def _details(counts: dict[str, Any], words: dict[str, str]) -> str:
    return "".join(f"; {counts[k]:,} {text}" for k, text in words.items() if counts.get(k))


# --- two models ---


def comparison(systems: "Mapping[str, Evaluation]") -> str:
    """For people: the second model against the first, a line a figure."""
    (one, first), (two, second) = systems.items()
    lines = [f"{two} against {one}: difference, its 95 % interval, p of a paired randomisation"]
    for name, change in second.against(first).items():
        lines.append(f"{name:12}{change.value:>+9.4f}  {change.low:>+8.4f} to {change.high:>+7.4f}"
                     f"  p {change.p:.4f}")  # fmt: skip
    return "\n".join(lines)


@dataclass(frozen=True)
class System:
    """A model, or a run file, and its figures."""

    name: str
    found: "Evaluation"
    intervals: dict[str, tuple[float, float]]
    groups: dict[str, dict[str, float]]  # of each group, "queries" and the figures of retrieval
    calibration: Calibration | None


@dataclass(frozen=True)
class Report:
    """What is told of one model, or of two on the same data."""

    systems: list[System]
    differences: "dict[str, Difference]"  # of the second from the first

    @classmethod
    def of(
        cls,
        found: "Mapping[str, Evaluation]",
        retrieval: "RetrievalSet | None",
        margin_scale: float,
    ) -> "Report":
        groups = None if retrieval is None else retrieval.groups
        systems = [
            System(name, one, one.intervals(), _by_group(one, groups or ()), None
                   if one.pairs is None else
                   calibration(one.pairs.margins, one.pairs.weights, margin_scale))
            for name, one in found.items()
        ]  # fmt: skip
        evaluations = [*found.values()]
        differences = evaluations[1].against(evaluations[0]) if len(evaluations) > 1 else {}
        return cls(systems, differences)

    def as_json(self) -> dict[str, Any]:
        """Of one model its figures by name and what belongs to them; of two, "systems" and
        "differences"."""
        rows = [_system_as_json(system) for system in self.systems]
        if len(rows) == 1:
            return rows[0]
        named = [{"name": s.name, **row} for s, row in zip(self.systems, rows, strict=True)]
        differences = {name: asdict(change) for name, change in self.differences.items()}
        return {"systems": named, "differences": differences}

    def as_markdown(self, picture: str) -> str:
        """A page, with the picture of that name."""
        counts = self.systems[0].found.counts
        parts = ["# Evaluation", "", *(f"* {key}: {value}" for key, value in
                 _taken_of(counts.get("retrieval", {})).items())]  # fmt: skip
        if "preferences" in counts:
            parts.append(f"* preference pairs: {counts['preferences']['pairs']:,}")
        parts += ["", f"![figures]({picture})", ""]
        parts += [f"Intervals hold 95 % of {DRAWS:,} bootstrap samples of the queries.", ""]
        parts += self._figures()
        parts += self._differences()
        for system in self.systems:
            parts += self._groups(system) + self._calibration(system)
        return "\n".join(parts) + "\n"

    def _figures(self) -> list[str]:
        names = list(self.systems[0].found.figures)
        rows = []
        for name in names:
            cells = [f"{s.found.figures[name]:.4f} ({s.intervals[name][0]:.4f} to "
                     f"{s.intervals[name][1]:.4f})" for s in self.systems]  # fmt: skip
            rows.append([name, *cells])
        return _rows(["figure", *(system.name for system in self.systems)], rows)

    def _differences(self) -> list[str]:
        if not self.differences:
            return []
        one, two = (system.name for system in self.systems)
        rows = [[name, f"{c.value:+.4f}", f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.4f}"]
                for name, c in self.differences.items()]  # fmt: skip
        table = _rows(["figure", "difference", "95 %", "p"], rows)
        note = "p: paired randomisation over queries, two-sided, for each figure alone."
        return ["", f"## {two} against {one}", "", *table, "", note]

    def _groups(self, system: System) -> list[str]:
        if not system.groups:
            return []
        of_one = next(iter(system.groups.values()))
        cutoffs = [int(name.partition("@")[2]) for name in of_one if name.startswith("ndcg@")]
        cutoff = MAIN_CUTOFF if MAIN_CUTOFF in cutoffs else cutoffs[-1]
        names = [f"{key}@{cutoff}" for key in ROWS.values()]
        rows = [[group, f"{row['queries']:,}", *(f"{row[name]:.4f}" for name in names)]
                for group, row in system.groups.items()]  # fmt: skip
        return ["", f"## Groups: {system.name}", "", *_rows(["group", "queries", *names], rows)]

    def _calibration(self, system: System) -> list[str]:
        found = system.calibration
        if found is None:
            return []
        rows = [[f"{b.low:.2f} to {b.high:.2f}", f"{b.pairs:,}", f"{b.predicted:.3f}",
                 f"{b.observed:.3f}"] for b in found.bins]  # fmt: skip
        return ["", f"## Reliability of margins: {system.name}", "",
                f"Probability of the model's choice, sigmoid({found.scale:g} |margin|), and the "
                f"share in which it was preferred. Mean distance {found.error:.3f}; log loss "
                f"{found.log_loss:.3f}, of a coin 0.693.", "",
                *_rows(["probability", "pairs", "predicted", "observed"], rows)]  # fmt: skip


def _system_as_json(system: System) -> dict[str, Any]:
    found = system.found
    row: dict[str, Any] = {**found.figures, **found.counts, "intervals": system.intervals}
    if system.groups:
        row["groups"] = system.groups
    if found.similarities:
        row["similarities"] = {
            name: {"mean": float(values.mean()) if len(values) else None,
                   "histogram": np.histogram(values.clip(-1, 1), BINS)[0].tolist()}
            for name, values in found.similarities.items()
        }  # fmt: skip
        row["similarities"]["edges"] = BINS.round(3).tolist()
    if system.calibration is not None:
        row["calibration"] = asdict(system.calibration)
    return row


def _by_group(found: "Evaluation", groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """In order of name."""
    of_query = np.array(groups)
    rows: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups)):
        inside = of_query == group
        rows[group] = {"queries": int(inside.sum())}
        rows[group] |= {
            name: float(values[inside].mean()) for name, values in found.by_query.items()
        }
    return rows


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
            for line in lines]  # fmt: skip
