"""YAML with the line of every value, for messages: what is unknown is named with what is near."""

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.errors import InputError

if TYPE_CHECKING:
    import yaml


@dataclass(frozen=True)
class Node:
    """A value of a YAML file; `where` is "path:line" and opens every message."""

    node: "yaml.Node"
    path: Path

    @classmethod
    def read(cls, path: Path) -> "Node":
        import yaml

        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = f":{mark.line + 1}" if mark else ""
            raise InputError(f"{path}{line}: malformed YAML: {error.problem}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise InputError(f"{path}: nested too deeply") from None
        if node is None:
            raise InputError(f"{path}: the file is empty")
        return cls(node, path)

    @property
    def where(self) -> str:
        return f"{self.path}:{self.node.start_mark.line + 1}"

    def fault(self, message: str) -> InputError:
        return InputError(f"{self.where}: {message}")

    @property
    def kind(self) -> str:
        return {"scalar": "one value", "sequence": "a list", "mapping": "keys with values"}[
            self.node.id  # type: ignore[attr-defined]
        ]

    def is_list(self) -> bool:
        return bool(self.node.id == "sequence")  # type: ignore[attr-defined]

    def is_mapping(self) -> bool:
        return bool(self.node.id == "mapping")  # type: ignore[attr-defined]

    def pairs(self, what: str) -> Iterator[tuple["Node", "Node"]]:
        """Keys and values, each key once."""
        if not self.is_mapping():
            raise self.fault(f"{what} must be keys with values, got {self.kind}")
        seen = set()
        for key, value in self.node.value:
            name = Node(key, self.path).text("a key")
            if name in seen:
                raise Node(key, self.path).fault(f"{name} stands twice")
            seen.add(name)
            yield Node(key, self.path), Node(value, self.path)

    def mapping(
        self, what: str, known: Collection[str], required: Collection[str] = ()
    ) -> dict[str, "Node"]:
        found = {}
        for key, value in self.pairs(what):
            name = key.text("a key")
            if name not in known:
                raise key.fault(f"{what} has no {name}{near(name, known)}")
            found[name] = value
        for name in required:
            if name not in found:
                raise self.fault(f"{what} needs {name}")
        return found

    def items(self, what: str) -> list["Node"]:
        if not self.is_list():
            raise self.fault(f"{what} must be a list, got {self.kind}")
        return [Node(node, self.path) for node in self.node.value]

    def text(self, what: str) -> str:
        """As it is written: `no` is "no", not false."""
        if self.is_list() or self.is_mapping():
            raise self.fault(f"{what} must be one value, got {self.kind}")
        text = str(self.node.value)
        if not text.strip():
            raise self.fault(f"{what} is empty")
        return text

    def number(self, what: str, *, low: float, high: float, whole: bool = False) -> Any:
        text = self.text(what)
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            kind = "a whole number" if whole else "a number"
            raise self.fault(f"{what} must be {kind}, got {text}") from None
        if not low <= value <= high:
            raise self.fault(f"{what} must be from {low:g} to {high:g}, got {text}")
        return value


def near(name: str, known: Collection[str]) -> str:
    """A suggestion behind an unknown name, and all there are where they are few."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (there are {', '.join(sorted(known)[:20])})" if known else ""
