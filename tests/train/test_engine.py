"""Whole or in parts, weights on several ranks are trained as in one process.

What ends one rank ends all, and the last checkpoint resumes.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.retrieval.evaluate import measure
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.engine import Engine, check_shard
from rankpo_fast.train.memory import HOST_TRIAL, Memory
from rankpo_fast.train.meters import Agreed, Host
from support import rank_runs
from support.rank_runs import arguments


@pytest.fixture
def ran(tmp_path):
    """How so many ranks ended that have called a function."""

    def run(ranks, function, *args, **options):
        directory = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
        return rank_runs.start(ranks, directory, function, *args, **options).ended()

    return run


@pytest.fixture
def flags(tmp_path, contrastive_file):
    def of(model, name, rows, **more):
        return {
            "model_name_or_path": str(model), "train_data": [contrastive_file],
            "stage": "contrastive", "output_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"), "per_device_train_batch_size": rows, **more,
        }  # fmt: skip

    return of


@pytest.mark.long
@pytest.mark.parametrize(
    "shard, ranks, model, more",
    [
        pytest.param("none", 4, "llama", {"lora": True}, id="none-lora"),
        pytest.param("grad", 2, "bert", {"gradient_checkpointing": True}, id="grad-checkpointed"),
        pytest.param("full", 4, "bert", {"gradient_checkpointing": True}, id="full-checkpointed"),
        pytest.param("full", 2, "llama", {"lora": True}, id="full-lora"),
    ],
)
def test_twenty_steps_end_at_the_weights_of_one_process(
    shard, ranks, model, more, ran, flags, request
):
    """In fp64, by AdamW, clipped; whatever weights the others had loaded."""
    directory = request.getfixturevalue(f"tiny_{model}_dir")
    more |= {"max_steps": 20, "max_tokens_per_micro_batch": 100, "disable_dropout": True,
             "learning_rate": 1e-3, "activation_memory_gb": 1e-4}  # fmt: skip
    one = rank_runs.weights(**flags(directory, "one", 12, **more))
    many = flags(directory, "many", 12 // ranks, shard=shard, **more)
    ended = ran(ranks, rank_runs.weights, **many)
    assert [rank.code for rank in ended] == [0] * ranks, ended
    ours = ended[0].answer
    assert ours.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(ours[name], one[name], rtol=1e-6, atol=1e-9)


@pytest.mark.long
def test_parts_are_gone_on_from_bit_by_bit_and_by_other_ranks_with_batches_as_large(
    ran, flags, tiny_bert_dir, tmp_path, run_stage, preference_file, read_metrics
):
    """With dropout on, evaluated on the way by all."""
    more = {"preference_data": [preference_file], "eval_steps": 3, "max_tokens_per_micro_batch": 90}
    of = flags(tiny_bert_dir, "straight", 4, shard="full", **more)
    assert [rank.code for rank in ran(3, rank_runs.train, **of)] == [0] * 3
    of = flags(tiny_bert_dir, "stopped", 4, shard="full", **more)
    assert [rank.code for rank in ran(3, rank_runs.train, stop=2, **of)] == [143] * 3
    [path] = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert len(list((path / "weights").glob("*.safetensors"))) == 3
    outputs = {}
    for name, ranks, shard in [("same", 3, "full"), ("fewer", 2, "grad"), ("whole", 4, "none")]:
        of = flags(tiny_bert_dir, name, 12 // ranks, shard=shard, resume=str(path), **more)
        ended = ran(ranks, rank_runs.train, **of)
        assert [rank.code for rank in ended] == [0] * ranks, ended
        assert ("processes was 3, is" in ended[0].said) == (ranks != 3)
        outputs[name] = load_file(tmp_path / name / "model.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run_stage("contrastive", tiny_bert_dir, "one", per_device_train_batch_size=12,
                  resume=str(path), **more)  # fmt: skip
    assert any("but not bit by bit" in str(warning.message) for warning in said)
    trained = Encoder.from_pretrained(tmp_path / "straight", device="cpu")
    figures = measure(trained, preferences=read_preferences([preference_file])).figures
    assert read_metrics(tmp_path / "straight")[-1]["eval/alignment"] == figures["alignment"]
    want = load_file(tmp_path / "straight" / "model.safetensors")
    assert all(torch.equal(want[name], outputs["same"][name]) for name in want)
    for name in ("fewer", "whole"):
        assert not all(torch.equal(want[key], outputs[name][key]) for key in want)
    of = flags(tiny_bert_dir, "seed", 4, shard="full", resume=str(path), seed=43, **more)
    ended = ran(3, rank_runs.train, **of)
    assert all(rank.code != 0 for rank in ended) and "--seed was 42, is 43" in ended[0].said


@pytest.mark.long
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_rank_that_is_killed_ends_the_others_and_the_last_checkpoint_resumes(
    shard, ran, flags, tiny_llama_dir, tmp_path
):
    more = {"save_steps": 1, "shard": shard, "max_steps": 4, "gradient_accumulation_steps": 1}
    of = flags(tiny_llama_dir, "out", 8, **more)
    *others, killed = ran(3, rank_runs.command_killed, *arguments(of))
    assert killed.code == -9
    for rank in others:
        assert rank.code == 1 and "another is gone" in rank.said and "Traceback" not in rank.said
    last = checkpoints.newest(tmp_path / "out" / "checkpoints")
    assert last.step in (1, 2)  # the second was being written
    ended = ran(3, rank_runs.command, *arguments(of), "--resume")
    assert [rank.code for rank in ended] == [0] * 3, ended


@pytest.mark.long
def test_out_of_memory_in_a_pass_of_all_ends_all_and_the_last_checkpoint_resumes(
    ran, flags, tiny_llama_dir, tmp_path
):
    more = {"save_steps": 1, "shard": "full", "max_steps": 4, "gradient_accumulation_steps": 1}
    of = flags(tiny_llama_dir, "out", 8, **more)
    *others, last = ran(3, rank_runs.command_out_of_memory_in_a_pass, *arguments(of))
    assert last.code == 2 and "out of memory on rank 2 in a pass" in last.said
    for rank in others:
        assert rank.code == 1 and "another is gone" in rank.said and "Traceback" not in rank.said
    assert checkpoints.newest(tmp_path / "out" / "checkpoints").step == 2


@pytest.mark.parametrize(
    "settings, ranks, lent, said",
    [
        ({"weights_dtype": "bf16"}, 2, False, "--weights_dtype bf16: .*give --shard full"),
        ({"shard": "full"}, 1, False, "--shard full is for several processes, and this is one"),
        ({"shard": "grad", "optim": "muon"}, 2, False, "goes with --optim adamw, not muon"),
        ({"shard": "full"}, 2, True, "give the model by its name"),
    ],
    ids=["bf16-weights", "one-process", "another-optimizer", "a-lent-encoder"],
)
def test_parts_are_refused_where_they_cannot_be(settings, ranks, lent, said):
    with pytest.raises(InputError, match=said):
        model = ModelConfig("x", weights_dtype=settings.pop("weights_dtype", "fp32"))
        training = TrainingConfig("out", **settings)
        check_shard(training, model, SimpleNamespace(size=ranks), lent=lent)


def test_memory_is_reckoned_for_the_rank_that_has_least_and_nothing_larger_is_tried(
    tiny_bert_dir, monkeypatch
):
    """Of a simulated card, which others have less of; too little for the longest text is said."""
    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu").train()
    table = encoder.tokenize_passages(["a nurse " * n for n in range(1, 100)])
    tried, others = [], [1.0]
    forward = Encoder.forward

    def noted(encoder, batch):
        tried.append(sum(batch.lengths))
        return forward(encoder, batch)

    monkeypatch.setattr(Encoder, "forward", noted)
    monkeypatch.setattr(Host, "free", lambda _: 100 * 2**20)
    monkeypatch.setattr("rankpo_fast.train.memory.most_workspace", lambda _: 0)
    worst = SimpleNamespace(highest=lambda numbers: [max(n, int(n * others[0])) for n in numbers])
    engine = Engine()
    engine.meter = lambda meter: Agreed(meter, worst)
    roomy = Memory.measure(encoder, table, 100_000, None, engine)
    others[0] = 0.5  # -free: half of it
    cramped = Memory.measure(encoder, table, 100_000, None, engine)
    assert max(tried) <= HOST_TRIAL < cramped.max_tokens < roomy.max_tokens < 100_000
    assert cramped.max_tokens == pytest.approx(roomy.max_tokens / 2, rel=0.1)
    others[0] = 1e-4
    with pytest.raises(InputError, match="alone in a micro-batch"):
        Memory.measure(encoder, table, None, None, engine)
