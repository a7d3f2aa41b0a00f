"""Flags and `--config` files -> settings. What does not fit is an InputError that names it."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rankpo_fast.config import AutoOrBool
from rankpo_fast.errors import InputError


def parse(name: str, summary: str, classes: Sequence[type], flags: list[str]) -> tuple[Any, ...]:
    """One object of each of `classes` from the flags of command `name`; --help prints and exits."""
    parser = _parser(name, summary, classes)
    _check_flags(flags, list(parser._option_string_actions))
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(flags)[0].config
    of_file = {} if path is None else _flags_of_file(Path(path), _kinds(classes))
    for flag in flags:  # which win
        if flag.startswith("--"):
            of_file.pop(flag[2:].partition("=")[0].replace("-", "_"), None)
    before = [argument for arguments in of_file.values() for argument in arguments]
    try:
        *settings, _, rest = parser.parse_args_into_dataclasses(
            [*before, *flags], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        if of_file.keys().isdisjoint(re.findall(r"--(\w+)", str(error))):
            raise
        raise InputError(f"--config {path}: {error}") from None
    if rest:
        raise InputError(f"what is {rest[0]!r}? See rankpo-fast {name} --help")
    return tuple(settings)


def closest(name: str, known: Sequence[str]) -> str:
    """A suggestion to put behind an unknown name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _parser(name: str, summary: str, classes: Sequence[type]) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    class Parser(_Parser, HfArgumentParser):
        @staticmethod
        def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Any) -> None:
            if field.type == AutoOrBool:  # which transformers has no kind of flag for
                _add_auto_or_bool(parser, field)
            else:
                HfArgumentParser._parse_dataclass_field(parser, field)

    parser = Parser(
        classes,
        prog=f"rankpo-fast {name}",
        usage="%(prog)s [--config FILE.yaml] --flag value ...",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of flags and values; those given here win.")
    return parser


def _add_auto_or_bool(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """--x, --x true|false|auto, and --no_x, which switches have too."""
    names = list(dict.fromkeys([field.name, field.name.replace("_", "-")]))
    parser.add_argument(
        *(f"--{name}" for name in names), type=_auto_or_bool, nargs="?", const=True,
        default=field.default, metavar="auto|true|false", **field.metadata,
    )  # fmt: skip
    parser.add_argument(
        "--no_" + names[0], "--no-" + names[-1], dest=field.name, action="store_const", const=False,
        default=field.default, help=argparse.SUPPRESS,
    )  # fmt: skip


def _auto_or_bool(text: str) -> bool | str:
    from transformers.hf_argparser import string_to_bool

    try:
        return "auto" if text == "auto" else string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"auto, true or false, not {text!r}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(re.sub(r"/--[a-z0-9-]+", "", message))  # one spelling of a flag is enough


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, and no default where there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [option for option in action.option_strings if "-" not in option.strip("-")]
        [*_, option] = spellings
        if action.nargs == 0:
            return option
        if action.const is True:
            return f"{option} [{action.metavar or 'true|false'}]"
        default = self._get_default_metavar_for_optional(action).upper()
        return f"{option} {self._format_args(action, default.rpartition('_')[2])}"

    def _get_help_string(self, action: argparse.Action) -> str:
        unset = action.default in (None, [], argparse.SUPPRESS) or action.nargs == 0
        return action.help if unset else super()._get_help_string(action)


def _check_flags(flags: list[str], known: list[str]) -> None:
    for flag in flags:
        option = flag.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise InputError(f"unknown flag {option}{closest(option, known)}")


def _kinds(classes: Sequence[type]) -> dict[str, Any]:
    """The type of every setting."""
    hints = {cls: get_type_hints(cls) for cls in classes}
    return {f.name: hints[cls][f.name] for cls in classes for f in dataclasses.fields(cls)}


def _flags_of_file(path: Path, kinds: dict[str, Any]) -> dict[str, list[str]]:
    """The file's settings as command-line arguments; null, and false for what has a value: none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of the form flag: value")
    flags = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise InputError(f"--config {path}: unknown key {key}{closest(name, list(kinds))}")
        if isinstance(value, dict):
            raise InputError(f"--config {path}: {key} holds keys itself; settings are not nested")
        if isinstance(value, list):
            flags[name] = [f"--{name}", *map(str, value)] if value else []
        elif value is True:
            flags[name] = [f"--{name}"]
        elif value is not None and (value is not False or _switches(kinds[name])):
            flags[name] = [f"--{name}={value}"]
    return flags


def _switches(kind: Any) -> bool:
    return kind is bool or bool in get_args(kind)
