"""Weights between models, block by block of each tensor: no model is built.

    linear   W = (1 - a) W_0 + a sum_i w_i W_i         W_0 the base, the w_i of sum 1
    slerp    W = sin((1 - a) o) / sin o W_0 + sin(a o) / sin o W_1
                                                       o the angle between both as vectors
    adapter  B becomes a B, so that a model and it are W_0 + a scale B A

Computed in fp32 (angles in fp64), stored in the dtype of the base. What alone has a coefficient
that is not 0, and has 1, is copied: alpha 0 and 1 are bitwise the inputs, where dtypes are one.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rankpo_fast.config import MergeConfig
from rankpo_fast.data.files import disk_errors, stream_tensors, whole_directory
from rankpo_fast.errors import InputError
from rankpo_fast.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from rankpo_fast.model.alike import check_alike
from rankpo_fast.model.directories import (
    DTYPES,
    MODEL_FLAG,
    blaming,
    check_config,
    check_weights,
    find_directory,
    has_weights,
    weights_dtype,
)
from rankpo_fast.model.lora import FOLDER
from rankpo_fast.model.modules import backbone_folder, read_json
from rankpo_fast.paths import model_files

BASE_FLAG = "--base_model_name_or_path"
RECORD = "merge.json"  # what was merged, in each directory
ELEMENTS = 1 << 24  # of a tensor at once: 64 MB in fp32, of each model
INDEX = "model.safetensors.index.json"
FLOATS = {**DTYPES, "F64": torch.float64}
OF_ADAPTER = re.compile(r"\.lora_(embedding_)?(?P<side>[AB])(\.weight|\.bias)?$")
# As some old files have it, which transformers reads too.
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
Write = Callable[[Path, float], None]  # a merged model into a directory, for an alpha


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str  # there
    dtype: str  # as safetensors writes it: "F32"
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """The files of a model and its tensors, by the names that they have in the first of several."""

    given: str  # by the user
    directory: Path
    folder: Path  # of config.json and weights
    tensors: dict[str, Stored]
    opened: dict[Path, Any] = field(repr=False)  # by safe_open

    @classmethod
    def opened_from(cls, given: str, flag: str, stack: ExitStack) -> "Model":
        """With files that stay open as long as `stack`; InputError for what is no model."""
        directory, folder = _place(given, flag)
        check_config(folder, flag)
        model = cls(given, directory, folder, {}, {})
        for path in check_weights(folder, flag):
            model.open(path, stack)
        return model

    def open(self, path: Path, stack: ExitStack) -> None:
        with blaming(f"{self.given}: {path}"):
            file = self.opened[path] = stack.enter_context(safe_open(path, "pt"))
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            self.tensors[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor from front to back, as stored, in parts that follow from its shape alone."""
        stored = self.tensors[name]
        file = self.opened[stored.file]
        if not stored.shape:
            yield file.get_tensor(stored.name)
            return
        rows = max(1, ELEMENTS // max(1, math.prod(stored.shape[1:])))
        part = file.get_slice(stored.name)
        for start in range(0, stored.shape[0], rows):
            yield part[start : start + rows]


def merge(config: MergeConfig) -> list[Path]:
    """Make the directories that `config` asks for, all or none; returns them.

    Raises:
        InputError: models that do not go together, named with the tensor, token or setting; an
            alpha that leads beyond what the dtype holds.
    """
    with ExitStack() as stack:
        places = [_place(given, MODEL_FLAG) for given in config.model_name_or_path]
        write: Write
        if any(_is_adapter(folder) for _, folder in places):
            write = _scaled(config, *places[0], stack)
        else:
            write = _between(config, stack)
        alphas = config.alphas or {"": 1.0}
        names = [f"alpha-{name}" if len(alphas) > 1 else "" for name in alphas]
        with whole_directory(config.output_dir) as temporary, disk_errors(temporary):
            for name, alpha in zip(names, alphas.values(), strict=True):
                (temporary / name).mkdir(exist_ok=True)
                write(temporary / name, alpha)
                _write_record(temporary / name, config, alpha)
    return [Path(config.output_dir) / name for name in names]


# --- whole models ---


def _between(config: MergeConfig, stack: ExitStack) -> Write:
    """What merges whole models. InputError where they do not go together."""
    tuned = [Model.opened_from(name, MODEL_FLAG, stack) for name in config.model_name_or_path]
    first, base = tuned[0], config.base_model_name_or_path
    if len(tuned) == 1 and base is None:
        raise InputError(f"{MODEL_FLAG} {first.given} is one model: give {BASE_FLAG}, or several")
    models = tuned if base is None else [Model.opened_from(base, BASE_FLAG, stack), *tuned]
    check_alike([(model.given, model.directory, model.folder) for model in [first, *models]])
    models = [model if model is first else _named_as(first, model) for model in models]
    _check_shapes(first, models)
    files: dict[Path, list[str]] = {}
    for name, stored in first.tensors.items():
        files.setdefault(stored.file, []).append(name)
    dtype = weights_dtype(list(models[0].opened))

    def write(directory: Path, alpha: float) -> None:
        _copy_others(first, directory, dtype)
        kinds = {name: models[0].tensors.get(name, stored) for name, stored in
                 first.tensors.items()}  # fmt: skip
        layout = {name: (stored.dtype, stored.shape) for name, stored in kinds.items()}

        def merged(name: str) -> Iterator[Tensor]:
            return _merged(name, FLOATS.get(layout[name][0]), _parts(config, models, name, alpha))

        for path, names in files.items():
            into = directory / path.relative_to(first.directory)
            stream_tensors({name: layout[name] for name in names}, merged, into)

    return write


def _named_as(first: Model, model: Model) -> Model:
    """The model with its tensors under the names of `first`: those of a model with a head have one
    level more, and some old ones other words.

    InputError where one of them is missing, other than a pooler's, or there are more layers.
    """
    names: dict[str, Stored] = {}
    for name, stored in model.tensors.items():
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        names[name] = stored
    levels = ["", *dict.fromkeys(f"{name.partition('.')[0]}." for name in names)]
    level = max(levels, key=lambda level: sum(level + name in names for name in first.tensors))
    found = {name: names.pop(level + name) for name in first.tensors if level + name in names}
    missing = [name for name in first.tensors if name not in found]
    unread = [name for name in missing if name.startswith("pooler.")]
    if len(unread) < len(missing):
        name = next(name for name in missing if name not in unread)
        raise InputError(f"{model.given}: {len(missing)} tensors of {first.given} are not there: "
                         f"{name} ...")  # fmt: skip
    kinds = {_kind(name) for name in first.tensors}
    more = [name for name in names if _kind(name.removeprefix(level)) in kinds]
    if more:
        raise InputError(f"{model.given}: {len(more)} tensors more than {first.given}, which has "
                         f"fewer layers: {more[0]} ...")  # fmt: skip
    if names:
        warnings.warn(f"{model.given}: {len(names)} tensors of what {first.given} lacks are left "
                      f"out ({next(iter(names))} ...)", stacklevel=2)  # fmt: skip
    if unread:
        warnings.warn(f"{model.given}: no pooler, which changes no vector: {first.given}'s is "
                      f"copied", stacklevel=2)  # fmt: skip
    return replace(model, tensors=found)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _check_shapes(first: Model, models: list[Model]) -> None:
    """InputError for a tensor of another shape, or that is of no numbers to merge."""
    for model in models:
        for name, stored in model.tensors.items():
            other = first.tensors[name]
            if stored.shape != other.shape:
                raise InputError(f"{name} is {list(other.shape)} in {first.given} and "
                                 f"{list(stored.shape)} in {model.given}: only models of one shape "
                                 f"can be merged")  # fmt: skip
            if stored.dtype not in FLOATS and stored.dtype == other.dtype:
                same = zip(first.blocks(name), model.blocks(name), strict=True)
                if all(bool((a == b).all()) for a, b in same):
                    continue
            elif stored.dtype in FLOATS and other.dtype in FLOATS:
                continue
            raise InputError(f"{name} is {other.dtype} in {first.given} and {stored.dtype} in "
                             f"{model.given}: only {', '.join(FLOATS)} can be merged")  # fmt: skip
    kinds = {model.given: {s.dtype for s in model.tensors.values()} for model in models}
    if len({frozenset(kind) for kind in kinds.values()}) > 1:
        told = ", ".join(f"{' '.join(sorted(kind))} in {name}" for name, kind in kinds.items())
        warnings.warn(f"weights are {told}: all are stored as in {models[0].given}", stacklevel=3)


def _parts(
    config: MergeConfig, models: list[Model], name: str, alpha: float
) -> list[tuple[Iterable[Tensor], float]]:
    """The blocks of the tensor in each model that has it, and with what they are multiplied."""
    first, *rest = models
    if config.base_model_name_or_path is None:
        coefficients = config.shares
    elif config.method == "slerp" and name in first.tensors:
        coefficients = _along_the_arc(first, rest[0], name, alpha)
    else:
        coefficients = [1 - alpha, *(alpha * share for share in config.shares)]
    pairs = [pair for pair in zip(models, coefficients, strict=True) if pair[1] != 0]
    if any(name not in model.tensors for model in models):  # a pooler's
        pairs = [(next(model for model in rest if name in model.tensors), 1.0)]
    return [(model.blocks(name), coefficient) for model, coefficient in pairs]


def _along_the_arc(base: Model, tuned: Model, name: str, alpha: float) -> list[float]:
    """Coefficients of the two; those of a line where there is no angle between them."""
    if alpha in (0, 1) or base.tensors[name].dtype not in FLOATS:
        return [1 - alpha, alpha]
    squares = [0.0, 0.0, 0.0]  # of the lengths of both and of their difference, summed in fp64
    for a, b in zip(base.blocks(name), tuned.blocks(name), strict=True):
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        for i, block in enumerate((a, b, a.to(wide) - b.to(wide))):
            squares[i] += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    one, two = math.sqrt(squares[0]), math.sqrt(squares[1])
    if one * two == 0:
        return [1 - alpha, alpha]
    # The chord between both at length 1. From an arc cosine in place of it the small angles between
    # a model and what was tuned from it would not come out.
    chord = math.sqrt(max(0.0, squares[2] - (one - two) ** 2) / (one * two))
    angle = 2 * math.asin(min(1.0, chord / 2))
    if angle > 3.1:  # of pi; near there rounding decides which way the arc goes
        raise InputError(f"--method slerp: {name} has opposite directions in {base.given} and "
                         f"{tuned.given}, with many arcs between: take linear")  # fmt: skip
    if angle < 1e-9:
        return [1 - alpha, alpha]
    return [math.sin(share * angle) / math.sin(angle) for share in (1 - alpha, alpha)]


def _merged(
    name: str, dtype: torch.dtype | None, parts: list[tuple[Iterable[Tensor], float]]
) -> Iterator[Tensor]:
    """The sum of the parts, stored as `dtype`; None: of no floats, which are one in all models."""
    if dtype is None:
        yield from parts[0][0]
        return
    coefficients = [coefficient for _, coefficient in parts]
    for blocks in zip(*(blocks for blocks, _ in parts), strict=True):
        if coefficients == [1]:
            block = blocks[0].to(dtype)
        else:
            working = torch.promote_types(dtype, torch.float32)
            pairs = zip(blocks, coefficients, strict=True)
            block = sum(b.to(working) * c for b, c in pairs).to(dtype)
        if not block.isfinite().all():
            finite = all(bool(b.isfinite().all()) for b in blocks)
            why = f"goes beyond what {dtype} holds" if finite else "holds NaN or inf in a model"
            raise InputError(f"{name} {why}: nothing is written")
        yield block


def _copy_others(model: Model, directory: Path, dtype: torch.dtype) -> None:
    """All files of a model but its weights; InputError where other modules have some."""
    inside = model.folder.relative_to(model.directory)
    for name in model_files(model.directory):
        source, into = model.directory / name, directory / name
        of_weights = name.parent == inside and name.match("*.safetensors*") and name.name != INDEX
        of_adapter = name.parent == inside / FOLDER or name.name == CONFIG_FILE
        if of_weights or of_adapter:
            continue
        if name.suffix == ".safetensors":
            raise InputError(f"{MODEL_FLAG} {model.given}: {name} holds weights too, but only "
                             f"those of the transformer are merged")  # fmt: skip
        into.parent.mkdir(parents=True, exist_ok=True)
        if name == inside / "config.json":
            content = read_json(source)
            content.pop("torch_dtype", None)
            content["dtype"] = str(dtype).removeprefix("torch.")
        elif name == inside / INDEX:
            if (model.folder / "model.safetensors").is_file():
                continue  # which goes before the parts that this lists
            content = read_json(source) | {"metadata": {}}  # of sizes in another dtype
        else:
            shutil.copyfile(source, into)
            continue
        into.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- adapters ---


def _scaled(config: MergeConfig, directory: Path, folder: Path, stack: ExitStack) -> Write:
    """What scales an adapter. InputError where it cannot be, or more is asked for."""
    given = config.model_name_or_path[0]
    what = f"{MODEL_FLAG} {given}"
    if len(config.model_name_or_path) > 1 or config.base_model_name_or_path is not None:
        raise InputError(f"{MODEL_FLAG}: an adapter is scaled alone, beside the base that its file "
                         f"names: give nothing else, or merge whole models")  # fmt: skip
    if config.method != "linear" or not config.alpha:
        raise InputError(f"{what}: an adapter is scaled by --alpha, with --method linear")
    if 0 in config.alphas.values():
        raise InputError(f"--alpha 0: {given} would add nothing, so this is its base: leave 0 out")
    kind = read_json(folder / CONFIG_FILE).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{what}: of adapters only LORA is scaled, this is {kind}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{what}: no {WEIGHTS_FILE} there")
    adapter = Model(given, directory, folder, {}, {})
    adapter.open(folder / WEIGHTS_FILE, stack)
    layout = {name: (stored.dtype, stored.shape) for name, stored in adapter.tensors.items()}
    sides = {name: OF_ADAPTER.search(name) for name in layout}
    for name, match in sides.items():
        if match is None or layout[name][0] not in FLOATS:
            raise InputError(f"{what}: {name} is not scaled by a factor: merge the whole model "
                             f"with its base")  # fmt: skip

    def write(into: Path, alpha: float) -> None:
        def scaled(name: str) -> Iterator[Tensor]:
            match = sides[name]
            factor = alpha if match is not None and match["side"] == "B" else 1.0
            return _merged(name, FLOATS[layout[name][0]], [(adapter.blocks(name), factor)])

        for name in model_files(directory):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            if directory / name != folder / WEIGHTS_FILE:
                shutil.copyfile(directory / name, into / name)
        stream_tensors(layout, scaled, into / folder.relative_to(directory) / WEIGHTS_FILE)

    return write


# --- directories ---


def _place(given: str, flag: str) -> tuple[Path, Path]:
    """The directory, and in it that of the transformer."""
    directory = find_directory(given, flag, weights=True)
    return directory, backbone_folder(directory)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and not has_weights(folder)


def _write_record(directory: Path, config: MergeConfig, alpha: float) -> None:
    record = {
        "base_model_name_or_path": config.base_model_name_or_path,
        "model_name_or_path": config.model_name_or_path,
        "weights": config.shares,
        "alpha": alpha if config.alpha else None,
        "method": config.method,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
