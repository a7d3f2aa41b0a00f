"""Ranks that train together take the steps of one process, and end together."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast import cli
from rankpo_fast.config import ComputeConfig
from rankpo_fast.errors import InputError
from rankpo_fast.ranks import deal, own_device
from rankpo_fast.train import checkpoint as checkpoints
from support import rank_runs
from support.rank_runs import arguments

RANKS = 3  # so that neither rows nor texts come out even


@pytest.fixture
def flags(tmp_path, contrastive_file, preference_file):
    """Of a stage, a model and an output directory."""
    files = {"contrastive": contrastive_file, "rankpo": preference_file}

    def of(stage, model, name, **more):
        return {
            "model_name_or_path": str(model), "train_data": [files[stage]], "stage": stage,
            "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), **more,
        }  # fmt: skip

    return of


@pytest.fixture
def ran(tmp_path):
    """How the ranks ended that have called a function."""

    def run(function, *args, **options):
        directory = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
        return rank_runs.start(RANKS, directory, function, *args, **options).ended()

    return run


@pytest.fixture
def answered(ran):
    """What the ranks returned."""

    def ask(function, **options):
        ended = ran(function, **options)
        assert [rank.code for rank in ended] == [0] * RANKS, ended
        return [rank.answer for rank in ended]

    return ask


def assert_same_steps(ours, one):
    """Gradients as a whole, and which parameters have any."""
    for got, want in zip(ours, one, strict=True):
        assert got.keys() == want.keys()
        off, size = (
            torch.stack([x.norm() for x in tensors]).norm()
            for tensors in ([got[i] - want[i] for i in want], want.values())
        )
        assert size > 0 and off < 1e-10 * size


RUNS = [
    pytest.param("contrastive", "llama", {}, id="contrastive"),
    pytest.param(
        "contrastive",
        "bert",  # which has a pooler that takes no part
        {"gradient_checkpointing": True, "disable_dropout": True, "activation_memory_gb": 0.0},
        id="checkpointed-and-computed-twice",
    ),
    pytest.param(
        "contrastive",
        "llama",
        {
            "directions": ["query_to_passage", "passage_to_query", "query_to_query"],
            "false_negative_margin": 0.3,
            "temperature_learning_rate": 0.1,
        },
        id="every-rank-the-whole-batch",
    ),
    pytest.param("contrastive", "llama", {"own_negatives": True}, id="own-negatives"),
    pytest.param("rankpo", "llama", {"reference_free": False}, id="rankpo-with-reference"),
    pytest.param("rankpo", "llama", {"use_confidence": True}, id="weighted-pairs"),
    pytest.param("contrastive", "llama", {"trim_vocabulary": True}, id="trimmed-vocabulary"),
]


@pytest.mark.long
@pytest.mark.parametrize("stage, model, more", [
    *RUNS,
    *(pytest.param(*run.values[:2], {**run.values[2], "shard": shard}, id=f"{run.id}-{shard}")
      for run in RUNS[1:3] for shard in ("grad", "full")),
])  # fmt: skip
def test_every_step_is_that_of_one_process_with_a_batch_as_large(
    stage, model, more, answered, flags, request, read_metrics, tmp_path
):
    """Of two batches each."""
    directory = request.getfixturevalue(f"tiny_{model}_dir")
    more = {"max_steps": 3, "max_tokens_per_micro_batch": 100, **more}
    of = flags(stage, directory, "ranks", per_device_train_batch_size=7, **more)
    answers = answered(rank_runs.descend, **of)
    shard = more.pop("shard", "none")
    of = flags(stage, directory, "one", per_device_train_batch_size=7 * RANKS, **more)
    gradients, losses, _ = rank_runs.descend(**of)
    for ours, our_losses, reductions in answers:
        assert_same_steps(ours, gradients)
        torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(losses))
        first, *later = reductions
        # One a step, though two batches are accumulated. Parts are not summed by it.
        assert later == ([first + 1, first + 2] if shard == "none" else [first, first])
    lines = [read_metrics(tmp_path / name) for name in ("ranks", "one")]
    unlike = {"tokens_per_second", "queries_per_second", "peak_memory_bytes"}
    for got, want in zip(*lines, strict=True):
        assert got.keys() == want.keys()
        for name in want.keys() - unlike:
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("shard", ["none", "full"])
def test_ranks_without_a_row_and_without_a_text_take_part(
    shard, answered, flags, tiny_llama_dir, tmp_path
):
    """One row of two texts for three ranks."""
    row = {"query": "a nurse", "positives": ["a nurse"], "negatives": ["a cook in Lyon"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    more = {"train_data": [str(tmp_path / "one.jsonl")], "max_steps": 2, "wide": False}
    of = flags("contrastive", tiny_llama_dir, "ranks", shard=shard, **more)
    answers = answered(rank_runs.descend, **of)
    gradients, *_ = rank_runs.descend(**flags("contrastive", tiny_llama_dir, "one", **more))
    for ours, *_ in answers:
        assert_same_steps(ours, gradients)


@pytest.mark.long
def test_two_stages_in_one_program(answered, flags, tiny_llama_dir, tmp_path, read_metrics):
    first = flags("contrastive", tiny_llama_dir, "1", max_steps=1)
    second = flags("rankpo", tmp_path / "1", "2", max_steps=1)
    answered(rank_runs.both, stages=[first, second])
    assert (tmp_path / "2" / "config.json").exists()


def test_an_error_of_the_first_is_one_of_all(answered, flags, tiny_llama_dir, tmp_path):
    """So that a program which catches it goes on together."""
    wrong = flags("contrastive", tiny_llama_dir, "out", train_data=[str(tmp_path / "no.jsonl")])
    answers = answered(rank_runs.refused, **wrong)
    assert len({said for said, _ in answers}) == 1 and "no.jsonl: cannot be read" in answers[0][0]
    assert [copied for _, copied in answers] == [False, True, True]


@pytest.mark.long
def test_all_stop_when_one_is_told_to_and_go_on_bit_by_bit(
    ran, answered, flags, tiny_bert_dir, tmp_path, preference_file, read_metrics, run_stage
):
    """With dropout on, which every rank draws for itself, and evaluations by the first."""
    more = {"per_device_train_batch_size": 2, "preference_data": [preference_file], "eval_steps": 3}
    answered(rank_runs.train, **flags("rankpo", tiny_bert_dir, "straight", **more))
    of = flags("rankpo", tiny_bert_dir, "stopped", **more)
    assert [rank.code for rank in ran(rank_runs.train, stop=2, **of)] == [143] * RANKS
    [checkpoint] = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert checkpoints.read(checkpoint).step == 2
    states = load_file(checkpoint / "random.safetensors")
    assert not torch.equal(states["0/torch"], states["1/torch"])
    with pytest.raises(InputError, match="processes was 3, is 1"):
        run_stage("rankpo", tiny_bert_dir, "stopped", resume="newest", **more)
    answered(rank_runs.train, resume="newest", **of)
    want, got = (
        load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(want[name], got[name]) for name in want)
    lines = [read_metrics(tmp_path / name) for name in ("straight", "stopped")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 3, 4, 5, 6, 6]
    for one, other in zip(*lines, strict=True):
        assert one.get("loss") == other.get("loss")
        assert one.get("eval/alignment") == other.get("eval/alignment")


@pytest.mark.long
def test_out_of_memory_on_one_all_do_the_step_again_and_resume_with_what_was_found(
    ran, answered, flags, tiny_bert_dir, tmp_path
):
    """With dropout on. Where no graph but the last is kept, each time all halve their tokens."""
    more = {"max_steps": 3, "activation_memory_gb": 0.0, "max_tokens_per_micro_batch": 400}
    of = flags("contrastive", tiny_bert_dir, "cramped", **more)
    ended = ran(rank_runs.train_out_of_memory, stop=2, **of)
    assert [rank.code for rank in ended] == [143] * RANKS, ended
    said = ended[0].said.partition("step 1: out of memory, done again with ")[2].splitlines()[0]
    notes = re.findall(r"at most (\d+) tokens in a micro-batch, not (\d+) \(rank (\d)\)", said)
    budgets, befores, ranks = zip(*notes, strict=True)
    assert ranks == ("2", "0", "1") and befores == ("400", *budgets[:2])
    [checkpoint] = (tmp_path / "cramped" / "checkpoints").iterdir()
    assert checkpoints.read(checkpoint).max_tokens == int(budgets[-1])
    answered(rank_runs.train, resume="newest", **of)
    more["max_tokens_per_micro_batch"] = int(budgets[-1])
    answered(rank_runs.train, **flags("contrastive", tiny_bert_dir, "roomy", **more))
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("cramped", "roomy"))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_all_collectives_of_a_step_are_used_before_memory_is_measured(
    answered, flags, tiny_llama_dir
):
    used = answered(rank_runs.connected, **flags("contrastive", tiny_llama_dir, "o", max_steps=1))
    assert used == [{"_all_gather", "all_to_all_single", "all_reduce"}] * RANKS


# --- one command, several processes ---


def test_nan_on_one_rank_stops_all_and_the_first_names_the_rows_of_all(ran, flags, tiny_llama_dir):
    of = flags("contrastive", tiny_llama_dir, "out", gradient_accumulation_steps=1)
    ended = ran(rank_runs.command_with_nan, *arguments(of))
    assert [rank.code for rank in ended] == [1] * RANKS
    first, *others = (rank.said.partition("error: ")[2] for rank in ended)
    assert "step 1: loss nan" in first and others == [""] * (RANKS - 1)
    assert len(first.partition("from 1: ")[2].split(", ")) == 8 * RANKS


def test_all_go_on_when_the_first_cannot_save_a_checkpoint(ran, flags, tiny_llama_dir):
    of = flags("contrastive", tiny_llama_dir, "out", save_steps=1)
    saving = "rankpo_fast.train.checkpoint.save_tensors"
    first, *others = ran(rank_runs.command_on_a_full_disk, saving, *arguments(of))
    assert first.code == 1 and "No space left on device); the model is saved" in first.said
    assert (Path(of["output_dir"]) / "config.json").exists()
    for rank in others:
        assert rank.code == 1 and "error" not in rank.said and "Traceback" not in rank.said


def test_others_end_when_the_first_cannot_save_the_model(ran, flags, tiny_llama_dir):
    of = flags("contrastive", tiny_llama_dir, "out")
    saving = "rankpo_fast.model.encoder.save_backbone"
    first, *others = ran(rank_runs.command_on_a_full_disk, saving, *arguments(of))
    assert first.code == 1 and "No space left" in first.said
    for rank in others:
        assert rank.code == 1 and "another is gone" in rank.said and "Traceback" not in rank.said


@pytest.mark.long
def test_all_end_when_one_has_no_memory_for_the_longest_text(ran, flags, tiny_llama_dir):
    *others, last = ran(
        rank_runs.command_out_of_memory, *arguments(flags("contrastive", tiny_llama_dir, "out"))
    )
    assert last.code == 2 and "alone in a micro-batch: give" in last.said
    for rank in others:
        assert rank.code == 1 and "another is gone" in rank.said and "Traceback" not in rank.said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--temperature", "-1"], "--temperature must be > 0"),
        (["--preference_data", "nothing.jsonl"], "nothing.jsonl"),
        (["--profile_steps", "5", "--max_steps", "3"], "--profile_steps 5 needs 4 steps before"),
    ],
    ids=["flag", "data", "steps"],
)
def test_bad_input_ends_all_and_is_said_once(words, said, ran, flags, tiny_llama_dir):
    first, *others = ran(
        rank_runs.command, *arguments(flags("contrastive", tiny_llama_dir, "o"), *words)
    )
    assert first.code == 2 and said in first.said
    for rank in others:
        assert rank.code > 0 and said not in rank.said and "Traceback" not in rank.said


def test_ranks_that_were_started_unlike_are_refused(ran, flags, tiny_llama_dir, preference_file):
    """In what they compute, and in when they meet."""
    of = flags("contrastive", tiny_llama_dir, "out", max_steps=1)
    own = ["--learning_rate", "1", "--save_steps", "2", "--eval_steps", "3"]
    own += ["--preference_data", preference_file]
    first, *others = ran(rank_runs.command_with_own, own, *arguments(of))
    assert first.code == 2 and "rank 2 of 3 has other settings" in first.said
    for line in (
        "--learning_rate was 1.0, is 1e-05",
        "--save_steps was 2, is None",
        "--eval_steps was 3, is None",
        "whether to evaluate was True, is False",
    ):
        assert line in first.said
    assert all(rank.code == 1 for rank in others)


@pytest.mark.long
def test_torchrun_hands_sigterm_to_all(flags, tiny_llama_dir, tmp_path):
    of = flags("contrastive", tiny_llama_dir, "out", max_steps=1000000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "rankpo_fast.cli", *arguments(of)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as torchrun:
        metrics = tmp_path / "out" / "metrics.jsonl"
        while torchrun.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        torchrun.terminate()
        _, said = torchrun.communicate(timeout=60)
    assert said.count("stopped by SIGTERM after step") == 1, said
    assert "on each of 2 ranks" in said
    checkpoint = checkpoints.newest(tmp_path / "out" / "checkpoints")
    assert checkpoint.step == json.loads(metrics.read_text().splitlines()[-1])["step"]


def test_other_commands_refuse_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["plan"]) == 2
    assert "plan runs in one process" in capsys.readouterr().err


# --- cards and texts ---


def test_every_rank_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for number in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        for name in ("auto", "cuda"):
            assert own_device(ComputeConfig(device=name)) == chosen.pop()
            assert own_device(ComputeConfig(device=name)) == torch.device(f"cuda:{number}")
        assert own_device(ComputeConfig(device="cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda:0: each rank needs a GPU of its own"):
        own_device(ComputeConfig(device="cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="--device cuda:2: there are 2 CUDA devices"):
        own_device(ComputeConfig())


def test_texts_are_dealt_evenly_and_none_is_lost():
    torch.manual_seed(0)
    costs = torch.rand(1000) ** 3
    hands = deal(costs, 7)
    assert torch.equal(torch.cat(hands).sort().values, torch.arange(1000))
    totals = torch.stack([costs[hand].sum() for hand in hands])
    assert totals.max() < 1.001 * totals.min()
    assert [len(hand) for hand in deal(costs[:2], 3)] == [1, 1, 0]
