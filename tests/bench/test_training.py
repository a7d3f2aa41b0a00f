"""The comparison of trainers trains, measures, and says what could not be measured."""

import dataclasses
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.training import __main__ as bench
from bench.training.__main__ import Case, is_red, summary, table
from bench.training.apart import OUT_OF_MEMORY, in_a_process
from bench.training.contenders import Measured, Task
from bench.training.corpus import shape, texts_of, write_corpus, write_model
from rankpo_fast.demo.world import SplitSize

SIZE = dataclasses.replace(bench.QUICK, rows=40)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write_model(path / bench.MODEL, write_corpus(path / "False", SIZE, None, seed=0), SIZE)
    write_corpus(path / "True", SIZE, SplitSize(20, 60), seed=0)
    return path


def rows_of(corpus: Path, repeats: bool) -> list[dict]:
    lines = (corpus / str(repeats) / "train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_texts_repeat_only_where_they_may(corpus):
    texts = [text for row in rows_of(corpus, repeats=False) for text in texts_of(row)]
    assert len(set(texts)) == len(texts) == 3 * SIZE.rows
    repeated = shape(rows_of(corpus, repeats=True), corpus / bench.MODEL, 16, 1, seed=0)
    assert repeated["repeated texts"] > 0.1
    distinct = shape(rows_of(corpus, repeats=False), corpus / bench.MODEL, 16, 1, seed=0)
    assert distinct["repeated texts"] == 0 and 0.3 < distinct["padding"] < 0.8


def test_a_batch_of_one_length_has_no_padding(corpus):
    row = rows_of(corpus, repeats=False)[0] | {"negatives": []}
    same = shape([row] * 4, corpus / bench.MODEL, 4, 0, seed=0)
    assert same["padding"] == 0 and same["repeated texts"] == 6 / 8


def raising(error: BaseException, task: Task) -> None:
    raise error


def dying(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def task(corpus, tmp_path) -> Task:
    return Task(
        corpus / bench.MODEL, corpus / "False", tmp_path / "output", tmp_path / "cache",
        batch_size=8, negatives=1, steps=3, learning_rate=1e-3, seed=0, repeats=False, ndcg=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("contender", "note"),
    [
        (partial(raising, ValueError("no\nmore")), "ValueError: no"),
        (partial(raising, torch.OutOfMemoryError()), OUT_OF_MEMORY),
        (partial(raising, ModuleNotFoundError(name="datasets")), "datasets is not installed"),
        (dying, OUT_OF_MEMORY),
    ],
    ids=["error", "torch-out-of-memory", "not-installed", "killed-as-the-kernel-does"],
)
def test_what_stops_a_contender_is_its_answer(task, contender, note):
    assert in_a_process(contender, task) == note


def test_only_a_peer_may_be_missing_or_too_large():
    case = Case("c", "?", dict.fromkeys(["sentence-transformers", "rankpo-fast"]))
    for note, red in [(OUT_OF_MEMORY, [False, True]), ("datasets is not installed", [False, True]),
                      ("ValueError: no", [True, True])]:  # fmt: skip
        rows = summary(case, dict.fromkeys(case.contenders, [note]), tokens=1.0)
        assert [is_red(row) for row in rows] == red
        assert table(rows).count(note) == 2


def test_ratios_are_taken_within_a_round():
    case = Case("c", "?", dict.fromkeys(["floor", "ours"]), batch_size=10)
    floor = [Measured(seconds, 2**20, 0.5) for seconds in (1.0, 2.0, 10.0)]  # a machine grows busy
    ours = [Measured(seconds, 2**21, n) for seconds, n in ((0.5, 0.4), (0.8, 0.5), (5.0, 0.6))]
    row = summary(case, {"floor": floor, "ours": ours}, tokens=3.0)[1]
    assert (row.ratio, row.low, row.high) == (0.5, 0.4, 0.5)
    assert (row.seconds, row.queries, row.tokens, row.peak_mib) == (0.8, 12.5, 37.5, 2.0)
    assert (row.ndcg, row.ndcg_low, row.ndcg_high) == (0.5, 0.4, 0.6)


def test_without_a_floor_no_contender_has_a_ratio():
    case = Case("c", "?", dict.fromkeys(["floor", "ours"]))
    rows = summary(case, {"floor": [OUT_OF_MEMORY], "ours": [Measured(1.0, 1, None)]}, tokens=1.0)
    assert rows[0].note == OUT_OF_MEMORY and rows[1].ratio is None and rows[1].seconds == 1.0


def test_every_case_runs_and_is_written(tmp_path, monkeypatch, capsys):
    """Of the peer, what is installed: its rows say so where it is not."""
    monkeypatch.setattr(bench, "QUICK", dataclasses.replace(SIZE, rows=64))
    output = tmp_path / "deep" / "result.json"
    command = ["bench.training", "--quick", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 0
    said = json.loads(output.read_text())
    printed = capsys.readouterr().out
    cases = bench.cases(quick=True)
    assert [result["case"] for result in said["results"]] == [case.name for case in cases]
    for case, result in zip(cases, said["results"], strict=True):
        assert [row["contender"] for row in result["rows"]] == list(case.contenders)
        assert case.question in printed
        for row in result["rows"]:
            assert ("seconds" in row) != ("note" in row), row
            assert ("ndcg" in row) == (case.ndcg and "seconds" in row)
