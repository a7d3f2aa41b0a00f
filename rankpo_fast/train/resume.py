"""What a run that goes on must share with the run it goes on from, and where that one stopped.

What was read is compared by content, not by name: data and models may move, or lie behind a link.
The ranks of a run share as much, and a little more.
"""

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankpo_fast.config import EvaluationConfig, ModelConfig, TrainingConfig
from rankpo_fast.data.files import Stamp, stamp_of, tensor_bytes
from rankpo_fast.data.groups import is_directory
from rankpo_fast.data.memory import Source
from rankpo_fast.data.retrieval import beir_files
from rankpo_fast.data.sources import digest, digest_of_bytes
from rankpo_fast.errors import InputError
from rankpo_fast.model.adapter import CONFIG_FILE, find_adapter
from rankpo_fast.model.directories import find_directory
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.precision import Precision
from rankpo_fast.paths import MODELS, all_inputs, model_files
from rankpo_fast.ranks import Ranks
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.arithmetic import arithmetic
from rankpo_fast.train.checkpoint import Checkpoint
from rankpo_fast.train.run import Run

# What a run that goes on may change: none of it changes a bit of the weights.
FREE_TO_CHANGE = {
    "activation_memory_gb", "gradient_checkpointing", "output_dir", "resume",
    "overwrite_output_dir", "logging_steps", "eval_steps", "save_steps", "save_minutes",
    "background_saves", "save_total_limit", "save_dtype", "report_to", "project", "run_name",
    "profile_steps", "auto_resume", "after_save", "cache_dir", "no_cache", "rank_timeout",
    "device", "auto",
}  # fmt: skip
FREE_PARTS = {"offload": {"activations"}}  # of settings that are lists
# May differ from run to run, but not from rank to rank.
MET_FOR = ("save_steps", "eval_steps", "activation_memory_gb", "background_saves")
PROCESSES, ROWS = "processes", "--per_device_train_batch_size"
# May change together, so long as as many rows make a batch.
BATCHES = (ROWS, "--replay_batch_size", "--graded_batch_size", "--teacher_batch_size")
OF_RANKS = (PROCESSES, *BATCHES, "--shard")
MODEL, TOKENIZER = "model_name_or_path", "tokenizer_name"
WEIGHTS = ".safetensors"
TRAINED_ON = ("train_data", "replay_data", "graded_data", "teacher_data")
MEASURED_ON = ("query_data", "corpus_data", "preference_data")
CONTENT = "content of "
# Recorded, but free to change too: names of what was read, and what decides how sums are rounded.
NAME, ARITHMETIC = "name of ", "arithmetic"


def settings_of(
    stage: str, ranks: Ranks, configs: Sequence[Any], encoder: Encoder | None = None
) -> dict[str, Any]:
    """All that decides the weights, by flag; of data and models the sha256 of their content.

    Args:
        encoder: the one to train, where it is not loaded from the model that is named.

    Raises:
        InputError: there is no such model.
    """
    settings: dict[str, Any] = {"stage": stage, "device": ranks.device.type}
    settings |= {PROCESSES: ranks.size, ARITHMETIC: arithmetic(ranks.device)}
    for flag, source in all_inputs(*configs):
        settings.setdefault(f"{NAME}{flag}", []).append(str(source))
    for config in configs:
        for name, value in asdict(config).items():
            if name in TRAINED_ON:
                settings[_content(name)] = [data_content(path) for path in value]
            elif name in MODELS:
                if name == MODEL and encoder is not None:
                    settings[_content(name)] = _encoder_content(encoder)
                elif value is not None:
                    scratch = name == MODEL and config.from_scratch
                    weights = name != TOKENIZER and not scratch
                    settings[_content(name)] = model_content(f"--{name}", value, weights)
            elif name in FREE_PARTS:
                settings[f"--{name}"] = [part for part in value if part not in FREE_PARTS[name]]
            elif name not in FREE_TO_CHANGE:
                settings[f"--{name}"] = value
    return settings


def settings_of_choice(training: TrainingConfig, evaluation: EvaluationConfig) -> dict[str, Any]:
    """What else decides the weights where --metric_for_best_model chooses among steps."""
    settings: dict[str, Any] = {"--eval_steps": training.eval_steps}
    for name, value in asdict(evaluation).items():
        if name in MEASURED_ON:
            sources = value if isinstance(value, list) else [] if value is None else [value]
            settings[_content(name)] = [data_content(source) for source in sources]
        else:
            settings[f"--{name}"] = value
    return settings


def find_checkpoint(
    training: TrainingConfig, settings: dict[str, Any], ranks: Ranks
) -> Checkpoint | None:
    """The one to go on from; InputError if it, or the run there, was made under other settings."""
    if training.resume is None:
        return None
    path = Path(training.output_dir)
    record = output.read_record(path)
    if record is None and training.resume == "newest":
        raise InputError(f"--resume: there is no run in {path}; --auto_resume starts one then")
    record = record or {}
    check_same(f"--resume: {path}", _of_ranks(record.get("settings", settings), settings), settings)
    if output.finished(path):
        return None
    if training.resume == "newest":
        directory = path / output.CHECKPOINTS
        checkpoint = checkpoints.newest(directory)
        if checkpoint is None:
            ranks.say(
                f"--resume: no complete checkpoint in {directory}, starting from the beginning"
            )
            return None
    else:
        checkpoint = checkpoints.read(Path(training.resume))
    _check_best(checkpoint, path)
    was = _of_ranks(checkpoint.settings, settings)
    check_same(f"--resume: {checkpoint.path}", was, settings)
    if was != checkpoint.settings:
        names = [n for n in OF_RANKS if checkpoint.settings.get(n) != settings.get(n)]
        changes = [_change(name, checkpoint.settings.get(name), settings[name]) for name in names]
        dropout = "; dropout is drawn anew" if PROCESSES in names else ""
        warnings.warn(
            f"--resume: {', '.join(map(str, changes))}: the batches and their order are the same, "
            f"but sums are rounded otherwise{dropout}, so the run goes on, but not bit by bit",
            stacklevel=2,
        )
    _warn_of_arithmetic(checkpoint.settings.get(ARITHMETIC), settings[ARITHMETIC])
    return checkpoint


def _check_best(checkpoint: Checkpoint, path: Path) -> None:
    """InputError unless the best model so far is there, which may turn out to be the result."""
    best = (checkpoint.choice or {}).get("best")
    if best is None or path / output.CHECKPOINTS / checkpoints.name_of(best["step"]) == (
        checkpoint.path
    ):
        return
    try:
        checkpoints.read(path / output.CHECKPOINTS / checkpoints.name_of(best["step"]))
    except InputError as error:
        raise InputError(
            f"--resume: {checkpoint.path}: step {best['step']} was the best until then, and its "
            f"checkpoint is needed: {error}"
        ) from error


def _warn_of_arithmetic(was: Any, now: dict[str, str]) -> None:
    """Of each part that differs."""
    before = was if isinstance(was, dict) else {"arithmetic": was}  # as earlier versions wrote it
    changes = [_change(n, before.get(n), now.get(n)) for n in dict.fromkeys([*before, *now])]
    said = "; ".join(change for change in changes if change is not None)
    if said:
        warnings.warn(
            f"--resume: {said}: sums may be rounded otherwise, so the run goes on, but maybe not "
            f"bit by bit",
            stacklevel=3,
        )


def _of_ranks(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`was`, with the ranks of `now` if their batches are the same."""

    def rows(settings: dict[str, Any]) -> Any:
        return [settings.get(PROCESSES, 0) * (settings.get(name) or 0) for name in BATCHES]

    same = rows(was) == rows(now) and was.get("device") == now["device"]
    same = same and not now.get("--gradient_filter")  # which each rank takes of its own queries
    return {**was, **{name: now[name] for name in OF_RANKS if name in now}} if same else was


def settings_before(training: TrainingConfig) -> dict[str, Any]:
    """Of the run that --resume goes on with; nothing if there is none."""
    if training.resume is None:
        return {}
    record = output.read_record(Path(training.output_dir))
    if record is None and training.resume != "newest":
        return checkpoints.read(Path(training.resume)).settings
    return (record or {}).get("settings", {})


def shared_precision(model: ModelConfig, training: TrainingConfig, ranks: Ranks) -> Precision:
    """What --bf16 comes to, the same on all ranks and in a run that goes on as before; all must
    call it. InputError for a --resume CHECKPOINT that cannot be read."""
    precision = None
    if ranks.first:
        before = settings_before(training) if model.bf16 == "auto" else {}
        if isinstance(before.get("--bf16"), bool):
            precision = Precision(before["--bf16"], "as the run that goes on had it")
        else:
            precision = Precision.of_model(model, ranks.device)
    of_first, *_ = ranks.objects(precision)
    return of_first


def compare_ranks(run: Run) -> None:
    """InputError where ranks were not told the same: some would wait for others for ever."""
    meetings = {f"--{name}": getattr(run.training, name) for name in MET_FOR}
    layers = {"--gradient_checkpointing": run.model.gradient_checkpointing}
    told = run.ranks.objects({
        **run.settings, **meetings, **layers, "whether to evaluate": run.evaluation.asked,
        "step that --resume found": run.first_step,
    })  # fmt: skip
    if run.ranks.first:
        of_first, *_ = told
        for rank, theirs in enumerate(told):
            check_same(f"rank {rank} of {len(told)}", theirs, of_first)
    run.ranks.meet()


def check_same(what: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError that names every setting which differs, and of a model the files."""
    names = [name for name in dict.fromkeys([*was, *now]) if not name.startswith(NAME)]
    changes = [_change(n, was.get(n), now.get(n)) for n in names if n != ARITHMETIC]
    changed = [f"  {change}" for change in changes if change is not None]
    if f"--{MODEL}" in was:
        changed = ["  an earlier version wrote it, which recorded names of models, not contents: "
                   "train anew, or go on with that version"]  # fmt: skip
    if changed:
        lines = "\n".join(changed)
        raise InputError(f"{what} has other settings:\n{lines}")


def _change(name: str, was: Any, now: Any) -> str | None:
    if was == now:
        return None
    if not name.startswith(CONTENT):
        return f"{name} was {was}, is {now}"
    if was is None or now is None:
        flag = name.removeprefix(CONTENT)
        return f"{flag} was {'not ' if was is None else ''}given, is {'not' if was else 'now'}"
    if isinstance(was, dict):
        differ = sorted(file for file in {*was, *now} if was.get(file) != now.get(file))
        more = f" and {len(differ) - 5:,} more" if len(differ) > 5 else ""
        return f"{name} differs: {', '.join(differ[:5])}{more}"
    if len(was) != len(now):
        return f"{name} differs: {len(was)} files became {len(now)}"
    differ = [str(i) for i, (a, b) in enumerate(zip(was, now, strict=True), 1) if a != b]
    return f"{name} differs: file {', '.join(differ)} of {len(now)}"


# --- what is recorded ---


def stamps_of(configs: Sequence[Any], encoder: Encoder | None = None) -> dict[Path, Stamp]:
    """Of all files that models are made of, before they are hashed and read; arguments and errors
    as of `settings_of`."""
    stamps = {}
    for config in configs:
        for name in MODELS:
            value = getattr(config, name, None)
            if value is not None and not (name == MODEL and encoder is not None):
                for file in _files(f"--{name}", value, weights=name != TOKENIZER).values():
                    stamps[file] = stamp_of(file)
    return stamps


def check_unchanged(run: Run) -> None:
    """InputError where a file of a model is no longer the one whose hash is recorded: called once
    all have been read."""
    for file, stamp in run.stamps.items():
        if stamp_of(file) != stamp:
            raise InputError(f"{file} has changed while it was read: start again, with files that "
                             f"stay as they are")  # fmt: skip


def data_content(source: Source) -> str:
    """The sha256 of rows; of a BEIR directory that of all its files."""
    if not is_directory(source):
        return digest(source)
    files = beir_files(Path(str(source)))
    return hashlib.sha256(" ".join(map(digest, map(str, files))).encode()).hexdigest()


def _content(name: str) -> str:
    return f"{CONTENT}--{name}"


def _files(flag: str, name: str, weights: bool) -> dict[str, Path]:
    """Those that make the model, or the tokenizer, by their place there; those of the model that an
    adapter is for too."""
    directory = find_directory(name, flag, weights=weights)
    found = {file.as_posix(): directory / file for file in model_files(directory)}
    for config in [*directory.glob(CONFIG_FILE), *directory.glob(f"*/{CONFIG_FILE}")]:
        if (adapter := find_adapter(config.parent, flag)) is not None:
            base = adapter.base_directory
            found |= {f"base/{file.as_posix()}": base / file for file in model_files(base)}
    return {place: file for place, file in found.items() if weights or WEIGHTS not in file.name}


def model_content(flag: str, name: str, weights: bool = True) -> dict[str, str]:
    """The sha256 of each file that makes the model, or the tokenizer, at its place there."""
    files = _files(flag, name, weights)
    try:
        with ThreadPoolExecutor() as pool:  # shards: hashing leaves Python's lock
            return dict(zip(files, pool.map(digest_of_bytes, files.values()), strict=True))
    except OSError as error:
        raise InputError(f"{flag} {name}: cannot be read: {error}") from error


def _encoder_content(encoder: Encoder) -> dict[str, str]:
    """The same of one in memory: the sha256 of each tensor, and how it reads text."""
    weights = encoder.backbone.state_dict().items()
    content = {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in weights}
    return content | {name: str(value) for name, value in asdict(encoder.settings).items()}
