"""Rules and records -> labels: the steps in their order, each of which leaves tables for the next.

`label` writes what `rankpo-fast label` does; `rules_met` is for who wants the pairs themselves.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankpo_fast.config.label import LabelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.label.choose import Choice, choose
from rankpo_fast.label.draw import mixed
from rankpo_fast.label.engines import Engine
from rankpo_fast.label.pairs import Found, Groups, RuleCount, count_rule, find_pairs
from rankpo_fast.label.records import Records, Splits, rows_of, stage
from rankpo_fast.label.report import Example, Report, described, quantiles
from rankpo_fast.label.rule_file import RuleFile
from rankpo_fast.label.write import Writer, Written, move

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from ibis.expr.types import Table

EXAMPLES = 3  # of each kind, in the report
NEAR_FOR_EXAMPLES = 5_000_000  # pairs, where near misses are not asked for


@dataclass(frozen=True)
class Staged:
    """Rules, and records as tables in a folder that goes when all is done."""

    connection: "DuckDBPyConnection"
    engine: Engine
    rules: RuleFile
    queries: Records
    items: Records
    groups: Groups


def label(config: LabelConfig) -> Report:
    """Write rows, evaluation sets and report; returns the report.

    Raises:
        InputError: a rule, a field, a record or a rule that matches nothing.
    """
    rules = RuleFile.read(config.config)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    splits = Splits(config.validation_share, config.test_share, config.seed)
    with _staged(rules, config, out, splits) as staged:
        counts = _counted(staged, config)
        found = find_pairs(
            staged.engine, rules, staged.groups, max_pairs=config.max_pairs,
            max_near=config.max_pairs if config.negatives != "random" else NEAR_FOR_EXAMPLES,
            near_required=config.negatives != "random", seed=config.seed,
        )  # fmt: skip
        if not staged.engine.one(found.pairs.filter(found.pairs.grade > 0).count()):
            raise InputError(_no_match(rules, counts))
        trained, evaluated = _queries_of_splits(staged.engine, found.pairs, config)
        choice = Choice(config.max_positives, config.num_negatives,
                        config.negatives != "random", config.seed)  # fmt: skip
        choose(staged.engine, trained, found.pairs, choice)
        _evaluation(staged.engine, evaluated, found.pairs)
        made = staged.engine.folder / "out"
        written = Writer(staged.connection, staged.engine, rules, made, config).write()
        report = _report(staged, config, counts, found, written)
        report.write(made)
        move(made, out)
    return report


def rules_met(
    rule_file: str | Path, queries: str | Path, items: str | Path, *, seed: int = 0
) -> list[dict[int, int]]:
    """For each query {row of an item: how many rules it meets}: all of them, or all but one.

    Records may be few: all is kept in memory. Raises InputError as `label` does.
    """
    rules = RuleFile.read(rule_file)
    number = len(rules.rules)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = LabelConfig(str(rule_file), str(queries), str(items), folder, seed=seed)
        staged = stack.enter_context(_staged(rules, config, Path(folder)))
        found = find_pairs(
            staged.engine, rules, staged.groups, max_pairs=config.max_pairs,
            max_near=config.max_pairs, near_required=number > 1, seed=seed,
        )  # fmt: skip
        pairs = staged.engine.glob("pairs")
        met: list[dict[int, int]] = [{} for _ in range(staged.queries.count)]
        for query, item, failed in rows_of(
            staged.connection,
            f"SELECT q.row, i.row, p.failed FROM '{pairs}' p "
            f"JOIN '{staged.engine.glob('queries')}' q ON q.grp = p.sq "
            f"JOIN '{staged.engine.glob('items')}' i ON i.grp = p.si "
            f"ORDER BY q.row, i.row",
        ):
            met[query][item] = number - (failed is not None)
        assert found.share_of_items in (0, 1)
    return met


@contextmanager
def _staged(
    rules: RuleFile, config: LabelConfig, folder: Path, splits: Splits | None = None
) -> Iterator[Staged]:
    import duckdb

    with tempfile.TemporaryDirectory(prefix=".label-", dir=folder) as name:
        work = Path(name)
        connection = duckdb.connect(config={
            "memory_limit": f"{config.memory_gb}GB", "temp_directory": str(work / "spilled"),
            "autoinstall_known_extensions": False,  # nothing is fetched
        })  # fmt: skip
        with closing(connection):
            of_items = splits if config.disjoint_items else None
            q = stage(connection, rules, "query", config.queries, work, splits, config.seed)
            i = stage(connection, rules, "item", config.items, work, of_items, config.seed)
            if config.engine == "spark":
                engine = Engine.spark(work, config.memory_gb)
            else:
                engine = Engine.duckdb(work, connection)
            with closing(engine):
                groups = Groups.of(engine, rules.columns, disjoint=config.disjoint_items)
                yield Staged(connection, engine, rules, q, i, groups)


def _counted(staged: Staged, config: LabelConfig) -> list[RuleCount]:
    """Each rule alone. InputError for one that matches nothing and must hold; others are said."""
    rules = staged.rules
    counts = [
        count_rule(staged.engine, rules, staged.groups, number, max_pairs=config.max_pairs,
                   seed=config.seed)
        for number in range(len(rules.rules))
    ]  # fmt: skip
    least = min(weight for weight, _ in rules.grades)
    total = sum(rule.weight for rule in rules.rules)
    for one in counts:
        rule = one.rule
        if one.dead:
            what = f"{rule.where}: rule {rule.name!r} matches nothing: no item, for any query"
            if total - rule.weight < least:
                raise InputError(f"{what}, so there is no match at all")
            warnings.warn(f"{what}", stacklevel=2)
        elif one.matches_all:
            warnings.warn(f"{rule.where}: rule {rule.name!r} matches everything: it decides "
                          f"nothing", stacklevel=2)  # fmt: skip
    return counts


def _no_match(rules: RuleFile, counts: list[RuleCount]) -> str:
    alone = ", ".join(f"{one.rule.name} {one.share:.2%}" for one in counts)
    return (f"{rules.path}: no item meets the rules of any query; alone they match, of all pairs: "
            f"{alone}")  # fmt: skip


def _queries_of_splits(
    engine: Engine, pairs: "Table", config: LabelConfig
) -> tuple["Table", "Table"]:
    """Queries with a match: those that train, and those that evaluate, no more than asked for."""
    import ibis

    queries = engine.read("queries")
    matched = pairs.filter(pairs.grade > 0).select("sq").distinct()
    queries = queries.semi_join(matched, queries.grp == matched.sq)
    queries = queries.select(query="row", grp="grp", twin="twin", split="split")
    held_out = queries.filter(queries.split > 0)
    hashed = mixed(held_out.query, 8, config.seed)
    place = ibis.row_number().over(ibis.window(group_by="split", order_by=[hashed, "query"]))
    held_out = held_out.mutate(place=place)
    held_out = held_out.filter(held_out.place < config.max_evaluation_queries)
    trained = engine.keep(queries.filter(queries.split == 0), "trained")
    return trained, engine.keep(held_out.drop("place"), "held_out")


def _evaluation(engine: Engine, queries: "Table", pairs: "Table") -> None:
    """Write all positives of the queries that evaluate: query, split, item, number, grade."""
    items = engine.read("items")
    matches = pairs.filter(pairs.grade > 0)
    items = items.select("number", item="row", item_grp="grp")
    found = queries.join(matches, queries.grp == matches.sq)
    found = found.join(items, found.si == items.item_grp)
    engine.keep(found.select("query", "split", "item", "number", "grade"), "evaluation")


# --- the report ---


def _report(
    staged: Staged, config: LabelConfig, counts: list[RuleCount], found: Found, written: Written
) -> Report:
    matches = _matches_per_query(staged, found.pairs)
    total = staged.queries.count
    without = next((queries for count, queries in matches if count == 0), 0)
    capped = sum(queries for count, queries in matches if count > config.max_positives)
    files = {"rows of stage 1": written.rows, "positives": written.positives,
             "negatives": written.negatives}  # fmt: skip
    files |= {f"queries of {name}": count for name, count in written.queries.items()}
    files |= {f"negatives that miss {name} alone": n for name, n in written.failed.items()}
    return Report(
        records={"queries": total, "items": staged.items.count,
                 "queries without a match, left out": without},
        positives=quantiles(matches),
        rules=[described(one) for one in counts],
        files=files,
        notes=_notes(staged, config, found, written, capped),
        examples=_examples(staged, found, config.seed),
    )  # fmt: skip


def _matches_per_query(staged: Staged, pairs: "Table") -> list[tuple[int, int]]:
    """(matches, how many queries have as many), ascending."""
    matches = pairs.filter(pairs.grade > 0)
    per_group = matches.group_by("sq").agg(count=matches.ni.sum())
    groups = staged.groups.queries.left_join(per_group, "sq")
    table = groups.select(nq=groups.nq, count=groups["count"].fill_null(0))
    rows = staged.engine.rows(table.group_by("count").agg(queries=table.nq.sum()))
    return sorted((row["count"], row["queries"]) for row in rows)


def _notes(
    staged: Staged, config: LabelConfig, found: Found, written: Written, capped: int
) -> list[str]:
    notes = []
    if capped:
        notes.append(f"{capped:,} queries match more than --max_positives {config.max_positives}: "
                     f"in rows of stage 1 so many are drawn, and mining may take the others for "
                     f"negatives; evaluation sets have all")  # fmt: skip
    if written.short:
        notes.append(f"{written.short:,} rows have fewer than --num_negatives "
                     f"{config.num_negatives}: too few items are no match")  # fmt: skip
    random = written.negatives - written.failed.total()
    if config.negatives == "near_misses" and random:
        notes.append(f"{random:,} negatives are random: there were not enough near misses")
    if config.negatives == "near_misses" and found.share_of_items < 1:
        notes.append(f"near misses are drawn among {found.share_of_items:.1%} of the items: all "
                     f"would take more pairs than --max_pairs {config.max_pairs:,}")  # fmt: skip
    for records in (staged.queries, staged.items):
        for field, unmapped in records.unmapped.items():
            notes.append(f"{field} of {records.path.stem}: {unmapped.count:,} values are not in "
                         f"the map: {unmapped}")  # fmt: skip
    for name, rows in written.queries.items():
        if rows == config.max_evaluation_queries:
            notes.append(f"{name} has {rows:,} queries, as --max_evaluation_queries says")
    return notes


def _examples(staged: Staged, found: Found, seed: int) -> list[Example]:
    """Matches, and near misses of each rule, of groups drawn by the seed."""
    import ibis

    pairs = found.pairs
    kind = ibis.ifelse(pairs.grade > 0, ibis.literal(-1, "int64"), pairs.failed)
    table = pairs.mutate(kind=kind, order=mixed(pairs.sq, pairs.si, seed))
    window = ibis.window(group_by="kind", order_by=["order", "sq", "si"])
    table = table.mutate(place=ibis.row_number().over(window))
    table = table.filter(table.place < EXAMPLES).order_by("kind", "place")
    staged.engine.keep(table.select("kind", "place", "sq", "si"), "examples")
    rows = rows_of(
        staged.connection,
        f"SELECT e.kind, q.id, q.text, i.id, i.text FROM '{staged.engine.glob('examples')}' e "
        f"JOIN '{staged.engine.glob('queries')}' q ON q.row = e.sq "
        f"JOIN '{staged.engine.glob('items')}' i ON i.row = e.si ORDER BY e.kind, e.place",
    )
    names = [rule.name for rule in staged.rules.rules]
    return [Example("match" if kind < 0 else names[kind], *texts) for kind, *texts in rows]
