"""`score`: a cross-encoder's logits, each as transformers computes that pair alone, as rows that
stage 2 learns from; and what cannot score is refused before any work."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
)

from rankpo_fast import RankPOTrainer, cli
from rankpo_fast.commands import score
from rankpo_fast.data.groups import GroupRow, read_scored
from rankpo_fast.errors import InputError
from rankpo_fast.model.reranker import Reranker

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
CONFIGS = {"bert": BertConfig, "llama": LlamaConfig}


def reranker(tokenizer, folder, kind="bert", labels=1, **more):
    """A cross-encoder with weights large enough that scores differ."""
    config = CONFIGS[kind](
        vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5, **SHAPE, **{"max_position_embeddings": 64, **more},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cross_encoder(tiny_tokenizer, tmp_path):
    return reranker(tiny_tokenizer, tmp_path / "reranker")


@pytest.fixture
def run(cross_encoder, tmp_path):
    """run(rows, *flags) -> exit code; rows go to rows.jsonl, scores to scored.jsonl."""

    def command(rows, *flags):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"--reranker": cross_encoder, "--train_data": path,
                 "--output_file": tmp_path / "scored.jsonl", "--device": "cpu"}  # fmt: skip
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        return cli.main(["score", *(str(word) for pair in given.items() for word in pair)])

    return command


PAIRS = [
    ("a nurse", "the nurse in Lyon cares for patients at night"),
    ("we are looking for a teacher of mathematics", "a"),
    ("a", "a senior data engineer in Berlin builds pipelines " * 20),  # longer than 64 tokens
    ("a nurse", "software developer with ten years of experience in Python"),
]


@pytest.mark.parametrize(
    ("kind", "labels"), [("bert", 1), ("bert", 2), ("llama", 1)], ids=["one", "two", "decoder"]
)
def test_a_score_is_that_of_the_pair_alone(kind, labels, tiny_tokenizer, tmp_path):
    """In batches of a few tokens, padded to others of like length, and in one of all."""
    folder = reranker(tiny_tokenizer, tmp_path / "reranker", kind, labels)
    ours = Reranker.load(str(folder), device=CPU)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = []
    for pair in PAIRS:
        inputs = tokenizer(*pair, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**inputs).logits[0]
        want.append(logits[0] if labels == 1 else logits[1] - logits[0])
    want = torch.stack(want)
    assert want.std() > 1e-3
    for budget in (64, 4096):
        got, truncated = ours.scores(PAIRS, max_tokens=budget)
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-5)
        assert truncated == 1


KINDS = [
    {"query": "a nurse", "positives": ["nurse"], "negatives": ["cook", "nurse", "pilot"]},
    {"query": "a nurse", "passage1": "nurse", "passage2": "cook", "preferred": "B"},
    {"query": "a cook", "passages": ["cook", "pilot", "baker"], "grades": [2, 0, 1]},
    {"query": "a cook", "passages": ["cook", {"title": "a", "text": "b"}], "scores": [0, 1]},
]


def test_rows_of_every_kind_become_a_teachers(run, cross_encoder, tmp_path, capsys, monkeypatch):
    """Whatever rows go through the model together."""
    monkeypatch.setattr(score, "PAIRS_AT_ONCE", 4)
    assert run(KINDS) == 0
    assert "4 rows with 10 scores in" in capsys.readouterr().out
    rows = read_scored(str(tmp_path / "scored.jsonl"))
    passages = [("nurse", "cook", "pilot"), ("cook", "nurse"), ("cook", "pilot", "baker"),
                ("cook", "a b")]  # fmt: skip
    assert [row.passages for row in rows] == passages
    ours = Reranker.load(str(cross_encoder), device=CPU)
    for row in rows:
        alone, _ = ours.scores([(row.query, passage) for passage in row.passages])
        torch.testing.assert_close(torch.tensor(row.values), torch.tensor(alone))


def test_a_reranker_is_distilled(run, tiny_llama_dir, tmp_path):
    """From rows of stage 1 to a student that agrees more with the teacher."""
    assert run([{**row, "query": f"{row['query']} {i}"} for i in range(4) for row in KINDS]) == 0
    trainer = RankPOTrainer(
        str(tiny_llama_dir), teacher_data=tmp_path / "scored.jsonl", output_dir=tmp_path / "out",
        max_steps=12, learning_rate=3e-3, per_device_train_batch_size=16, bf16=False,
        device="cpu", logging_steps=1, no_cache=True,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["teacher/loss"] < 0.7 * lines[0]["teacher/loss"]


def test_scores_are_the_same_each_time_and_a_bad_row_leaves_nothing(run, tmp_path, capsys):
    assert run(KINDS) == 0
    output = tmp_path / "scored.jsonl"
    first = output.read_bytes()
    assert run(KINDS) == 0 and output.read_bytes() == first
    output.unlink()
    capsys.readouterr()
    assert run([*KINDS, {"query": "a", "passages": []}]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:5: no passages: the list is empty" in said and "Loading" not in said
    assert not output.exists()


def spoiled(change):
    def make(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))

    return make


REFUSED = {
    "labels": (
        spoiled({"id2label": {str(i): str(i) for i in range(3)}, "label2id": {}}),
        "its head has 3 labels",
    ),
    "code": (
        spoiled({"auto_map": {"AutoModelForSequenceClassification": "evil.Model"}}),
        "code of model directories is never run",
    ),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "neither model.safetensors nor",
    ),
    "config": (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
    "shape": (spoiled({"hidden_size": 64}), "no cross-encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_cross_encoder_is_refused(name, cross_encoder, run, capsys, tmp_path):
    change, said = REFUSED[name]
    change(cross_encoder)
    assert run(KINDS) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "scored.jsonl").exists()


def test_an_encoder_without_a_head_is_refused(run, tiny_bert_dir, capsys):
    assert run(KINDS, "--reranker", tiny_bert_dir) == 2
    assert "no cross-encoder: 2 tensors that one has are not there" in capsys.readouterr().err


def test_files_outside_the_directory_are_not_read(cross_encoder, run, capsys, tmp_path):
    shutil.move(cross_encoder / "model.safetensors", tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../model.safetensors"}}
    (cross_encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(KINDS) == 2
    assert "lies outside the directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_length", 65], "--max_length 65 is more than the 64 positions"),
        (["--max_length", 3], "--max_length 3 leaves no room for text"),
        (["--max_tokens_per_micro_batch", 63], "63 is less than a pair may have: give 64 or more"),
        (["--split", "train"], "--split needs --train_data to be a BEIR directory"),
        (["--no_cache", "true"], "unknown flag --no_cache"),
    ],
)
def test_bad_flags_are_named(flags, said, run, capsys):
    assert run(KINDS, *flags) == 2
    assert said in capsys.readouterr().err


def test_what_is_read_is_not_written_over(run, tmp_path, cross_encoder, capsys):
    for place in (tmp_path / "rows.jsonl", cross_encoder / "config.json"):
        assert run(KINDS, "--output_file", place) == 2
        assert "is also read" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_named(cross_encoder):
    ours = Reranker.load(str(cross_encoder), device=CPU)
    with torch.no_grad():
        ours.model.classifier.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="4 scores are not finite, the first of query 'a nurse'"):
        ours.scores(PAIRS)


def test_rows_of_one_passage_are_written_and_left_out_of_training(run, tmp_path):
    run([{"query": "a", "passages": ["b"]}, KINDS[1]])
    with pytest.warns(UserWarning, match="1 of 2 rows are left out: they have one passage"):
        [row] = read_scored(str(tmp_path / "scored.jsonl"))
    assert isinstance(row, GroupRow) and row.query == "a nurse"
