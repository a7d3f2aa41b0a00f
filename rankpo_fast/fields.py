"""Settings as fields of dataclasses: a flag each, with its help, and what its value must be.

A check raises InputError that names the flag and its value.
"""

import math
from dataclasses import MISSING, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rankpo_fast.errors import InputError

AutoOrBool = bool | Literal["auto"]  # auto: as suits the machine, which the start says


def flag(help: str, default: Any = MISSING, **argparse_settings: Any) -> Any:
    """One flag: its help text, its default (none: required), and what else argparse should know."""
    metadata = {"help": help, **argparse_settings}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(config: Any, name: str, rule: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"--{name} must be {rule}, got {getattr(config, name)!r}")


def check_choices(config: Any) -> None:
    """argparse checks these on the command line; this serves those who build a config in Python."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            require(config, name, f"one of {', '.join(choices)}", value in choices)
        elif hint == AutoOrBool:
            require(config, name, "auto, true or false", value == "auto" or value in (True, False))


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
