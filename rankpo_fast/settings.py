"""Settings of Python callers, dataclasses and keywords -> one object of each class."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rankpo_fast.compatibility.names import alias, hint
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config


def gathered(
    caller: str,
    classes: Sequence[type[Config]],
    given: Sequence[Any],
    keywords: Mapping[str, Any],
) -> list[Any]:
    """An object of each of `classes`: the one among `given`, or a new one, with the keywords that
    are its fields.

    Args:
        caller: whose settings they are, for messages.

    Raises:
        InputError: something given or a keyword is none of the settings, a class is given twice, a
            setting without a default is not given, or a value cannot be used.
    """
    by_class = _by_class(caller, classes, given)
    fields = {cls: {field.name: field for field in dataclasses.fields(cls)} for cls in classes}
    known = {name for of_class in fields.values() for name in of_class}
    for name in keywords:
        if name not in known:
            raise InputError(f"{caller} has no setting {name}{nearest(name, known)}", name)
    made = []
    for cls, of_class in fields.items():
        own = {name: value for name, value in keywords.items() if name in of_class}
        if cls in by_class:
            made.append(dataclasses.replace(by_class[cls], **own))
            continue
        for name, field in of_class.items():
            if name not in own and field.default is field.default_factory is dataclasses.MISSING:
                raise InputError(f"{caller} needs {name}: {field.metadata['help']}", name)
        made.append(cls(**own))
    return made


def _by_class(
    caller: str, classes: Sequence[type[Config]], given: Sequence[Any]
) -> dict[type[Config], Config]:
    found: dict[type[Config], Config] = {}
    for one in given:
        if type(one) not in classes:
            names = ", ".join(cls.__name__ for cls in classes)
            kind = one.__name__ if isinstance(one, type) else type(one).__name__
            raise InputError(f"{caller} takes settings as objects of {names}, got {kind}")
        if type(one) in found:
            raise InputError(f"{caller}: {type(one).__name__} is given twice")
        found[type(one)] = one
    return found


def nearest(name: str, known: set[str]) -> str:
    """What an unknown setting may have meant, by the names of other trainers or by its letters."""
    meant = alias(name, known) or hint(name, known)
    close = [meant] if meant else difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0].replace('--', '')}?)" if close else ""
