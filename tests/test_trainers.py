"""Training, encoding, mining and measuring from Python: what the command line does, as objects."""

import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast import (
    Callback,
    ContrastiveTrainer,
    Encoder,
    InputError,
    RankPOTrainer,
    TrainingStopped,
    evaluate,
    mine_hard_negatives,
    search,
)
from rankpo_fast.cli import main
from rankpo_fast.config import ComputeConfig, ContrastiveLossConfig, ModelConfig, TrainingConfig

TRADES, PLACES = ("nurse", "teacher", "cook", "pilot"), ("Berlin", "Lyon", "Oslo")
CORPUS = [f"{trade} from {place}" for trade in TRADES for place in PLACES]
ROWS = [
    {
        "query": f"we look for a {trade} in {place}",
        "positives": [f"{trade} from {place}"],
        "negatives": [text for text in CORPUS if trade not in text],
    }
    for trade in TRADES
    for place in PLACES
]
PAIRS = [
    {
        "query": row["query"],
        "passage1": f"junior {row['positives'][0]}",
        "passage2": f"senior {row['positives'][0]}",
        "preferred": "B",
    }
    for row in ROWS
]
QUERIES = [
    {"query": {"text": row["query"]}, "positives": {"index": [number]}}
    for number, row in enumerate(ROWS)
]
DOCUMENTS = [{"text": text} for text in CORPUS]
SMALL = {
    "per_device_train_batch_size": 4, "num_negatives": 2, "learning_rate": 3e-3, "max_steps": 4,
    "logging_steps": 1, "device": "cpu", "bf16": False, "gradient_checkpointing": False,
    "no_cache": True,
}  # fmt: skip
OF_PAIRS = {name: value for name, value in SMALL.items() if name != "num_negatives"}


def contrastive(model, rows, output_dir, **settings) -> ContrastiveTrainer:
    return ContrastiveTrainer(model, rows, output_dir=output_dir, **{**SMALL, **settings})


def written(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_dataset(rows, path):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def weights_of_the_command_line(tiny_bert_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("command")
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name != "no_cache"]
    rows = written(path / "rows.jsonl", ROWS)
    command = ["contrastive", f"--model_name_or_path={tiny_bert_dir}", f"--train_data={rows}"]
    assert main([*command, *flags, "--no_cache", f"--output_dir={path / 'out'}"]) == 0
    return load_file(path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    "given",
    [lambda rows, path: rows, lambda rows, path: tuple(rows), lambda rows, path: iter(rows),
     lambda rows, path: Path(written(path, rows)), lambda rows, path: [written(path, rows)],
     lambda rows, path: [rows[:5], written(path, rows[5:])], as_dataset],
    ids=["list", "tuple", "iterator", "path", "paths", "list-and-path", "dataset"],
)  # fmt: skip
def test_rows_wherever_they_are_train_the_weights_of_the_command_line(
    given, tiny_bert_dir, tmp_path, weights_of_the_command_line
):
    rows = given(ROWS, tmp_path / "some.jsonl")
    result = contrastive(tiny_bert_dir, rows, tmp_path / "out").train()
    assert result.output_dir == tmp_path / "out" and result.steps == 4
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), weights_of_the_command_line
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_from_rows_to_an_aligned_model(tiny_bert_dir, tmp_path):
    """Both stages with mining between them, on one Encoder that never leaves memory."""
    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu", max_passage_length=64)
    first = contrastive(encoder, ROWS, tmp_path / "1", query_data=QUERIES, corpus_data=DOCUMENTS)
    before = first.evaluate().figures
    result = first.train()
    assert result.encoder is first.encoder is encoder and not encoder.training
    assert [line["step"] for line in result.history if "loss" in line] == [1, 2, 3, 4]
    assert result.figures == first.evaluate().figures != before

    mined = mine_hard_negatives(
        encoder, ROWS, DOCUMENTS, num_negatives=3, search_range=(0, 9), no_cache=True
    )
    assert mined.rows[0].keys() == {"query", "positives", "negatives", "mined"}
    assert all(len(row["negatives"]) == 3 for row in mined.rows)
    contrastive(encoder, mined.rows, tmp_path / "2").train()

    second = RankPOTrainer(
        encoder, PAIRS, output_dir=tmp_path / "3", reference_free=False, loss_type="hinge",
        preference_data=PAIRS, replay_data=mined.rows, **{**OF_PAIRS, "max_steps": 12},
    )  # fmt: skip
    aligned = second.train().figures["alignment"]
    assert aligned > evaluate(str(tmp_path / "2"), preference_data=PAIRS).figures["alignment"]

    second.save(tmp_path / "saved")
    reloaded = Encoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert reloaded.settings.max_passage_length == 64
    torch.testing.assert_close(reloaded.encode(CORPUS), encoder.encode(CORPUS))


def test_search_finds_the_nearest_of_encoded_texts(tiny_bert_dir):
    encoder = Encoder.from_pretrained(str(tiny_bert_dir), device="cpu")
    passages = encoder.encode([*CORPUS, " "])
    assert passages.shape == (len(CORPUS) + 1, encoder.dim)
    torch.testing.assert_close(passages[:-1].norm(dim=1), torch.ones(len(CORPUS)))
    assert not passages[-1].any()
    torch.testing.assert_close(encoder.encode(CORPUS[3]), passages[3])
    scores, rows = search(passages[:5], passages, k=2)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert encoder.encode([]).shape == (0, encoder.dim)
    with pytest.raises(InputError, match="role must be query or passage, got 'document'"):
        encoder.encode(CORPUS, role="document")
    with pytest.raises(InputError, match=r"texts\[1\] must be text, got None"):
        encoder.encode(["a", None])
    with pytest.raises(InputError, match=r"must be \[M, D\] and \[N, D\], got \[2\] and"):
        search(torch.zeros(2), passages, k=1)


def test_settings_as_dataclasses_and_keywords_which_go_first(tiny_bert_dir, tmp_path):
    trainer = ContrastiveTrainer(
        tiny_bert_dir,
        ROWS,
        TrainingConfig(output_dir=tmp_path / "out", max_steps=9, learning_rate=1e-4),
        ContrastiveLossConfig(temperature=0.05),
        ComputeConfig(no_cache=True),
        max_steps=1,
        bf16=False,
    )
    result = trainer.train()
    assert result.steps == 1
    record = json.loads((result.output_dir / "training.json").read_text())["settings"]
    assert record["--temperature"] == 0.05 and record["--learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        ({"lr": 1e-4}, "lr", r"has no setting lr \(did you mean learning_rate\?\)"),
        ({"learning_rat": 1}, "learning_rat", r"learning_rat \(did you mean learning_rate\?\)"),
        ({"max_length": 8}, "max_length", "did you mean max_query_length and max_passage_length"),
        ({"beta": 2.0}, "beta", "ContrastiveTrainer has no setting beta"),
        ({"learning_rate": "1e-5"}, "learning_rate", "must be a number, got '1e-5'"),
        ({"learning_rate": -1}, "learning_rate", "--learning_rate must be > 0.*, got -1"),
        ({"seed": 1.5}, "seed", "--seed must be a whole number, got 1.5"),
        ({"packing": "yes"}, "packing", "--packing must be true or false, got 'yes'"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type", "must be one of cosine, linear"),
        ({"output_dir": None}, "output_dir", "--output_dir must be text, got None"),
    ],
)  # fmt: skip
def test_a_setting_at_fault_is_named(settings, name, said, tiny_bert_dir):
    with pytest.raises(InputError, match=said) as fault:
        ContrastiveTrainer(tiny_bert_dir, ROWS, **{"output_dir": "unused", **settings})
    assert fault.value.name == name


def test_values_of_other_libraries_are_as_good_as_pythons(tiny_bert_dir, tmp_path):
    """To the end: a value of numpy's must not break what is written last."""
    trainer = contrastive(
        tiny_bert_dir, ROWS, tmp_path / "out", learning_rate=np.float64(1e-3), seed=np.int64(3),
        matryoshka_dims=np.array([8, 32]), cutoffs=range(1, 3), bf16=np.False_, max_steps=1,
        temperature=torch.tensor(0.05), query_data=QUERIES, corpus_data=DOCUMENTS,
    )  # fmt: skip
    assert "--learning_rate | 0.001" in (trainer.train().output_dir / "README.md").read_text()


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "bf16"])
def test_one_and_zero_are_true_and_false(setting, tiny_bert_dir):
    for value in (1, 0):
        made = ContrastiveTrainer(tiny_bert_dir, ROWS, output_dir="unused", **{setting: value})
        assert getattr(made._configs[ModelConfig], setting) is bool(value)


def test_a_training_leaves_nothing_but_weights_on_an_encoder(tiny_bert_dir, tmp_path):
    class Breaking(Callback):
        def on_log(self, step, metrics):
            raise RuntimeError("broken")

    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu")
    settings = {
        "gradient_checkpointing": True, "save_dtype": "bfloat16", "bf16": True, "mlp_chunk": 16,
        "temperature_learning_rate": 0.1,
    }  # fmt: skip
    contrastive(encoder, ROWS, tmp_path / "1", **settings).train()
    trainer = contrastive(encoder, ROWS, tmp_path / "2", callbacks=[Breaking()], **settings)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert trainer.encoder is encoder and not encoder.training
    assert not encoder.layers.checkpointed and not encoder.bf16 and encoder.log_scale is None
    assert encoder.layers.mlp_chunk is None
    assert not any("feed_forward_chunk" in vars(module) for module in encoder.backbone.modules())
    assert encoder.save_dtype == torch.float32
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_encoder_that_was_looked_at_is_the_one_that_is_trained(tiny_bert_dir, tmp_path):
    trainer = contrastive(tiny_bert_dir, ROWS, tmp_path / "out")
    encoder = trainer.encoder
    frozen = encoder.backbone.embeddings.word_embeddings.weight.requires_grad_(False)
    before = frozen.clone()
    assert trainer.train().encoder is trainer.encoder is encoder
    assert torch.equal(frozen, before)
    with pytest.raises(InputError, match="holds a finished run"):
        trainer.train()
    assert trainer.encoder is encoder


def test_the_same_trainer_trains_the_same_model_again(tiny_bert_dir, tmp_path):
    trainer = contrastive(tiny_bert_dir, ROWS, tmp_path / "out", overwrite_output_dir=True)
    first, second = (trainer.train().encoder.encode(CORPUS) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_missing_or_given_twice_is_named(tiny_bert_dir):
    with pytest.raises(InputError, match="ContrastiveTrainer needs output_dir: Where the model"):
        ContrastiveTrainer(tiny_bert_dir, ROWS)
    with pytest.raises(InputError, match="TrainingConfig is given twice"):
        ContrastiveTrainer(tiny_bert_dir, ROWS, TrainingConfig("a"), TrainingConfig("b"))
    with pytest.raises(InputError, match="takes settings as objects of ModelConfig.* got str"):
        ContrastiveTrainer(tiny_bert_dir, ROWS, "outputs")
    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu")
    with pytest.raises(InputError, match="pooling was settled when the Encoder was") as fault:
        ContrastiveTrainer(encoder, ROWS, output_dir="unused", pooling="cls")
    assert fault.value.name == "pooling"
    with pytest.raises(InputError, match="special_tokens needs the model by its name"):
        ContrastiveTrainer(encoder, ROWS, output_dir="unused", special_tokens=["<x>"])
    with pytest.raises(InputError, match="device cuda, but the Encoder is on cpu"):
        ContrastiveTrainer(encoder, ROWS, output_dir="unused", device="cuda")
    with pytest.raises(InputError, match=r"callbacks\[0\] must be a Callback, got type"):
        ContrastiveTrainer(encoder, ROWS, output_dir="unused", callbacks=[Callback])
    with pytest.raises(InputError, match="nothing to measure"):
        evaluate(encoder)
    with pytest.raises(InputError, match="one file, or one list of rows, .* got .{,120}$"):
        evaluate(encoder, query_data=QUERIES, corpus_data=CORPUS * 99)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], {"query": "a"}], r"train_data\[1\]: missing key"),
        ([ROWS[0], {**ROWS[0], "query": 3}], r'train_data\[1\]: "query" must be a string, got'),
        ([ROWS[0], {**ROWS[0], "positives": [""]}], r'train_data\[1\]: "positives\[0\]" is empty'),
        ([ROWS[:1], [{"query": "a"}]], r"train_data\[1\]\[0\]: missing key"),
        (ROWS[0], "--train_data must be a list of rows, got one row"),
        ([{"query": "a", 3: "b"}], r"train_data\[0\]: keys must be text, got 3"),
        ({"train": ROWS, "test": ROWS}, "a dictionary of data sets: give one of train, test"),
        ([3, ROWS], r"--train_data\[0\]: 3 is no path"),
        (3, "--train_data: 3 is no path, no list of rows and no data set"),
        ([ROWS[0], 3], r"train_data\[1\]: a row must be an object, got a number"),
        ([], "--train_data must be at least one file or row"),
    ],
    ids=["key", "type", "value", "second-list", "row", "number-as-key", "splits",
         "number-before-a-list", "number", "number-behind-a-row", "empty"],
)  # fmt: skip
def test_rows_of_a_wrong_shape_are_named(rows, said, tiny_bert_dir, tmp_path):
    with pytest.raises(InputError, match=said):
        contrastive(tiny_bert_dir, rows, tmp_path / "out").train()
    assert not (tmp_path / "out").exists()


class Listening(Callback):
    def __init__(self, end_at: int | None = None):
        self.heard, self.end_at = [], end_at

    def on_log(self, step, metrics):
        self.heard.append(("log", step))
        assert metrics["loss"] > 0
        return step == self.end_at

    def on_evaluation(self, step, figures):
        self.heard.append(("evaluation", step))
        assert "ndcg@20" in figures

    def on_checkpoint(self, step, path):
        self.heard.append(("checkpoint", step))
        assert (path / "manifest.json").exists()


def test_callbacks_hear_of_the_training_and_may_end_it(tiny_bert_dir, tmp_path):
    own = Listening(end_at=3)
    result = contrastive(
        tiny_bert_dir, ROWS, tmp_path / "out", max_steps=6, eval_steps=2, save_steps=2,
        query_data=QUERIES, corpus_data=DOCUMENTS, callbacks=[own],
    ).train()  # fmt: skip
    assert own.heard.index(("log", 2)) < own.heard.index(("checkpoint", 2))  # when it is written
    own.heard.remove(("checkpoint", 2))
    assert own.heard == [
        ("log", 1), ("log", 2), ("evaluation", 2), ("log", 3), ("evaluation", 3)
    ]  # fmt: skip
    assert result.steps == 3 and (result.output_dir / "model.safetensors").exists()


def test_a_stop_saves_and_raises_and_the_run_goes_on_to_the_same_weights(tiny_bert_dir, tmp_path):
    class Stopping(Callback):
        def on_log(self, step, metrics):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = contrastive(tiny_bert_dir, ROWS, tmp_path / "whole").train()
    stopped = contrastive(tiny_bert_dir, ROWS, tmp_path / "out", callbacks=[Stopping()])
    with pytest.raises(TrainingStopped, match="after step 2, which is saved") as stop:
        stopped.train()
    assert (stop.value.step, stop.value.exit_code) == (2, 143)
    with pytest.raises(InputError, match="the training has not ended"):
        stopped.encoder.encode(CORPUS)
    trainer = contrastive(tiny_bert_dir, ROWS, tmp_path / "out", resume="newest")
    result = trainer.train()
    assert [line["step"] for line in result.history] == [1, 2, 3, 4]
    texts = whole.encoder.encode(CORPUS)
    assert torch.equal(result.encoder.encode(CORPUS), texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = contrastive(tiny_bert_dir, ROWS, tmp_path / "out", resume=True).train()
    assert again.encoder is None and again.steps == 4
    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu")
    other = contrastive(encoder, ROWS, tmp_path / "given")
    other.train()
    trained, given = encoder.encode(CORPUS), Encoder.from_pretrained(tiny_bert_dir, device="cpu")
    contrastive(given, ROWS, tmp_path / "given", resume=True).train()
    assert torch.equal(given.encode(CORPUS), trained)
    with pytest.raises(InputError, match="content of --train_data differs"):
        contrastive(tiny_bert_dir, ROWS[1:], tmp_path / "out", resume="newest").train()


def test_an_encoder_of_other_weights_is_no_resumption(tiny_bert_dir, tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_bert_dir, device="cpu")
    contrastive(encoder, ROWS, tmp_path / "out", max_steps=1).train()
    with pytest.raises(InputError, match="content of --model_name_or_path differs"):
        contrastive(encoder, ROWS, tmp_path / "out", max_steps=1, resume="newest").train()
