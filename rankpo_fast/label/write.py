"""Labels -> files: rows of stage 1, evaluation sets, and graded ones in BEIR's form.

    train.jsonl               {"query", "positives", "negatives", "ids": {"query", "positives",
                              "negatives"}, "failed": [name of a rule, or null]}
    train_graded.jsonl        {"query", "passages", "grades"}, where the rules give grades
    corpus.jsonl              {"text", "id"}, the items in their order
    SPLIT_queries.jsonl       {"query": {"text"}, "positives": {"index"}, "id"}
    beir/                     corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, with grades
With items of their own, splits have a SPLIT_corpus.jsonl and a beir_SPLIT/ each.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.config.label import LabelConfig
from rankpo_fast.data.files import flush_to_disk, whole_file
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.label.engines import Engine
from rankpo_fast.label.records import rows_of
from rankpo_fast.label.rule_file import RuleFile

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

HELD_OUT = {1: "validation", 2: "test"}
AT_ONCE = 10_000  # queries whose texts are in memory


@dataclass
class Written:
    """What the files hold."""

    rows: int = 0
    positives: int = 0
    negatives: int = 0
    capped: int = 0  # rows of more positives than were taken
    short: int = 0  # rows of fewer negatives than were asked for
    failed: Counter = field(default_factory=Counter)  # near misses by rule
    queries: dict[str, int] = field(default_factory=dict)  # of evaluation sets


@dataclass(frozen=True)
class Writer:
    connection: "DuckDBPyConnection"
    engine: Engine
    rules: RuleFile
    folder: Path
    config: LabelConfig

    def write(self) -> Written:
        written = Written()
        write_jsonl(self.folder / "train.jsonl", self._train(written))
        if self.rules.graded:
            write_jsonl(self.folder / "train_graded.jsonl", self._graded())
        splits = [name for number, name in HELD_OUT.items() if self._has(number)]
        for name in splits:
            written.queries[name] = self._evaluation(name)
        return written

    def _has(self, split: int) -> bool:
        found = f"SELECT 1 FROM '{self._table('evaluation')}' WHERE split = {split} LIMIT 1"
        return self.connection.execute(found).fetchone() is not None

    def _table(self, name: str) -> str:
        return self.engine.glob(name).replace("'", "''")

    # --- training ---

    def _chosen(self) -> Iterator[tuple]:
        """Id and text of a query, and its items: kind, id, text, grade, failed, in order."""
        queries, items, chosen = map(self._table, ("queries", "items", "chosen"))
        last = self.connection.execute(f"SELECT max(query) FROM '{chosen}'").fetchall()[0][0]
        for first in range(0, (-1 if last is None else last) + 1, AT_ONCE):
            inside = f"BETWEEN {first} AND {first + AT_ONCE - 1}"
            yield from rows_of(
                self.connection,
                f"SELECT any_value(q.id), any_value(q.text), list((c.kind, i.id, i.text, c.grade, "
                f"c.failed) ORDER BY c.kind, c.place) FROM '{chosen}' c JOIN '{queries}' q ON "
                f"q.row = c.query JOIN '{items}' i ON i.row = c.item WHERE c.query {inside} "
                f"AND q.row {inside} GROUP BY c.query ORDER BY c.query",
            )

    def _train(self, written: Written) -> Iterator[dict[str, Any]]:
        names = [rule.name for rule in self.rules.rules]
        for key, text, items in self._chosen():
            positives = [item for item in items if item[0] == 0]
            negatives = [item for item in items if item[0] == 1]
            failed = [None if item[4] is None else names[item[4]] for item in negatives]
            written.rows += 1
            written.positives += len(positives)
            written.negatives += len(negatives)
            written.short += len(negatives) < self.config.num_negatives
            written.failed.update(name for name in failed if name is not None)
            row = {
                "query": text,
                "positives": [item[2] for item in positives],
                "negatives": [item[2] for item in negatives],
                "ids": {
                    "query": key,
                    "positives": [item[1] for item in positives],
                    "negatives": [item[1] for item in negatives],
                },
            }
            if self.config.negatives == "near_misses":
                row["failed"] = failed
            yield row

    def _graded(self) -> Iterator[dict[str, Any]]:
        for _, text, items in self._chosen():
            yield {
                "query": text,
                "passages": [item[2] for item in items],
                "grades": [item[3] for item in items],
            }

    # --- evaluation ---

    def _evaluation(self, split: str) -> int:
        """Its queries, and the corpus where that is not written yet; returns how many queries."""
        disjoint = self.config.disjoint_items
        number = next(n for n, name in HELD_OUT.items() if name == split)
        corpus = self.folder / (f"{split}_corpus.jsonl" if disjoint else "corpus.jsonl")
        if not corpus.exists():
            rows = self._items(number if disjoint else 0)
            write_jsonl(corpus, ({"text": text, "id": key} for key, text in rows))
        queries = list(self._positives(number))
        write_jsonl(
            self.folder / f"{split}_queries.jsonl",
            (
                {"query": {"text": text}, "positives": {"index": index}, "id": key}
                for key, text, index, _, _ in self._positives(number)
            ),
        )
        if self.rules.graded:
            self._beir(split, number)
        return len(queries)

    def _positives(self, split: int) -> Iterator[tuple]:
        """Id, text, and of the positives: numbers in the corpus, ids, grades."""
        queries, items, found = map(self._table, ("queries", "items", "evaluation"))
        yield from rows_of(
            self.connection,
            f"SELECT any_value(q.id), any_value(q.text), list(e.number ORDER BY e.number), "
            f"list(i.id ORDER BY e.number), list(e.grade ORDER BY e.number) FROM '{found}' e "
            f"JOIN '{queries}' q ON q.row = e.query JOIN (SELECT row, id FROM '{items}') i ON "
            f"i.row = e.item WHERE e.split = {split} GROUP BY e.query ORDER BY e.query",
            size=100,
        )

    def _items(self, split: int) -> Iterator[tuple]:
        yield from rows_of(
            self.connection,
            f"SELECT id, text FROM '{self._table('items')}' WHERE split = {split} ORDER BY row",
        )

    def _beir(self, split: str, number: int) -> None:
        disjoint = self.config.disjoint_items
        folder = self.folder / (f"beir_{split}" if disjoint else "beir")
        if not (folder / "corpus.jsonl").exists():
            rows = self._items(number if disjoint else 0)
            write_jsonl(folder / "corpus.jsonl", ({"_id": k, "text": t} for k, t in rows))
            which = f"= {number}" if disjoint else "> 0"
            queries = rows_of(
                self.connection,
                f"SELECT id, text FROM '{self._table('queries')}' WHERE row IN (SELECT query FROM "
                f"'{self._table('evaluation')}' WHERE split {which}) ORDER BY row",
            )
            write_jsonl(folder / "queries.jsonl", ({"_id": k, "text": t} for k, t in queries))
        with whole_file(folder / "qrels" / f"{split}.tsv") as path, path.open("w") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for key, _, _, ids, grades in self._positives(number):
                file.writelines(
                    f"{key}\t{item}\t{grade}\n" for item, grade in zip(ids, grades, strict=True)
                )


def outputs(folder: Path) -> list[Path]:
    """Every file that a run may write there."""
    names = ["train.jsonl", "train_graded.jsonl", "corpus.jsonl", "report.md", "report.json"]
    for split in HELD_OUT.values():
        names += [f"{split}_queries.jsonl", f"{split}_corpus.jsonl", f"beir/qrels/{split}.tsv"]
        names.append(f"beir_{split}/qrels/{split}.tsv")
    for beir in ("beir", *(f"beir_{split}" for split in HELD_OUT.values())):
        names += [f"{beir}/corpus.jsonl", f"{beir}/queries.jsonl"]
    return [folder / name for name in names]


def move(made: Path, out: Path) -> None:
    """Every file of `made` to its place in `out`; what else an earlier run left there goes."""
    for stale in outputs(out):
        stale.unlink(missing_ok=True)
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        target = out / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    flush_to_disk(out)
