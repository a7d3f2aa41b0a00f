"""Rows that are in memory already, where else the name of a file would stand.

A list of dicts, a datasets.Dataset or any iterable of rows; messages call row 3 `train_data[3]`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rankpo_fast.errors import InputError

# Methods of tables that are no rows -> what makes rows of one.
TABLES = {
    ("to_dict", "columns"): 'pandas\' to_dict("records")',
    ("to_dicts", "columns"): "polars' to_dicts()",
    ("to_pylist", "column_names"): "Arrow's to_pylist()",
}


class Rows:
    """Rows under the name of the setting that has them; copied settings share them."""

    def __init__(self, name: str, rows: Iterable[Any]):
        self.name = name
        self._rows = rows if isinstance(rows, Sequence) or is_dataset(rows) else list(rows)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield ("name[number]", row); rows count from 0, and values are those that JSON has."""
        for number, row in enumerate(self._rows):
            where = f"{self.name}[{number}]"
            if isinstance(row, Mapping):
                for key in row:
                    if not isinstance(key, str):
                        raise InputError(f"{where}: keys must be text, got {key!r}")
                yield where, {key: _as_json(value) for key, value in row.items()}
            else:
                yield where, _as_json(row)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {type(self._rows).__name__})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rows":
        return self


Source = str | Rows  # where rows come from: a name, as `data/sources.py` reads it, or they


def sources(name: str, value: Any) -> list[Source]:
    """What the setting `name` was given as: a path, rows, a data set, or a list of some of these.

    InputError for what is none of them.
    """
    if isinstance(value, Mapping):
        what = "one row: put it into a list"
        if any(is_dataset(part) or _is_rows(part) for part in value.values()):
            what = f"a dictionary of data sets: give one of {', '.join(map(str, value))}"
        raise InputError(f"--{name} must be a list of rows, got {what}", name)
    for ways, hint in TABLES.items():
        if all(hasattr(value, way) for way in ways):
            raise InputError(
                f"--{name} must be a list of rows, got a table: {hint} makes one", name
            )
    if isinstance(value, Rows | str | os.PathLike) or is_dataset(value):
        return [_source(name, value)]
    if not isinstance(value, Iterable):
        return [_source(name, value)]  # which refuses it
    items = value if isinstance(value, Sequence) else list(value)
    if items and _is_row(items[0]):
        return [Rows(name, items)]
    several = len(items) > 1
    return [_source(f"{name}[{i}]" if several else name, item) for i, item in enumerate(items)]


def _source(name: str, value: Any) -> Source:
    if isinstance(value, Rows):
        return value
    if isinstance(value, str | os.PathLike):
        return str(os.fspath(value))
    if is_dataset(value):
        return Rows(name, _plain(value))
    if _is_rows(value):
        return Rows(name, value)
    raise InputError(f"--{name}: {value!r:.60} is no path, no list of rows and no data set")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _is_row(value: Any) -> bool:
    """A dict of columns, or the texts of a row in order."""
    texts = isinstance(value, list | tuple) and value and all(isinstance(x, str) for x in value)
    return isinstance(value, Mapping) or bool(texts)


def _as_json(value: Any) -> Any:
    """Tuples as lists; numpy's and torch's values as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def is_dataset(value: Any) -> bool:
    """Whether it is a data set of the library datasets, which need not be installed."""
    return type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "with_format")


def _plain(dataset: Any) -> Any:
    """With rows of Python's values, of the columns that are selected."""
    chosen = getattr(dataset, "format", None)  # which one that streams has not
    if chosen is None or chosen["type"] in (None, "python", "custom"):  # custom: of with_transform
        return dataset
    return dataset.with_format(None).select_columns(chosen["columns"])
