"""Draws that DuckDB and Spark make alike: hashes of row numbers, in integers below 2**63.

`mixed` takes ints and expressions of Ibis, `mixed_sql` makes the same of SQL.
"""

from typing import Any

HASHES = 2**32
_FACTORS = (0x2C1B3C6D, 0x297A2D39)  # odd, and below 2**31, so that products fit into 63 bits
_STEP = 0x1E3779B1


def mixed(first: Any, second: Any, seed: int) -> Any:
    """A hash in [0, HASHES) of two whole numbers >= 0."""
    salted = _whirled((first + _salt(seed)) % HASHES)
    return _whirled((salted + second % HASHES * _STEP % HASHES) % HASHES)


def mixed_sql(first: str, second: int, seed: int) -> str:
    salted = _whirled_sql(f"(({first}) + {_salt(seed)}) % {HASHES}")
    return _whirled_sql(f"({salted} + {second * _STEP % HASHES}) % {HASHES}")


def _salt(seed: int) -> int:
    return int(_whirled(_whirled(seed % HASHES) ^ (seed // HASHES)))


def _whirled(x: Any) -> Any:
    """Odd factors and shifted copies: each is undone by another, so no two x become one."""
    for factor, shift in zip(_FACTORS, (15, 16), strict=True):
        x = x * factor % HASHES
        x = x ^ (x >> shift)
    return x


def _whirled_sql(x: str) -> str:
    for factor, shift in zip(_FACTORS, (15, 16), strict=True):
        x = f"(({x}) * {factor} % {HASHES})"
        x = f"xor({x}, {x} >> {shift})"
    return x
