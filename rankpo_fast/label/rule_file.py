"""The rule file: YAML -> RuleFile. What it does not know is refused, with file, line and what is
near; docs/labels.md says what may stand in it."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rankpo_fast.errors import InputError
from rankpo_fast.label.predicates import (
    AtLeast,
    Column,
    Columns,
    Kind,
    Leaf,
    Not,
    OneOf,
    OrdinalDistance,
    Overlap,
    Predicate,
    Range,
    Same,
    Side,
    Within,
    leaves,
)
from rankpo_fast.label.templates import Template
from rankpo_fast.label.yaml_nodes import Node, near

MOST = 1e15  # of numbers in a rule file
SECONDS_OF_DAY = 86_400
MOST_PARTS = 10_000
MAX_RULES = 16  # ways to meet all but one, or a threshold, are counted out


@dataclass(frozen=True)
class Derived:
    """A field made of another by a map; `default` stands for what the map has not."""

    map: str
    of: str
    default: str | None
    where: str


@dataclass(frozen=True)
class SideSettings:
    """How the records of one side are read."""

    id: str
    id_where: str
    template: Template
    text_where: str
    lists: Mapping[str, str]  # field -> what separates the values in its text
    lists_where: Mapping[str, str]
    derived: Mapping[str, Derived]


@dataclass(frozen=True)
class Rule:
    name: str
    predicate: Predicate
    weight: float
    where: str


@dataclass(frozen=True)
class RuleFile:
    """
    Attributes:
        grades: (least weight, grade) from the highest grade down; of rules without grades the one
            grade 1, for which all must hold.
        graded: whether the file has grades.
    """

    path: Path
    sides: Mapping[Side, SideSettings]
    maps: Mapping[str, Mapping[str, str]]
    rules: tuple[Rule, ...]
    grades: tuple[tuple[float, int], ...]
    graded: bool
    columns: Columns

    @classmethod
    def read(cls, path: str | Path) -> "RuleFile":
        try:
            return _Reader(Path(path)).read()
        except RecursionError:  # an alias (*name) inside of what it names
            raise InputError(f"{path}: rules are nested too deeply") from None


SIDES: dict[str, Side] = {"queries": "query", "items": "item"}
COMBINATIONS = ("all", "any", "at_least", "not")
OF_RULES = ("name", "weight")


@dataclass
class _Reader:
    path: Path
    columns: Columns = field(default_factory=Columns)
    dates: dict[Side, set[str]] = field(default_factory=dict)
    date_lines: dict[tuple[Side, str], Node] = field(default_factory=dict)
    parts: int = 0  # of rules, so far

    def read(self) -> RuleFile:
        top = Node.read(self.path).mapping(
            "the rule file",
            (*SIDES, "maps", "rules", "grades"),
            required=(*SIDES, "rules"),
        )
        maps = self._maps(top["maps"]) if "maps" in top else {}
        sides = {side: self._side(top[name], name, side, maps) for name, side in SIDES.items()}
        nodes = top["rules"].items("rules")
        if not 0 < len(nodes) <= MAX_RULES:
            raise top["rules"].fault(f"there must be 1 to {MAX_RULES} rules, got {len(nodes)}")
        rules = [self._rule(node) for node in nodes]
        names = [rule.name for rule in rules]
        for node, rule in zip(nodes, rules, strict=True):
            if names.count(rule.name) > 1:
                raise node.fault(f"two rules are called {rule.name}: give each a name")
        total = math.fsum(rule.weight for rule in rules)
        grades = self._grades(top["grades"], total) if "grades" in top else ((total, 1),)
        if "grades" not in top:
            for node, rule in zip(nodes, rules, strict=True):
                if rule.weight != 1:
                    raise node.fault("a weight means nothing without grades, which say what sums "
                                     "of weights are worth")  # fmt: skip
        for (side, name), node in self.date_lines.items():
            if all(c != Column(side, name, "date") for c in self.columns.where):
                raise node.fault(f"no rule reads the date {name}")
        return RuleFile(self.path, sides, maps, tuple(rules), grades, "grades" in top, self.columns)

    # --- records ---

    def _side(
        self, node: Node, name: str, side: Side, maps: Mapping[str, Mapping[str, str]]
    ) -> SideSettings:
        found = node.mapping(name, ("id", "text", "lists", "dates", "fields"), ("id", "text"))
        try:
            template = Template.parse(found["text"].text(f"{name}: text"))
        except ValueError as error:
            raise found["text"].fault(f"{name}: text: {error}") from None
        lists, list_lines = {}, {}
        for key, value in found["lists"].pairs("lists") if "lists" in found else ():
            lists[_field(key)] = value.text("a separator") if value.node.value else ""
            list_lines[_field(key)] = key.where
            if not lists[_field(key)]:
                raise value.fault("a separator is empty")
        self.dates[side] = set()
        for date in found["dates"].items("dates") if "dates" in found else ():
            self.dates[side].add(_field(date))
            self.date_lines[side, _field(date)] = date
        derived = {}
        for key, value in found["fields"].pairs("fields") if "fields" in found else ():
            parts = value.mapping(f"field {_field(key)}", ("map", "of", "else"), ("map", "of"))
            chosen = parts["map"].text("map")
            if chosen not in maps:
                raise parts["map"].fault(f"there is no map {chosen}{near(chosen, maps)}")
            other = parts["else"].text("else") if "else" in parts else None
            derived[_field(key)] = Derived(chosen, _field(parts["of"]), other, value.where)
        for name, one in derived.items():
            if one.of in derived:
                raise InputError(f"{one.where}: {name} is made of {one.of}, which is made itself: "
                                 f"name the field of the records")  # fmt: skip
        return SideSettings(
            _field(found["id"]), found["id"].where, template, found["text"].where,
            lists, list_lines, derived,
        )  # fmt: skip

    def _maps(self, node: Node) -> dict[str, dict[str, str]]:
        return {key.text("a map"): self._map(value) for key, value in node.pairs("maps")}

    def _map(self, node: Node) -> dict[str, str]:
        """A list says an order: each value's place in it, from 0."""
        if node.is_list():
            values = [item.text("a value") for item in node.items("a map")]
            for value in values:
                if values.count(value) > 1:
                    raise node.fault(f"{value} stands twice in the order")
            return {value: str(place) for place, value in enumerate(values)}
        if node.is_mapping():
            made = {key.text("a key"): value.text("a value") for key, value in node.pairs("a map")}
        else:
            made = _map_of_file(self.path.parent / node.text("a map"), node)
        if not made:
            raise node.fault("the map is empty")
        return made

    # --- rules ---

    def _rule(self, node: Node) -> Rule:
        kinds = {key.text("a key") for key, _ in node.pairs("a rule")} - {*OF_RULES}
        named = node.mapping("a rule", (*OF_RULES, *PREDICATES, *COMBINATIONS))
        if len(kinds) != 1:
            raise node.fault(f"a rule says one thing, by one of {', '.join(PREDICATES)}, "
                             f"{', '.join(COMBINATIONS)}; got {len(kinds)}")  # fmt: skip
        [kind] = kinds
        predicate = self._predicate(kind, named[kind])
        weight = 1.0
        if "weight" in named:
            weight = named["weight"].number("weight", low=1e-6, high=1e6)
        name = named["name"].text("name") if "name" in named else _words(kind, predicate)
        return Rule(name, predicate, weight, node.where)

    def _part(self, node: Node) -> Predicate:
        named = node.mapping("a predicate", (*PREDICATES, *COMBINATIONS))
        if len(named) != 1:
            raise node.fault(f"one predicate stands here, got {len(named)}")
        [(kind, value)] = named.items()
        return self._predicate(kind, value)

    def _predicate(self, kind: str, node: Node) -> Predicate:
        self.parts += 1
        if self.parts > MOST_PARTS:
            raise node.fault(f"more than {MOST_PARTS:,} parts of rules, those of aliases counted "
                             f"where they stand")  # fmt: skip
        if kind == "not":
            return Not(self._part(node))
        if kind in ("all", "any"):
            parts = tuple(self._part(part) for part in node.items(kind))
            if not parts:
                raise node.fault(f"{kind} of nothing")
            return AtLeast(len(parts) if kind == "all" else 1, parts)
        if kind == "at_least":
            found = node.mapping(kind, ("count", "of"), ("count", "of"))
            parts = tuple(self._part(part) for part in found["of"].items("of"))
            if not 0 < len(parts) <= MAX_RULES:
                raise found["of"].fault(f"there must be 1 to {MAX_RULES} parts, got {len(parts)}")
            count = found["count"].number("count", low=1, high=len(parts), whole=True)
            return AtLeast(count, parts)
        return PREDICATES[kind](self, node)

    def _column(self, side: Side, node: Node, kind: Kind, limit: float = math.inf) -> Column:
        name = _field(node)
        if kind == "number" and name in self.dates[side]:
            kind = "date"
        return self.columns.add(Column(side, name, kind, limit), node.where)

    def _both(self, kind: str, node: Node, *others: str) -> tuple[dict[str, Node], Node, Node]:
        """The settings of a predicate, and the fields of both sides; `same: region` is short."""
        if not node.is_mapping():
            return {}, node, node
        found = node.mapping(kind, ("field", "query", "item", *others))
        if "field" in found:
            if "query" in found or "item" in found:
                raise node.fault(f"{kind}: field stands for query and item alike: give it alone")
            return found, found["field"], found["field"]
        for side in ("query", "item"):
            if side not in found:
                raise node.fault(f"{kind} needs field, or query and item")
        return found, found["query"], found["item"]

    def _grades(self, node: Node, total: float) -> tuple[tuple[float, int], ...]:
        found = []
        for key, value in node.pairs("grades"):
            grade = key.number("a grade", low=1, high=100, whole=True)
            least = value.number(f"grade {grade}", low=1e-6, high=MOST)
            if least > total:
                raise value.fault(f"grade {grade} needs {least:g}, but all weights are {total:g}")
            found.append((least, grade))
        found.sort(key=lambda pair: pair[1])
        if not found:
            raise node.fault("grades of nothing")
        if [least for least, _ in found] != sorted({least for least, _ in found}):
            raise node.fault("a higher grade must need more weight")
        return tuple(reversed(found))


def _same(reader: _Reader, node: Node) -> Leaf:
    _, query, item = reader._both("same", node)
    return Same(reader._column("query", query, "text"), reader._column("item", item, "text"))


def _in(reader: _Reader, node: Node) -> Leaf:
    """One value among those of the other side's list, or among given ones."""
    found = node.mapping("in", ("query", "item", "values", "list"))
    if "values" in found:
        if ("query" in found) == ("item" in found) or "list" in found:
            raise node.fault("in: values are those of a query or of an item: name one field")
        side: Side = "query" if "query" in found else "item"
        values = tuple(value.text("a value") for value in found["values"].items("values"))
        if not values:
            raise found["values"].fault("values of nothing")
        return OneOf(reader._column(side, found[side], "text"), values)
    for name in ("query", "item"):
        if name not in found:
            raise node.fault("in needs query and item, or one of them and values")
    holder = found["list"].text("list") if "list" in found else "item"
    if holder not in ("query", "item"):
        raise found["list"].fault(f"list must be query or item, got {holder}")
    kinds: dict[str, Kind] = {"query": "text", "item": "text", holder: "list"}
    return Overlap(*(reader._column(s, found[s], kinds[s]) for s in ("query", "item")))  # type: ignore[arg-type]


def _overlap(reader: _Reader, node: Node) -> Leaf:
    found, query, item = reader._both("overlap", node, "at_least", "share", "of")
    sides = reader._column("query", query, "list"), reader._column("item", item, "list")
    if ("at_least" in found) == ("share" in found):
        raise node.fault("overlap needs at_least, a number of values, or share, a part of them")
    if "at_least" in found:
        if "of" in found:
            raise found["of"].fault("of says whose share is meant: it goes with share")
        return Overlap(*sides, found["at_least"].number("at_least", low=1, high=1e6, whole=True))
    share = found["share"].number("share", low=1e-6, high=1)
    of = found["of"].text("of") if "of" in found else "query"
    if of not in ("query", "item", "union"):
        raise found["of"].fault(f"of must be query, item or union, got {of}")
    return Overlap(*sides, 1, share, of)  # type: ignore[arg-type]


def _ordinal_distance(reader: _Reader, node: Node) -> Leaf:
    found, query, item = reader._both("ordinal_distance", node, "at_most", "below", "above")
    sides = reader._column("query", query, "number"), reader._column("item", item, "number")
    if ("at_most" in found) == bool({"below", "above"} & {*found}):
        raise node.fault("ordinal_distance needs at_most; or below and above, of the item against "
                         "the query")  # fmt: skip
    below, above = (
        found[name].number(name, low=0, high=MOST) if name in found else 0.0
        for name in (("at_most", "at_most") if "at_most" in found else ("below", "above"))
    )
    return OrdinalDistance(*sides, below, above)


def _range(reader: _Reader, node: Node) -> Leaf:
    """`item: salary, from: low, to: high`: bounds are fields of the query, or constants."""
    found = node.mapping("range", ("query", "item", "from", "to"))
    if ("query" in found) == ("item" in found):
        raise node.fault("range needs the field of one side, query or item, and from, to or both")
    side: Side = "query" if "query" in found else "item"
    other: Side = "item" if side == "query" else "query"
    value = reader._column(side, found[side], "number")
    if "from" not in found and "to" not in found:
        raise node.fault(
            "range needs from, to or both: numbers, dates, or fields of the other side"
        )

    def bound(name: str) -> Column | float | None:
        if name not in found:
            return None
        text = found[name].text(name)
        constant = _date(text) if value.kind == "date" else _number(text)
        if constant is not None:
            return constant
        made = reader._column(other, found[name], "number")
        if made.kind != value.kind:
            raise found[name].fault(
                f"{value.field} is a {value.kind}, {made.field} a {made.kind}: what is a date "
                f"stands under dates"
            )
        return made

    return Range(value, bound("from"), bound("to"))


def _within(reader: _Reader, node: Node) -> Leaf:
    found, query, item = reader._both("within", node, "km")
    if "km" not in found:
        raise node.fault("within needs km")
    km = found["km"].number("km", low=0.1, high=20_100)
    columns: list[Column] = []
    sides: list[tuple[Side, Node]] = [("query", query), ("item", item)]
    for side, place in sides:
        pair = place.items(f"within: {side}")
        if len(pair) != 2:
            raise place.fault("a place is [latitude, longitude], the names of two fields")
        limits = zip(pair, (90.0, 180.0), strict=True)
        columns += [reader._column(side, one, "number", limit) for one, limit in limits]
    q_lat, q_lon, i_lat, i_lon = columns
    return Within(q_lat, q_lon, i_lat, i_lon, km)


PREDICATES: dict[str, Callable[[_Reader, Node], Leaf]] = {
    "same": _same,
    "in": _in,
    "overlap": _overlap,
    "ordinal_distance": _ordinal_distance,
    "within": _within,
    "range": _range,
}


def _field(node: Node) -> str:
    name = node.text("a field")
    if '"' in name or "\\" in name:
        raise node.fault(f"a field cannot have quotes or backslashes in its name: {name}")
    return name


def _words(kind: str, predicate: Predicate) -> str:
    """The name of a rule without one."""
    fields = dict.fromkeys(c.field for leaf in leaves(predicate) for c in leaf.columns())
    return f"{kind} {' '.join(fields)}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _date(text: str) -> float | None:
    """In days since 1970, as columns of dates are."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() / SECONDS_OF_DAY


def _map_of_file(path: Path, node: Node) -> dict[str, str]:
    """A .json object, or a .csv of two columns with a header."""
    if path.suffix not in (".json", ".csv"):
        raise node.fault(f"a map is keys with values, an ordered list, or the name of a .csv or "
                         f".json file, got {path.name}")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise node.fault(f"{path} cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: malformed JSON: {error}") from None
        if not isinstance(content, dict) or any(
            isinstance(value, dict | list | bool | None) for value in content.values()
        ):
            raise InputError(f"{path}: must be one object of texts or numbers")
        return {key: str(value) for key, value in content.items()}
    made: dict[str, str] = {}
    reader = csv.reader(text.splitlines())
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None
    for number, row in rows:
        where = f"{path}:{number}"
        if not row or number == 1:  # the names of the columns
            continue
        if len(row) != 2:
            raise InputError(f"{where}: two columns are read, got {len(row)}")
        if made.setdefault(row[0], row[1]) != row[1]:
            raise InputError(f"{where}: {row[0]} stands in an earlier line too, as {made[row[0]]}")
    return made
