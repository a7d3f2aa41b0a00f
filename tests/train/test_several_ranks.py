"""Ranks that train together take the steps of one process, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from rank_runs import descend, train, train_with_nan
from safetensors.torch import load_file

from bench.processes import processes
from rankpo_fast.errors import InputError
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.ranks import deal

RANKS = 3  # so that rows and texts do not come out even


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with processes(RANKS, tmp_path_factory.mktemp("ranks")) as ask:
        yield ask


@pytest.fixture
def flags(tmp_path, contrastive_file, preference_file):
    """Of a stage, a model and an output directory."""

    def of(stage, model, name, **more):
        file = {"contrastive": contrastive_file, "rankpo": preference_file}[stage]
        return {
            "model_name_or_path": str(model), "train_data": [file], "stage": stage,
            "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), **more,
        }  # fmt: skip

    return of


def answered(answers):
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def assert_same_steps(ours, one):
    """Gradients as a whole to 1e-6, and which parameters have any."""
    for got, want in zip(ours, one, strict=True):
        assert got.keys() == want.keys()
        off, size = (
            torch.stack([x.norm() for x in tensors]).norm()
            for tensors in ([got[i] - want[i] for i in want], want.values())
        )
        print("OFF", off / size)
        assert off < 1e-6 * size or size == 0


RUNS = [
    pytest.param("contrastive", "llama", {}, id="contrastive"),
    pytest.param(
        "contrastive",
        "bert",  # which has a pooler that takes no part
        {"gradient_checkpointing": True, "disable_dropout": True, "activation_memory_gb": 0.0},
        id="checkpointed-and-computed-twice",
    ),
    pytest.param("rankpo", "llama", {"reference_free": False}, id="rankpo-with-reference"),
    pytest.param("rankpo", "llama", {"use_confidence": True}, id="weighted-pairs"),
]


@pytest.mark.parametrize("stage, model, more", RUNS)
def test_every_step_is_that_of_one_process_with_a_batch_as_large(
    stage, model, more, ranks, flags, request, read_metrics
):
    directory = request.getfixturevalue(f"tiny_{model}_dir")
    more = {"max_steps": 3, "max_tokens_per_micro_batch": 100, "temperature": 0.1, **more}
    of = {"per_device_train_batch_size": 7, **more}
    answers = answered(ranks(descend, **flags(stage, directory, "ranks", **of)))
    of["per_device_train_batch_size"] *= RANKS
    gradients, losses, _ = descend(**flags(stage, directory, "one", **of))
    for ours, our_losses, _ in answers:
        assert_same_steps(ours, gradients)
        torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(losses))
    lines = [read_metrics(flags(stage, "", name)["output_dir"]) for name in ("ranks", "one")]
    for got, want in zip(*lines, strict=True):
        unlike = {"tokens_per_second", "queries_per_second", "peak_memory_bytes"}
        assert got.keys() == want.keys()
        for name in want.keys() - unlike:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_gradients_travel_once_a_step_whatever_is_accumulated(ranks, flags, tiny_llama_dir):
    of = {"gradient_accumulation_steps": 3, "max_steps": 2, "max_tokens_per_micro_batch": 60}
    for _, _, messages in answered(
        ranks(descend, **flags("contrastive", tiny_llama_dir, "a", **of))
    ):
        reductions = [of_step["all_reduce"] for of_step in messages]
        assert reductions == [1, 2]


def test_ranks_without_a_row_and_without_a_text_take_part(ranks, flags, tiny_llama_dir, tmp_path):
    """One row of two texts for three ranks."""
    row = {"query": "a nurse", "positives": ["a nurse"], "negatives": ["a cook in Lyon"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    of = {"train_data": [str(tmp_path / "one.jsonl")], "max_steps": 2}
    answers = answered(ranks(descend, **flags("contrastive", tiny_llama_dir, "ranks", **of)))
    gradients, *_ = descend(**flags("contrastive", tiny_llama_dir, "one", **of))
    assert any(gradient.norm() > 0 for gradient in gradients[0].values())
    for ours, *_ in answers:
        assert_same_steps(ours, gradients)


def test_all_stop_when_one_is_told_to_and_go_on_bit_by_bit(
    ranks, flags, tiny_bert_dir, tmp_path, preference_file, read_metrics, run_stage
):
    """With dropout on, which every rank draws for itself, and evaluations by the first."""
    more = {"per_device_train_batch_size": 2, "preference_data": [preference_file], "eval_steps": 3}
    straight = flags("rankpo", tiny_bert_dir, "straight", **more)
    assert answered(ranks(train, **straight)) == [0] * RANKS
    stopped = flags("rankpo", tiny_bert_dir, "stopped", **more)
    assert answered(ranks(train, stop=2, **stopped)) == [143] * RANKS
    [checkpoint] = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert checkpoints.read(checkpoint).step == 2
    states = load_file(checkpoint / "random.safetensors")
    assert not torch.equal(states["0/torch"], states["1/torch"])
    with pytest.raises(InputError, match="processes was 3, is 1"):
        run_stage("rankpo", tiny_bert_dir, "stopped", resume="newest", **more)
    assert answered(ranks(train, seed=99, resume="newest", **stopped)) == [0] * RANKS
    want, got = (
        load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(want[name], got[name]) for name in want)
    lines = [read_metrics(tmp_path / name) for name in ("straight", "stopped")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 3, 4, 5, 6, 6]
    for one, other in zip(*lines, strict=True):
        assert one.get("loss") == other.get("loss")
        assert one.get("eval/alignment") == other.get("eval/alignment")


def test_nan_on_one_rank_stops_all_and_names_the_rows_of_all(ranks, flags, tiny_llama_dir):
    of = flags("contrastive", tiny_llama_dir, "nan", gradient_accumulation_steps=1)
    del of["stage"]
    answers = ranks(train_with_nan, bad_rank=1, **of)
    assert len({str(answer) for answer in answers}) == 1
    assert isinstance(answers[0], FloatingPointError)
    assert "step 1: loss nan" in str(answers[0])
    assert len(str(answers[0]).partition("from 1: ")[2].split(", ")) == 4 * RANKS


# --- the command line ---


def start(*flags):
    """Two ranks of `rankpo-fast contrastive`, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    of_all |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "rankpo_fast.cli", "contrastive", *map(str, flags)]
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def ended(ranks):
    """(exit code, what was said) of each."""
    try:
        return [
            (said, rank.returncode) for rank in ranks for said in [rank.communicate(timeout=60)[1]]
        ]
    finally:
        for rank in ranks:
            rank.kill()
