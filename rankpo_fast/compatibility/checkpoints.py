"""The authors' `--evaluate_all_checkpoints true`: one command line for each model below a path."""

from pathlib import Path

from rankpo_fast.compatibility.names import alias
from rankpo_fast.compatibility.rules import truth
from rankpo_fast.errors import InputError
from rankpo_fast.flags import split

SWITCH = "evaluate_all_checkpoints"


def command_lines(flags: list[str]) -> list[list[str]]:
    """`evaluate`'s flags for each directory with a config.json, where the switch is on.

    InputError for a path without models, and for several models with one --output.
    """
    strays, spelled = split(flags)
    given = {}
    for spelling, values in spelled:
        name = spelling.lstrip("-").replace("-", "_")
        given[alias(name, {"model_name_or_path", "output"}) or name] = values
    if truth(given.pop(SWITCH, ["false"])) != "true":
        return [flags]
    root = Path(" ".join(given.get("model_name_or_path", [])))
    models = sorted(path.parent for path in root.rglob("config.json"))
    if not models:
        raise InputError(f"--{SWITCH}: no config.json in or below --model_name_or_path {root}")
    if len(models) > 1 and "output" in given:
        raise InputError(f"--output is one file for the {len(models)} models below {root}: give "
                         "--output_dir DIRECTORY, where each gets its own")  # fmt: skip
    each = [given | {"model_name_or_path": [str(model)]} for model in models]
    return [[*strays, *_arguments(one)] for one in each]


def _arguments(given: dict[str, list[str]]) -> list[str]:
    return [text for name, values in given.items() for text in (f"--{name}", *values)]
