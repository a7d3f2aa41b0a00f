"""YAML files: each key stands once, nothing in them is run, and nothing has no end."""

import re
from pathlib import Path
from typing import Any

from rankpo_fast.errors import InputError

TAGS = "tag:yaml.org,2002:"
NUMBERS = ("int", "float")
KINDS = ("str", "seq", "map", "null", "bool")
MERGE = f"{TAGS}merge"
WORDS = {
    MERGE: "<<",
    f"{TAGS}null": "~|null|Null|NULL|",
    f"{TAGS}bool": "true|True|TRUE|false|False|FALSE",
}
MOST_KEYS = 10_000  # of a mapping: merges of merges may double them again and again


def read_yaml(path: Path, where: str, *, numbers: bool = False) -> Any:
    """What a file holds: mappings, lists, texts, true, false and null. Of what aliases (*name) make
    of it, writing it out may have no end.

    Args:
        where: begins every message.
        numbers: whether numbers are more than text. Where argparse reads them they are not: YAML
            takes some for times of day, or octal.

    Raises InputError, in one line.
    """
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), _loader(numbers))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}{' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{where}nested too deeply") from None
    except (ValueError, KeyError) as error:  # of !!int x and !!bool x
        raise InputError(f"{where}not of its tag: {error}") from None


def _loader(numbers: bool) -> type:
    import yaml

    tags = {f"{TAGS}{kind}" for kind in (*KINDS, *(NUMBERS if numbers else ()))}

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        yaml_constructors = {
            tag: construct
            for tag, construct in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag in tags
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key in (key for key, _ in node.value if key.tag != MERGE):
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"a key must be one word (line {_line(key)})")
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is given twice (line {_line(key)})")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            if len(node.value) > MOST_KEYS:
                raise yaml.YAMLError(f"more than {MOST_KEYS:,} keys (line {_line(node)})")

    if numbers:
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
            kept = [(tag, pattern) for tag, pattern in resolvers if tag in {*tags, MERGE}]
            Loader.yaml_implicit_resolvers[first] = kept
    else:
        for tag, words in WORDS.items():
            Loader.add_implicit_resolver(tag, re.compile(f"^(?:{words})$"), None)
    return Loader


def _line(node: Any) -> int:
    return node.start_mark.line + 1
