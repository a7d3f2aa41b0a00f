"""Bytes -> JSON objects -> checked values. A `where` is "path:line" and opens every message."""

import codecs
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.data.sources import byte_lines, is_table, place, table_rows
from rankpo_fast.errors import InputError

JSON_TYPES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def lines(path: Path | Source) -> Iterator[tuple[str, str]]:
    """Yield (where, text) for every line that is not blank, of which there must be one."""
    assert not isinstance(path, Rows), "values() has them"
    empty, name = True, place(path)
    for number, line in enumerate(byte_lines(path), start=1):
        where = f"{name}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}"
            ) from None
        if text.strip():
            empty = False
            yield where, text
    if empty:
        raise InputError(f"{name}: the file is empty")


def values(path: Path | Source) -> Iterator[tuple[str, Any]]:
    """Yield (where, JSON value) for every line that is not blank, or every row of a table."""
    if is_table(path):
        yield from table_rows(path)
        return
    for where, line in lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "every line must be one JSON object"
            if str(path).lower().endswith((".csv", ".tsv")):
                hint = "records of a CSV file become rows by `rankpo-fast label`"
            raise InputError(
                f"{where}: malformed JSON: {error.msg} at column {error.colno} ({hint})"
            ) from None
        except (ValueError, RecursionError) as error:  # a number or a nesting past Python's limit
            raise InputError(f"{where}: unusable JSON: {error}") from None
        yield where, value


def objects(path: Path | Source) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) for every line that is not blank; each must be one JSON object."""
    for where, row in values(path):
        if not isinstance(row, dict):
            raise no_object(row, where)
        yield where, row


def no_object(row: Any, where: str) -> InputError:
    """Says what a row is instead."""
    if isinstance(row, list) and any(isinstance(item, dict) for item in row):
        return InputError(
            f"{where}: a list of {len(row):,} rows: write one object a line (jq -c '.[]' does)"
        )
    return InputError(f"{where}: a row must be an object, got {kind_of(row)}")


def find_texts(paths: Iterable[Path | Source], texts: Collection[str]) -> dict[str, str]:
    """{text: where} of those that stand in a row, its title and text joined or any value in it.

    For messages about a text after all rows were read, so that rows need not carry their lines.
    What cannot be read is passed over, since the message matters more than the place.
    """
    wanted = set(texts)
    places: dict[str, str] = {}
    for path in paths:
        with suppress(InputError, OSError):
            for where, row in values(path):
                if not wanted:
                    return places
                for text in wanted.intersection(_texts_in(row)):
                    places[text] = where
                    wanted.remove(text)
    return places


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)
        if isinstance(value, dict):
            title, body = value.get("title"), value.get("text")
            if isinstance(title, str) and isinstance(body, str):
                yield _with_title(title, body)


class Entry(NamedTuple):
    """Of a row: its full name, "query.text" of a nested one, and what stands there."""

    name: str
    value: Any


def value(row: dict, keys: Sequence[str], where: str, parent: str = "", hint: str = "") -> Entry:
    """The first of `keys` that `row` has; `parent` is "name." if nested.

    `hint` ends the sentence about a missing key.
    """
    for key in keys:
        if key in row:
            return Entry(parent + key, row[key])
    wanted = " or ".join(f'"{parent}{key}"' for key in keys)
    there = ", ".join(shown(parent + key) for key in row) or "none"
    raise InputError(f"{where}: missing key {wanted}{hint} (keys here: {there})")


def expect(kind: type, name: str, value: Any, where: str) -> Any:
    """`value`, if it is of the JSON type `kind`."""
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "an integer" if kind is int else JSON_TYPES[kind]
        raise InputError(
            f'{where}: "{name}" must be {expected}, got {kind_of(value)}: {shown(value)}'
        )
    return value


def text(name: str, value: Any, where: str) -> str:
    """`value`, if it is a string with something in it."""
    expect(str, name, value, where)
    if not value.strip():
        raise InputError(f'{where}: "{name}" is {"blank" if value else "empty"}')
    try:
        value.encode("utf-8")  # JSON may spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise InputError(
            f'{where}: "{name}" holds half a surrogate pair, \\u{ord(value[error.start]):04x}'
        ) from None
    return sys.intern(str(value))  # passages recur as negatives of many rows: keep each once


def text_at(row: dict, key: str, where: str) -> str:
    """The text under `key`, plain or as {"text": ...}."""
    name, found = value(row, (key,), where)
    if isinstance(found, dict):
        name, found = value(found, ("text",), where, f"{name}.")
    return text(name, found, where)


def texts_at(row: dict, key: str, where: str) -> tuple[str, ...]:
    """The list of texts under `key`, plain or as {"text": [...]}; each may have a title."""
    name, found = key, row[key]
    if isinstance(found, dict):
        if "index" in found and "text" not in found:
            raise InputError(f'{where}: "{key}" are places in a corpus, not texts: such rows go '
                             f"with --corpus_data")  # fmt: skip
        name, found = value(found, ("text",), where, f"{name}.")
    expect(list, name, found, where)
    return tuple(passage(f"{name}[{i}]", item, where) for i, item in enumerate(found))


def passage(name: str, value: Any, where: str) -> str:
    """A text, plain or as {"title": ..., "text": ...}."""
    if isinstance(value, dict):
        value = titled_text(value, where, f"{name}.")
    return text(name, value, where)


def titled_text(row: dict, where: str, parent: str = "") -> str:
    """Title and text of a document; may be blank.

    The title may be absent or null, the text may not.
    """
    title = row.get("title")
    title = "" if title is None else expect(str, f"{parent}title", title, where)
    return _with_title(title, expect(str, *value(row, ("text",), where, parent), where))


def _with_title(title: str, body: str) -> str:
    """As BEIR joins them; without a title nothing is changed, as spaces decide tokens."""
    return f"{title} {body}".strip() if title.strip() else body


def document_text(row: dict, where: str) -> str:
    """Title and text of a row of a corpus; "" where that is nothing but whitespace."""
    both = titled_text(row, where)
    return text("text", both, where) if both.strip() else ""


def kind_of(value: Any) -> str:
    """The type of a value in the words of JSON."""
    return JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """The value as JSON, cut where it would fill the screen."""
    full = json.dumps(value, default=str)
    return full if len(full) <= 60 else full[:57] + "..."
