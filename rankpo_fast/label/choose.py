"""Which items stand in the row of a query: its positives, or some of them, and its negatives.

    query, item   rows of the records
    kind          0 a positive, 1 a negative
    place         its order among those of its kind, from 0
    grade         of a positive; 0 of a negative
    failed        the rule that a near miss does not meet; null of others

A draw is a rank among the matches of a query. Where these are few all ranks are drawn, in the order
of their hashes; else some more than needed, of which those drawn twice count once. Which match has
a rank is found in the running sum of group sizes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankpo_fast.label.draw import mixed
from rankpo_fast.label.engines import Engine

if TYPE_CHECKING:
    from ibis.expr.types import Table

POSITIVE = -1  # the class of matches; of near misses it is the rule that failed
RANDOM = 1000  # of items drawn from all
CLASSES = 2048


@dataclass(frozen=True)
class Choice:
    """How many of each kind a query gets, at most."""

    positives: int
    negatives: int
    near: bool
    seed: int


def choose(engine: Engine, queries: "Table", pairs: "Table", choice: Choice) -> "Table":
    """
    Args:
        queries: rows of queries with a match: query, grp, twin, split.
        pairs: as of pairs.py.
    """
    items = engine.read("items")
    items = items.select(item=items.row, item_twin=items.twin, item_grp=items.grp,
                         item_split=items.split, item_place=items.place,
                         item_number=items.number)  # fmt: skip
    matches = pairs.filter(pairs.grade > 0).mutate(cls=_int(POSITIVE))
    classes = matches.select("sq", "si", "ni", "cls", "grade")
    if choice.near and choice.negatives:
        near = pairs.filter((pairs.grade == 0) & pairs.failed.notnull())
        near = near.mutate(cls=near.failed).select("sq", "si", "ni", "cls", "grade")
        classes = classes.union(near)
    starts = _starts(engine, classes)
    positives = _positives(queries, starts, items, choice)
    if not choice.negatives:
        return engine.keep(positives, "chosen")
    drawn = _random(engine, queries, items, choice)
    if choice.near:
        drawn = drawn.union(_near(queries, starts, items, choice))
    drawn = engine.keep(drawn, "drawn")
    wrong = _true_matches(engine, drawn, matches)
    negatives = drawn.anti_join(wrong, ["query", "item"])
    negatives = _best(negatives, choice.negatives).mutate(kind=_int(1), grade=_int(0))
    negatives = negatives.mutate(
        failed=(negatives.cls == RANDOM).ifelse(_null(), negatives.cls)
    ).select(*positives.columns)
    return engine.keep(positives.union(negatives), "chosen")


def _starts(engine: Engine, classes: "Table") -> "Table":
    """Groups of items of each group of queries and class, in order: where each begins among the
    matches, and how many these are."""
    import ibis

    alike = {"group_by": ["sq", "cls"]}
    up_to = ibis.window(**alike, order_by="si", preceding=None, following=0)
    whole = ibis.window(**alike)
    table = classes.mutate(
        start=(classes.ni.sum().over(up_to) - classes.ni).cast("int64"),
        count=classes.ni.sum().over(whole).cast("int64"),
    )
    return engine.keep(table, "starts")


def _positives(queries: "Table", starts: "Table", items: "Table", choice: Choice) -> "Table":
    """Of those drawn the best grades first."""
    drawn = _located(queries, starts.filter(starts.cls == POSITIVE), items,
                     2 * choice.positives, choice.seed)  # fmt: skip
    best = _best(drawn.mutate(order=drawn.order - drawn.grade * 2**40), choice.positives)
    return best.select("query", "item", "place", "grade", kind=_int(0), failed=_null())


def _near(queries: "Table", starts: "Table", items: "Table", choice: Choice) -> "Table":
    """Of every rule as many as there may be, in an order that takes the rules in turn."""
    import ibis

    drawn = _located(queries, starts.filter(starts.cls != POSITIVE), items,
                     choice.negatives + 2, choice.seed)  # fmt: skip
    window = ibis.window(group_by=["query", "cls"], order_by=["order", "item"])
    drawn = drawn.mutate(turn=ibis.row_number().over(window).cast("int64"))
    order = drawn.turn * 2**33 + mixed(drawn.query, drawn.cls, choice.seed)
    return drawn.select("query", "query_twin", "item", "item_twin", "cls", order=order)


def _random(engine: Engine, queries: "Table", items: "Table", choice: Choice) -> "Table":
    """Of all items of the split; behind all near misses."""
    sizes = items.group_by(split="item_split").agg(count=items.count())
    table = queries.join(sizes, "split").mutate(cls=_int(RANDOM))
    table = _ranks(table, 2 * choice.negatives + 8, choice.seed)
    found = table.join(items, [table.split == items.item_split, table.rank == items.item_number])
    return found.select(
        "query", "item", "item_twin", "cls", query_twin="twin", order=found.order + 2**50
    ).select("query", "query_twin", "item", "item_twin", "cls", "order")


def _ranks(table: "Table", wanted: int, seed: int) -> "Table":
    """Some of 0 ... count - 1 for each row of query, cls and count: `rank`, and its `order`."""
    import ibis

    few = 4 * wanted + 16
    draws = ibis.ifelse(table["count"] <= few, table["count"], _int(2 * wanted + 8))
    table = table.mutate(draw=ibis.range(0, draws).unnest())
    all_of_them = table["count"] <= few
    hashed = mixed(table.query, table.draw.cast("int64") * CLASSES + table.cls + 1, seed)
    table = table.mutate(
        rank=ibis.ifelse(all_of_them, table.draw.cast("int64"), hashed % table["count"]),
        order=ibis.ifelse(all_of_them, hashed, table.draw.cast("int64")),
    )
    first = ibis.row_number().over(ibis.window(group_by=["query", "cls", "rank"], order_by="order"))
    table = table.mutate(seen=first).filter(ibis._.seen == 0)
    place = ibis.row_number().over(
        ibis.window(group_by=["query", "cls"], order_by=["order", "rank"])
    )
    return table.mutate(turn=place).filter(ibis._.turn < wanted).drop("seen", "turn", "draw")


def _located(queries: "Table", starts: "Table", items: "Table", wanted: int, seed: int) -> "Table":
    """Draws of every class: query, query_twin, item, item_twin, cls, grade, order."""
    import ibis

    counts = starts.group_by("sq", "cls").agg(count=starts["count"].max())
    table = queries.join(counts, queries.grp == counts.sq)
    ranks = _ranks(table.select("query", "twin", "sq", "cls", "count"), wanted, seed)
    # Ranks among the starts, in order: the last start before a rank is that of its group.
    marks = starts.select("sq", "cls", at=starts.start, is_rank=_int(0), query=_null(),
                          twin=_null(), order=_null(), start=starts.start)  # fmt: skip
    asked = ranks.select("sq", "cls", at=ranks["rank"], is_rank=_int(1), query=ranks.query,
                         twin=ranks.twin, order=ranks.order, start=_null())  # fmt: skip
    both = marks.union(asked)
    before = ibis.window(group_by=["sq", "cls"], order_by=["at", "is_rank"],
                         preceding=None, following=0)  # fmt: skip
    both = both.mutate(begins=both.start.max().over(before)).filter(ibis._.is_rank == 1)
    begun = starts.select("sq", "cls", "si", "grade", begins="start")
    found = both.drop("start").join(begun, ["sq", "cls", "begins"])
    found = found.mutate(within=found.at - found.begins)
    found = found.join(items, [found.si == items.item_grp, found.within == items.item_place])
    return found.select("query", "item", "item_twin", "cls", "grade", "order", query_twin="twin")


def _best(drawn: "Table", most: int) -> "Table":
    """The first `most` of each query by order, equal texts once: with `place`."""
    import ibis

    alike = ibis.window(group_by=["query", "item_twin"], order_by=["order", "item"])
    drawn = drawn.mutate(again=ibis.row_number().over(alike)).filter(ibis._.again == 0)
    window = ibis.window(group_by="query", order_by=["order", "item"])
    drawn = drawn.mutate(place=ibis.row_number().over(window).cast("int64"))
    return drawn.filter(drawn.place < most)


def _true_matches(engine: Engine, drawn: "Table", matches: "Table") -> "Table":
    """Of what was drawn, that which is a positive of the query, or has the text of one; for any
    query of the same text."""
    of_queries, of_items = engine.read("queries"), engine.read("items")
    same_query = of_queries.select(query_twin="twin", sq="grp").distinct()
    same_item = of_items.select(item_twin="twin", si="grp").distinct()
    table = drawn.select("query", "item", "query_twin", "item_twin")
    table = table.join(same_query, "query_twin").join(same_item, "item_twin")
    return table.semi_join(matches, ["sq", "si"]).select("query", "item").distinct()


def _int(value: int) -> Any:
    import ibis

    return ibis.literal(value, "int64")


def _null() -> Any:
    import ibis

    return ibis.null("int64")
