"""The authors' `--evaluate_all_checkpoints true`: one command line for each model below a path."""

import warnings
from pathlib import Path

from rankpo_fast.compatibility.names import alias
from rankpo_fast.compatibility.rules import truth
from rankpo_fast.errors import InputError
from rankpo_fast.flags import split
from rankpo_fast.model.modules import read_modules

SWITCH = "evaluate_all_checkpoints"
# Weights of a model, of an adapter, and those in a format that evaluate refuses by name.
WEIGHTS = ("model.safetensors*", "adapter_config.json", "pytorch_model*.bin")


def command_lines(flags: list[str]) -> list[list[str]]:
    """`evaluate`'s flags for each directory that holds a model, where the switch is on.

    InputError for a path without models, and for several models with one --output.
    """
    strays, spelled = split(flags)
    given = {}
    for spelling, values in spelled:
        name = spelling.lstrip("-").replace("-", "_")
        given[alias(name, {"model_name_or_path", "output"}) or name] = values
    if truth(given.pop(SWITCH, ["false"])) != "true":
        return [flags]
    from rankpo_fast.train.checkpoint import MANIFEST, NAMES  # with what a training needs

    root = Path(" ".join(given.get("model_name_or_path", [])))
    models = _models(root)
    resumable = list(root.rglob(f"{NAMES}/{MANIFEST}"))
    if resumable:
        warnings.warn(f"--{SWITCH}: {len(resumable)} checkpoints of runs below {root} left out: "
                      f"no models, but what --resume needs", stacklevel=2)  # fmt: skip
    if not models:
        raise InputError(f"--{SWITCH}: no model in or below --model_name_or_path {root}")
    if len(models) > 1 and "output" in given:
        raise InputError(f"--output is one file for the {len(models)} models below {root}: give "
                         "--output_dir DIRECTORY, where each gets its own")  # fmt: skip
    if len(models) > 1 and "report" in given:
        raise InputError(f"--report is one directory for the {len(models)} models below {root}: "
                         f"report on one of them")  # fmt: skip
    each = [given | {"model_name_or_path": [str(model)]} for model in models]
    return [[*strays, *_arguments(one)] for one in each]


def _models(root: Path) -> list[Path]:
    """Directories with weights or modules.json, but for those that are modules of another."""
    named = {path.parent for path in root.rglob("modules.json")}
    modules = {module.folder for path in named for module in read_modules(path)}
    weights = {path.parent for pattern in WEIGHTS for path in root.rglob(pattern)}
    return sorted(named | weights - modules)


def _arguments(given: dict[str, list[str]]) -> list[str]:
    return [text for name, values in given.items() for text in (f"--{name}", *values)]
