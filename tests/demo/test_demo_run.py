"""The demo from the command line to metrics.json, in its tiny form."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from rankpo_fast.cli import main
from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.data.rows import read_contrastive, read_preferences
from rankpo_fast.demo import run
from rankpo_fast.demo.run import DemoConfig
from rankpo_fast.demo.steps import FULL, QUICK, SHORT

STAGE_1 = {"untrained", "stage1_random_negatives", "stage1"}
MODELS = STAGE_1 | {"simrankpo", "rankpo", "rankpo_replay"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "--output_dir", str(path)]) == 0
    return path


def test_the_demo_is_short_unless_it_is_told_otherwise():
    assert DemoConfig().scale is SHORT
    assert DemoConfig(quick=True).scale is QUICK
    assert DemoConfig(full=True).scale is FULL
    assert QUICK.methods == SHORT.methods


def test_it_leaves_its_models_its_figures_and_a_picture(demo):
    beside = {"data", "cache", "metrics.json", "report.png"}
    assert {entry.name for entry in demo.iterdir()} == MODELS | beside


@pytest.mark.long
def test_the_full_demo_measures_four_forms_of_stage_2(tmp_path, monkeypatch, capsys):
    tiny = replace(QUICK, methods=FULL.methods, random_steps=1, mined_steps=1, alignment_steps=1)
    monkeypatch.setattr(run, "FULL", tiny)
    assert main(["demo", "--full", "--output_dir", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["full"] and not metrics["quick"]
    for name in MODELS | {"sft"}:
        assert set(metrics[name]) == {"ndcg@20", "alignment"}
        assert (tmp_path / name).is_dir()
    assert "stage 1 + SFT" in capsys.readouterr().out


def test_it_measures_every_model_on_both_axes(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    assert "sft" not in metrics
    for name in MODELS:
        assert set(metrics[name]) == {"ndcg@20", "alignment"}
        assert all(0 <= value <= 1 for value in metrics[name].values())
    assert 0 < metrics["training_seconds"] < metrics["seconds"]
    assert metrics["versions"]["torch"] == torch.__version__
    assert (demo / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_of_the_test_split_is_trained_on(demo):
    data = demo / "data"
    trained = set()
    for name in ("stage1_random_negatives", "stage1"):
        for row in read_contrastive([data / f"{name}.jsonl"]):
            trained |= {row.query, *row.positives, *row.negatives}
    for row in read_preferences([data / "train_preferences.jsonl"]):
        trained |= {row.query, row.chosen, row.rejected}
    for split in ("validation", "test"):
        retrieval = read_retrieval(data / f"{split}_queries.jsonl", data / f"{split}_corpus.jsonl")
        assert not trained & {*retrieval.queries, *retrieval.corpus}
        for row in read_preferences([data / f"{split}_preferences.jsonl"]):
            assert not trained & {row.query, row.chosen, row.rejected}


def test_mined_negatives_join_the_random_ones_and_fit_nobody(demo):
    random, mined = (
        read_contrastive([demo / "data" / f"{name}.jsonl"])
        for name in ("stage1_random_negatives", "stage1")
    )
    for before, after in zip(random, mined, strict=True):
        assert after.negatives[: len(before.negatives)] == before.negatives
        assert len(after.negatives) > len(before.negatives)
        assert not set(after.negatives) & set(before.positives)


def test_replay_differs_from_rankpo_by_the_rows_that_stage_1_ended_with(demo):
    plain, replay = (
        json.loads((demo / name / "training.json").read_text())["settings"]
        for name in ("rankpo", "rankpo_replay")
    )
    digest = hashlib.sha256((demo / "data" / "stage1.jsonl").read_bytes()).hexdigest()
    assert plain["content of --replay_data"] == []
    assert replay["content of --replay_data"] == [digest]
    assert all("--replay_" in name for name in plain if plain[name] != replay[name])


@pytest.mark.long
def test_a_rerun_replaces_the_earlier_demo_and_finds_the_same(demo, capsys):
    first = json.loads((demo / "metrics.json").read_text())
    assert main(["demo", "--quick", "--output_dir", str(demo)]) == 0
    second = json.loads((demo / "metrics.json").read_text())
    assert {name: first[name] for name in MODELS} == {name: second[name] for name in MODELS}
    table = capsys.readouterr().out
    assert "stage 1 + RankPO + replay" in table and "report.png" in table


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "report.png").write_text("mine")
    assert main(["demo", "--quick", "--output_dir", str(tmp_path)]) == 2
    assert "holds something else (thesis.txt)" in capsys.readouterr().err
    assert (tmp_path / "report.png").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "flags",
    [["--seed", "-1"], ["--quickly"], ["--quick", "--full"]],
    ids=["seed", "unknown-flag", "two-sizes"],
)
def test_flags_it_cannot_use_end_with_exit_code_2(flags, tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert all(flag in err for flag in flags if flag.startswith("--"))
    assert not (tmp_path / "out").exists()
