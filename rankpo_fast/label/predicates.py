"""What a rule can say of a query and an item, as expressions of Ibis over a table of pairs.

`holds` is true or false for each pair, and false where a value is missing. A leaf with `expand` can
drive a join: both sides get a column of keys, a record maybe several rows, and whatever holds has a
key in common. Keys may let more through than holds, never less.
"""

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ibis.expr.types import BooleanValue, Table, Value

Side = Literal["query", "item"]
Kind = Literal["text", "list", "number", "date"]
EARTH_KM = 6371.0088  # mean radius
DEGREE_KM = EARTH_KM * math.pi / 180
CELLS = 10_000_000  # more than a band of the grid has cells


@dataclass(frozen=True)
class Column:
    """A field as a rule reads it; `where` is the line of the rule file that first names it."""

    side: Side
    field: str
    kind: Kind
    limit: float = math.inf  # of the absolute value: 90 and 180 of coordinates

    def of(self, pairs: "Table", columns: "Columns") -> Any:
        return pairs[columns.name(self)]


class Columns:
    """The columns of both sides: q0, q1, ... and i0, i1, ..., by their number."""

    def __init__(self) -> None:
        self.where: dict[Column, str] = {}

    def add(self, column: Column, where: str) -> Column:
        self.where.setdefault(column, where)
        return column

    def side(self, side: Side) -> dict[str, Column]:
        """{name: column}."""
        mine = [column for column in self.where if column.side == side]
        return {f"{side[0]}{number}": column for number, column in enumerate(mine)}

    def name(self, column: Column) -> str:
        return next(name for name, one in self.side(column.side).items() if one == column)


class Leaf:
    """A predicate of one or more columns of either side."""

    query: Column
    item: Column

    def columns(self) -> Sequence[Column]:
        return (self.query, self.item)

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        raise NotImplementedError

    def expand(self, table: "Table", side: Side, key: str, columns: Columns) -> "Table | None":
        """`table` of one side with a column `key`; rows without one are left out. None: this
        predicate drives no join."""
        return None

    @property
    def drives(self) -> bool:
        return type(self).expand is not Leaf.expand

    @property
    def of_lists(self) -> bool:
        """Whether both sides have several keys, so that a pair may meet in more than one."""
        return self.query.kind == self.item.kind == "list"


@dataclass(frozen=True)
class Same(Leaf):
    query: Column
    item: Column

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        q, i = (c.of(pairs, columns) for c in self.columns())
        return (q == i).fill_null(False)

    def expand(self, table: "Table", side: Side, key: str, columns: Columns) -> "Table":
        value = getattr(self, side).of(table, columns)
        return table.mutate(**{key: value}).filter(value.notnull())


@dataclass(frozen=True)
class Overlap(Leaf):
    """At least `count` values in common, or `share` of those of `of`; `in` is the overlap of one
    value with a list."""

    query: Column
    item: Column
    count: int = 1
    share: float = 0.0
    of: Literal["query", "item", "union"] = "query"

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        q, i = (c.of(pairs, columns) for c in self.columns())
        if self.query.kind == "text":
            return i.contains(q).fill_null(False)
        if self.item.kind == "text":
            return q.contains(i).fill_null(False)
        common = q.intersect(i).length()
        enough = common >= self.count
        if self.share:
            whole = {"query": q.length(), "item": i.length()}.get(
                self.of, q.length() + i.length() - common
            )
            # 0.6 * 5 is a little more than 3: the slack is below any difference of two shares
            enough = enough & (common >= whole * self.share - 1e-9)
        return enough.fill_null(False)

    def expand(self, table: "Table", side: Side, key: str, columns: Columns) -> "Table":
        column = getattr(self, side)
        value = column.of(table, columns)
        if column.kind == "list":
            return table.filter(value.length() > 0).mutate(**{key: value.unnest()})
        return table.mutate(**{key: value}).filter(value.notnull())


@dataclass(frozen=True)
class OrdinalDistance(Leaf):
    """The item's number lies at most `below` under the query's and at most `above` over it."""

    query: Column
    item: Column
    below: float
    above: float

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        q, i = (c.of(pairs, columns) for c in self.columns())
        return ((i >= q - self.below) & (i <= q + self.above)).fill_null(False)

    def expand(self, table: "Table", side: Side, key: str, columns: Columns) -> "Table":
        """Buckets as wide as the interval: it touches two of them at most."""
        import ibis

        width = (self.below + self.above) or 1.0
        value = getattr(self, side).of(table, columns)
        table = table.filter(value.notnull())
        if side == "item":
            return table.mutate(**{key: (value / width).floor().cast("int64")})
        low, high = ((edge / width).floor().cast("int64") for edge in
                     (value - self.below, value + self.above))  # fmt: skip
        steps = ibis.array([0, 1, 2]).cast("array<int64>")  # the third for what rounding does
        table = table.mutate(low_=low, high_=high, step_=steps.unnest())
        table = table.mutate(**{key: table.low_ + table.step_})
        return table.filter(table[key] <= table.high_).drop("low_", "high_", "step_")


@dataclass(frozen=True)
class Range(Leaf):
    """low <= value <= high, where each is a column or a constant, and a missing bound is none."""

    value: Column
    low: Column | float | None
    high: Column | float | None

    def columns(self) -> Sequence[Column]:
        return [c for c in (self.value, self.low, self.high) if isinstance(c, Column)]

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        value = self.value.of(pairs, columns)
        result = value.notnull()
        if self.low is not None:
            low = self.low.of(pairs, columns) if isinstance(self.low, Column) else self.low
            result = result & (value >= low).fill_null(True)
        if self.high is not None:
            high = self.high.of(pairs, columns) if isinstance(self.high, Column) else self.high
            result = result & (value <= high).fill_null(True)
        return result


@dataclass(frozen=True)
class OneOf(Leaf):
    """A value of one side among given ones."""

    column: Column
    values: tuple[str, ...]

    def columns(self) -> Sequence[Column]:
        return (self.column,)

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        return self.column.of(pairs, columns).isin(self.values).fill_null(False)


@dataclass(frozen=True)
class Within(Leaf):
    """At most `km` between two places, over the great circle of a sphere."""

    query_lat: Column
    query_lon: Column
    item_lat: Column
    item_lon: Column
    km: float

    of_lists = False  # an item lies in one cell

    def columns(self) -> Sequence[Column]:
        return (self.query_lat, self.query_lon, self.item_lat, self.item_lon)

    def holds(self, pairs: "Table", columns: Columns) -> "BooleanValue":
        lat1, lon1, lat2, lon2 = (c.of(pairs, columns).radians() for c in self.columns())
        half_lat, half_lon = ((lat2 - lat1) / 2).sin(), ((lon2 - lon1) / 2).sin()
        h = half_lat * half_lat + lat1.cos() * lat2.cos() * half_lon * half_lon
        # The chord is compared, not the arc: no arcsine of what rounding made more than 1.
        most = math.sin(min(self.km / EARTH_KM, math.pi) / 2) ** 2
        return (h <= most).fill_null(False)

    def expand(self, table: "Table", side: Side, key: str, columns: Columns) -> "Table":
        """Bands of latitude `km` high, cut into cells at least `km` wide: an item lies in one, a
        query asks the cells that its circle may touch in its own band and the two beside it."""
        import ibis

        lat_c, lon_c = self.columns()[:2] if side == "query" else self.columns()[2:]
        lat, lon = lat_c.of(table, columns), lon_c.of(table, columns)
        table = table.filter(lat.notnull() & lon.notnull())
        height = self.band
        band = (lat / height).floor().cast("int64")
        if side == "item":
            table = table.mutate(band_=band)
            table = table.mutate(cells_=self._cells(table.band_))
            cell = ((lon_c.of(table, columns) + 180) / 360 * table.cells_).floor().cast("int64")
            table = table.mutate(**{key: table.band_ * CELLS + cell % table.cells_})
            return table.drop("band_", "cells_")
        beside = ibis.array([-1, 0, 1]).cast("array<int64>")
        table = table.mutate(own_=band, beside_=beside.unnest())
        table = table.mutate(band_=table.own_ + table.beside_)
        table = table.mutate(cells_=self._cells(table.band_))
        # Degrees of longitude that a circle of this radius reaches to either side; over a pole all.
        angle = math.radians(height)
        ratio = math.sin(min(angle, math.pi / 2)) / lat_c.of(table, columns).radians().cos()
        # `ratio` beyond 1: the circle holds a pole
        reach = ibis.ifelse(ratio < 1, ibis.least(ratio, 1.0).asin().degrees(), 180.0)
        lon = lon_c.of(table, columns) + 180
        low, high = (
            ((lon + sign * reach) / 360 * table.cells_).floor().cast("int64") for sign in (-1, 1)
        )
        table = table.mutate(low_=low, high_=ibis.least(high, low + table.cells_ - 1))
        steps = ibis.array(list(range(self._most_cells()))).cast("array<int64>")
        table = table.mutate(step_=steps.unnest())
        table = table.filter(table.low_ + table.step_ <= table.high_)
        cell = (table.low_ + table.step_ + table.cells_) % table.cells_
        table = table.mutate(**{key: table.band_ * CELLS + cell})
        return table.drop("own_", "beside_", "band_", "cells_", "low_", "high_", "step_")

    @property
    def band(self) -> float:
        """Degrees; a little more than the radius, so that rounding loses no pair."""
        return self.km / DEGREE_KM * (1 + 1e-9)

    def _cells(self, band: "Value") -> Any:
        """How many a band is cut into: none is narrower than a band is high."""
        import ibis

        edge = ibis.least(ibis.greatest(band.abs(), (band + 1).abs()) * self.band, 90.0)
        count = (edge.radians().cos() * 360 / self.band).floor().cast("int64")
        return ibis.greatest(count, 1)

    def _most_cells(self) -> int:
        """That a query asks in one band, over all bands there are."""
        height, most = self.band, 1
        for band in range(-1, math.ceil(90 / height) + 1):
            edge = min(max(abs(band), abs(band + 1)) * height, 90.0)
            cells = max(1, math.floor(math.cos(math.radians(edge)) * 360 / height))
            far = min((max(abs(band), abs(band + 1)) + 1) * height, 90.0)  # of a query beside it
            ratio = math.sin(min(math.radians(height), math.pi / 2)) / max(
                math.cos(math.radians(far)), 1e-300
            )
            reach = math.degrees(math.asin(ratio)) if ratio < 1 else 180.0
            most = max(most, min(cells, math.floor(2 * reach / 360 * cells) + 2))
        return most + 1


@dataclass(frozen=True)
class Not:
    part: "Predicate"


@dataclass(frozen=True)
class AtLeast:
    """`all` and `any` are this with all of the parts, and with one."""

    count: int
    parts: tuple["Predicate", ...]


Predicate = Leaf | Not | AtLeast


def leaves(predicate: Predicate) -> Iterator[Leaf]:
    if isinstance(predicate, Leaf):
        yield predicate
        return
    for part in (predicate.part,) if isinstance(predicate, Not) else predicate.parts:
        yield from leaves(part)


def holds(predicate: Predicate, pairs: "Table", columns: Columns) -> "BooleanValue":
    if isinstance(predicate, Leaf):
        return predicate.holds(pairs, columns)
    if isinstance(predicate, Not):
        return ~holds(predicate.part, pairs, columns)
    found = [holds(part, pairs, columns) for part in predicate.parts]
    if predicate.count == len(found):
        return functools.reduce(operator.and_, found)
    if predicate.count == 1:
        return functools.reduce(operator.or_, found)
    return functools.reduce(operator.add, [one.cast("int64") for one in found]) >= predicate.count
