"""What holds stage 2 to the model it starts from: rankings of a batch, and weights."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import (
    ComputeConfig,
    ModelConfig,
    RankPOLossConfig,
    ReplayConfig,
    RetentionConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import PreferenceData
from rankpo_fast.data.retained import RetainedData
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.in_batch_kl import in_batch_kl_definition
from rankpo_fast.ranks import ALONE
from rankpo_fast.train import retention as retained
from rankpo_fast.train.elastic import Elastic
from rankpo_fast.train.engine import ALONE as ALONE_ENGINE
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import make_optimizer
from rankpo_fast.train.prefetch import pack_step
from rankpo_fast.train.rankpo import RankPOTask
from rankpo_fast.train.replay import replay_batches, replay_task
from rankpo_fast.train.retention import RetainedTask, reference_vectors
from rankpo_fast.train.step import add_gradients, train_step
from support import rank_runs

TRAINING = TrainingConfig("unused", per_device_train_batch_size=4)
MEMORY = Memory(max_tokens=200, room=0.0, graph_bytes=1.0)
CPU = torch.device("cpu")


@pytest.fixture
def compute(tmp_path):
    return ComputeConfig("cpu", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def encoder(tiny_llama_dir):
    config = ModelConfig(str(tiny_llama_dir), bf16=False, gradient_checkpointing=False)
    return load_encoder(config, device=CPU).train()


@pytest.fixture
def pairs(encoder, preference_file, compute):
    """Stage 2's task on batches of 4 pairs."""
    rows = read_preferences([preference_file], use_confidence=True)
    data = PreferenceData(rows, batch_size=4, seed=TRAINING.seed)
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    return RankPOTask(data, texts, RankPOLossConfig(), None)


# --- rankings ---


def test_a_step_is_the_tasks_loss_and_the_weighted_divergence(pairs):
    """On vectors laid out by hand, of a task that is weighted itself."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": len(pairs.data.query_texts), "passage": len(pairs.data.passage_texts)}
    own = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in sizes.values()]
    frozen = [torch.randn(n, 5, generator=generator).half() for n in sizes.values()]
    config = RetentionConfig(retention_weight=0.6, retention_temperature=0.1)
    held = RetainedTask.of(replace(pairs, weight=0.25), config, tuple(frozen))
    batch = held.data.batch(0, 1)
    q, p = own[0][batch.query_texts], own[1][batch.passage_texts]
    got = held.loss(q, p, batch)
    plain = pairs.loss(q, p, batch.batch)
    inner, rows = batch.batch, batch.batch.query_rows
    leaves = q.clone().requires_grad_(), p.clone().requires_grad_()
    kl_B = in_batch_kl_definition(
        leaves[0][rows], leaves[1], frozen[0][batch.query_texts][rows].double(),
        frozen[1][batch.passage_texts].double(), 0.1,
    )  # fmt: skip
    kl = (kl_B * inner.weights.double()).sum() / inner.weights.double().sum()
    dq, dp = torch.autograd.grad(kl, leaves)
    assert held.weight * got.loss.item() == pytest.approx(
        0.25 * plain.loss.item() + 0.6 * kl.item()
    )
    torch.testing.assert_close(0.25 * got.d_queries, 0.25 * plain.d_queries + 0.6 * dq)
    torch.testing.assert_close(0.25 * got.d_passages, 0.25 * plain.d_passages + 0.6 * dp)
    assert got.own_loss == plain.loss
    assert got.metrics["retention_kl"].item() == pytest.approx(kl_B.mean().item())


def test_parts_of_a_batch_add_up_to_it(pairs):
    """Ranks share its rows out by weight."""
    generator = torch.Generator().manual_seed(0)
    own, frozen = (
        [
            torch.randn(len(texts), 6, generator=generator, dtype=torch.float64)
            for texts in (pairs.data.query_texts, pairs.data.passage_texts)
        ]
        for _ in range(2)
    )
    held = RetainedTask.of(pairs, RetentionConfig(retention_weight=2.0), tuple(frozen))
    batch = held.data.batch(0, 0)
    q, p = own[0][batch.query_texts], own[1][batch.passage_texts]
    whole = held.loss(q, p, batch)
    parts = [batch.part(rows) for rows in (slice(0, 0), slice(0, 1), slice(1, 4))]
    losses = [held.loss(q, p, part) for part in parts]
    shares = [part.weight / batch.weight for part in parts]
    for name in ("loss", "d_queries", "d_passages"):
        together = sum(s * getattr(x, name) for s, x in zip(shares, losses, strict=True))
        torch.testing.assert_close(together, getattr(whole, name))


def mapped_file(tensor):
    """The name of the file whose pages a tensor is, by what the system says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return name
    raise AssertionError("no such memory")


def test_the_reference_is_computed_once_and_then_lies_in_the_cache(
    encoder, pairs, compute, monkeypatch
):
    first = reference_vectors(encoder, pairs.texts, pairs.data, compute)
    monkeypatch.setattr(retained, "encode_texts", None)
    again = reference_vectors(encoder, pairs.texts, pairs.data, compute)
    monkeypatch.undo()
    vectors = encode_texts(encoder, pairs.texts.table)
    rows = pairs.texts.query_rows, pairs.texts.passage_rows
    for one, other, own in zip(first, again, rows, strict=True):
        assert one.dtype == torch.float16 and torch.equal(one, other)
        torch.testing.assert_close(one.float(), vectors[own], atol=1e-3, rtol=1e-3)
    assert all("retained-" in mapped_file(tensor) for tensor in (*first, *again))
    with torch.no_grad():
        encoder.backbone.embed_tokens.weight[5:].mul_(1.1)
    changed = reference_vectors(encoder, pairs.texts, pairs.data, compute)
    assert not torch.equal(changed[1], first[1])


def runs_apart(run_stage, read_metrics, model, **flags):
    """Means of the last two steps of 12, without and with what `flags` say."""
    usual = {"max_steps": 12, "learning_rate": 3e-3, "warmup_ratio": 0.0}
    free, held = (
        read_metrics(run_stage("rankpo", model, name, **usual, **more))
        for name, more in (("free", {"retention_weight": 1e-9}), ("held", flags))
    )
    return [
        {name: (lines[-2][name] + lines[-1][name]) / 2 for name in lines[-1]}
        for lines in (free, held)
    ]


def test_rankings_stay_nearer_to_the_references(tiny_llama_dir, run_stage, read_metrics, capsys):
    """Of the same run with a weight of next to nothing; at the start both are the same."""
    free, held = runs_apart(run_stage, read_metrics, tiny_llama_dir, retention_weight=3.0)
    assert held["retention_kl"] < 0.5 * free["retention_kl"]
    assert min(line["rewards/accuracies"] for line in (free, held)) > 0.5
    assert "3 * KL from the ranking by the model as it starts" in capsys.readouterr().err


def test_at_the_first_step_there_is_nothing_to_pull(
    tiny_llama_dir, run_stage, read_metrics, contrastive_file
):
    flags = {"retention_weight": 5.0, "replay_data": [contrastive_file], "max_steps": 1}
    [line] = read_metrics(run_stage("rankpo", tiny_llama_dir, "out", **flags))
    assert abs(line["replay/retention_kl"]) < 1e-4  # by fp16's rounding, over 0.02
    flags |= {"reference_free": False, "retention_rows": "stage2", "retention_temperature": 0.1}
    [line] = read_metrics(run_stage("rankpo", tiny_llama_dir, "more", **flags))
    assert abs(line["retention_kl"]) < 1e-5 and line["retention_top1_kept"] > 0.9
    assert "replay/retention_kl" not in line


def test_the_reference_may_be_another_model(
    tiny_llama_dir, tiny_bert_dir, run_stage, read_metrics, preference_file
):
    flags = {"retention_weight": 1.0, "max_steps": 1, "reference_free": False}
    other = run_stage("contrastive", tiny_llama_dir, "other", learning_rate=1e-2)
    flags["reference_model_name_or_path"] = str(other)
    [line] = read_metrics(run_stage("rankpo", tiny_llama_dir, "out", **flags))
    assert line["retention_kl"] > 1e-3


RESUMED = {
    "rankings": {"retention_weight": 0.5},
    "weights": {"elastic_weight": 0.1},
    "fisher": {"elastic_weight": 0.1, "elastic_fisher_batches": 2, "retention_weight": 0.5},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_gives_the_same_weights_bit_by_bit(
    name, tiny_bert_dir, goes_on_bit_by_bit, contrastive_file
):
    """It stops within an epoch, with dropout on; what holds it is of the start, not of there."""
    flags = {**RESUMED[name], "max_steps": 5}
    if name == "fisher":
        flags |= {"replay_data": [contrastive_file], "replay_batch_size": 5}
    refused = (
        ({"retention_weight": 0.7}, "--retention_weight was"),
        ({"elastic_weight": 0.3}, "--elastic_weight was"),
    )
    goes_on_bit_by_bit("rankpo", tiny_bert_dir, ("loss", "grad_norm"), refused=refused, **flags)


# --- weights ---


def moved(encoder, amount=0.01):
    """The encoder, each weight a little elsewhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return encoder


def gradients_of_a_step(tasks, encoder, monkeypatch, pull=None):
    def keep(optimizer, losses, rate, max_norm):
        seen.update(
            {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        )
        optimizer.zero_grad()
        return torch.zeros(())

    seen = {}
    monkeypatch.setattr("rankpo_fast.train.optim.Optimizer.update", keep)
    steps = iter([pack_step(tasks, encoder, ALONE, range(2), MEMORY.max_tokens)])
    optimizer = make_optimizer(encoder, TRAINING)
    metrics = train_step(encoder, steps, optimizer, 1e-3, 0, MEMORY, ALONE, pull=pull)
    return seen, metrics


def test_the_pull_is_the_weighted_distance_from_the_start(pairs, encoder, monkeypatch):
    starts = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    elastic = Elastic(encoder, RetentionConfig(elastic_weight=0.3))
    moved(encoder)
    plain, _ = gradients_of_a_step([pairs], encoder, monkeypatch)
    held, metrics = gradients_of_a_step([pairs], encoder, monkeypatch, elastic.pull)
    away = {n: p.detach() - starts[n] for n, p in encoder.named_parameters()}
    for name, gradient in held.items():
        torch.testing.assert_close(gradient, plain[name] + 0.3 * away[name])
    part = 0.15 * sum((away[name] ** 2).sum().item() for name in held)
    assert metrics.batch_metrics[0]["elastic"] == pytest.approx(part, rel=1e-5)


def test_the_fisher_is_the_mean_of_squared_gradients_of_stage_1s_batches(
    encoder, compute, contrastive_file
):
    """Scaled to a mean of 1, without dropout, and the pull is by it."""
    replay = ReplayConfig([contrastive_file], replay_weight=0.3, replay_batch_size=6)
    task = replay_task(replay, replay_batches(replay, TRAINING, processes=1), encoder, compute)
    starts = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    optimizer, squares = make_optimizer(encoder, TRAINING), {}
    twin = copy.copy(encoder).eval()
    for number in range(3):
        batches = pack_step(
            [replace(task, weight=1.0)], twin, ALONE, range(number, number + 1), MEMORY.max_tokens
        )
        add_gradients(twin, batches, MEMORY, ALONE, ALONE_ENGINE)
        for name, parameter in twin.named_parameters():
            squares[name] = squares.get(name, 0) + parameter.grad**2
        optimizer.zero_grad()
    mean = sum(x.sum() for x in squares.values()) / sum(x.numel() for x in squares.values())
    encoder.train()
    config = RetentionConfig(elastic_weight=0.5, elastic_fisher_batches=3)
    elastic = Elastic(encoder, config)
    elastic.weigh(task, encoder, optimizer, MEMORY, ALONE, ALONE_ENGINE)
    assert encoder.training and all(p.grad is None for p in encoder.parameters())
    moved(encoder)
    for parameter in encoder.backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    value, expected = elastic.pull(), 0.0
    for name, parameter in encoder.named_parameters():
        f, away = squares[name] / mean, parameter.detach() - starts[name]
        torch.testing.assert_close(parameter.grad, 0.5 * f * away)
        expected += 0.25 * (f * away**2).sum().item()
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_weights_stay_nearer_to_the_start(tiny_llama_dir, run_stage):
    start = load_file(tiny_llama_dir / "model.safetensors")
    usual = {"max_steps": 12, "learning_rate": 3e-3, "warmup_ratio": 0.0}

    def distance(name, **flags):
        path = run_stage("rankpo", tiny_llama_dir, name, **usual, **flags)
        found = load_file(path / "model.safetensors")
        return sum(((found[n] - start[n]) ** 2).sum() for n in start).sqrt()

    assert distance("held", elastic_weight=10.0) < 0.5 * distance("free")


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"retention_temperature": 0.1}, "--retention_temperature needs --retention_weight above"),
        ({"retention_rows": "stage2"}, "--retention_rows needs --retention_weight above 0"),
        ({"retention_weight": 1.0, "retention_rows": "replay"}, "replay needs --replay_data"),
        ({"elastic_fisher_batches": 2}, "needs --elastic_weight above 0"),
        ({"elastic_weight": 1.0, "elastic_fisher_batches": 2}, "batches needs --replay_data"),
        ({"elastic_weight": 1.0, "lora_rank": 2}, "--elastic_weight and --lora_rank do not go"),
        ({"elastic_weight": -1.0}, "--elastic_weight must be >= 0"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_means_nothing_is_refused(flags, named, tiny_llama_dir, run_stage, tmp_path):
    with pytest.raises(InputError, match=named):
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    assert not (tmp_path / "out").exists()


def test_data_that_is_handed_to_other_ranks_has_no_texts(pairs):
    vectors = [torch.zeros(len(x), 2) for x in (pairs.data.query_texts, pairs.data.passage_texts)]
    data = RetainedData(pairs.data, *vectors)
    bare = data.without_texts()
    assert bare.query_texts == [] and data.query_texts != []
    assert torch.equal(bare.batch(0, 0).rows, data.batch(0, 0).rows)


@pytest.mark.long
@pytest.mark.parametrize("more, bound", [
    pytest.param({"retention_weight": 0.5, "use_confidence": True}, 1e-9, id="rankings"),
    # By gradients without dropout, of which vectors are rounded to fp32.
    pytest.param(
        {"elastic_weight": 0.5, "elastic_fisher_batches": 2, "replay": True}, 1e-6, id="fisher"
    ),
])  # fmt: skip
def test_ranks_take_the_steps_of_one_process(
    more, bound, tiny_llama_dir, preference_file, contrastive_file, tmp_path
):
    """Of three, so that neither rows nor texts come out even."""
    more = dict(more)
    of = {"stage": "rankpo", "model_name_or_path": str(tiny_llama_dir), "max_steps": 3,
          "train_data": [preference_file], "cache_dir": str(tmp_path / "cache"),
          "max_tokens_per_micro_batch": 100}  # fmt: skip
    size = {"per_device_train_batch_size": 3}
    if more.pop("replay", False):
        of["replay_data"] = [contrastive_file]
        size["replay_batch_size"] = 2
    of |= more
    started = rank_runs.start(
        3, tmp_path / "ranks", rank_runs.descend, output_dir=str(tmp_path / "many"), **of, **size
    )
    ended = started.ended()
    assert [rank.code for rank in ended] == [0] * 3, ended
    size = {name: 3 * rows for name, rows in size.items()}
    gradients, losses, _ = rank_runs.descend(output_dir=str(tmp_path / "one"), **of, **size)
    for rank in ended:
        ours, of_rank, _ = rank.answer
        torch.testing.assert_close(of_rank, losses, atol=bound, rtol=bound)
        for got, want in zip(ours, gradients, strict=True):
            off = torch.stack([(got[i] - want[i]).norm() for i in want]).norm()
            assert off < bound * torch.stack([x.norm() for x in want.values()]).norm()


@pytest.mark.long
@pytest.mark.parametrize("flags, named", [
    ({"elastic_weight": 1.0}, "--elastic_weight and --shard full"),
    ({"retention_weight": 1.0}, "--retention_weight and --shard full"),
])  # fmt: skip
def test_weights_in_parts_are_refused(flags, named, tiny_llama_dir, preference_file, tmp_path):
    of = {"stage": "rankpo", "model_name_or_path": str(tiny_llama_dir), "shard": "full",
          "train_data": [preference_file], "output_dir": str(tmp_path / "out")}  # fmt: skip
    ended = rank_runs.start(2, tmp_path / "ranks", rank_runs.descend, **of, **flags).ended()
    assert all(rank.code == 1 and named in rank.said for rank in ended)
