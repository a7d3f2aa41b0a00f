"""The figures of an evaluation as text, with what they were taken of."""

from collections.abc import Mapping
from typing import Any

ROWS = {"nDCG": "ndcg", "MRR": "mrr", "recall": "recall"}


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
