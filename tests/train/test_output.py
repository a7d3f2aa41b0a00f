"""What a run may delete, and that it does it whole or can do it again."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.ranks import ALONE
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.lock import LOCK, held
from rankpo_fast.train.schedule import SaveSchedule

RECORD = {"stage": "rankpo", "settings": {}}
FILES = ("1_Pooling/config.json", "model.safetensors", "config.json")


@pytest.fixture
def finished(tmp_path):
    """An output directory as a run leaves it, with a file of the user's."""
    path = tmp_path / "out"
    for name in (*FILES, "metrics.jsonl", "checkpoints/step-00000001/manifest.json", "notes.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    record = {"program": "rankpo-fast", **RECORD, "model_files": ["1_Pooling", *FILES]}
    (path / "training.json").write_text(json.dumps(record))
    return path


class Killed(BaseException):
    """No handler of the code's own takes it."""


def killed_before(count, monkeypatch):
    """From the call number `count` on, nothing is made, renamed or deleted any more."""
    calls = itertools.count()
    for name in ("rename", "unlink", "rmdir", "mkdir", "replace"):
        original = getattr(os, name)

        def call(*args, original=original, **kwargs):
            if next(calls) >= count:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def test_clearing_that_is_killed_anywhere_can_be_done_again(finished, tmp_path, monkeypatch):
    for count in itertools.count():
        path = shutil.copytree(finished, tmp_path / str(count))
        with monkeypatch.context() as patches:
            killed_before(count, patches)
            try:
                output.start(path, RECORD, overwrite=True)
            except Killed:
                done = False
            else:
                done = True
        assert (path / "model.safetensors").exists() or not output.finished(path)
        output.check(path, [], resume=False, overwrite=True)
        output.start(path, RECORD, overwrite=True)
        left = {entry.name for entry in path.iterdir() if "rankpo-" not in entry.name}
        assert left == {"training.json", "notes.txt"}
        assert output.read_record(path)["model_files"] == []
        if done:
            break
    assert count > 10


def test_nothing_outside_is_touched_whatever_is_linked_inside(finished, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    linked = ("1_Pooling", "model.safetensors", "config.json", "metrics.jsonl", "checkpoints",
              "profile", ".model.tmp", ".rankpo-fast.trash")  # fmt: skip
    for name in linked:
        target = outside / name
        if (finished / name).exists():
            (finished / name).rename(target)
        else:
            target.mkdir()
            (target / "kept").touch()
        (finished / name).symlink_to(target)
    before = sorted(outside.rglob("*"))
    output.start(finished, RECORD, overwrite=True)
    assert sorted(outside.rglob("*")) == before
    assert {path.name for path in finished.iterdir()} == {"training.json", "notes.txt"}


def test_a_model_is_saved_beside_a_link_not_through_it(finished, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (".model.tmp", "2_Normalize"):
        (finished / name).symlink_to(outside)

    def save(directory: Path) -> None:
        (directory / "2_Normalize").mkdir(parents=True)
        for name in ("2_Normalize/config.json", "config.json"):
            (directory / name).touch()

    output.save_model(finished, SimpleNamespace(save=save), "card")
    assert not list(outside.iterdir())
    assert (finished / "2_Normalize/config.json").exists() and output.finished(finished)


def test_a_run_that_goes_on_writes_through_no_link(finished, tmp_path):
    (finished / "checkpoints").rename(tmp_path / "elsewhere")
    (finished / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="--resume: .*checkpoints is a link to .*elsewhere"):
        output.check(finished, [], resume=True, overwrite=False)
    (finished / "checkpoints").unlink()
    (finished / ".rankpo-fast.lock").symlink_to(tmp_path / "elsewhere" / "lock")
    with (
        pytest.raises(InputError, match="--output_dir .*symbolic links"),
        held(finished, "--output_dir"),
    ):
        pass
    assert not (tmp_path / "elsewhere" / "lock").exists()


def test_reports_put_aside_by_a_run_that_was_killed_come_back(finished, monkeypatch):
    (finished / "tensorboard").mkdir()
    (finished / "tensorboard" / "earlier").touch()
    for count in itertools.count():
        done = False
        with monkeypatch.context() as patches:
            try:
                with output.reports_aside(finished, overwrite=True):
                    (finished / "tensorboard").mkdir()
                    killed_before(count, patches)
                    raise RuntimeError("it does not start")
            except Killed:
                pass
            except RuntimeError:
                done = True
        if done:
            break
    assert count > 1
    assert (finished / "tensorboard" / "earlier").exists()
    assert not (finished / ".reports.tmp").exists()


def test_what_killed_runs_left_is_gone_once_the_directory_is_held(finished, tmp_path):
    """Of a finished run too, which writes nothing more; and of links the links alone."""
    outside = tmp_path / "outside"
    (outside / ".step-00000002.tmp").mkdir(parents=True)
    before = sorted(finished.rglob("*"))
    left = (".model.tmp", ".rankpo-fast.trash", "checkpoints/.step-00000001.tmp")
    for name in left:
        (finished / name / "folder").mkdir(parents=True)
    with output.claimed(TrainingConfig(str(finished)), ALONE):
        assert [path for path in sorted(finished.rglob("*")) if path.name != LOCK] == before
    shutil.rmtree(finished / "checkpoints")
    for name in (".model.tmp", "checkpoints"):
        (finished / name).symlink_to(outside)
    with output.claimed(TrainingConfig(str(finished)), ALONE):
        assert not (finished / ".model.tmp").is_symlink()
    assert (outside / ".step-00000002.tmp").exists()


# --- checkpoints that the disk refuses ---


@pytest.fixture
def refuse(monkeypatch):
    """refuse(steps, ...): the checkpoints of these find the disk full."""
    real = checkpoints.save

    def arm(*steps):
        def save(directory, state, **kwargs):
            if state.step in steps:
                raise OSError(28, "No space left on device")
            return real(directory, state, **kwargs)

        monkeypatch.setattr(checkpoints, "save", save)

    return arm


def test_a_checkpoint_that_cannot_be_written_ends_no_run(
    refuse, tiny_llama_dir, run_stage, read_metrics, capsys
):
    refuse(2, 3)
    path = run_stage("contrastive", tiny_llama_dir, "out", save_steps=1, max_steps=5,
                     background_saves=False)  # fmt: skip
    said = capsys.readouterr().err
    assert "the checkpoint of step 2 could not be written ([Errno 28] No space" in said
    lost = [line.get("steps_not_saved") for line in read_metrics(path)]
    assert lost == [None, None, 2, 3, None]  # the line of a step precedes its checkpoint
    assert said.count("NOT SAVED: the last ") == 2
    assert checkpoints.newest(path / "checkpoints").step == 5


def test_a_run_whose_last_checkpoint_is_missing_says_so_with_its_exit(
    refuse, tiny_llama_dir, run_stage, tmp_path
):
    refuse(4)
    with pytest.raises(OSError, match="checkpoint of step 4 could not .*; the model is saved"):
        run_stage("contrastive", tiny_llama_dir, "out", save_steps=2, max_steps=4)
    assert output.finished(tmp_path / "out")


def test_a_stop_whose_checkpoint_fails_claims_nothing(
    refuse, tiny_llama_dir, run_stage, stop_after
):
    refuse(2)
    stop_after(2)
    with pytest.raises(TrainingStopped, match="step 2, which is not saved: .*No space left"):
        run_stage("contrastive", tiny_llama_dir, "out")


def test_a_checkpoint_that_failed_is_tried_again_after_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rankpo_fast.train.schedule.time.monotonic", lambda: now[0])
    saves = SaveSchedule(TrainingConfig(output_dir="out", save_steps=1000))
    saves.failed()
    assert not saves.due(1, ends_epoch=False, last=False)
    now[0] = 61.0
    assert saves.due(2, ends_epoch=False, last=False)
    saves.begun()
    assert not saves.due(3, ends_epoch=False, last=False)
