"""Records of one side -> a parquet file of rows as the rules read them, by DuckDB, out of core.

    row     int64, the record's place in its file, from 0
    id      text
    text    what the template makes of it
    twin    int64, the first row of the same text
    split   int64, of Splits; 0 where items take no part in splits
    q0, q1, ... or i0, i1, ...   the columns of the rules: text, list of texts, or double (a date in
            days since 1970); null where a record has none
    grp     int64, the first row of those alike in split and all columns
    members int64, how many those are
    place   int64, its place among those, from 0, in an order drawn by the seed
    number  int64, its place in its split, from 0, in the order of the file

JSONL, CSV and parquet are read. What is wrong is named with file and line (row of CSV and parquet).
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.data.jsonl import lines, objects, shown
from rankpo_fast.errors import InputError
from rankpo_fast.label.csv_files import csv_fault, csv_sql
from rankpo_fast.label.draw import HASHES, mixed_sql
from rankpo_fast.label.predicates import Column, Side
from rankpo_fast.label.rule_file import RuleFile, SideSettings
from rankpo_fast.label.templates import Optional, Slot
from rankpo_fast.label.yaml_nodes import near

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

COMPRESSED = (".gz", ".zst")
OFFSET = r":[0-9.:]+([+-])([0-9]{2}):?([0-9]{2})?$"
RECORD = "one_of_the_records"  # of a table; a column of this name would stand before it
NAMED_KEYS = 1000  # records whose keys a message may suggest
NAMED_VALUES = 5  # that a map does not have
PLURAL: dict[Side, str] = {"query": "queries", "item": "items"}


@dataclass(frozen=True)
class Splits:
    """Shares of the queries for validation (1) and test (2); the rest trains (0). Equal texts fall
    into one split."""

    validation: float
    test: float
    seed: int

    def sql(self, twin: str) -> str:
        draw = f"({mixed_sql(twin, 1, self.seed)} / {HASHES}.0)"
        return (
            f"(CASE WHEN {draw} < {self.test!r} THEN 2 "
            f"WHEN {draw} < {self.test + self.validation!r} THEN 1 ELSE 0 END)::BIGINT"
        )


@dataclass(frozen=True)
class Unmapped:
    """Values that a map does not have: how many, how many different ones, the most frequent."""

    count: int
    different: int
    most: tuple[str, ...]

    def __str__(self) -> str:
        more = self.different - len(self.most)
        return ", ".join(self.most) + (f" and {more:,} others" if more else "")


@dataclass(frozen=True)
class Records:
    """Staged records of a side.

    Attributes:
        unmapped: {field: what its map does not have}.
    """

    side: Side
    path: Path
    count: int
    columns: Mapping[str, Column]
    unmapped: Mapping[str, Unmapped]


def stage(
    con: "DuckDBPyConnection",
    rules: RuleFile,
    side: Side,
    source: str,
    folder: Path,
    splits: Splits | None,
    seed: int,
) -> Records:
    """Read, check and write records.

    Args:
        splits: None: all are in split 0.

    Raises:
        InputError: a file, a field, a value, an id or a text cannot be used.
    """
    return _Stage(con, rules, side, source, folder).run(splits, seed)


@dataclass
class _Stage:
    con: "DuckDBPyConnection"
    rules: RuleFile
    side: Side
    source: str
    folder: Path

    @property
    def settings(self) -> SideSettings:
        return self.rules.sides[self.side]

    def run(self, splits: Splits | None, seed: int) -> Records:
        columns = self.rules.columns.side(self.side)
        self._read()
        self._check_fields(columns)
        for name, content in self.rules.maps.items():
            self.con.execute(
                f"SET VARIABLE {_map(name)} = (SELECT MAP(?::VARCHAR[], ?::VARCHAR[]))",
                [list(content), list(content.values())],
            )
        self._check_values(columns)
        unmapped = self._unmapped()
        made = ", ".join(f"{self._value(c)} AS {name}" for name, c in columns.items())
        self.con.execute(
            f"CREATE OR REPLACE TEMP TABLE staged AS SELECT row, {self._text_of(self.settings.id)} "
            f"AS id, {self._rendered()} AS text{', ' + made if made else ''} FROM records"
        )
        self.con.execute("DROP TABLE records")
        count = self._check_staged()
        path = self.folder / f"{PLURAL[self.side]}.parquet"
        split = splits.sql("twin") if splits else "0::BIGINT"
        alike = ", ".join(["split", *columns])
        self.con.execute(
            f"COPY (WITH twins AS (SELECT *, min(row) OVER (PARTITION BY hash(text), text) AS twin "
            f"FROM staged), parts AS (SELECT *, {split} AS split FROM twins), groups AS (SELECT *, "
            f"min(row) OVER alike AS grp, count(*) OVER alike AS members FROM parts "
            f"WINDOW alike AS (PARTITION BY {alike})) SELECT *, "
            f"row_number() OVER (PARTITION BY grp ORDER BY {mixed_sql('row', 2, seed)}, row) - 1 "
            f"AS place, row_number() OVER (PARTITION BY split ORDER BY row) - 1 AS number "
            f"FROM groups ORDER BY row) TO '{_quoted(path)}' (FORMAT parquet)"
        )
        self.con.execute("DROP TABLE staged")
        return Records(self.side, path, count, columns, unmapped)

    # --- reading ---

    def _read(self) -> None:
        """A table `records` of row, kind (of JSON) and x0, x1, ..., the fields as JSON."""
        import duckdb

        path = Path(self.source)
        fields = "".join(
            f", {_extracted(field)} AS x{number}" for number, field in enumerate(self._fields())
        )
        if not path.is_file():
            raise InputError(f"--{PLURAL[self.side]} {path}: no such file")
        try:
            self.con.execute(
                f"CREATE OR REPLACE TEMP TABLE records AS SELECT row_number() OVER () - 1 AS row, "
                f"json_type(data) AS kind{fields} FROM (SELECT {self._data()})"
            )
        except duckdb.Error as error:
            if self._kind() == "jsonl":
                for _ in objects(path):  # which says where
                    pass
            if self._kind() == "csv":
                raise csv_fault(path, str(error)) from None
            message = str(error).partition("\n")[0]
            raise InputError(f"{path}: cannot be read as {self._kind()}: {message}") from None
        if not self._one("SELECT count(*) FROM records"):
            raise InputError(f"{path}: there are no records")
        self._refuse([("kind <> 'OBJECT'", "lower(kind)", "a record must be an object, got {}")])

    def _fields(self) -> list[str]:
        """Those that are read, of the records themselves."""
        slots = [slot.field for slot, _ in self.settings.template.slots()]
        columns = [c.field for c in self.rules.columns.side(self.side).values()]
        named = [self.settings.id, *slots, *columns]
        return list(dict.fromkeys(map(self._source_of, named)))

    def _kind(self) -> str:
        name = Path(self.source).name
        for suffix in COMPRESSED:
            name = name.removesuffix(suffix)
        kind = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv", "tsv": "csv",
                "parquet": "parquet"}.get(name.rpartition(".")[2].lower())  # fmt: skip
        if kind is None:
            raise InputError(f"--{PLURAL[self.side]} {self.source}: the name must end in .jsonl, "
                             f".csv, .tsv or .parquet (also .jsonl.gz and the like)")  # fmt: skip
        return kind

    def _data(self) -> str:
        kind, path = self._kind(), f"'{_quoted(self.source)}'"
        if kind == "jsonl":
            return f"json AS data FROM read_ndjson_objects({path})"
        if kind == "csv":
            return f"to_json({RECORD}) AS data FROM {csv_sql(Path(self.source))} {RECORD}"
        return f"to_json({RECORD}) AS data FROM read_parquet({path}) {RECORD}"

    def _where(self, row: int) -> str:
        path = Path(self.source)
        if self._kind() != "jsonl":
            return f"{path}: row {row + 1}"
        return next(itertools.islice(lines(path), row, None))[0]

    # --- what is wrong ---

    def _check_fields(self, columns: Mapping[str, Column]) -> None:
        """A field that no record has is an error of the rule file."""
        named = {
            self.settings.id: self.settings.id_where,
            **{slot.field: self.settings.text_where for slot, _ in self.settings.template.slots()},
            **{c.field: self.rules.columns.where[c] for c in columns.values()},
        }
        for field, one in self.settings.derived.items():
            if named.pop(field, None):
                named.setdefault(one.of, one.where)
        for field, where in self.settings.lists_where.items():
            if field not in named:
                raise InputError(f"{where}: neither a rule nor the text reads the list {field}"
                                 f"{near(field, named)}")  # fmt: skip
        counts = ", ".join(f"count({self._json(field)})" for field in named)
        found = self.con.execute(f"SELECT {counts} FROM records").fetchone()
        assert found is not None
        for (field, where), count in zip(named.items(), found, strict=True):
            if not count:
                known = {*self._keys(), *self.settings.derived}
                raise InputError(
                    f"{where}: no record of {self.source} has a value in {field}"
                    f"{near(field, known - {field})}"
                )

    def _keys(self) -> set[str]:
        rows = self.con.execute(
            f"SELECT DISTINCT unnest(json_keys(data)) FROM "
            f"(SELECT {self._data()} LIMIT {NAMED_KEYS})"
        )
        return {key for (key,) in rows.fetchall()}

    def _check_values(self, columns: Mapping[str, Column]) -> None:
        key = self.settings.id
        checks = [(f"json_type({self._json(key)}) = 'ARRAY'", self._json(key),
                   f"{key} must be one value, got {{}}")]  # fmt: skip
        checks += [
            (f"json_type({self._json(field)}) = 'OBJECT'", self._json(field),
             f"{field} must be a value or a list of them, got {{}}: write {field}.NAME for one "
             f"inside")
            for field in self._fields()
        ]  # fmt: skip
        for column in columns.values():
            checks += self._checks_of(column, self.rules.columns.where[column])
        self._refuse(checks)

    def _checks_of(self, column: Column, rule: str) -> list[tuple[str, str, str]]:
        """(condition, the value in it, message); the first that is met somewhere is raised."""
        value, raw = self._value(column), self._json(self._source_of(column.field))
        text, read = self._one_text(column.field), f"(read by {rule})"
        found = []
        if column.kind != "list":
            found.append((f"json_type({raw}) = 'ARRAY'", raw, f"{column.field} must be one value, "
                          f"got {{}} {read}: in and overlap take lists"))  # fmt: skip
        if column.kind in ("number", "date"):
            what = "a number" if column.kind == "number" else "a date as 2024-03-31"
            found.append((f"{text} IS NOT NULL AND {value} IS NULL", text,
                          f"{column.field} must be {what}, got {{}} {read}"))  # fmt: skip
            found.append((f"NOT isfinite({value})", text,
                          f"{column.field} must be finite, got {{}} {read}"))  # fmt: skip
        if column.limit < math.inf:
            most = f"{column.limit:g}"
            found.append((f"abs({value}) > {most}", text, f"{column.field} must be from -{most} to "
                          f"{most} degrees, got {{}} {read}"))  # fmt: skip
        return found

    def _check_staged(self) -> int:
        field = self.settings.id
        row = self._one("SELECT min(row) FROM staged WHERE coalesce(trim(id), '') = ''")
        if row is not None:
            raise InputError(f"{self._where(row)}: {field}, the id, is missing or empty")
        twice = self.con.execute(
            "SELECT min(row) AS first, min_by(id, row), list(row ORDER BY row)[2] FROM staged "
            "GROUP BY id HAVING count(*) > 1 ORDER BY first LIMIT 1"
        ).fetchone()
        if twice is not None:
            first, name, second = twice
            raise InputError(f"{self._where(second)}: {field} {shown(name)} stands in an earlier "
                             f"record too, {self._where(first)}")  # fmt: skip
        row = self._one("SELECT min(row) FROM staged WHERE text IS NULL")
        if row is not None:
            raise InputError(
                f"{self._where(row)}: {self._empty_field(row)} is missing or empty, which the text "
                f"needs ({self.settings.text_where}): in [ ] it may be"
            )
        row = self._one("SELECT min(row) FROM staged WHERE trim(text) = ''")
        if row is not None:
            raise InputError(f"{self._where(row)}: the text is empty")
        return int(self._one("SELECT count(*) FROM staged"))

    def _empty_field(self, row: int) -> str:
        """Of those that the text needs; the records are read again for it."""
        self._read()
        needed = [slot for slot, may_miss in self.settings.template.slots() if not may_miss]
        for slot in needed:
            if self._one(f"SELECT {self._slot(slot)} IS NULL FROM records WHERE row = {row}"):
                return slot.field
        raise AssertionError("the text is there")

    def _unmapped(self) -> dict[str, Unmapped]:
        found = {}
        for field, one in self.settings.derived.items():
            if one.of not in self._fields():  # nothing reads it
                continue
            values = f"(SELECT unnest({self._elements(one.of)}) AS v FROM records)"
            rows = self.con.execute(
                f"SELECT v, (sum(count(*)) OVER ())::BIGINT, count(*) OVER () FROM {values} "
                f"WHERE v IS NOT NULL AND getvariable('{_map(one.map)}')[v] IS NULL GROUP BY v "
                f"ORDER BY count(*) DESC, v LIMIT {NAMED_VALUES}"
            ).fetchall()
            if rows:
                _, count, different = rows[0]
                found[field] = Unmapped(count, different, tuple(value for value, *_ in rows))
        return found

    def _refuse(self, checks: list[tuple[str, str, str]]) -> None:
        """InputError for the first record of the first condition that any meets."""
        firsts = ", ".join(f"min(row) FILTER (WHERE {condition})" for condition, _, _ in checks)
        found = self.con.execute(f"SELECT {firsts} FROM records").fetchall()[0]
        for row, (_, value, message) in zip(found, checks, strict=True):
            if row is not None:
                text = str(self._one(f"SELECT ({value})::VARCHAR FROM records WHERE row = {row}"))
                text = text if len(text) <= 60 else f"{text[:57]}..."
                raise InputError(f"{self._where(row)}: {message.format(text)}")

    def _one(self, sql: str) -> Any:
        found = self.con.execute(sql).fetchone()
        return found and found[0]

    # --- fields as SQL ---

    def _source_of(self, field: str) -> str:
        derived = self.settings.derived.get(field)
        return derived.of if derived else field

    def _json(self, field: str) -> str:
        """JSON of a field of the records, null where it is missing or null."""
        return f"x{self._fields().index(field)}"

    def _text_of(self, field: str) -> str:
        """One value as text, null where it is empty."""
        return f"nullif(trim(json_extract_string({self._json(field)}, '$')), '')"

    def _one_text(self, field: str) -> str:
        derived = self.settings.derived.get(field)
        if derived is None:
            return self._text_of(field)
        text = self._text_of(derived.of)
        default = _literal(derived.default) if derived.default is not None else "NULL"
        mapped = f"coalesce(getvariable('{_map(derived.map)}')[{text}], {default})"
        return f"(CASE WHEN {text} IS NOT NULL THEN {mapped} END)"

    def _elements(self, field: str) -> str:
        """All values as a list of texts, in their order, without empty ones."""
        raw = self._json(field)
        if field in self.settings.lists:
            separator = _literal(self.settings.lists[field])
            single = f"string_split(json_extract_string({raw}, '$'), {separator})"
        else:
            single = f"[json_extract_string({raw}, '$')]"
        found = (f"CASE json_type({raw}) WHEN 'ARRAY' THEN json_extract_string({raw}, '$[*]') "
                 f"ELSE {single} END")  # fmt: skip
        return f"list_filter(list_transform({found}, lambda x: trim(x)), lambda x: x <> '')"

    def _list(self, field: str) -> str:
        derived = self.settings.derived.get(field)
        if derived is None:
            return self._elements(field)
        default = _literal(derived.default) if derived.default is not None else "NULL"
        mapped = f"coalesce(getvariable('{_map(derived.map)}')[x], {default})"
        return (f"list_filter(list_transform({self._elements(derived.of)}, lambda x: {mapped}), "
                f"lambda x: x IS NOT NULL)")  # fmt: skip

    def _value(self, column: Column) -> str:
        if column.kind == "list":
            return f"list_sort(list_distinct({self._list(column.field)}))"
        text = self._one_text(column.field)
        if column.kind == "number":
            return f"TRY_CAST({text} AS DOUBLE)"
        if column.kind == "date":
            return f"((epoch(TRY_CAST({text} AS TIMESTAMP)) - {_offset(text)}) / 86400)"
        return text

    def _slot(self, slot: Slot) -> str:
        joined = f"array_to_string({self._list(slot.field)}, {_literal(slot.separator)})"
        return f"nullif({joined}, '')"

    def _rendered(self) -> str:
        """Null where a field that must be there is not."""
        parts = []
        for part in self.settings.template.parts:
            if isinstance(part, Optional):
                inner = [_literal(p) if isinstance(p, str) else self._slot(p) for p in part.parts]
                parts.append(f"coalesce({' || '.join(inner)}, '')")
            else:
                parts.append(_literal(part) if isinstance(part, str) else self._slot(part))
        return f"trim({' || '.join(parts)})"


def _offset(text: str) -> str:
    """Seconds that a time is ahead of UTC, by the +02:00 behind it, which a cast reads over."""
    sign, hours, minutes = (f"regexp_extract({text}, '{OFFSET}', {n})" for n in (1, 2, 3))
    seconds = f"(3600 * TRY_CAST({hours} AS INT) + 60 * TRY_CAST('0' || {minutes} AS INT))"
    return f"coalesce(TRY_CAST({sign} || '1' AS INT) * {seconds}, 0)"


def _map(name: str) -> str:
    """A variable of DuckDB for a map, whose name may hold anything."""
    return f"map_{name.encode().hex()}"


def _extracted(field: str) -> str:
    """JSON of a field of `data`; "a.b" is a key of that name, or b inside of a."""
    whole = f"json_extract(data, '$.\"{_quoted(field)}\"')"
    if "." in field:
        path = "".join(f'."{_quoted(part)}"' for part in field.split("."))
        whole = f"coalesce({whole}, json_extract(data, '${path}'))"
    return f"(CASE WHEN json_type({whole}) <> 'NULL' THEN {whole} END)"


def _literal(text: str) -> str:
    return f"'{_quoted(text)}'"


def _quoted(text: str | Path) -> str:
    return str(text).replace("'", "''")


def rows_of(con: "DuckDBPyConnection", sql: str, size: int = 1000) -> Iterator[tuple]:
    """The rows that a statement gives, a block at a time."""
    found = con.execute(sql)
    while block := found.fetchmany(size):
        yield from block
