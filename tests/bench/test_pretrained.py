"""The bench of a user's own model and texts trains what the user would, and says if it does not."""

import dataclasses
import json

import pytest

from bench import __main__ as bench
from bench.questions import NOT_INSTALLED, OURS, Rates, Row, Settings
from bench.training import pretrained
from bench.training.corpus import model_of
from rankpo_fast.errors import InputError

SETTINGS = Settings("cpu", "quick", 1, Rates({"float32": 1e10}, 1e10))


@pytest.fixture
def texts(tmp_path):
    """35 rows, of which two have one negative more."""
    rows = [
        {"query": f"a nurse {i}", "positives": [f"nurse {i}"], "negatives": [f"cook {i}"]}
        for i in range(35)
    ]
    rows[3]["negatives"] += ["pilot"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.long
def test_both_train_and_their_first_losses_are_equal(texts, monkeypatch):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(
        pretrained, "in_a_process", lambda function, *arguments: function(*arguments)
    )
    monkeypatch.setattr(pretrained, "STEPS", {"cpu": 2})
    question = pretrained.question(model_of("tiny", 160), texts)
    [shape] = question.shapes("cpu", "quick")
    result = question.answer(shape, SETTINGS)
    theirs, ours = result.rows
    assert (theirs.implementation, ours.implementation) == ("sentence-transformers", OURS)
    assert ours.note == "" and ours.error < 1e-5 and ours.ratio > 0 and ours.tokens > 0
    assert result.about["negatives"] == 1 and result.about["first loss"][OURS] > 0


def test_rows_fill_batches_and_have_equally_many_negatives(texts, tmp_path):
    rows = pretrained.write_rows(texts, tmp_path / "made")
    assert len(rows) == 32 and {len(row["negatives"]) for row in rows} == {1}
    columns = pretrained.columns(rows)
    assert list(columns) == ["anchor", "positive", "negative_1"] and len(columns["anchor"]) == 32


def test_a_loss_that_is_another_has_no_time():
    row = Row(OURS, seconds=1.0, ratio=0.5)
    losses = {OURS: 2.0, "sentence-transformers": 2.001}
    assert pretrained.checked(row, losses).seconds is None
    assert "first loss 2, not 2.001" in pretrained.checked(row, losses).note
    assert pretrained.checked(row, "ValueError: x").red
    assert pretrained.checked(row, f"sentence_transformers {NOT_INSTALLED}") == row
    peer = dataclasses.replace(row, implementation="sentence-transformers")
    assert pretrained.checked(peer, losses) == peer


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "needs --model DIRECTORY, and --texts"),
        (["--model", "no/such", "--texts", "rows.jsonl"], "--model no/such: no such directory"),
        (["--model", ".", "--texts", "no.jsonl"], "--texts no.jsonl: no such file"),
        (["--model", "."], "--texts"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(flags, named, capsys, texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    assert bench.main(["--cases", "pretrained", *flags]) == 2
    assert named in capsys.readouterr().err


def test_fewer_rows_than_a_batch_are_named(texts, tmp_path):
    (tmp_path / "few.jsonl").write_text(texts.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="few.jsonl: fewer than the 32 rows"):
        pretrained.write_rows(tmp_path / "few.jsonl", tmp_path)
