"""Rounds end the same wherever they were stopped, and train on what their mode says."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rankpo_fast import evaluate, mine_hard_negatives
from rankpo_fast.cli import main
from rankpo_fast.rounds import run as rounds

SMALL = {
    "--device": "cpu", "--bf16": "false", "--gradient_checkpointing": "false",
    "--max_steps": 3, "--per_device_train_batch_size": 8, "--learning_rate": 3e-3,
    "--num_negatives": 3, "--mined_negatives": 4, "--search_range": "0-20", "--cutoffs": 5,
    "--rounds": 2,
}  # fmt: skip


@pytest.fixture
def data(tmp_path, contrastive_file):
    """Flags of the rows, each with two of its negatives, and of an evaluation on the positives."""
    rows = [json.loads(line) for line in Path(contrastive_file).read_text().splitlines()]
    queries, corpus = tmp_path / "queries.jsonl", tmp_path / "corpus.jsonl"
    train = tmp_path / "train.jsonl"
    train.write_text("".join(
        json.dumps({**row, "negatives": row["negatives"][:2]}) + "\n" for row in rows
    ))  # fmt: skip
    queries.write_text("".join(
        json.dumps({"query": {"text": row["query"]}, "positives": {"index": [i]}}) + "\n"
        for i, row in enumerate(rows)
    ))  # fmt: skip
    corpus.write_text("".join(json.dumps({"text": row["positives"][0]}) + "\n" for row in rows))
    return {"--train_data": train, "--query_data": queries, "--corpus_data": corpus}


@pytest.fixture
def command(tmp_path, tiny_llama_dir, data):
    """command("out", *flags) -> exit code of `rounds`."""

    def run(name, *flags):
        given = {"--model_name_or_path": tiny_llama_dir, "--output_dir": tmp_path / name,
                 "--cache_dir": tmp_path / "cache", **data, **SMALL}  # fmt: skip
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        words = (str(word) for pair in given.items() for word in pair if word != "")
        return main(["rounds", *words])

    return run


def made(folder: Path) -> dict[str, str]:
    """The sha256 of all that rounds end with: rows, models, figures, and cards but for paths."""
    kinds = ("*.safetensors", "*.jsonl", "*.json", "*.md", "*.png")
    files = [
        file for kind in kinds for file in folder.rglob(kind) if "checkpoints" not in file.parts
    ]
    files = [file for file in files if file.name not in ("metrics.jsonl", "training.json")]
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {
        name: hashlib.sha256(content.replace(bytes(folder), b"OUT")).hexdigest()
        for name, content in contents.items()
    }


def rows_of(folder: Path, number: int) -> list[dict]:
    lines = (folder / f"round-{number}" / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


def kill_at(monkeypatch, target, name, call, *, after):
    """The given call of a function does its work, or not, and all ends there."""
    original, calls = getattr(target, name), []

    def dies(*args, **words):
        calls.append(1)
        if len(calls) < call:
            return original(*args, **words)
        if after:
            original(*args, **words)
        raise Killed

    monkeypatch.setattr(target, name, dies)


@pytest.mark.long
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(
    command, tmp_path, monkeypatch, stop_after, capsys
):
    """The cache of tokens is shared, the rest of both runs their own."""
    assert command("straight") == 0
    straight, out = made(tmp_path / "straight"), tmp_path / "out"
    kills = [  # in the order of the run
        (rounds, "write_jsonl", 1, True),  # mined, and not recorded
        (rounds._Steps, "done", 4, False),  # recorded, and the next step not begun
        (rounds, "train_contrastive", 1, True),  # trained, and not recorded
        (rounds, "write_jsonl", 1, False),  # mined, and not written
        (rounds.output, "adopt_model", 1, False),  # all but the last copy
    ]
    stop_after(2)  # of round 0's training
    assert command("out") == 143
    monkeypatch.undo()
    for target, name, call, after in kills:
        kill_at(monkeypatch, target, name, call, after=after)
        with pytest.raises(Killed):
            command("out", "--resume", "")
        monkeypatch.undo()
        assert not (out / "config.json").exists()  # no model before the last round's
    assert command("out", "--resume", "") == 0
    assert made(out) == straight
    assert {"round-0", "round-1", "round-2"} <= {Path(name).parts[0] for name in straight}
    assert command("out", "--resume", "") == 0 and made(out) == straight
    assert command("out") == 2 and "a finished run" in capsys.readouterr().err


@pytest.mark.long
def test_what_is_done_is_not_done_again_and_more_rounds_go_on(command, tmp_path, monkeypatch):
    assert command("three", "--rounds", 3) == 0
    assert command("out") == 0

    def again(*args, **words):
        assert "round-3" in str(words or args), "a step that is recorded was taken again"
        return original(*args, **words)

    original = rounds.train_contrastive
    monkeypatch.setattr(rounds, "train_contrastive", again)
    assert command("out", "--resume", "", "--rounds", 3) == 0
    assert made(tmp_path / "out") == made(tmp_path / "three")


@pytest.mark.long
def test_combined_has_the_negatives_of_all_rounds_and_incremental_the_newest(
    command, tmp_path, data
):
    given = [json.loads(line) for line in data["--train_data"].read_text().splitlines()]
    # A pool beside the rows' own negatives, so that who has which can be told.
    pool = [{"text": f"{word} {i}"} for word in ("senior", "Berlin", "night") for i in range(20)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    flags = ("--mining_corpus", tmp_path / "pool.jsonl")
    assert command("both", *flags) == 0
    assert command("newest", *flags, "--mode", "incremental") == 0
    texts = {row["text"] for row in pool}
    for number in (1, 2):
        for row, own in zip(rows_of(tmp_path / "both", number), given, strict=True):
            count = len(own["negatives"])
            assert row["negatives"][:count] == own["negatives"]
            assert len(row["negatives"]) == len({*row["negatives"]}) == count + 4 * number
            assert {*row["negatives"][count:]} <= texts
            assert row["mined"]["ranks"] and len(row["mined"]["scores"]) == 4
        for row in rows_of(tmp_path / "newest", number):
            assert len(row["negatives"]) == 4 and {*row["negatives"]} <= texts
    first, second = (rows_of(tmp_path / "both", number) for number in (1, 2))
    for before, after in zip(first, second, strict=True):
        assert after["negatives"][:-4] == before["negatives"]
    newest = [rows_of(tmp_path / "newest", number) for number in (1, 2)]
    assert newest[0] != newest[1]  # another model, and another draw


def test_each_round_is_mine_and_contrastive_by_hand(command, tmp_path, tiny_llama_dir, data):
    """Of the model of the round before, which the last round's is a copy of; figures are those of
    `evaluate`."""
    assert command("out", "--mine_first", "true", "--rounds", 1, "--method", "topk") == 0
    out = tmp_path / "out"
    assert not (out / "round-0").exists()
    mined = mine_hard_negatives(
        tiny_llama_dir, data["--train_data"], num_negatives=4, search_range="0-20", method="topk",
        combine=True, device="cpu",
    )  # fmt: skip
    assert rows_of(out, 1) == json.loads(json.dumps(mined.rows))
    words = {flag: str(value) for flag, value in SMALL.items()
             if flag not in ("--rounds", "--mined_negatives", "--search_range")}  # fmt: skip
    words |= {"--model_name_or_path": str(tiny_llama_dir), "--seed": "43", "--no_cache": "true",
              "--train_data": str(out / "round-1/rows.jsonl"),
              "--output_dir": str(tmp_path / "by-hand")}  # fmt: skip
    assert main(["contrastive", *(word for pair in words.items() for word in pair)]) == 0
    ours, by_hand = (load_file(path / "model.safetensors") for path in (out, tmp_path / "by-hand"))
    assert all(ours[name].equal(by_hand[name]) for name in by_hand)
    steps = json.loads((out / "rounds.json").read_text())["steps"]
    for model, step in ((tiny_llama_dir, "start"), (out, "round-1/model")):
        figures = evaluate(model, query_data=str(data["--query_data"]), device="cpu",
                           corpus_data=str(data["--corpus_data"]), cutoffs=[5]).figures  # fmt: skip
        assert steps[step]["figures"] == figures
    report = (out / "report.md").read_text()
    assert "| | start | round 1 |" in report and f"{figures['ndcg@5']:.3f}" in report


@pytest.mark.long
def test_the_model_loads_in_sentence_transformers(command, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    assert command("out", "--rounds", 1, "--max_steps", 1) == 0
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    last = sentence_transformers.SentenceTransformer(str(tmp_path / "out/round-1/model"),
                                                     device="cpu")  # fmt: skip
    assert (model.encode(["a nurse"]) == last.encode(["a nurse"])).all()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--rounds", 0], "--rounds must be >= 1, got 0"),
        (["--mode", "both"], "--mode"),
        (["--mined_negatives", 30], "--search_range 0-20 is narrower than --mined_negatives 30"),
        (["--mine_first", "true", "--from_scratch", "true"], "--mine_first: random weights"),
        (["--trim_vocabulary", "true"], "--trim_vocabulary"),
        (["--train_data_weights", 2], "--train_data_weights"),
        (["--resume", "elsewhere"], "--resume elsewhere"),
        (["--train_data", "-"], "standard input"),
        (["--mining_corpus", "none.jsonl"], "none.jsonl"),
        (["--reranker_margin", 1], "--reranker_margin needs --reranker"),
        (["--reranker", "no/such/model"], "--reranker no/such/model"),
        (["--model_name_or_path", "no/such/model"], "--model_name_or_path no/such/model"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_be_used_is_named_before_any_work(flags, named, command, tmp_path, capsys):
    assert command("out", *flags) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bad_row_of_either_file_is_named(command, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n')
    for flag in ("--train_data", "--mining_corpus"):
        assert command("out", flag, tmp_path / "bad.jsonl") == 2
        assert "bad.jsonl:1" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.fixture
def finished(command, tmp_path):
    assert command("out", "--max_steps", 1, "--rounds", 1) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["round-1/rows.jsonl", "round-0/model/model.safetensors"])
@pytest.mark.parametrize("change", [os.remove, lambda path: path.write_bytes(b"{}")])
def test_what_was_changed_since_is_refused(name, change, finished, command, capsys):
    change(finished / name)
    capsys.readouterr()
    assert command("out", "--max_steps", 1, "--rounds", 2, "--resume", "") == 2
    assert "is not as the run left it" in capsys.readouterr().err


def test_other_settings_fewer_rounds_and_other_data_are_refused(
    finished, command, capsys, data, tmp_path
):
    same = ("--max_steps", 1, "--resume", "")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(Path(data["--train_data"]).read_text().split("\n", 1)[1])
    queries = tmp_path / "fewer.jsonl"
    queries.write_text(data["--query_data"].read_text().split("\n", 1)[1])
    for flags, named in [
        (("--mode", "incremental"), "--mode was combined, is incremental"),
        (("--mined_negatives", 5), "--mined_negatives was 4, is 5"),
        (("--train_data", changed), "content of --train_data"),
        (("--query_data", queries), "content of --query_data"),
    ]:
        capsys.readouterr()
        assert command("out", *same, *flags, "--rounds", 1) == 2
        assert named in capsys.readouterr().err
    assert command("out", *same, "--rounds", 2) == 0
    assert command("out", *same, "--rounds", 1) == 2
    assert "has gone on to round 2" in capsys.readouterr().err


def test_overwriting_leaves_nothing_of_the_earlier_rounds(finished, command, capsys):
    assert command("out", "--rounds", 1, "--mine_first", "true", "--overwrite_output_dir", "") == 0
    assert [path.name for path in finished.glob("round-*")] == ["round-1"]


def test_folders_that_no_rounds_left_are_not_touched(command, tmp_path, contrastive_file, capsys):
    (tmp_path / "out/round-1").mkdir(parents=True)
    (tmp_path / "out/round-1/thesis.tex").touch()
    assert command("out", "--overwrite_output_dir", "") == 2
    assert (tmp_path / "out/round-1/thesis.tex").exists()
