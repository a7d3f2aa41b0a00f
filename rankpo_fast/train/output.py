"""The output directory: whose it is, what may be deleted there, and how the model gets in.

    training.json metrics.jsonl checkpoints/ profile/ tensorboard/ wandb/ mlflow/, at the end
    the model's files

While a run is there, it holds the directory by a lock (train/lock.py).
training.json makes a directory ours and lists the model's files; config.json is the last of them to
arrive, so that a directory without it holds no finished model. Nothing else there is ever touched,
and nothing outside: of a link there the link alone goes, and none is followed.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.files import (
    flush_to_disk,
    is_temporary,
    named,
    remove,
    sweep,
    whole_directory,
    whole_file,
)
from rankpo_fast.data.sources import digests_kept
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.paths import check_writable, files_read, lies_in
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.lock import LOCK, held
from rankpo_fast.train.reporters import About, Reporters, chosen
from rankpo_fast.train.run import Run

RECORD, LAST_FILE, MODEL_ON_ITS_WAY = "training.json", "config.json", ".model.tmp"
TRASH = ".rankpo-fast.trash"
REPORTS, REPORTS_ASIDE = ("tensorboard", "wandb", "mlflow"), ".reports.tmp"
CARD = "README.md"  # one of the model's files
METRICS, LAST_GOOD = "metrics.jsonl", "last-good"  # the second after NaN
PROGRAM, CHECKPOINTS, PROFILE = "rankpo-fast", "checkpoints", "profile"
WRITTEN_WHILE_TRAINING = (METRICS, CHECKPOINTS, PROFILE, MODEL_ON_ITS_WAY, REPORTS_ASIDE,
                          LAST_GOOD)  # fmt: skip


def check(path: Path, inputs: Iterable[tuple[str, str]], *, resume: bool, overwrite: bool) -> None:
    """InputError unless a run may use --output_dir.

    Args:
        inputs: flag and value of all that the run reads, none of which may lie in there. A value
            that is no path is a name on the Hub.
    """
    check_writable("--output_dir", path, directory=True)
    for flag, name in inputs:
        shadowed = lies_in(name, path) and lies_in(path, name)  # a name on the Hub
        if shadowed or any(
            file.exists() and lies_in(file, path) for file in files_read(flag, name)
        ):
            raise InputError(f"{flag} {name} lies in --output_dir {path}: choose another")
    there = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    there = [name for name in there if not (name.startswith((LOCK, TRASH)) or is_temporary(name))]
    if there and read_record(path) is None:
        damaged = f", or a run whose {RECORD} is damaged" if RECORD in there else ""
        raise InputError(
            f"--output_dir {path} holds something else ({', '.join(there[:5])}){damaged}: choose "
            f"another"
        )
    if there and not resume and not overwrite:
        state = "a finished" if finished(path) else "an unfinished (--resume continues it)"
        raise InputError(
            f"--output_dir {path} holds {state} run: choose another, or --overwrite_output_dir"
        )
    for name in (*WRITTEN_WHILE_TRAINING, *REPORTS):
        if resume and (path / name).is_symlink():
            raise InputError(
                f"--resume: {path / name} is a link to {(path / name).readlink()}, and a run "
                f"writes nothing outside --output_dir: put there what it leads to"
            )


@contextmanager
def claimed(training: TrainingConfig, ranks: Ranks) -> Iterator[None]:
    """The first rank holds --output_dir inside; InputError, before anything is read, where another
    run does. What is read inside is hashed as it is, and what killed runs left there is gone."""
    path = Path(training.output_dir)
    check_writable("--output_dir", path, directory=True)
    with held(path, "--output_dir") if ranks.first else nullcontext(), digests_kept():
        if ranks.first and read_record(path) is not None:
            _remove_leftovers(path)
        yield


def _remove_leftovers(path: Path) -> None:
    """What was on its way in or out when a run was killed, which no run of now would go by."""
    sweep(path)
    left = [path / MODEL_ON_ITS_WAY, path / TRASH]
    if not (path / CHECKPOINTS).is_symlink():
        left += (path / CHECKPOINTS).glob(".step-*.tmp")
    for entry in left:
        with suppress(OSError):  # of another user's, say
            remove(entry)


def finished(path: Path) -> bool:
    """Whether the whole model is there: one that lost a file is made anew from its checkpoint."""
    record = read_record(path)
    files = [] if record is None else [LAST_FILE, *record.get("model_files", [])]
    return bool(files) and all((path / file).exists() for file in files)


def evaluated(path: Path) -> bool:
    """Whether the run's last word is of an evaluation."""
    with suppress(OSError):
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
        return any(kind in (lines or [""])[-1] for kind in ('"eval/', '"best/'))
    return False


@contextmanager
def opened(run: Run) -> Iterator[Reporters]:
    """Reporters start, an earlier run is cleared where that was asked for, and the directory is
    ours. InputError for a reporter that does not start: the directory is then as it was."""
    config, first = run.training, run.ranks.first
    overwrite = config.overwrite_output_dir
    about = About(run.path, config.project or PROGRAM, config.run_name, run.settings,
                  run.first_step)  # fmt: skip
    with ExitStack() as stack:
        reporters = Reporters(chosen(config.report_to) if first else [], about)
        if first:
            with reports_aside(run.path, overwrite=overwrite):
                stack.enter_context(reporters)
            start(run.path, {"stage": run.stage, "settings": run.settings}, overwrite=overwrite)
        run.ranks.meet()
        yield reporters


def start(path: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make the directory ours; `overwrite` deletes what an earlier run wrote, and only that."""
    earlier = read_record(path)
    if overwrite and earlier is not None:
        _clear(path, earlier)
    path.mkdir(parents=True, exist_ok=True)
    remove(path / TRASH)  # of a run that was killed while it cleared
    _write_record(path, {"program": PROGRAM, **record, "model_files": []})


@contextmanager
def reports_aside(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Inside, reporters start. `overwrite` puts the folders that an earlier run's had aside, for
    `start` to delete; after an exception they are back, and what was begun is gone."""
    aside = path / REPORTS_ASIDE
    _put_back(aside)  # of a run that was killed in here
    there = {name for name in REPORTS if os.path.lexists(path / name)}
    if overwrite and read_record(path) is not None:
        aside.mkdir()
        for name in there:
            (path / name).rename(aside / name)
    try:
        yield
    except BaseException:
        for name in REPORTS:
            if name not in there:
                remove(path / name)
        _put_back(aside)
        raise


def _put_back(aside: Path) -> None:
    """What lies aside, in the place of what came there since."""
    if aside.is_symlink() or not aside.is_dir():
        return
    for old in aside.iterdir():
        remove(aside.parent / old.name)
        old.rename(aside.parent / old.name)
    aside.rmdir()


def save_model(path: Path, encoder: Encoder, card: str) -> None:
    """Save beside the place, then move file by file. After an OSError no half model is there."""
    temporary = path / MODEL_ON_ITS_WAY
    remove(temporary)
    try:
        with named(temporary):
            encoder.save(temporary)
            (temporary / CARD).write_text(card, encoding="utf-8")
        names = sorted(entry.relative_to(temporary) for entry in temporary.rglob("*"))
        folders = [name for name in names if (temporary / name).is_dir()]
        files = [name for name in names if name not in folders and name != Path(LAST_FILE)]
        files.append(Path(LAST_FILE))
        of_model = [name.as_posix() for name in [*folders, *files]]
        _write_record(path, {**(read_record(path) or {}), "model_files": of_model})
        (path / LAST_FILE).unlink(missing_ok=True)  # of a model that had lost another file
        for folder in folders:
            if (path / folder).is_symlink():
                (path / folder).unlink()
            (path / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            flush_to_disk(temporary / file)
            os.replace(temporary / file, path / file)
        flush_to_disk(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def adopt_model(path: Path, other: Path) -> None:
    """Put a copy of the finished model of another run into `path`, which is ours; config.json is
    the last of its files to arrive."""
    of_model = (read_record(other) or {})["model_files"]
    _write_record(path, {**(read_record(path) or {}), "model_files": of_model})
    (path / LAST_FILE).unlink(missing_ok=True)  # of an earlier one
    for name in of_model:
        if (other / name).is_dir():
            (path / name).mkdir(parents=True, exist_ok=True)
            continue
        with whole_file(path / name) as temporary:
            shutil.copyfile(other / name, temporary)


def save_last_good(path: Path, encoder: Encoder) -> None:
    """The encoder as a model of its own, beside the run's; raises OSError."""
    remove(path / LAST_GOOD)
    with whole_directory(path / LAST_GOOD) as temporary:
        encoder.save(temporary)


def write_card(path: Path, card: str) -> None:
    """Over the one that came with the model."""
    with whole_file(path / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


def _clear(path: Path, record: dict[str, Any]) -> None:
    """config.json goes first, and training.json stays: what is half cleared is no model, but ours.
    Everything loses its name before anything is deleted."""
    model_files = [Path(name) for name in record.get("model_files", [])]
    for file in model_files:
        if file.is_absolute() or ".." in file.parts:
            raise InputError(f"{path / RECORD} names {file}, which lies outside the directory")
    trash = path / TRASH
    remove(trash)  # of a run that was killed in here
    trash.mkdir()
    for number, name in enumerate([*reversed(model_files), *map(Path, WRITTEN_WHILE_TRAINING)]):
        entry = path / name
        if not os.path.lexists(entry) or any((path / p).is_symlink() for p in name.parents[:-1]):
            continue
        if name in model_files and entry.is_dir() and not entry.is_symlink():
            if not any(entry.iterdir()):  # else something of the user's is in there
                entry.rmdir()
        else:
            entry.rename(trash / str(number))
    remove(trash)


def read_record(path: Path) -> dict[str, Any] | None:
    """What we wrote; None where there is nothing of ours."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("program") != PROGRAM:
        return None
    files = record.get("model_files", [])
    whole = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return record if whole and isinstance(record.get("settings", {}), dict) else None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with whole_file(path / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
