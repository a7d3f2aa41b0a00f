"""The examples of trainers: they train, and the gradient cache by hand is exact."""

import re
import runpy
import sys

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import small_world
from rankpo_fast import info_nce_loss
from rankpo_fast.model.pooling import pool_padded
from support import hf_runs, rank_runs
from support.hf_runs import close, gradients, triplets


def test_a_gradient_cache_by_hand_has_the_gradients_of_one_graph(tiny_tokenizer, llama):
    from gradient_cache import backward

    def embed(texts):
        tokens = tiny_tokenizer(texts, padding=True, return_tensors="pt")
        return pool_padded(llama(**tokens).last_hidden_state, tokens["attention_mask"], "last")

    rows = triplets(7)
    queries = [row["query"] for row in rows]
    passages = [row[key] for row in rows for key in ("positive", "negative")]
    whole = info_nce_loss(embed(queries), embed(passages))
    expected = gradients(whole, llama)
    llama.zero_grad()
    assert abs(backward(embed, queries, passages, size=3) - whole) < 1e-5
    close(torch.cat([x.grad.flatten() for x in llama.parameters()]), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["plain_loop", "gradient_cache", "train_accelerate", "train_hf_trainer", "train_lightning"],
)
def test_an_example_trains(name, world, tmp_path, monkeypatch, capsys):
    if name == "train_lightning":
        pytest.importorskip("lightning")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(small_world, "small_world", lambda: world)
    monkeypatch.chdir(tmp_path)
    runpy.run_module(name, run_name="__main__")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    stages = [losses[:2], losses[2:]] if name.endswith("hf_trainer") else [losses]
    assert all(of_stage[-1] < of_stage[0] for of_stage in stages)


def test_both_stages_raise_the_alignment(world, tmp_path, monkeypatch):
    import both_stages

    monkeypatch.setattr(both_stages, "small_world", lambda: world)
    monkeypatch.chdir(tmp_path)
    before, after = both_stages.main()
    assert after > before + 0.1


@pytest.mark.long
def test_processes_of_accelerate_share_their_negatives(world, tmp_path):
    small = world._replace(triplets=world.triplets[:64])
    ranks = rank_runs.start(2, tmp_path / "said", hf_runs.accelerated, small).ended()
    assert [rank.code for rank in ranks] == [0, 0], ranks
    q, p, losses = zip(*[rank.answer for rank in ranks], strict=True)
    whole = info_nce_loss(torch.cat(q), torch.cat(p))
    assert abs(sum(losses) / 2 - whole) < 1e-5
