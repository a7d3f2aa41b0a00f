"""The loop's own arithmetic and refusals, the output directory, and what is logged."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.packing import pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import ALONE
from rankpo_fast.train import loop
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import learning_rate, make_optimizer
from rankpo_fast.train.prefetch import PackedBatch
from rankpo_fast.train.reporters import Reporters
from rankpo_fast.train.schedule import StepSchedule
from rankpo_fast.train.step import train_step
from rankpo_fast.train.task import LossOutput


def config(**flags):
    return TrainingConfig(**{"output_dir": "unused", **flags})


# --- steps and rates ---


DATA = SimpleNamespace(batch_size=8, batches_per_epoch=5)


def test_every_batch_of_every_epoch_is_used_once():
    schedule = StepSchedule.of(config(num_train_epochs=3, gradient_accumulation_steps=4), DATA)
    batches = [number for step in range(schedule.total_steps) for number in schedule.batches(step)]
    assert batches == list(range(15))
    assert schedule.total_steps == 4
    assert schedule.epochs(schedule.total_steps) == 3


def test_max_steps_overrides_epochs():
    schedule = StepSchedule.of(config(max_steps=7, gradient_accumulation_steps=2), DATA)
    assert schedule.total_steps == 7
    assert len(schedule.batches(6)) == 2


@pytest.mark.parametrize(
    "kind, halfway", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)], ids=lambda x: str(x)
)
def test_rate_rises_then_follows_its_course(kind, halfway):
    settings = config(learning_rate=2.0, lr_scheduler_type=kind, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, settings) for step in range(10)]
    assert rates[:2] == [1.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * halfway)
    assert all(rate > 0 for rate in rates)


def test_biases_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = make_optimizer(model, config(weight_decay=0.1)).param_groups
    decayed = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups}
    assert decayed == {0.1: [2], 0.0: [1, 1, 1]}


@pytest.mark.parametrize("max_norm, length", [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(max_norm, length):
    """Read off the moments, since the step scales gradients as it reads them."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(nn.ParameterList([weight]), config(adam_beta1=0.0))
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer.update([torch.zeros(())], 0.1, max_norm) == 5.0
    torch.testing.assert_close(optimizer.state_of(weight)["exp_avg"].norm(), torch.tensor(length))


# --- a loop over a toy ---


class Toy(nn.Module):
    """Vectors [S, 1] of texts of one token."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return self.weight.expand(len(batch.lengths), 1)


def toy_run(directory, loss, **flags):
    """Three steps; batch k has the rows from 4 k on. `loss` of the batch: its value and d / dx."""
    settings = config(**{"max_steps": 3, "logging_steps": 1, **flags})

    def batch_loss(queries, passages, batch):
        value, slope, metrics = loss(batch)
        return LossOutput(value, slope * torch.ones(1, 1), torch.zeros(1, 1), metrics)

    def packed(number):
        rows = torch.arange(4) + 4 * number
        batch = SimpleNamespace(rows=rows, index=number)
        group = pack(TokenTable(torch.ones(1, dtype=torch.int32), torch.tensor([0, 1]), 0), ZERO)
        task = SimpleNamespace(loss=batch_loss, prefix="", flag="--train_data")
        places = ZERO, ZERO, ZERO
        return PackedBatch(
            task, 1 / per_step, batch, [group], *places, [1], tuple(rows.tolist()), 1.0, 1.0, 1
        )

    model, per_step = Toy(), settings.gradient_accumulation_steps
    optimizer, memory = make_optimizer(model, settings), Memory(1, 0.0, 0.0)
    steps = iter([[packed(per_step * s + i) for i in range(per_step)] for s in range(3)])
    with MetricsLog(directory, settings, Reporters([], None), 0, 3) as log:
        for step in range(3):
            log.step(step + 1, 0.0, train_step(model, steps, optimizer, 0.1, 1.0, memory, ALONE))


ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step later"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_weights_are_untouched_by_what_is_not_finite(tmp_path, monkeypatch, where, late):
    models = []
    made = Toy.__init__
    monkeypatch.setattr(Toy, "__init__", lambda self: (made(self), models.append(self))[0])
    if late:  # as on a GPU, where the next step is under way by then
        arrived = SimpleNamespace(synchronize=lambda: None)
        monkeypatch.setattr("rankpo_fast.train.step._to_host", lambda x: (x.clone(), arrived))
    seen = []

    def loss(batch):
        seen.append(models[0].weight.detach().clone())
        bad = torch.tensor(math.nan if batch.index == 5 else 1.0)
        value, slope = (bad, torch.ones(())) if where == "loss" else (torch.ones(()), bad)
        return value, slope, {}

    with pytest.raises(FloatingPointError, match="step 2: ") as error:
        toy_run(tmp_path, loss, gradient_accumulation_steps=4)
    rows = str(error.value).partition("from 1: ")[2].split(", ")
    assert rows == [str(i) for i in (range(21, 25) if where == "loss" else range(17, 33))]
    assert torch.equal(models[0].weight, seen[4])
    assert not torch.equal(seen[4], seen[0])


def test_metrics_are_means_over_steps_and_batches(tmp_path):
    def loss(batch):
        number = torch.tensor(float(batch.index))
        return number, torch.ones(()), {"number": number}

    toy_run(tmp_path, loss, logging_steps=2, gradient_accumulation_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert [line["number"] for line in lines] == [3.5, 9.5]
    assert [line["loss"] for line in lines] == [3.5, 9.5]


def test_without_a_terminal_there_are_lines_and_no_bar(tmp_path, capsys):
    """The first step, every logging step, the last; a loss of several steps says so."""
    toy_run(tmp_path, lambda batch: (torch.tensor(float(batch.index)), torch.ones(()), {}),
            logging_steps=2, gradient_accumulation_steps=1)  # fmt: skip
    said = capsys.readouterr().err
    assert "\r" not in said and "|" not in said
    losses = re.findall(r"step (\d) of 3: loss (\S+?)( \(mean of \d steps\))?,", said)
    assert losses == [("1", "0.0000", ""), ("2", "0.5000", " (mean of 2 steps)"),
                      ("3", "2.0000", "")]  # fmt: skip
    for line in said.splitlines():
        assert re.search(r"rate \S+e-\d+, [\d,]+ tok/s, [\d.]+ GiB, \d:\d\d:\d\d left$", line), line


def test_on_a_terminal_there_is_a_bar_with_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rankpo_fast.train.log.on_terminal", lambda: True)
    toy_run(tmp_path, lambda batch: (torch.ones(()), torch.ones(()), {}))
    said = capsys.readouterr().err
    assert "3/3 steps" in said and "left, loss 1.0000" in said and "step 1 of" not in said


# --- the output directory ---


def test_foreign_directory_is_refused_before_the_model_loads(run_stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for flags in ({}, {"overwrite_output_dir": True}, {"resume": "newest"}):
        with pytest.raises(InputError, match="holds something else .thesis.tex."):
            run_stage("contrastive", "no/such-model", "out", **flags)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_record_of_another_program_makes_no_directory_ours(run_stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text('{"epochs": 3}')
    with pytest.raises(InputError, match="holds something else"):
        run_stage("contrastive", "no/such-model", "out", overwrite_output_dir=True)


def test_finished_run_is_replaced_only_when_asked(tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out", save_steps=2)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds a finished run"):
        run_stage("contrastive", "no/such-model", "out")
    assert (output / "2_Normalize").is_dir()  # a module without files
    run_stage("rankpo", tiny_llama_dir, "out", max_steps=1, overwrite_output_dir=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "checkpoints").exists()
    assert json.loads((output / "training.json").read_text())["stage"] == "rankpo"


def test_output_directory_cannot_be_the_model_it_starts_from(tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out")
    with pytest.raises(InputError, match="--model_name_or_path .* lies in --output_dir"):
        run_stage("rankpo", output, "out", overwrite_output_dir=True)


def test_nothing_that_is_read_or_kept_lies_in_the_output_directory(
    tiny_llama_dir, run_stage, contrastive_file
):
    output = run_stage("contrastive", tiny_llama_dir, "out")
    inside = output / "tensorboard" / "rows.jsonl"
    inside.parent.mkdir()
    inside.write_text(Path(contrastive_file).read_text())
    for name, value in {"train_data": [str(inside)], "cache_dir": str(output / "cache")}.items():
        with pytest.raises(InputError, match=f"--{name} .* lies in --output_dir"):
            run_stage("contrastive", "no/such-model", "out", overwrite_output_dir=True,
                      **{name: value})  # fmt: skip
    assert inside.exists()


@pytest.mark.long
def test_earlier_run_is_replaced_only_when_memory_suffices(tiny_llama_dir, run_stage, monkeypatch):
    output = run_stage("contrastive", tiny_llama_dir, "out")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    monkeypatch.setattr("rankpo_fast.train.memory._try", lambda *args: None)
    with pytest.raises(InputError, match="out of memory"):
        run_stage("contrastive", tiny_llama_dir, "out", overwrite_output_dir=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_record_without_model_files_is_tolerated(tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out", max_steps=1)
    record = json.loads((output / "training.json").read_text())
    del record["model_files"]
    (output / "training.json").write_text(json.dumps(record))
    run_stage("contrastive", tiny_llama_dir, "out", max_steps=1, overwrite_output_dir=True)


@pytest.mark.parametrize(
    "damage", [b'{"program": "rankpo-fa', b'{"program": "rankpo-fast", "model_files": [5]}']
)
def test_a_damaged_record_is_named(damage, tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out", max_steps=1)
    (output / "training.json").write_bytes(damage)
    with pytest.raises(InputError, match="or a run whose training.json is damaged"):
        run_stage("contrastive", tiny_llama_dir, "out", overwrite_output_dir=True)


def test_crash_while_saving_leaves_no_half_model(tiny_llama_dir, run_stage, monkeypatch, tmp_path):
    save = Encoder.save

    def save_then_fail(self, directory):
        save(self, directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Encoder, "save", save_then_fail)
    with pytest.raises(OSError, match="No space left"):
        run_stage("contrastive", tiny_llama_dir, "out", save_steps=6)
    output = tmp_path / "out"
    names = sorted(path.name for path in output.iterdir())
    assert names == ["checkpoints", "metrics.jsonl", "training.json"]
    monkeypatch.undo()
    run_stage("contrastive", tiny_llama_dir, "out", save_steps=6, resume="newest")
    assert (output / "config.json").exists()


def test_crash_between_two_files_leaves_a_directory_that_is_no_model(
    tiny_llama_dir, run_stage, monkeypatch, tmp_path
):
    replace = os.replace

    def fail_at_tokenizer(source, target):
        if Path(target).name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("rankpo_fast.train.output.os.replace", fail_at_tokenizer)
    with pytest.raises(OSError, match="No space left"):
        run_stage("contrastive", tiny_llama_dir, "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(InputError, match="holds an unfinished"):
        run_stage("contrastive", tiny_llama_dir, "out")


def test_model_that_cannot_be_loaded_leaves_nothing_behind(run_stage, tmp_path):
    with pytest.raises(InputError):
        run_stage("contrastive", tmp_path / "nothing-there", "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_need_torchrun(tiny_llama_dir, run_stage, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK, .* start with torchrun"):
        run_stage("contrastive", tiny_llama_dir, "out")


# --- evaluation and reports ---


def test_evaluation_is_logged_when_due_and_changes_nothing(
    tiny_bert_dir, run_stage, read_metrics, preference_file
):
    flags = {"max_steps": 5, "preference_data": [preference_file]}
    watched = run_stage("rankpo", tiny_bert_dir, "watched", eval_steps=2, **flags)
    alone = run_stage("rankpo", tiny_bert_dir, "alone", max_steps=5)
    lines = read_metrics(watched)
    assert [line["step"] for line in lines if "eval/alignment" in line] == [2, 4, 5]
    losses = [
        [line["loss"] for line in read_metrics(o) if "loss" in line] for o in (watched, alone)
    ]
    assert losses[0] == losses[1]


def test_model_is_saved_before_the_last_evaluation(
    tiny_llama_dir, run_stage, preference_file, monkeypatch, tmp_path
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankpo_fast.train.loop.measure", fail)
    with pytest.raises(OSError, match="No space left"):
        run_stage("rankpo", tiny_llama_dir, "out", max_steps=1, preference_data=[preference_file])
    assert (tmp_path / "out" / "config.json").exists()


def test_tensorboard_gets_the_metrics(tiny_llama_dir, run_stage):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    output = run_stage("contrastive", tiny_llama_dir, "out", report_to="tensorboard")
    events = event_accumulator.EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_what_is_going_to_happen_is_said(tiny_llama_dir, run_stage, capsys):
    run_stage("contrastive", tiny_llama_dir, "out", max_passage_length=12, num_negatives=40)
    said = capsys.readouterr().err
    for part in ("24 of them have fewer than 40 negatives", "24 were truncated", "6 of 2 x 4 rows",
                 "InfoNCE, temperature 0.02", "cpu", "fp32", "batch of 4 rows; --gradient_accumul",
                 "_steps 2 adds none", "every 10 minutes and at the end of"):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("asked", [True, False])
def test_sums_are_in_one_order_while_a_run_lasts_that_asks_for_it(
    asked, tiny_llama_dir, run_stage, monkeypatch
):
    """What torch then does on a GPU is seen in test_cuda.py."""
    seen, step = [], loop.train_step

    def noted(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*args)

    monkeypatch.setattr(loop, "train_step", noted)
    run_stage("contrastive", tiny_llama_dir, "out", max_steps=2, deterministic=asked)
    assert seen == [asked] * 2 and not torch.are_deterministic_algorithms_enabled()


def test_a_batch_that_holds_all_rows_is_said(tiny_llama_dir, run_stage, capsys):
    flags = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 1}
    for stage in ("contrastive", "rankpo"):
        run_stage(stage, tiny_llama_dir, stage, **flags)
        said = capsys.readouterr().err
        assert "1 of 1 x 24 rows (all there are, of 32 that a batch may have)" in said
        assert "accumulation" not in said


def test_defaults_are_one_batch_of_all_queries_of_a_step():
    defaults = config()
    assert defaults.per_device_train_batch_size == 32
    assert defaults.gradient_accumulation_steps == 1


def test_text_that_fits_no_micro_batch_is_named_before_training(
    tiny_llama_dir, run_stage, tmp_path
):
    with pytest.raises(InputError, match="--max_tokens_per_micro_batch"):
        run_stage("contrastive", tiny_llama_dir, "out", max_tokens_per_micro_batch=8)
    assert not (tmp_path / "out").exists()


def test_evaluation_text_that_fits_no_micro_batch_is_named_before_training(
    tiny_llama_dir, run_stage, tmp_path
):
    row = {"query": "a nurse", "passage1": "nurse " * 60, "passage2": "cook", "preferred": "A"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    flags = {"preference_data": [str(tmp_path / "long.jsonl")], "max_tokens_per_micro_batch": 50}
    with pytest.raises(InputError, match="--max_tokens_per_micro_batch"):
        run_stage("contrastive", tiny_llama_dir, "out", **flags)
    assert not (tmp_path / "out").exists()


def test_limits_without_room_for_text_and_reference_models_are_named_by_their_flags(
    tiny_llama_dir, run_stage
):
    with pytest.raises(InputError, match="--max_passage_length: .* 1 tokens leaves no room"):
        run_stage("contrastive", tiny_llama_dir, "out", max_passage_length=1)
    other = {"reference_free": False, "reference_model_name_or_path": "/nope"}
    with pytest.raises(InputError, match="--reference_model_name_or_path /nope"):
        run_stage("rankpo", tiny_llama_dir, "out", **other)
