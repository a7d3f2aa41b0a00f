"""What runs of days need: a second place for checkpoints, schedulers that start again, NaN."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.train import contrastive


def test_each_complete_checkpoint_is_given_to_the_command(tiny_llama_dir, run_stage, tmp_path):
    command = f'cp -r "$RANKPO_CHECKPOINT" {tmp_path}/second-$RANKPO_STEP'
    output = run_stage("contrastive", tiny_llama_dir, "out", save_steps=2, after_save=command)
    assert sorted(path.name for path in tmp_path.glob("second-*")) == [
        "second-2", "second-4", "second-6",
    ]  # fmt: skip
    for file in (output / "checkpoints/step-00000006").iterdir():
        assert (tmp_path / "second-6" / file.name).read_bytes() == file.read_bytes()


def test_a_command_that_fails_is_said_and_ends_no_run(tiny_llama_dir, run_stage, capsys):
    output = run_stage("contrastive", tiny_llama_dir, "out", save_steps=3, after_save="exit 7")
    said = capsys.readouterr().err
    assert "--after_save: the command for step 3 ended with exit status 7: the run goes on" in said
    assert (output / "config.json").exists()


def test_auto_resume_starts_goes_on_and_ends(
    tiny_llama_dir, run_stage, stop_after, monkeypatch, capsys
):
    expected = run_stage("contrastive", tiny_llama_dir, "straight")
    stop_after(3)
    with pytest.raises(TrainingStopped):
        run_stage("contrastive", tiny_llama_dir, "out", auto_resume=True)
    monkeypatch.undo()
    output = run_stage("contrastive", tiny_llama_dir, "out", auto_resume=True)
    got, straight = (load_file(path / "model.safetensors") for path in (output, expected))
    assert all(torch.equal(got[name], straight[name]) for name in straight)
    run_stage("contrastive", tiny_llama_dir, "out", auto_resume=True)
    assert "this run is finished, nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"resume": "newest"}, {"overwrite_output_dir": True}])
def test_auto_resume_contradicts_what_decides_already(other):
    with pytest.raises(InputError, match="leave out --resume and --overwrite_output_dir"):
        TrainingConfig("out", auto_resume=True, **other)


def test_nan_leaves_the_weights_of_the_last_good_step_as_a_model(
    tiny_llama_dir, run_stage, monkeypatch, capsys
):
    straight = run_stage("contrastive", tiny_llama_dir, "straight", save_steps=1)
    good = load_file(straight / "checkpoints/step-00000005/weights.safetensors")
    compute, calls = contrastive.info_nce_loss_and_grads, []

    def loss(*args, **kwargs):
        calls.append(0)
        value, *others = compute(*args, **kwargs)
        return value * (math.nan if len(calls) == 11 else 1), *others  # two batches a step

    monkeypatch.setattr(contrastive, "info_nce_loss_and_grads", loss)
    with pytest.raises(FloatingPointError, match="step 6"):
        run_stage("contrastive", tiny_llama_dir, "out")
    output = straight.parent / "out"
    assert f"the weights before that step are in {output / 'last-good'}" in capsys.readouterr().err
    saved = load_file(output / "last-good/model.safetensors")
    by_end = {name.removeprefix("backbone."): tensor for name, tensor in good.items()}
    assert saved.keys() <= by_end.keys()
    assert all(torch.equal(saved[name], by_end[name]) for name in saved)
    AutoModel.from_pretrained(output / "last-good")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_deleted_checkpoint_is_not_held_open_after_a_resume(
    tiny_llama_dir, run_stage, stop_after, monkeypatch
):
    stop_after(3)
    with pytest.raises(TrainingStopped):
        run_stage("contrastive", tiny_llama_dir, "out")
    monkeypatch.undo()
    held: list[str] = []
    original = contrastive.train

    def train(run, *args, **kwargs):
        result = original(run, *args, **kwargs)
        held.extend(line for line in Path("/proc/self/maps").read_text().splitlines()
                    if "step-00000003" in line)  # fmt: skip
        files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        held.extend(os.readlink(file) for file in files if os.path.lexists(file)
                    and "step-00000003" in os.readlink(file))  # fmt: skip
        return result

    monkeypatch.setattr(contrastive, "train", train)
    output = run_stage("contrastive", tiny_llama_dir, "out", resume="newest", save_steps=1,
                       save_total_limit=1)  # fmt: skip
    assert not (output / "checkpoints/step-00000003").exists()
    assert held == []
