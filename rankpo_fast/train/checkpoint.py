"""Checkpoints that are either complete or not there; training goes on from them bit by bit.

`checkpoints/step-00000100/` holds the weights that are trained, the optimizer's state, the random
states of all ranks and the counters as safetensors and JSON, and a manifest with the sha256 of each
file. It is written under another name, flushed to disk, and renamed. The learning rate and the
order of the rows follow from the step, so nothing of them need be kept.
"""

import json
import random
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from safetensors.torch import save as pack
from torch import Tensor, nn

from rankpo_fast.data.files import (
    flush_to_disk,
    load_tensors,
    open_to_umask,
    save_tensors,
    sha256_of,
)
from rankpo_fast.errors import InputError
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.train.optim import Optimizer

WEIGHTS, OPTIMIZER, RANDOM, STATE, MANIFEST = (
    "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
    "manifest.json",
)  # fmt: skip
FILES = (WEIGHTS, OPTIMIZER, RANDOM, STATE)
NAMES = "step-" + "[0-9]" * 8  # of their folders


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # optimizer steps done
    settings: dict[str, Any]  # of the run that wrote it
    max_tokens: int  # of a micro-batch, as it was then


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    max_tokens: int,
    *,
    keep: int | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `directory/step-XXXXXXXX`, then drop all before it but the newest `keep`, of which it
    is one; raises OSError.

    All ranks must call it, the first one writes.
    """
    target = directory / f"step-{step:08d}"
    generators = ranks.objects(_random_state(ranks.device))
    if not ranks.first:
        return target
    temporary = directory / f".{target.name}.tmp"
    for left in directory.glob(".step-*.tmp"):  # of a run that was killed while saving
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_tensors(_weights(model), temporary / WEIGHTS)
        save_tensors(_states(model, optimizer), temporary / OPTIMIZER)
        tensors = {
            f"{rank}/{name}": tensor
            for rank, (of_rank, _) in enumerate(generators)
            for name, tensor in load(of_rank).items()
        }
        save_tensors(tensors, temporary / RANDOM)
        numbers = [of_rank for _, of_rank in generators]
        state = {"step": step, "settings": settings, "max_tokens": max_tokens, "random": numbers}
        _write_json(temporary / STATE, state)
        _write_json(temporary / MANIFEST, {name: sha256_of(temporary / name) for name in FILES})
        open_to_umask(temporary)
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        shutil.rmtree(target, ignore_errors=True)  # a broken one of the same step
        temporary.rename(target)
        flush_to_disk(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Later ones are of a run that went back: broken, or the same again when their step comes.
    done = [old for old in _steps(directory) if old.name <= target.name]
    whole = [old for old in done if (old / MANIFEST).exists()]
    for old in done:
        if keep and old not in whole[-keep:]:
            shutil.rmtree(old)
    return target


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`; InputError says what is wrong with one that is not complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        changed = [name for name in FILES if sha256_of(path / name) != manifest[name]]
        state = json.loads((path / STATE).read_text())
        checkpoint = Checkpoint(
            path, int(state["step"]), dict(state["settings"]), int(state["max_tokens"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a complete checkpoint ({error}); there should be {MANIFEST} and what it "
            f"names, as in OUTPUT_DIR/checkpoints/step-00000100"
        ) from error
    if changed:
        raise InputError(f"{path}: {', '.join(changed)} damaged since written (sha256 differs)")
    for name in (WEIGHTS, OPTIMIZER, RANDOM):
        try:
            with safe_open(path / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path / name}: cannot be read ({error})") from error
    return checkpoint


def newest(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `directory`; broken ones are passed over with a warning."""
    for path in reversed(_steps(directory)):
        try:
            return read(path)
        except InputError as error:
            warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=2)
    return None


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, ranks: Ranks = ALONE
) -> None:
    """Put model, optimizer and random generators where they were when it was written.

    Raises:
        InputError: what is there is not of this model; the message names the tensor.
    """
    weights, states, random_states = (
        _load(checkpoint.path / name) for name in (WEIGHTS, OPTIMIZER, RANDOM)
    )
    own = _weights(model)
    _check_shapes(checkpoint.path / WEIGHTS, weights, own)
    _check_shapes(checkpoint.path / OPTIMIZER, states, _states(model, optimizer))
    wanted = _random_tensors(ranks.device)
    found = {name: random_states.get(f"{ranks.rank}/{name}") for name in wanted}
    _check_shapes(checkpoint.path / RANDOM, found, wanted)
    generators = {name: tensor for name, tensor in found.items() if tensor is not None}
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    _restore_states(model, optimizer, states, checkpoint.step)
    try:
        numbers = json.loads((checkpoint.path / STATE).read_text())["random"][ranks.rank]
        _restore_random(generators, numbers, ranks.device)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{checkpoint.path / STATE}: no random states ({error!r})") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except OSError as error:
        raise InputError(f"cannot be read: {error}") from error


def _check_shapes(
    path: Path, there: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None]
) -> None:
    for name in sorted({*there, *wanted}):
        got, should = (_shape(tensors.get(name)) for tensors in (there, wanted))
        if got != should:
            raise InputError(f"{path}: {name} is {got}, should be {should} (of another model?)")


def _shape(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else f"of shape {tuple(tensor.shape)}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes: trained parameters, tied ones once, and the buffers of the state.
    The others are as the model was loaded, which a run that goes on loads again."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state, buffers = model.state_dict().keys(), model.named_buffers()
    return trained | {name: tensor for name, tensor in buffers if name in state}


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state_of(parameter).items()
    }


def _restore_states(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], updates: int
) -> None:
    parameters = dict(model.named_parameters())
    states: dict[Tensor, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        states.setdefault(parameters[name], {})[what] = tensor
    optimizer.restore(states, updates)


def _random_tensors(device: torch.device) -> dict[str, Tensor]:
    words = np.random.get_state(legacy=False)["state"]["key"]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(words)}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _random_state(device: torch.device) -> tuple[bytes, dict[str, Any]]:
    state = np.random.get_state(legacy=False)
    own = [state["bit_generator"], state["state"]["pos"], state["has_gauss"], state["gauss"]]
    numbers = {"python": random.getstate(), "numpy": own}
    return pack(_random_tensors(device)), numbers


def _restore_random(
    tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device
) -> None:
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, *rest = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy(), *rest))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _steps(directory: Path) -> list[Path]:
    """Checkpoints by step, complete or not."""
    return sorted(directory.glob(NAMES))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
