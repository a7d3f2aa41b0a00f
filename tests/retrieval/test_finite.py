"""Vectors of NaN or inf end every command with exit code 2, name their texts, write nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankpo_fast.cli import main
from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.packing import pack
from rankpo_fast.errors import NotFiniteVectors
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder

WEIGHT = "embed_tokens.weight"
TEXTS = ["a calm text", "this is broken: #", "another calm one"]


@pytest.fixture(scope="module")
def broken_dir(tiny_llama_dir, tiny_tokenizer, tmp_path_factory):
    """NaN in the row of "#", which is not among the tokens that loading tries."""
    directory = shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("broken") / "model")
    weights = load_file(directory / "model.safetensors")
    weights[WEIGHT][tiny_tokenizer("#")["input_ids"][-2]] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def said(broken_dir, tmp_path, capsys):
    """The message of a command that is refused."""

    def run(name, *flags):
        model = ["--model_name_or_path", broken_dir, "--cache_dir", tmp_path / "cache"]
        assert main([name, *map(str, [*model, *flags])]) == 2
        return capsys.readouterr().err.partition("error: ")[2]

    return run


def test_encode_names_file_line_and_text(said, tmp_path):
    path = rows(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    message = said("encode", "--input", path, "--output", tmp_path / "x.npy")
    assert f'1 of 3 texts have vectors that are not finite: {path}:2 "this is broken' in message
    assert f"nor are weights of the model: {WEIGHT}" in message
    assert not (tmp_path / "x.npy").exists()


def test_evaluate_names_a_document_by_its_line_whatever_lies_beside_it(said, tmp_path):
    (tmp_path / "a.jsonl").write_text("half a li")
    (tmp_path / "corpus.jsonl.bak").write_bytes(b"\xff")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q\t1\t1\n")
    documents = ({"_id": i, "title": "on", "text": text} for i, text in enumerate(TEXTS))
    corpus = rows(tmp_path / "corpus.jsonl", *documents)
    rows(tmp_path / "queries.jsonl", {"_id": "q", "text": "calm"})
    message = said("evaluate", "--query_data", tmp_path, "--output", f"{tmp_path}.json")
    assert f'1 of 3 texts have vectors that are not finite: {corpus}:2 "on this is' in message
    assert not Path(f"{tmp_path}.json").exists()


def test_mine_and_reference_margins_name_a_text_of_a_row(said, tmp_path):
    row = {"query": "a", "positives": ["b"], "negatives": TEXTS}
    train = rows(tmp_path / "train.jsonl", row)
    message = said("mine", "--train_data", train, "--output_file", tmp_path / "mined.jsonl")
    assert f"{train}:1 " in message and not (tmp_path / "mined.jsonl").exists()
    pairs = [{"query": "a", "passage1": text, "passage2": "b", "preferred": "A"} for text in TEXTS]
    train = rows(tmp_path / "pairs.jsonl", *pairs)
    flags = ["--reference_free", "false", "--output_dir", tmp_path / "out", "--max_steps", 1]
    message = said("rankpo", "--train_data", train, *flags, "--bf16", "false")
    assert f"{train}:2 " in message


def test_a_place_that_cannot_be_read_any_more_does_not_replace_the_message(tmp_path):
    path = rows(tmp_path / "texts.jsonl", {"text": "a"}, {"text": "b"})
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nhalf a li')
    error = NotFiniteVectors(2, 3, ["a", "b"], [])
    paths = [tmp_path / "gone.jsonl", tmp_path, tmp_path / "bad.jsonl", path]
    assert f'{paths[2]}:1 "a", {path}:2 "b"' in str(error.located(paths))


def test_many_texts_are_counted_and_weights_that_are_finite_are_not_blamed(tiny_llama_dir):
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    encoder.backbone.norm.register_forward_hook(lambda *parts: parts[-1] * float("inf"))
    texts = [f"text {i}" for i in range(5)]
    with pytest.raises(NotFiniteVectors) as caught:
        encode_texts(encoder, encoder.tokenize_passages(texts), texts=texts)
    message = str(caught.value)
    assert message.startswith("5 of 5 texts") and '"text 2" and 2 more' in message
    assert message.endswith("weights are finite, but its states overflow")


def test_finite_vectors_whose_length_overflows_are_no_zeros(tiny_llama_dir):
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    encoder.backbone.norm.register_forward_hook(lambda *parts: parts[-1] * 1e25)
    assert encoder(pack(encoder.tokenize_passages(["a"]), torch.tensor([0]))).isfinite().all()
    with pytest.raises(NotFiniteVectors, match="2 of 2 texts .* its states overflow"):
        encode_texts(encoder, encoder.tokenize_passages(["a", "b"]))


def test_vectors_of_zeros_are_counted(tiny_llama_dir):
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    encoder.backbone.norm.register_forward_hook(lambda *parts: parts[-1] * 0)
    with pytest.warns(UserWarning, match="2 of 2 texts have a vector of zeros"):
        vectors = encode_texts(encoder, encoder.tokenize_passages(["a", "b"]))
    assert not vectors.any()
