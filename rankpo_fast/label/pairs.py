"""Pairs of groups of records that match, or meet all rules but one.

sq, si   the groups: of queries and of items
nq, ni   how many records each has
grade    0 of what is no match
failed   the number of the rule that alone does not hold; null of others
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankpo_fast.errors import InputError
from rankpo_fast.label.draw import HASHES, mixed
from rankpo_fast.label.engines import Engine
from rankpo_fast.label.plan import Alternative, alternatives, met_by_weight, of_rules
from rankpo_fast.label.predicates import Column, Columns, Predicate, holds, leaves
from rankpo_fast.label.rule_file import Rule, RuleFile

if TYPE_CHECKING:
    from ibis.expr.types import Table

SLACK = 1e-9  # of a sum of weights, which rounding may leave below its threshold
SAMPLED = 5  # the draw of items for near misses


@dataclass(frozen=True)
class Groups:
    """Of both sides: sq or si, nq or ni, split, and the columns of the rules."""

    queries: "Table"
    items: "Table"

    @classmethod
    def of(cls, engine: Engine, columns: Columns, *, disjoint: bool) -> "Groups":
        """
        Args:
            disjoint: pairs are of one split; else the items are those of every split.
        """
        import ibis

        tables = []
        for name, side in (("queries", "query"), ("items", "item")):
            table = engine.read(name)
            group, count = f"s{side[0]}", f"n{side[0]}"
            named = {group: "grp", count: "members"}
            own = [*columns.side(side)]  # type: ignore[arg-type]
            firsts = table.filter(table.place == 0).rename(named)
            if not disjoint:
                firsts = firsts.mutate(split=ibis.literal(0, "int64"))
            tables.append(firsts.select(group, count, "split", *own))
        return cls(*tables)


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        share_of_items: those among which near misses were looked for; 0: none were.
        candidates: pairs of groups that had keys in common, about.
    """

    pairs: "Table"
    share_of_items: float
    candidates: int


def find_pairs(
    engine: Engine,
    rules: RuleFile,
    groups: Groups,
    *,
    max_pairs: int,
    max_near: int,
    near_required: bool,
    seed: int,
) -> Found:
    """Write and return the table of pairs.

    Args:
        max_pairs: of groups, that the joins for matches may make.
        max_near: likewise for what meets all rules but one: where they would make more, a share
            of the items is searched.
        near_required: refuse rules whose near misses no join finds.

    Raises:
        InputError: no rule drives a join, or the joins would make more pairs.
    """
    least = min(weight for weight, _ in rules.grades)
    plan = of_rules(rules.rules, least)
    if plan is None:
        raise _nothing_drives(rules)
    plan = [_cheapest(engine, groups, one, rules.columns) for one in plan]
    cost = sum(_candidates(engine, groups, one, rules.columns) for one in plan)
    if cost > max_pairs:
        raise _too_many(rules, cost, max_pairs)
    joins = [_evaluated(groups, one, rules) for one in plan]
    share = 0.0
    ones = [1.0] * len(rules.rules)
    beside = met_by_weight([r.predicate for r in rules.rules], ones, len(ones) - 1)
    if len(ones) == 1 or beside is None:
        if near_required:
            raise InputError(
                f"{rules.path}: near misses meet all rules but one, and without some of the rules "
                f"no key drives a join: give --negatives random, or another rule by same, in, "
                f"overlap, within or ordinal_distance"
            )
    else:
        beside = [_cheapest(engine, groups, one, rules.columns) for one in beside]
        more = sum(_candidates(engine, groups, one, rules.columns) for one in beside)
        share = min(1.0, max_near / more) if more else 1.0
        searched = groups
        if share < 1:
            kept = mixed(groups.items.si, SAMPLED, seed) < int(share * HASHES)
            searched = Groups(groups.queries, groups.items.filter(kept))
        else:
            joins = [] if not rules.graded else joins  # what meets all meets all but one
        joins += [_evaluated(searched, one, rules) for one in beside]
        cost += round(share * more)
    together = functools.reduce(lambda a, b: a.union(b), joins)
    if len(joins) > 1 or any(leaf.of_lists for one in plan for leaf in one.leaves):
        together = together.distinct()
    return Found(engine.keep(together, "pairs"), share, cost)


def _evaluated(groups: Groups, alternative: Alternative, rules: RuleFile) -> "Table":
    """What the keys of an alternative let through, and the rules do not."""
    import ibis

    pairs = _joined(groups, alternative, rules.columns)
    held = {
        f"h{number}": holds(rule.predicate, pairs, rules.columns)
        for number, rule in enumerate(rules.rules)
    }
    pairs = pairs.mutate(**held)
    values = [pairs[name].cast("int64") for name in held]
    met = functools.reduce(operator.add, values)
    weight = functools.reduce(
        operator.add,
        (v * r.weight for v, r in zip(values, rules.rules, strict=True)),
    )
    cases = [
        (weight >= least - SLACK, ibis.literal(grade, "int64")) for least, grade in rules.grades
    ]
    grade = ibis.cases(*cases, else_=ibis.literal(0, "int64"))
    number = functools.reduce(operator.add, ((1 - v) * n for n, v in enumerate(values)))
    one_missing = (met == len(values) - 1) & (len(values) > 1)  # of one rule none is left
    failed = ibis.ifelse(one_missing, number, ibis.null("int64"))
    pairs = pairs.mutate(grade=grade, failed=failed)
    pairs = pairs.filter((pairs.grade > 0) | pairs.failed.notnull())
    return pairs.select("sq", "si", "nq", "ni", "grade", "failed")


def _joined(groups: Groups, alternative: Alternative, columns: Columns) -> "Table":
    q, i, keys = _with_keys(groups, alternative, columns)
    i = i.rename(split_right="split")
    joined = q.join(i, [*keys, q.split == i.split_right])
    return joined.drop("split_right", *(key for key in joined.columns if key.endswith("_right")
                                        and key != "split_right"))  # fmt: skip


def _with_keys(
    groups: Groups, alternative: Alternative, columns: Columns
) -> tuple["Table", "Table", list[str]]:
    q, i = groups.queries, groups.items
    keys = [f"k{number}" for number in range(len(alternative.leaves))]
    for key, leaf in zip(keys, alternative.leaves, strict=True):
        q = leaf.expand(q, "query", key, columns)
        i = leaf.expand(i, "item", key, columns)
    return q, i, keys


def _candidates(engine: Engine, groups: Groups, alternative: Alternative, columns: Columns) -> int:
    """How many pairs of groups the join makes, from the sizes of its keys alone."""
    q, i, keys = _with_keys(groups, alternative, columns)
    q = q.group_by("split", *keys).agg(count_q=q.count())
    i = i.group_by("split", *keys).agg(count_i=i.count())
    both = q.join(i, ["split", *keys])
    products = (both.count_q.cast("float64") * both.count_i).sum()
    return int(engine.one(products) or 0)


def _cheapest(
    engine: Engine, groups: Groups, alternative: Alternative, columns: Columns
) -> Alternative:
    """Keys of lists on both sides multiply the rows: one such leaf drives, that of fewest pairs."""
    lists = [leaf for leaf in alternative.leaves if leaf.of_lists]
    if len(lists) < 2:
        return alternative
    others = [leaf for leaf in alternative.leaves if not leaf.of_lists]
    choices = [Alternative((*others, leaf)) for leaf in lists]
    return min(choices, key=lambda one: _candidates(engine, groups, one, columns))


def _nothing_drives(rules: RuleFile) -> InputError:
    names = ", ".join(rule.name for rule in rules.rules)
    return InputError(
        f"{rules.rules[0].where}: no join can be made of the rules ({names}) but of every query "
        f"with every item: add one of same, in, overlap, within or ordinal_distance that every "
        f"match meets"
    )


def _too_many(rules: RuleFile, cost: int, most: int) -> InputError:
    return InputError(
        f"{rules.path}: the joins of the rules would make {cost:,} pairs, more than --max_pairs "
        f"{most:,}: add a rule that lets fewer through, or raise --max_pairs"
    )


# --- one rule alone ---

CROSS = 20_000_000  # pairs that are counted without keys, and of a sample
SAMPLED_QUERIES = 1000


@dataclass(frozen=True)
class RuleCount:
    """
    Attributes:
        counts: (items that a query matches by this rule alone, how many queries do), ascending.
        exact: False: of a sample, scaled up.
        pairs: of all queries and items.
    """

    rule: Rule
    counts: list[tuple[int, int]]
    exact: bool
    pairs: int

    @property
    def share(self) -> float:
        """Of all pairs, those that match."""
        return sum(count * queries for count, queries in self.counts) / self.pairs

    @property
    def dead(self) -> bool:
        return self.exact and self.share == 0

    @property
    def matches_all(self) -> bool:
        return self.exact and self.share == 1


def count_rule(
    engine: Engine, rules: RuleFile, groups: Groups, number: int, *, max_pairs: int, seed: int
) -> RuleCount:
    """What rule `number` matches alone, over its own columns: nothing larger than CROSS is
    crossed."""
    rule = rules.rules[number]
    names = [rules.columns.name(column) for column in _columns_of(rule.predicate)]
    q = _merged(groups.queries, "q", [n for n in names if n[0] == "q"])
    i = _merged(groups.items, "i", [n for n in names if n[0] == "i"])
    merged = Groups(
        engine.keep(q, f"rule_{number}_queries"), engine.keep(i, f"rule_{number}_items")
    )
    sizes = {
        side: engine.rows(table.group_by("split").agg(groups=table.count(), all=table[n].sum()))
        for side, table, n in (("q", merged.queries, "nq"), ("i", merged.items, "ni"))
    }
    of_items = {row["split"]: row for row in sizes["i"]}
    both = [(row, of_items[row["split"]]) for row in sizes["q"] if row["split"] in of_items]
    pairs = sum(a["all"] * b["all"] for a, b in both)
    crossed = sum(a["groups"] * b["groups"] for a, b in both)
    exact, scale = True, 1.0
    plan = alternatives(rule.predicate)
    if crossed <= CROSS:
        joined = _crossed(merged)
    elif (
        plan is not None
        and len(plan) == 1
        and _candidates(engine, merged, plan[0], rules.columns) <= min(max_pairs, 10 * CROSS)
    ):
        joined = _joined(merged, plan[0], rules.columns)
    else:
        exact = False
        merged, scale = _sample(engine, merged, number, seed)
        joined = _crossed(merged)
    joined = joined.filter(holds(rule.predicate, joined, rules.columns))
    joined = joined.select("sq", "si", "ni").distinct()
    per_group = joined.group_by("sq").agg(count=joined.ni.sum())
    counted = merged.queries.left_join(per_group, "sq")
    counted = counted.select(nq=counted.nq, count=counted["count"].fill_null(0))
    table = counted.group_by("count").agg(queries=counted.nq.sum())
    rows = [(round(row["count"] * scale), row["queries"]) for row in engine.rows(table)]
    return RuleCount(rule, sorted(rows), exact, pairs)


def _columns_of(predicate: Predicate) -> list[Column]:
    return list(dict.fromkeys(c for leaf in leaves(predicate) for c in leaf.columns()))


def _merged(table: "Table", letter: str, names: Sequence[str]) -> "Table":
    """Groups that agree in these columns are one."""
    group, count = f"s{letter}", f"n{letter}"
    merged = table.group_by("split", *names).agg(
        **{group: table[group].min(), count: table[count].sum()}
    )
    return merged


def _crossed(groups: Groups) -> "Table":
    i = groups.items.rename(split_right="split")
    return groups.queries.join(i, groups.queries.split == i.split_right)


def _sample(engine: Engine, groups: Groups, number: int, seed: int) -> tuple[Groups, float]:
    """Some thousand queries and as many items as CROSS allows, and what a count is worth then."""
    q = groups.queries.order_by(mixed(groups.queries.sq, 6, seed)).limit(SAMPLED_QUERIES)
    i = groups.items.order_by(mixed(groups.items.si, 7, seed)).limit(CROSS // SAMPLED_QUERIES)
    q, i = engine.keep(q, f"sample_{number}_queries"), engine.keep(i, f"sample_{number}_items")
    whole, part = engine.one(groups.items.ni.sum()), engine.one(i.ni.sum())
    return Groups(q, i), whole / part
