"""Replay adds stage 1's loss to stage 2's, with rows, random streams and names of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rankpo_fast.config import (
    ComputeConfig,
    ModelConfig,
    RankPOLossConfig,
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import PreferenceData
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ranks import ALONE
from rankpo_fast.train.contrastive import ContrastiveTask
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import make_optimizer
from rankpo_fast.train.prefetch import pack_step
from rankpo_fast.train.rankpo import RankPOTask
from rankpo_fast.train.replay import replay_batches, replay_task
from rankpo_fast.train.step import train_step
from rankpo_fast.train.task import LossOutput

TRAINING = TrainingConfig("unused", per_device_train_batch_size=4)
MEMORY = Memory(max_tokens=200, room=0.0, graph_bytes=1.0)


@pytest.fixture
def tasks(tiny_llama_dir, preference_file, contrastive_file, tmp_path):
    """The encoder, stage 2's task on batches of 4 pairs, and the replay's on 6 rows."""
    compute = ComputeConfig("cpu", cache_dir=str(tmp_path / "cache"))
    config = ModelConfig(str(tiny_llama_dir), bf16=False, gradient_checkpointing=False)
    encoder = load_encoder(config, device=torch.device("cpu")).train()
    pairs = PreferenceData(read_preferences([preference_file]), batch_size=4, seed=TRAINING.seed)
    texts = Texts.tokenize(encoder, pairs.query_texts, pairs.passage_texts, compute)
    replay = ReplayConfig([contrastive_file], replay_weight=0.3, replay_batch_size=6)
    return (
        encoder,
        RankPOTask(pairs, texts, RankPOLossConfig(), None),
        replay_task(replay, replay_batches(replay, TRAINING, processes=1), encoder, compute),
    )


def test_the_gradient_is_the_weighted_sum_of_both(tasks, monkeypatch):
    """Each computed apart, over two batches of a step."""
    encoder, preferences, replay = tasks

    def gradients(*tasks):
        def keep(optimizer, losses, rate, max_norm):
            seen.update({n: p.grad.clone() for n, p in encoder.named_parameters()})
            optimizer.zero_grad()
            return torch.zeros(())

        seen = {}
        monkeypatch.setattr("rankpo_fast.train.optim.Optimizer.update", keep)
        steps = iter([pack_step(tasks, encoder, ALONE, range(2, 4), MEMORY.max_tokens)])
        train_step(encoder, steps, make_optimizer(encoder, TRAINING), 1e-3, 0, MEMORY, ALONE)
        return seen

    both, first, second = (
        gradients(*parts)
        for parts in ((preferences, replay), (preferences,), (replace(replay, weight=1.0),))
    )
    assert all(part.norm() > 0 for part in second.values())
    for name, gradient in both.items():
        expected = first[name] + 0.3 * second[name]
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), name


def test_its_rows_have_epochs_and_orders_of_their_own(tasks):
    """Both files have 24 rows and the run one seed: that gives 6 batches of pairs, 4 of replay."""
    encoder, *both = tasks
    packed = pack_step(both, encoder, ALONE, range(8), MEMORY.max_tokens)
    pairs, replayed = (torch.cat([p.own.rows for p in part]) for part in (packed[:8], packed[8:]))
    orders = [pairs[:24], replayed[:24], replayed[24:]]
    assert all(torch.equal(order.sort().values, torch.arange(24)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_it_is_stage_1s_loss_that_is_added(
    tiny_llama_dir, run_stage, read_metrics, contrastive_file, capsys
):
    """With all rows in a batch, two runs without replay say what the parts are."""
    whole = {"max_steps": 1, "per_device_train_batch_size": 24, "gradient_accumulation_steps": 1}
    [alone] = read_metrics(run_stage("rankpo", tiny_llama_dir, "alone", **whole))
    flags = {"num_negatives": 30, "temperature": 0.05}
    [stage1] = read_metrics(run_stage("contrastive", tiny_llama_dir, "stage1", **whole, **flags))
    flags = {"replay_weight": 0.25, "replay_num_negatives": 30, "replay_temperature": 0.05}
    replayed = {"replay_data": [contrastive_file], **flags}
    capsys.readouterr()
    [both] = read_metrics(run_stage("rankpo", tiny_llama_dir, "both", **whole, **replayed))
    assert both["loss"] == pytest.approx(alone["loss"] + 0.25 * stage1["loss"], rel=1e-5)
    for name in ("loss", "accuracy", "positive_similarity", "hardest_negative_similarity"):
        assert both[f"replay/{name}"] == pytest.approx(stage1[name], rel=1e-5), name
    assert both.keys() - alone.keys() == {n for n in both if n.startswith("replay/")}
    said = capsys.readouterr().err
    assert "0.25 * InfoNCE, temperature 0.05, 24 at a time of 24 rows, 24 of them have" in said
    assert "replay/texts 24 queries" in said


# Of 24 rows each: an epoch is 6 batches of pairs and 3 of the replay. A step takes two of each.
REPLAY = {"replay_batch_size": 7, "replay_num_negatives": 2}


def test_resumed_run_gives_the_same_weights_bit_by_bit(
    tiny_bert_dir, goes_on_bit_by_bit, contrastive_file
):
    """It stops after 8 batches, in the middle of an epoch of either, with dropout on."""
    goes_on_bit_by_bit(
        "rankpo", tiny_bert_dir, ("loss", "replay/loss", "replay/accuracy"), stop=4, max_steps=7,
        replay_data=[contrastive_file], **REPLAY,
    )  # fmt: skip


def test_what_is_replayed_may_move_but_not_change(
    tiny_llama_dir, run_stage, stop_after, contrastive_file, tmp_path, monkeypatch
):
    stop_after(2)
    with pytest.raises(TrainingStopped):
        run_stage("rankpo", tiny_llama_dir, "out", replay_data=[contrastive_file], **REPLAY)
    monkeypatch.undo()
    moved = tmp_path / "moved.jsonl"
    rows = Path(contrastive_file).read_text()
    flags = {"resume": "newest", **REPLAY, "replay_data": [str(moved)]}
    moved.write_text(rows.split("\n", 1)[1])
    with pytest.raises(InputError, match="content of --replay_data differs: file 1 of 1"):
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    moved.write_text(rows)
    for changed, named in (
        ({"replay_weight": 0.7}, "--replay_weight was 0.1, is 0.7"),
        (dict.fromkeys(REPLAY, 5), "--replay_batch_size was 7, is 5"),
    ):
        with pytest.raises(InputError, match=named):
            run_stage("rankpo", tiny_llama_dir, "out", **{**flags, **changed})
    assert (run_stage("rankpo", tiny_llama_dir, "out", **flags) / "config.json").exists()


@pytest.mark.parametrize("whose", ["replay", "stage 2", "gradient"])
def test_nan_names_the_rows_of_the_guilty(
    whose, tiny_llama_dir, run_stage, contrastive_file, monkeypatch
):
    guilty = {"replay": ContrastiveTask, "stage 2": RankPOTask, "gradient": ContrastiveTask}
    original = guilty[whose].loss

    def loss(task, queries, passages, batch):
        value, d_queries, d_passages, metrics, *_ = original(task, queries, passages, batch)
        if whose == "gradient":
            return LossOutput(value, d_queries * torch.nan, d_passages, metrics)
        return LossOutput(value * torch.nan, d_queries, d_passages, metrics)

    monkeypatch.setattr(guilty[whose], "loss", loss)
    with pytest.raises(FloatingPointError, match="step 1: ") as error:
        run_stage("rankpo", tiny_llama_dir, "out", replay_data=[contrastive_file], **REPLAY)
    _, *named = str(error.value).split(". Rows of ")
    counts = {flag.split()[0]: flag.count(",") for flag in named}
    # Two batches of 7 rows of the replay, two of 4 pairs; "in it, counted" has a comma of its own.
    expected = {"--train_data": 8, "--replay_data": 14}
    blamed = {"replay": {"--replay_data"}, "stage 2": {"--train_data"}, "gradient": set(expected)}
    assert counts == {flag: expected[flag] for flag in blamed[whose]}


@pytest.mark.parametrize(
    "row, named",
    [
        pytest.param(
            {"query": "a", "positives": ["b"], "negatives": []},
            "of --replay_data have no negative, .*: give --replay_batch_size 2 or more",
            id="alone-in-its-batch",
        ),
        pytest.param({"query": "a", "passage1": "b"}, "replay.jsonl:1: .*positives", id="stage-2"),
        pytest.param(
            {"query": "a " * 200, "positives": ["b"], "negatives": ["c"]},
            "--max_tokens_per_micro_batch is 60",
            id="longer-than-a-micro-batch",
        ),
    ],
)
def test_bad_rows_are_named_before_training(row, named, tiny_llama_dir, run_stage, tmp_path):
    path = tmp_path / "replay.jsonl"
    path.write_text(json.dumps(row) + "\n")
    flags = {"replay_data": [str(path)], "max_tokens_per_micro_batch": 60}
    with pytest.raises(InputError, match=named):
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    assert not (tmp_path / "out").exists()


def test_what_is_replayed_cannot_lie_in_the_output_directory(
    tiny_llama_dir, run_stage, contrastive_file, tmp_path
):
    output = run_stage("rankpo", tiny_llama_dir, "out", max_steps=1)
    inside = output / "rows.jsonl"
    inside.write_text(Path(contrastive_file).read_text())
    with pytest.raises(InputError, match="--replay_data .*rows.jsonl lies in --output_dir"):
        run_stage("rankpo", "no/such-model", "out", replay_data=[str(inside)],
                  overwrite_output_dir=True)  # fmt: skip
    assert inside.exists()
