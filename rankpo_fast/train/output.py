"""The output directory: whose it is, what may be deleted there, and how the model gets in.

    training.json metrics.jsonl checkpoints/ tensorboard/ wandb/, at the end the model's files

training.json makes a directory ours and lists the model's files; config.json is the last of them to
arrive, so that a directory without it holds no finished model. Nothing else there is ever touched.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.files import flush_to_disk, whole_file
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder

RECORD, LAST_FILE, MODEL_ON_ITS_WAY = "training.json", "config.json", ".model.tmp"
PROGRAM, CHECKPOINTS = "rankpo-fast", "checkpoints"
WRITTEN_WHILE_TRAINING = ("metrics.jsonl", CHECKPOINTS, "tensorboard", "wandb", MODEL_ON_ITS_WAY)


def check(config: TrainingConfig, *models: str | None) -> None:
    """InputError unless a run may use --output_dir; `models` are the names it starts from."""
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise InputError(f"--output_dir {path} is a file")
    if any(name is not None and Path(name).resolve() == path.resolve() for name in models):
        raise InputError(f"--output_dir {path} is also the model to start from: choose another")
    there = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if there and _read_record(path) is None:
        raise InputError(
            f"--output_dir {path} holds something else ({', '.join(there[:5])}): choose another"
        )
    if there and config.resume is None and not config.overwrite_output_dir:
        state = "a finished" if finished(path) else "an unfinished (--resume continues it)"
        raise InputError(
            f"--output_dir {path} holds {state} run: choose another, or --overwrite_output_dir"
        )


def finished(path: Path) -> bool:
    return _read_record(path) is not None and (path / LAST_FILE).exists()


def start(path: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make the directory ours; `overwrite` deletes what an earlier run wrote, and only that."""
    if overwrite and _read_record(path) is not None:
        _clear(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_record(path, {"program": PROGRAM, **record, "model_files": []})


def save_model(path: Path, encoder: Encoder) -> None:
    """Save beside the place, then move file by file. After an OSError no half model is there."""
    temporary = path / MODEL_ON_ITS_WAY
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        encoder.save(temporary)
        names = sorted(entry.relative_to(temporary) for entry in temporary.rglob("*"))
        folders = [name for name in names if (temporary / name).is_dir()]
        files = [name for name in names if name not in folders and name != Path(LAST_FILE)]
        files.append(Path(LAST_FILE))
        record = {**_read_record(path), "model_files": [name.as_posix() for name in files]}
        _write_record(path, record)
        for folder in folders:
            (path / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            flush_to_disk(temporary / file)
            os.replace(temporary / file, path / file)
        flush_to_disk(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear(path: Path) -> None:
    """config.json goes first, training.json last: what is half cleared is no model, but ours."""
    model_files = [Path(name) for name in _read_record(path)["model_files"]]
    for file in model_files:
        if file.is_absolute() or ".." in file.parts:
            raise InputError(f"{path / RECORD} names {file}, which lies outside the directory")
    for file in reversed(model_files):
        (path / file).unlink(missing_ok=True)
        if file.parent != Path() and not any((path / file.parent).iterdir()):
            (path / file.parent).rmdir()
    for name in WRITTEN_WHILE_TRAINING:
        entry = path / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    (path / RECORD).unlink()


def _read_record(path: Path) -> dict[str, Any] | None:
    """What we wrote; None where there is nothing of ours."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("program") == PROGRAM else None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with whole_file(path / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
