"""Absurd input is refused with a line that names it, at once and in little memory."""

import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import rankpo_fast.commands.contrastive  # in the parent of all forks
import rankpo_fast.commands.encode  # noqa: F401
from rankpo_fast.model import load
from support.bounded import Outcome, command

MOST = 200  # MiB beyond the imports
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def model(tiny_llama_dir, tmp_path):
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def encode(model, tmp_path):
    """encode(rows=a file, before=...) -> how the command ended."""

    def run(rows: Path | str | None = None, **options) -> Outcome:
        if rows is None:
            rows = tmp_path / "rows.jsonl"
            rows.write_text('{"text": "a nurse"}\n')
        return command(
            *("encode", "--model_name_or_path", model, "--input", rows, "--text_key", "text"),
            *("--output", tmp_path / "vectors.npy", "--no_cache", "true", "--device", "cpu"),
            **options,
        )

    return run


def refused(outcome: Outcome, said: str) -> bool:
    assert outcome.code == 2, outcome.said
    assert said in outcome.complaint and outcome.complaint.startswith("rankpo-fast: error: ")
    assert "Traceback" not in outcome.said
    return outcome.mebibytes < MOST


def config(**changes):
    def change(model):
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written(name, content):
    return lambda model: (model / name).write_text(content)


def shards(files):
    def change(model):
        (model / "model.safetensors").rename(model / "1")
        index = {"weight_map": dict.fromkeys(files, "1"), "metadata": {}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def pipe(name):
    def change(model):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return change


def cut(model):
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    "change, said",
    [
        pytest.param(written("config.json", DEEP), "config.json: maximum recursion", id="config"),
        pytest.param(written("modules.json", DEEP), "modules.json: malformed", id="modules"),
        pytest.param(
            written("tokenizer_config.json", DEEP), "tokenizer_config.json", id="tokenizer"
        ),
        pytest.param(config(num_hidden_layers=300_000), "is 300,000", id="layers"),
        pytest.param(config(hidden_size=10**9), "parameters, but the weights", id="width"),
        pytest.param(config(vocab_size=10**10), "parameters, but the weights", id="vocabulary"),
        pytest.param(config(num_attention_heads=0), "modulo by zero", id="no-heads"),
        pytest.param(shards(["a"]), "the shard '1' is no .safetensors", id="numeric-shards"),
        pytest.param(pipe("tokenizer.json"), "tokenizer.json: is no ordinary", id="pipe"),
        pytest.param(cut, "cut off, or still being written", id="cut-weights"),
    ],
)
def test_an_absurd_model_is_refused_at_once(change, said, model, encode):
    change(model)
    assert refused(encode(), said)


def test_a_line_without_an_end_is_refused_by_its_length(encode, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with rows.open("wb") as file:
        file.write(b'{"text": "a nurse"}\n')
        file.truncate(2**34)  # 16 GiB of zeros, on no disk
    assert refused(encode(rows), "rows.jsonl:2: a line of more than 32 MiB")


def test_a_deep_row_is_refused_by_its_line(encode, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ' + DEEP)
    assert refused(encode(tmp_path / "rows.jsonl"), "rows.jsonl:1: unusable JSON")


def test_a_text_of_4_mb_is_cut_before_the_tokenizer_and_said(encode, tmp_path):
    """It takes what a text at the limit takes, and at most four copies of its own bytes."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a nurse " * 2**16}) + "\n")
    at_limit = encode(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a nurse " * 2**19}) + "\n")
    outcome = encode(tmp_path / "rows.jsonl")
    assert outcome.code == 0 and "1 of 1 texts have more than 524,288 characters" in outcome.said
    assert outcome.mebibytes < at_limit.mebibytes + 16


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_what_never_ends_is_no_data(name, encode, tmp_path):
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    said = {"pipe": "is a pipe that nobody writes into", "/dev/zero": "is a device"}[name]
    assert refused(encode(tmp_path / name), said)  # an absolute name stays as it is


def test_weights_that_are_cut_while_they_load_are_said(model, encode):
    def before():
        unmap = load._unmap
        load._unmap = lambda backbone: (unmap(backbone), cut(model))

    assert refused(encode(before=before), "cut off, or still being written")


def test_weights_that_are_cut_later_end_no_process(model):
    """Reading what is mapped, and gone from the file, is SIGBUS: the end without a word."""
    from rankpo_fast.config import EncoderConfig

    encoder = load.load_encoder(
        EncoderConfig(str(model), pooling="last"), device=torch.device("cpu")
    )
    os.truncate(model / "model.safetensors", 100)
    maps = Path("/proc/self/maps").read_text()
    assert str(model) not in maps
    assert all(bool(p.isfinite().all()) for p in encoder.parameters())


# --- nothing left: room on the disk, a place for temporary files, memory ---


@pytest.fixture
def train(model, tmp_path):
    rows = tmp_path / "train.jsonl"
    row = {"query": "a nurse", "positives": ["nurse"], "negatives": ["a cook"]}
    rows.write_text("".join(json.dumps(row | {"query": f"a nurse {i}"}) + "\n" for i in range(8)))

    def run(*flags, **options) -> Outcome:
        return command(
            *("contrastive", "--model_name_or_path", model, "--train_data", rows),
            *("--output_dir", tmp_path / "out", "--no_cache", "true", "--device", "cpu"),
            *("--max_steps", 2, "--save_steps", 1, "--num_negatives", 1, "--bf16", "false"),
            *flags,
            **options,
        )

    return run


def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))


def no_temporary_directory():
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]


def test_a_full_disk_ends_training_in_one_line_and_no_half_model(train, tmp_path):
    """Of files of more than 16 kB, as the weights and moments are, none can be written."""
    outcome = train(before=limit)
    assert outcome.code == 1 and "Traceback" not in outcome.said, outcome.said
    assert "the checkpoint of step 1 could not be written" in outcome.said
    assert outcome.complaint.startswith("rankpo-fast: error: ")
    assert "File too large" in outcome.complaint
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert left == {"training.json", "metrics.jsonl", "checkpoints"}


def test_without_a_temporary_directory_nothing_is_cached_and_said(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a nurse"}\n')
    outcome = command(
        *("encode", "--model_name_or_path", model, "--input", tmp_path / "rows.jsonl"),
        *("--text_key", "text", "--output", tmp_path / "v.npy", "--cache_dir", tmp_path / "cache"),
        *("--device", "cpu"),
        before=no_temporary_directory,
    )
    assert outcome.code == 0 and "cannot be used (No usable temporary directory" in outcome.said


def test_no_memory_ends_in_one_line(train, model, tmp_path):
    config(vocab_size=10**11)(model)  # 12 TiB of weights
    outcome = train("--from_scratch", "true")
    assert outcome.code == 1 and "Traceback" not in outcome.said, outcome.said
    assert outcome.complaint.startswith("rankpo-fast: error: out of memory: ")
    assert not (tmp_path / "out").exists()
