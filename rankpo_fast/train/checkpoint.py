"""Checkpoints that are either complete or not there; training goes on from them bit by bit.

`checkpoints/step-00000100/` holds the weights that are trained, the optimizer's state, the random
states of all ranks and the counters as safetensors and JSON, and a manifest with the sha256 of each
file. It is written under another name, flushed to disk, and renamed. The learning rate and the
order of the rows follow from the step, so nothing of them need be kept.

Of weights in parts each rank writes its own, in `weights/` and `optimizer/` (train/parts.py).
Either kind is read by any number of ranks, whole or in parts.
"""

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
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
    discard,
    flush_to_disk,
    load_tensors,
    open_to_umask,
    remove,
    save_tensors,
    sha256_of,
    temporary_name,
)
from rankpo_fast.errors import InputError
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.parts import in_parts, load_parts, save_parts, shapes_of_parts

WEIGHTS, OPTIMIZER, RANDOM, STATE, MANIFEST = (
    "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json",
    "manifest.json",
)  # fmt: skip
FOLDERS = {WEIGHTS: "weights", OPTIMIZER: "optimizer"}  # instead, of tensors in parts
NAMES = "step-" + "[0-9]" * 8  # of their folders


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # optimizer steps done
    settings: dict[str, Any]  # of the run that wrote it
    max_tokens: int  # of a micro-batch, as it was then
    choice: dict[str, Any] | None = None  # what evaluations had shown, of `Choice.state`

    def folder(self, name: str) -> Path:
        """Where the tensors of WEIGHTS or OPTIMIZER lie."""
        folder = self.path / FOLDERS[name]
        return folder if folder.exists() else self.path


def name_of(step: int) -> str:
    """Of the folder."""
    return f"step-{step:08d}"


def seed_random(seed: int) -> None:
    """All generators; the current GPU's too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, as all ranks have it after a step."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # of WEIGHTS and OPTIMIZER; none where others write them
    in_parts: bool  # whether they lie in parts
    random: list[tuple[bytes, dict[str, Any]]]  # of each rank
    settings: dict[str, Any]
    max_tokens: int
    choice: dict[str, Any] | None


def state_of(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    max_tokens: int,
    *,
    choice: dict[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> State:
    """Of a run after `step` steps; its tensors are the run's own. All ranks must call it."""
    generators = ranks.objects(_random_state(ranks.device))
    tensors = {WEIGHTS: _weights(model), OPTIMIZER: _states(model, optimizer)}
    parts = any(map(in_parts, tensors.values()))
    if not ranks.first and not parts:
        tensors = {}
    return State(step, tensors, parts, generators, settings, max_tokens, choice)


def save(directory: Path, state: State, *, keep: int | None = None, ranks: Ranks = ALONE) -> Path:
    """Write `directory/step-XXXXXXXX`, then drop what is older than the newest `keep` complete
    ones, of which it is one, unless one of them names it as the best; raises OSError, and then all
    are as they were.

    All ranks must call it; the first one writes, the others their parts of tensors.
    """
    target = directory / name_of(state.step)
    if not ranks.first and not state.in_parts:
        return target
    temporary = directory / f".{target.name}.tmp"
    refused: str | None = None
    if ranks.first:
        try:
            for left in directory.glob(".step-*.tmp"):  # of a run that was killed while saving
                remove(left)
            for name in FOLDERS.values() if state.in_parts else [""]:
                (temporary / name).mkdir(parents=True)
        except OSError as error:
            refused = str(error)
            shutil.rmtree(temporary, ignore_errors=True)
    if state.in_parts:  # no rank is to wait for the parts of others
        refused, *_ = ranks.objects(refused)
    if refused is not None:
        raise OSError(refused)
    try:
        manifest: dict[str, str] = {}
        if state.in_parts:
            for name, folder in FOLDERS.items():
                digests = save_parts(state.tensors[name], temporary / folder, ranks)
                manifest |= {f"{folder}/{file}": digest for file, digest in digests.items()}
        if not ranks.first:
            return target
        files = [RANDOM, STATE]
        if not state.in_parts:
            files += state.tensors
            for name, tensors in state.tensors.items():
                save_tensors(tensors, temporary / name)
        random_tensors = {
            f"{rank}/{name}": tensor
            for rank, (of_rank, _) in enumerate(state.random)
            for name, tensor in load(of_rank).items()
        }
        save_tensors(random_tensors, temporary / RANDOM)
        numbers = [of_rank for _, of_rank in state.random]
        _write_json(temporary / STATE, {
            "step": state.step, "settings": state.settings, "max_tokens": state.max_tokens,
            "random": numbers, "choice": state.choice,
        })  # fmt: skip
        manifest |= {name: sha256_of(temporary / name) for name in files}
        _write_json(temporary / MANIFEST, manifest)
        open_to_umask(temporary)
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        old = temporary_name(target)
        if os.path.lexists(target):  # of the same step: broken, or of a run that went back
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if os.path.lexists(old):
                old.rename(target)
            raise
        remove(old)
        flush_to_disk(directory)
        _verified[target] = _stamps(target, manifest)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
    if keep:
        drop_older(target, keep)
    return target


def drop_older(target: Path, keep: int) -> None:
    """Those before the newest `keep` complete ones, of which `target` is one. Later ones are of a
    run that went back: broken, or the same again when their step comes."""
    older = [old for old in _steps(target.parent) if old.name < target.name]
    if len(older) < keep:  # all may stay, and none has to be read
        return
    complete, best = 1, {_best_of(target)}
    for old in reversed(older):
        if complete < keep:
            complete += _is_complete(old)
            best.add(_best_of(old))
            continue
        if old.name in best:
            continue
        try:
            discard(old)
        except OSError as error:
            warnings.warn(f"{old} cannot be deleted: {error.strerror}", stacklevel=3)


def _best_of(path: Path) -> str | None:
    """The name of the checkpoint that this one says is the best so far."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        best = (json.loads((path / STATE).read_text())["choice"] or {})["best"]
        return None if best is None else name_of(best["step"])
    return None


Stamps = dict[str, tuple[int, int, int]]  # of files: size, time, inode
_verified: dict[Path, Stamps] = {}  # in this process: as they were when their sums were right


def _stamps(path: Path, names: Iterable[str]) -> Stamps:
    stats = {name: os.stat(path / name) for name in {*names, MANIFEST}}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _is_complete(path: Path) -> bool:
    """Whether `read` takes it, which is asked again only once a file has changed."""
    with suppress(InputError, OSError):
        stamps = _verified.get(path)
        if stamps is None or _stamps(path, stamps) != stamps:
            read(path)
        return True
    return False


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`; InputError says what is wrong with one that is not complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, folder in FOLDERS.items():
            if not any(file.startswith(f"{folder}/") for file in manifest):
                manifest[name]  # else KeyError
        manifest[RANDOM], manifest[STATE]
        changed = [name for name in manifest if sha256_of(path / name) != manifest[name]]
        state = json.loads((path / STATE).read_text())
        checkpoint = Checkpoint(
            path,
            int(state["step"]),
            dict(state["settings"]),
            int(state["max_tokens"]),
            state.get("choice"),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a complete checkpoint ({error}); there should be {MANIFEST} and what it "
            f"names, as in OUTPUT_DIR/checkpoints/step-00000100"
        ) from error
    if changed:
        raise InputError(f"{path}: {', '.join(changed)} damaged since written (sha256 differs)")
    for name in (name for name in manifest if name.endswith(".safetensors")):
        try:
            with safe_open(path / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path / name}: cannot be read ({error})") from error
    _verified[path] = _stamps(path, manifest)
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
    own = _weights(model)
    if in_parts(own) or checkpoint.folder(WEIGHTS) != checkpoint.path:
        _restore_parts(checkpoint, own, _states(model, optimizer), ranks)
        optimizer.updates = checkpoint.step
        _restore_random(checkpoint, ranks)
        return
    weights, moments = (_load(checkpoint.path / name) for name in (WEIGHTS, OPTIMIZER))
    _check_shapes(checkpoint.path / WEIGHTS, weights, own)
    _check_shapes(checkpoint.path / OPTIMIZER, moments, _states(model, optimizer))
    _restore_random(checkpoint, ranks)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    _restore_states(model, optimizer, moments, checkpoint.step)


def restore_weights(checkpoint: Checkpoint, model: nn.Module, ranks: Ranks = ALONE) -> None:
    """Put the weights alone where they were, for a model of which nothing more is trained; all
    ranks must call it. InputError as of `restore`."""
    own = _weights(model)
    folder = checkpoint.folder(WEIGHTS)
    if in_parts(own) or folder != checkpoint.path:
        load_parts(folder, own, ranks)
        return
    weights = _load(checkpoint.path / WEIGHTS)
    _check_shapes(checkpoint.path / WEIGHTS, weights, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _restore_parts(
    checkpoint: Checkpoint, weights: dict[str, Tensor], moments: dict[str, Tensor], ranks: Ranks
) -> None:
    """Where there or here tensors lie in parts."""
    try:
        for file, own in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            folder = checkpoint.folder(file)
            there = shapes_of_parts(folder)
            if folder == checkpoint.path:  # which has the tensors of all files
                there = {name: there[name] for name in own if name in there}
            _check_shapes(folder, there, dict(own))
            load_parts(folder, own, ranks)
    except OSError as error:
        raise InputError(f"cannot be read: {error}") from error


def _restore_random(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """The rank's generators; of another number of ranks new ones, that differ from step to step."""
    path = checkpoint.path / STATE
    try:
        numbers = json.loads(path.read_text())["random"]
        if len(numbers) != ranks.size:
            seed = checkpoint.settings.get("--seed", 0)
            seed_random(seed + ranks.rank + ranks.size * checkpoint.step)
            return
        states = _load(checkpoint.path / RANDOM)
        wanted = _random_tensors(ranks.device)
        found = {name: states.get(f"{ranks.rank}/{name}") for name in wanted}
        _check_shapes(checkpoint.path / RANDOM, found, wanted)
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        _set_random(tensors, numbers[ranks.rank], ranks.device)
    except InputError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: no random states ({error!r})") from error


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


def _set_random(tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> None:
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
