"""When a checkpoint is due, by a played clock; and that none changes a bit of what is trained."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import TrainingConfig
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import schedule
from rankpo_fast.train.schedule import SaveSchedule, StepSchedule

DATA = SimpleNamespace(batch_size=4, batches_per_epoch=5)


def saved_steps(monkeypatch, seconds, steps=20, **flags):
    """After which steps, of so many seconds each, a checkpoint is written; five make an epoch."""
    now = 0.0
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now)
    config = TrainingConfig("unused", max_steps=steps, **flags)
    steps_of_run = StepSchedule.of(config, DATA)
    saves, saved = SaveSchedule(config), []
    for step in range(1, steps + 1):
        now += seconds
        if saves.due(step, ends_epoch=steps_of_run.ends_epoch(step), last=step == steps):
            saved.append(step)
            saves.begun()
    return saved


@pytest.mark.parametrize(
    "seconds, flags, saved",
    [
        pytest.param(1, {}, [], id="an-epoch-takes-seconds"),
        pytest.param(7, {}, [10], id="every-second-end-of-an-epoch-is-too-early"),
        pytest.param(20, {}, [5, 10, 15], id="ends-of-epochs-but-for-the-last-step"),
        pytest.param(300, {}, [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19],
                     id="ten-minutes-and-ends-of-epochs"),
        pytest.param(300, {"save_minutes": 15}, [3, 5, 8, 10, 13, 15, 18], id="other-minutes"),
        pytest.param(300, {"save_minutes": 0}, [], id="off"),
        pytest.param(300, {"save_steps": 10}, [10, 20], id="steps-alone-the-last-among-them"),
        pytest.param(300, {"save_steps": 8, "save_minutes": 15}, [3, 5, 8, 10, 13, 15, 16, 19],
                     id="both"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_written_when_due(seconds, flags, saved, monkeypatch):
    assert saved_steps(monkeypatch, seconds, **flags) == saved


def test_an_epoch_ends_within_a_step_of_several_batches():
    config = TrainingConfig("unused", max_steps=5, gradient_accumulation_steps=2)
    schedule = StepSchedule.of(config, DATA)
    assert [step for step in range(1, 6) if schedule.ends_epoch(step)] == [3, 5]


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            {},
            "every 10 minutes and at the end of an epoch of a minute or more, when stopped; "
            "the last 2 kept",
        ),
        ({"save_steps": 5, "save_total_limit": 0}, "every 5 steps, when stopped; all kept"),
        ({"save_minutes": 0}, "when stopped; the last 2 kept"),
    ],
    ids=["default", "steps", "off"],
)
def test_when_is_said(flags, said):
    assert SaveSchedule(TrainingConfig("unused", **flags)).summary() == said


def test_checkpoints_by_time_change_no_bit_of_training(tiny_bert_dir, run_stage, monkeypatch):
    """With dropout on, a played hour between two looks at the clock: a checkpoint a step."""
    never = run_stage("contrastive", tiny_bert_dir, "never", save_minutes=0)
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr(schedule.time, "monotonic", lambda: next(hours))
    often = run_stage("contrastive", tiny_bert_dir, "often", max_steps=6)
    assert not (never / "checkpoints").exists()
    names = sorted(path.name for path in (often / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]  # the last step's is the model itself
    want, got = (load_file(path / "model.safetensors") for path in (never, often))
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_bit_by_bit(tiny_bert_dir, contrastive_file, tmp_path):
    """With dropout on; SIGKILL, which nothing can catch, after a checkpoint that time asked for."""
    command = [
        *(sys.executable, "-m", "rankpo_fast.cli", "contrastive"),
        *("--model_name_or_path", str(tiny_bert_dir), "--train_data", contrastive_file),
        *("--cache_dir", str(tmp_path / "cache"), "--device", "cpu", "--logging_steps", "1"),
        *("--max_steps", "300", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name, *more):
        where = ["--output_dir", str(tmp_path / name), *more]
        return subprocess.Popen([*command, *where], stderr=subprocess.PIPE, env=environment)

    folder = tmp_path / "killed" / "checkpoints"
    with start("killed", "--save_minutes", "0.005") as killed:
        while killed.poll() is None and not list(folder.glob("step-*")):
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    step = checkpoints.newest(folder).step
    with start("killed", "--resume") as goes_on, start("straight") as straight:
        said = goes_on.communicate()[1].decode(), straight.communicate()[1].decode()
    assert goes_on.returncode == straight.returncode == 0, said
    assert f"after step {step}" in said[0] and "as the run that goes on had it" in said[0]
    paths = [tmp_path / name for name in ("straight", "killed")]
    want, got = (load_file(path / "model.safetensors") for path in paths)
    assert all(torch.equal(want[name], got[name]) for name in want)
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in paths]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 300
