"""Flags and `--config` files -> settings. What does not fit is an InputError that names it.

Both are read in the same steps: names that others use become ours (`compatibility.names`), then
flags and values that others have and we have not (`compatibility.fates`), then argparse sees what
is ours. What is not taken as it stands is said.
"""

import argparse
import copy
import dataclasses
import difflib
import re
import reprlib
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from rankpo_fast.compatibility.fates import reading
from rankpo_fast.compatibility.names import alias, hint
from rankpo_fast.compatibility.rules import Line
from rankpo_fast.data.memory import Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import words_beside_bool
from rankpo_fast.yaml_files import read_yaml

if TYPE_CHECKING:
    from transformers import HfArgumentParser

# Types of settings that hold rows or name them, and what a command line can give of these.
NAMED = {
    Source: str,
    list[Source]: list[str],
    Source | None: str | None,
    list[Source] | None: list[str] | None,
}


@dataclass(frozen=True)
class Given:
    """A setting as it was given: spelled so, by the name that argparse knows, with its values."""

    spelling: str
    name: str
    values: list[str]

    def __str__(self) -> str:
        return " ".join([self.spelling, *self.values])

    def arguments(self) -> list[str]:
        if len(self.values) == 1:  # which may begin with a dash
            return [f"--{self.name}={self.values[0]}"]
        return [f"--{self.name}", *self.values]


@dataclass(frozen=True)
class Origin:
    """Where settings are given, and how messages write them there."""

    where: str = ""
    sign: str = "--"
    kind: str = "flag"


def parse(name: str, summary: str, classes: Sequence[type], flags: list[str]) -> tuple[Any, ...]:
    """One object of each of `classes` from the flags of command `name`; --help prints and exits."""
    parser = _parser(name, summary, classes)
    if {"-h", "--help"} & {*flags}:
        parser.parse_args(["--help"])
    options = _options(parser)
    strays, spelled = split(flags)
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    given = _named(spelled, options, Origin(), lists)
    own = _has_own_config(classes)
    path = " ".join(given.pop("config").values) if "config" in given and not own else None
    file, in_file = Origin(f"--config {path}: ", "", "key"), {}
    if path is not None:
        fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
        in_file = _given_in_file(Path(path), fields, file)
    in_file = {setting: one for setting, one in in_file.items() if setting not in given}
    together = {one.name: one.values for one in (in_file | given).values()}
    line = Line(name, frozenset(options), together)
    in_file, given = _ours(in_file, line, file), _ours(given, line, Origin())
    arguments = [text for one in (in_file | given).values() for text in one.arguments()]
    try:
        *settings, rest = parser.parse_args_into_dataclasses(
            [*strays, *arguments], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        if in_file.keys().isdisjoint(re.findall(r"--(\w+)", str(error))):
            raise
        raise InputError(f"{file.where}{error}") from None
    if rest:
        raise InputError(f"what is {rest[0]!r}? See rankpo-fast {name} --help")
    return tuple(settings[: len(classes)])  # behind them comes what is of no class


def split(flags: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What stands before the first flag, then each flag as it is spelled, with its values."""
    strays: list[str] = []
    spelled: list[tuple[str, list[str]]] = []
    values = strays
    for text in flags:
        spelling, equals, value = text.partition("=")
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", spelling) is None:
            values.append(text)
        else:
            values = [value] if equals else []
            spelled.append((spelling, values))
    return strays, spelled


def closest(name: str, known: Sequence[str]) -> str:
    """A suggestion to put behind an unknown name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _parser(name: str, summary: str, classes: Sequence[Any]) -> "HfArgumentParser":
    from transformers import HfArgumentParser

    class Parser(_Parser, HfArgumentParser):
        @staticmethod
        def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Any) -> None:
            if words := words_beside_bool(field.type):  # transformers has no such kind of flag
                _add_words_or_bool(parser, field, words)
                return
            field = copy.copy(field)
            field.type = NAMED.get(field.type, field.type)
            HfArgumentParser._parse_dataclass_field(parser, field)

    own = _has_own_config(classes)
    parser = Parser(
        classes,
        prog=f"rankpo-fast {name}",
        usage=f"%(prog)s {'' if own else '[--config FILE.yaml] '}--flag value ...",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    if not own:
        parser.add_argument("--config", help="YAML file of flags and values; those given here win.")
    return parser


def _has_own_config(classes: Sequence[Any]) -> bool:
    """Whether --config is a setting of the command, as the rules of `label`: no file of flags."""
    return any(field.name == "config" for cls in classes for field in dataclasses.fields(cls))


def _add_words_or_bool(
    parser: argparse.ArgumentParser, field: dataclasses.Field, words: Sequence[str]
) -> None:
    """--x, --x true|false|WORD, and --no_x, which switches have too."""
    names = list(dict.fromkeys([field.name, field.name.replace("_", "-")]))
    parser.add_argument(
        *(f"--{name}" for name in names), type=partial(_word_or_bool, words), nargs="?", const=True,
        default=field.default, metavar="|".join([*words, "true", "false"]), **field.metadata,
    )  # fmt: skip
    parser.add_argument(
        "--no_" + names[0], "--no-" + names[-1], dest=field.name, action="store_const", const=False,
        default=field.default, help=argparse.SUPPRESS,
    )  # fmt: skip


def _word_or_bool(words: Sequence[str], text: str) -> bool | str:
    from transformers.hf_argparser import string_to_bool

    try:
        return text if text in words else string_to_bool(text)
    except argparse.ArgumentTypeError:
        known = f"{', '.join(words)}, true or false"
        raise argparse.ArgumentTypeError(f"{known}, not {text!r}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
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
        return (action.help or "") if unset else super()._get_help_string(action) or ""


def _options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """{name of a flag: the setting that it sets}."""
    actions = parser._option_string_actions
    return {_name(option): action.dest for option, action in actions.items()}


def _name(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_")


def _named(
    spelled: Iterable[tuple[str, Any]],
    options: dict[str, str],
    origin: Origin,
    lists: Collection[str] = (),
) -> dict[str, Given]:
    """{setting of ours, or another trainer's flag: as it was given}, other names of ours read.

    Of a flag given twice the last holds, as everywhere, but two lists would lose the first.
    """
    given: dict[str, Given] = {}
    read: dict[str, str] = {}
    for spelling, values in spelled:
        name = _name(spelling)
        ours = name if name in options else alias(name, options.keys())
        if ours is not None and ours != name:
            read[name] = f"{spelling} as {origin.sign}{ours}"
        setting = name if ours is None else options.get(ours, name)
        before = given.pop(setting, None)
        if before is not None and _name(before.spelling) != name:
            _refuse_both(before, Given(spelling, name, []), origin)
        if before is not None and setting in lists:
            raise InputError(f"{spelling} is given twice: give it once, with all its values")
        given[setting] = Given(spelling, ours or name, values)
    if read:
        _say(origin, f"read {', '.join(read.values())}")
    return given


def _ours(given: dict[str, Given], line: Line, origin: Origin) -> dict[str, Given]:
    """Settings of ours: what else was given is read as these, or said to have no effect."""
    ours: dict[str, Given] = {}
    read: dict[str, Given] = {}
    for setting, one in given.items():
        try:
            meant = reading(one.name, one.values, line)
        except InputError as error:
            raise InputError(f"{origin.where}{one}: {error}") from None
        if meant is None and one.name in line.known:
            ours[setting] = one
            continue
        if meant is None or not meant.flags.keys() <= line.known:
            raise InputError(f"{origin.where}{_unknown(one, line, origin)}")
        new = [Given(one.spelling, name, values) for name, values in meant.flags.items()]
        flags = [" ".join([f"{origin.sign}{flag.name}", *flag.values]) for flag in new]
        _say(origin, f"read {one} as {' '.join(flags)}" if flags else f"{one}: {meant.why}")
        for flag in new:
            if flag.name in read:
                _refuse_both(read[flag.name], flag, origin)
            read[flag.name] = flag
    for name in ours.keys() & read.keys():
        _refuse_both(ours[name], read[name], origin)
    return ours | read


def _unknown(one: Given, line: Line, origin: Origin) -> str:
    meant = hint(one.name, line.known)
    if meant is not None:
        return f"unknown {origin.kind} {one.spelling}: use {meant}"
    known = [f"{origin.sign}{name}" for name in sorted(line.known)]
    return f"unknown {origin.kind} {one.spelling}{closest(origin.sign + one.name, known)}"


def _refuse_both(first: Given, second: Given, origin: Origin) -> None:
    both = f"{first.spelling} and {second.spelling}"
    raise InputError(f"{origin.where}{both} are one setting: give one of them")


def _say(origin: Origin, text: str) -> None:
    warnings.warn(f"{origin.where}{text}", stacklevel=3)


def _given_in_file(
    path: Path, fields: dict[str, dataclasses.Field], origin: Origin
) -> dict[str, Given]:
    """The file's settings. Null, and false for what has a value, is a setting that is not given:
    an error where something else than None would come of that."""
    content = read_yaml(path, origin.where)
    if not isinstance(content, dict):
        raise InputError(f"{origin.where}expected lines of the form flag: value")
    keys = [(str(key), value) for key, value in content.items()]
    named = _named(keys, {name: name for name in fields}, origin)
    if "config" in named:
        raise InputError(f"{origin.where}a file cannot name another one by config")
    given = {}
    for setting, one in named.items():
        value = one.values
        items = value if isinstance(value, list) else [value]
        nested = isinstance(value, dict) or any(isinstance(item, dict | list) for item in items)
        if setting not in fields:
            text = reprlib.repr(value) if nested else str(value)  # aliases may make it endless
            given[setting] = Given(one.spelling, one.name, [text])
            continue
        if nested:
            raise InputError(
                f"{origin.where}{one.spelling} holds keys or lists itself; settings are not nested"
            )
        switch = fields[setting].type is bool or bool in get_args(fields[setting].type)
        if value is None or value == [] or (value is False and not switch):
            _unset(fields[setting], one, origin)
            continue
        values = list(map(str, items))
        given[setting] = Given(one.spelling, one.name, [] if value is True else values)
    return given


def _unset(field: dataclasses.Field, one: Given, origin: Origin) -> None:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = " ".join(map(str, field.default_factory()))
    if default not in (None, "", dataclasses.MISSING):  # of the last argparse says that it lacks
        word = "null" if one.values is None else "false" if one.values is False else "[]"
        raise InputError(
            f"{origin.where}{one.spelling} cannot be {word}: give a value, or leave the key out "
            f"for {default}"
        )
