"""Settings as fields of dataclasses: a flag each, with its help, and what its value must be.

A check raises InputError that names the flag and its value, in Python as on the command line.
"""

import functools
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rankpo_fast.data.memory import Source, sources
from rankpo_fast.errors import InputError

AutoOrBool = bool | Literal["auto"]  # auto: as suits the machine, which the start says
LONGEST = 120  # characters of a value that a message shows
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Config:
    """Base of frozen dataclasses of settings. Values are checked, and brought to the types that
    their fields have, when one is made: a path becomes text, one value a list of one."""

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, hint in _hints(kind).items():
            value = getattr(self, name)
            const = self.__dataclass_fields__[name].metadata.get("const", True)
            if const is not True and isinstance(value, bool):  # resume=True is a bare --resume
                value = const if value else None
            typed = _typed(self, name, hint, value)
            if typed is not getattr(self, name):
                object.__setattr__(self, name, typed)
        self.check()

    def check(self) -> None:
        """InputError for a value that cannot be used."""

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their defaults."""
        usual = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(self)
        }
        return {k: getattr(self, k) for k, value in usual.items() if getattr(self, k) != value}


def words_beside_bool(hint: Any) -> tuple[str, ...]:
    """Of a type as `bool | Literal["auto"]` the words; of any other none."""
    parts = get_args(hint)
    if get_origin(hint) not in (Union, UnionType) or bool not in parts:
        return ()
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def flag(help: str, default: Any = MISSING, **argparse_settings: Any) -> Any:
    """One flag: its help text, its default (none: required), and what else argparse should know."""
    metadata = {"help": help, **argparse_settings}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _typed(config: Config, name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; InputError where it is of another."""
    if type(None) in get_args(hint):  # which stands for "not given"
        if value is None:
            return None
        hint = functools.reduce(or_, (part for part in get_args(hint) if part is not type(None)))
    if hint == list[Source]:
        return sources(name, value)
    if hint == Source:
        found = sources(name, value)
        require(config, name, "one file, or one list of rows, which are dicts", len(found) == 1)
        return found[0]
    if hasattr(value, "tolist"):  # numpy's and torch's as Python's
        value = value.tolist()
    if words := words_beside_bool(hint):
        known = value in words or value in (True, False)
        require(config, name, f"{', '.join(words)}, true or false", known)
        return value if value in words else bool(value)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        right = isinstance(value, str) and value in choices
        require(config, name, f"one of {', '.join(choices)}", right)
        return value
    if get_origin(hint) is list:
        several = isinstance(value, Iterable) and not isinstance(value, str)
        [of_item] = get_args(hint)
        return [_typed(config, name, of_item, x) for x in (value if several else [value])]
    if hint not in KINDS or type(value) is hint:
        return value
    if hint is str:
        require(config, name, KINDS[str], isinstance(value, str | os.PathLike))
        return str(os.fspath(value))
    if hint is bool:
        require(config, name, KINDS[bool], value in (0, 1))
        return bool(value)
    number = isinstance(value, int if hint is int else int | float)
    require(config, name, KINDS[hint], number and not isinstance(value, bool))
    return value


def require(config: Any, name: str, rule: str, holds: bool) -> None:
    if not holds:
        value = repr(getattr(config, name))
        shown = value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."
        raise InputError(f"--{name} must be {rule}, got {shown}", name)


def check_above(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(config, name, "finite", math.isfinite(value))
        require(config, name, f"> {low}", value > low)


def check_at_least(config: Any, low: float, *names: str) -> None:
    """None stands for "not given" and passes."""
    for name in names:
        value = getattr(config, name)
        require(config, name, "finite", value is None or math.isfinite(value))
        require(config, name, f">= {low}", value is None or value >= low)


def check_seed(config: Any) -> None:
    require(config, "seed", "in [0, 2**63)", 0 <= config.seed < 2**63)


def check_names(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        for item in value if isinstance(value, list) else [value]:
            require(config, name, "a name, not empty", item is None or bool(str(item).strip()))
