"""A CSV file -> the SQL that reads it, with columns and separator taken from its header.

DuckDB would guess them from the first 20,480 rows. It then takes lines that begin with # for
comments, reads a file in which one row is short as one column, and fails at the first quoted
newline behind those rows.
"""

import codecs
import csv
import re
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from rankpo_fast.data.sources import byte_lines
from rankpo_fast.errors import InputError

SEPARATORS = ",;\t|"
LINE = re.compile(r"CSV Error on Line: (\d+)")
REASONS = {
    r"Expected Number of Columns: (\d+) Found: (\d+)": "{0} columns are expected, as in line 1, "
    "and {1} found",
    r"unterminated quote": "a quote is not closed (one inside a value is written twice)",
    r"Invalid unicode": "not UTF-8 (iconv -f latin1 -t utf-8 turns such a file into it)",
    r"Maximum line size of (\d+) bytes": "a row of more than {0} bytes",
    r"reached an invalid state": "lines that end in different ways (dos2unix makes them alike), "
    "or text behind a closed quote",
}


def csv_sql(path: Path) -> str:
    """`read_csv(...)` of the file. Nothing is guessed but the separator: that of , ; | and tab
    which makes the most columns of the header."""
    names = _header(path)
    separator, columns = max(names.items(), key=lambda item: len(item[1]))
    named = [name or f"column{number}" for number, name in enumerate(columns)]
    for number, name in enumerate(named):  # DuckDB tells no capitals apart
        for other in named[:number]:
            if other.lower() == name.lower():
                raise InputError(
                    f"{path}:1: two columns are named {other}"
                    f"{'' if other == name else f' and {name}, capitals apart'}"
                )
    listed = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in named)
    return (f"read_csv({_literal(str(path))}, auto_detect = false, columns = {{{listed}}}, "
            f"header = true, delim = {_literal(separator)}, quote = '\"', escape = '\"', "
            f"comment = '', strict_mode = true)")  # fmt: skip


def csv_fault(path: Path, message: str) -> InputError:
    """What DuckDB says of a bad file in a page of text, in one line."""
    line = LINE.search(message)
    where = f"{path}:{line[1]}" if line else str(path)
    for pattern, reason in REASONS.items():
        if found := re.search(pattern, message):
            return InputError(f"{where}: {reason.format(*found.groups())}")
    return InputError(f"{path}: cannot be read as csv: {message.partition(chr(10))[0]}")


def _header(path: Path) -> dict[str, list[str]]:
    """The names of the columns, by each separator."""
    names = {}
    for separator in SEPARATORS:
        with closing(_lines(path)) as text:
            header = next(csv.reader(text, delimiter=separator), [])
        names[separator] = [name.strip() for name in header]
    if not any(names.values()):
        raise InputError(f"{path}: there are no records")
    return names


def _lines(path: Path) -> Generator[str]:
    for number, line in enumerate(byte_lines(path), 1):
        try:
            text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}:{number}: {REASONS['Invalid unicode']}") from None
        yield from re.split(r"(?<=\r)(?!\n)", text)  # such as end in \r alone


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
