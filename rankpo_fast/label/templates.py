"""Text templates: "<title> {title} <sep> {skills|, }[ <abstract> {abstract}]".

    {field}     the field's value; a list is joined by ", "
    {field|; }  a list is joined by what stands behind the bar
    [ ... ]     left out where a field inside it has no value
    {{ }} [[ ]] the characters themselves

All else stands as it is, special tokens too. A field outside of brackets must have a value in every
record.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{[^{}]*\}|[\[\]{}]|[^\[\]{}]+", re.DOTALL)
SEPARATOR = ", "


@dataclass(frozen=True)
class Slot:
    field: str
    separator: str = SEPARATOR


@dataclass(frozen=True)
class Optional:
    parts: tuple["str | Slot", ...]


@dataclass(frozen=True)
class Template:
    parts: tuple[str | Slot | Optional, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """ValueError that says what is wrong."""
        done: list[str | Slot | Optional] = []
        inner: list[str | Slot] | None = None  # of the bracket that is open
        for token in TOKEN.findall(text):
            if token == "[":
                if inner is not None:
                    raise ValueError("a [ stands inside of [ ]: write [[ for the character")
                inner = []
                continue
            if token == "]":
                if inner is None:
                    raise ValueError("a ] without a [: write ]] for the character")
                if not any(isinstance(part, Slot) for part in inner):
                    raise ValueError("no {field} stands between [ and ]: write [[ and ]] for the "
                                     "characters")  # fmt: skip
                done.append(Optional(tuple(inner)))
                inner = None
                continue
            part = _part(token)
            if inner is None:
                done.append(part)
            else:
                inner.append(part)
        if inner is not None:
            raise ValueError("a [ without a ]")
        made = cls(tuple(done))
        if not list(made.slots()):
            raise ValueError("it names no {field}")
        return made

    def slots(self) -> Iterator[tuple[Slot, bool]]:
        """Each with whether it may be empty."""
        for part in self.parts:
            if isinstance(part, Slot):
                yield part, False
            elif isinstance(part, Optional):
                yield from ((slot, True) for slot in part.parts if isinstance(slot, Slot))


def _part(token: str) -> str | Slot:
    if token in ("{{", "}}", "[[", "]]"):
        return token[0]
    if token in ("{", "}"):
        raise ValueError(f"a single {token}: write {token * 2} for the character")
    if not token.startswith("{"):
        return token
    field, bar, separator = token[1:-1].partition("|")
    if not field.strip():
        raise ValueError(f"{token} names no field")
    return Slot(field.strip(), separator if bar else SEPARATOR)
