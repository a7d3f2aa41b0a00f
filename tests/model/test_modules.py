"""Directories of sentence-transformers: vectors equal to theirs, or an error that names the cause.

Version 6 writes them here; older layouts are made of these by hand.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
base_modules = pytest.importorskip("sentence_transformers.base.modules")

TEXTS = ["A Nurse in LYON", "étude", "x", "Teacher of maths " * 20]
CPU = torch.device("cpu")
CLASSIC = "sentence_transformers.models"
OPTIONS = "config_sentence_transformers.json"


def load(directory, **settings):
    return load_encoder(EncoderConfig(str(directory), **settings), device=CPU)


def ours(directory, **settings):
    """Unit vectors of the texts as queries and as passages, [2, n, D]."""
    encoder = load(directory, **settings)
    tables = encoder.tokenize_queries(TEXTS), encoder.tokenize_passages(TEXTS)
    return torch.stack([encode_texts(encoder, table, max_tokens=512) for table in tables])


def theirs(directory):
    model = library.SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    vectors = [encode(TEXTS, convert_to_tensor=True)
               for encode in (model.encode_query, model.encode_document)]  # fmt: skip
    return F.normalize(torch.stack(vectors), dim=-1)


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | changes))


@pytest.fixture
def directories(tiny_bert_dir, tiny_llama_dir):
    return {"bert": tiny_bert_dir, "llama": tiny_llama_dir}


@pytest.fixture
def make(directories, tmp_path):
    """A directory as the library writes it: backbone, pooling, further modules, model options."""

    def write(*others, backbone="bert", pooling="mean", transformer=None, pooled=None, **options):
        parts = [base_modules.Transformer(str(directories[backbone]), **(transformer or {}))]
        if pooling is not None:
            parts.append(modules.Pooling(32, pooling, **(pooled or {})))
        model = library.SentenceTransformer(modules=[*parts, *others], device="cpu", **options)
        model.save(str(tmp_path / "theirs"), create_model_card=False)
        return tmp_path / "theirs"

    return write


# --- equal ---

PROMPTS = {"query": "Find: ", "document": "Text: "}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("written", "backbone"),
    [
        pytest.param({"pooling": "mean"}, "bert", id="mean"),
        pytest.param({"pooling": "cls"}, "bert", id="cls"),
        pytest.param({"pooling": "lasttoken"}, "llama", id="last"),
        pytest.param({"pooling": "mean_sqrt_len_tokens"}, "bert", id="same-direction-as-the-mean"),
        pytest.param({"prompts": PROMPTS}, "llama", id="prompts"),
        pytest.param({"prompts": PROMPTS, "default_prompt_name": "query"}, "bert", id="a-default"),
        pytest.param({"transformer": {"max_seq_length": 9}}, "bert", id="length"),
        pytest.param(
            {"transformer": {"query_length": 5, "document_length": 9}}, "bert", id="two-lengths"
        ),
    ],
)
def test_what_version_6_writes_gives_equal_vectors(make, written, backbone):
    directory = make(backbone=backbone, **written)
    torch.testing.assert_close(ours(directory), theirs(directory), rtol=0, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_modules_that_change_no_direction_are_taken(make, similarity):
    others = [modules.Dropout(0.5), base_modules.Normalize()]
    directory = make(*others, similarity_fn_name=similarity)
    with pytest.warns(UserWarning, match="2_Dropout: the dropout of vectors is left out in"):
        vectors = ours(directory)
    torch.testing.assert_close(vectors, theirs(directory), rtol=0, atol=1e-5)


def classic(directory, tmp_path):
    """The directory in the layout of version 2."""
    old = tmp_path / "classic"
    (old / "1_Pooling").mkdir(parents=True)
    shutil.copytree(directory, old / "0_Transformer")
    kinds = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    content = [{"idx": i, "name": str(i), "path": path, "type": f"{CLASSIC}.{kind}"}
               for i, (kind, path) in enumerate(kinds)]  # fmt: skip
    (old / "modules.json").write_text(json.dumps(content))
    edit(old / "1_Pooling/config.json", word_embedding_dimension=32, pooling_mode_cls_token=True,
         pooling_mode_mean_tokens=False, pooling_mode_max_tokens=False)  # fmt: skip
    return old


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_the_layout_of_version_2_gives_equal_vectors(tiny_bert_dir, tmp_path, name):
    directory = classic(tiny_bert_dir, tmp_path)
    edit(directory / "0_Transformer" / name, max_seq_length=9, do_lower_case=False)
    torch.testing.assert_close(ours(directory), theirs(directory), rtol=0, atol=1e-5)


def cased_bert(directory):
    """Gives the directory a tokenizer whose class builds its own normalizer: it keeps case."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [*"ABCDEFGHIJKLMNOPQRSTUVWXYZé", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyzé")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(directory)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tokenizer", ["bert", "bpe"])
def test_do_lower_case_is_obeyed_and_survives_saving(tiny_bert_dir, tmp_path, tokenizer):
    """A BertTokenizer forgets the normalizer of its file; theirs loses the lower case so."""
    directory = classic(tiny_bert_dir, tmp_path)
    folder = directory / "0_Transformer"
    if tokenizer == "bert":
        cased_bert(folder)
    before = ours(directory)
    edit(folder / "sentence_bert_config.json", max_seq_length=40, do_lower_case=True)
    expected = theirs(directory)
    assert (before - expected).abs().max() > 1e-4
    torch.testing.assert_close(ours(directory), expected, rtol=0, atol=1e-5)
    load(directory).save(tmp_path / "saved")
    for vectors in (ours, theirs):
        torch.testing.assert_close(vectors(tmp_path / "saved"), expected, rtol=0, atol=1e-5)
    (tmp_path / "saved/rankpo_fast.json").unlink()
    torch.testing.assert_close(ours(tmp_path / "saved"), expected, rtol=0, atol=1e-5)


# --- refused, unless the backbone alone is asked for ---


def refused(directory, *parts):
    with pytest.raises(InputError) as error:
        load(directory)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("other", "written"),
    [
        pytest.param(lambda: base_modules.Dense(32, 8), {}, id="Dense"),
        pytest.param(lambda: modules.LayerNorm(32), {}, id="LayerNorm"),
        pytest.param(None, {"pooling": "max"}, id="max"),
        pytest.param(None, {"pooling": "weightedmean"}, id="weightedmean"),
        pytest.param(None, {"pooling": ("mean", "cls")}, id="cls"),
        pytest.param(None, {"pooled": {"include_prompt": False}}, id="include_prompt"),
        pytest.param(None, {"similarity_fn_name": "dot"}, id="similarity_fn_name 'dot'"),
        pytest.param(None, {"similarity_fn_name": "euclidean"}, id="euclidean"),
        pytest.param(None, {"truncate_dim": 8}, id="truncate_dim 8"),
        pytest.param(
            lambda: base_modules.Normalize("token_embeddings"), {}, id="module_input_name"
        ),
    ],
)
def test_what_makes_other_vectors_is_refused_by_name(make, request, other, written):
    name = request.node.callspec.id
    directory = make(*([other()] if other else []), **written)
    refused(directory, name, "--pooling")
    with pytest.warns(UserWarning, match="--pooling: left out of the model: .*" + name):
        assert load(directory, pooling="cls").settings.pooling == "cls"


def test_layers_before_the_pooling_are_refused_by_name(make, directories):
    others = [modules.WeightedLayerPooling(32, 2), modules.Pooling(32)]
    directory = make(
        *others, pooling=None, transformer={"config_kwargs": {"output_hidden_states": True}}
    )
    refused(directory, "WeightedLayerPooling", "--pooling")


def test_a_model_without_a_transformer_in_front_is_refused_by_name(make, tiny_tokenizer, tmp_path):
    kinds = {
        "StaticEmbedding": modules.StaticEmbedding(tiny_tokenizer, embedding_dim=8),
        "BoW": modules.BoW(["a", "nurse"]),
    }
    for kind, module in kinds.items():
        model = library.SentenceTransformer(modules=[module], device="cpu")
        model.save(str(tmp_path / kind), create_model_card=False)
        refused(tmp_path / kind, kind, "modules.json")
        with pytest.raises(InputError, match=kind):
            load(tmp_path / kind, pooling="mean")


def test_a_router_is_refused_by_name(directories, tmp_path):
    paths = [[base_modules.Transformer(str(directories["bert"])), modules.Pooling(32)]
             for _ in range(2)]  # fmt: skip
    router = base_modules.Router.for_query_document(*paths)
    model = library.SentenceTransformer(modules=[router], device="cpu")
    model.save(str(tmp_path / "router"), create_model_card=False)
    refused(tmp_path / "router", "Router", "modules.json")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
        ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 3}}}),
        ("sentence_bert_config.json", {"query_expansion": {"strategy": "fixed"}}),
        ("sentence_bert_config.json", {"config_args": {"is_decoder": True}}),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "another"}),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}),
        ("sentence_bert_config.json", {"modality_config": ["text"]}),
        (OPTIONS, {"model_type": "SparseEncoder"}),
    ],
)
def test_a_key_that_changes_vectors_is_refused_by_name(make, file, change):
    directory = make()
    edit(directory / file, **change)
    refused(directory, f"{file}: {next(iter(change))}")


FUTURE = {"new": 1, "newer": {"a": 2}}


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "1_Pooling/config.json"])
def test_keys_of_the_future_are_refused_as_the_library_does(make, file):
    directory = make()
    edit(directory / file, **FUTURE)
    with pytest.raises(TypeError):
        theirs(directory)
    refused(directory, f"{file}: 2 unknown keys (new, newer)", "--pooling")
    with pytest.warns(UserWarning, match="left out of the model: .* unknown keys"):
        load(directory, pooling="mean")


@pytest.mark.parametrize("file", [OPTIONS, "2_Normalize/config.json"])
def test_keys_of_the_future_that_the_library_ignores_are_warned_of(make, file):
    directory = make(base_modules.Normalize())
    edit(directory / file, **FUTURE)
    theirs(directory)
    with pytest.warns(UserWarning, match=rf"{file}: .* 2 keys \(new, newer\)"):
        load(directory)


def test_modules_of_others_are_refused_and_their_code_is_not_run(make):
    directory = make()
    content = json.loads((directory / "modules.json").read_text())
    content[1]["type"] = "own_code.Pooling"
    (directory / "modules.json").write_text(json.dumps(content))
    refused(directory, "own_code.Pooling", "--pooling")
    content[0]["type"] = "own_code.Transformer"
    (directory / "modules.json").write_text(json.dumps(content))
    refused(directory, "own_code.Transformer")


def test_a_pooling_that_is_not_there_is_named(make):
    directory = make()
    shutil.rmtree(directory / "1_Pooling")
    refused(directory, "1_Pooling", "--pooling")


def test_a_default_prompt_of_another_task_asks_for_prefixes(make):
    directory = make(prompts={"sts": "Compare: "}, default_prompt_name="sts")
    refused(directory, "'sts'", "--query_prefix", "--passage_prefix")
    encoder = load(directory, query_prefix="Compare: ", passage_prefix="")
    assert encoder.settings.query_prefix == "Compare: "
    edit(directory / OPTIONS, default_prompt_name="unheard")
    refused(directory, "'unheard'", "sts")


def test_prompts_of_other_tasks_are_counted(make):
    directory = make(prompts=PROMPTS | {"sts": "Compare: ", "empty": ""})
    with pytest.warns(UserWarning, match=r"1 prompts of other tasks are not used \(sts\)"):
        assert load(directory).settings.query_prefix == "Find: "


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_passage_prompt_that_the_library_overlooks_is_taken_and_said(make, recwarn, name):
    directory = make()
    edit(directory / OPTIONS, prompts={"query": "Find: ", name: "Text: "})
    said = f"'Text: ' is put before passages, being the prompt '{name}'; .*--passage_prefix ''"
    with pytest.warns(UserWarning, match=said):
        assert load(directory).settings.passage_prefix == "Text: "
    recwarn.clear()
    torch.testing.assert_close(
        ours(directory, passage_prefix=""), theirs(directory), rtol=0, atol=1e-5
    )
    assert not [w for w in recwarn if "before passages" in str(w.message)]


def test_a_pooling_nobody_names_is_said_to_be_a_guess(tiny_llama_dir, make, recwarn):
    with pytest.warns(UserWarning, match="no file there names the pooling; .*last.*--pooling"):
        load(tiny_llama_dir)
    recwarn.clear()
    load(tiny_llama_dir, pooling="last")
    directory = make(pooling="cls")
    load(directory)
    assert not [w for w in recwarn if "--pooling" in str(w.message)]
    (directory / "modules.json").unlink()
    said = "1_Pooling/config.json is not read, since no modules.json names it; .*mean"
    with pytest.warns(UserWarning, match=said):
        vectors = ours(directory)
    torch.testing.assert_close(vectors, theirs(directory), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", '[{"path": ""}]'),
        ("modules.json", '[{"type": 1, "path": ""}]'),
        ("modules.json", '"x"'),
        ("sentence_bert_config.json", "{"),
        ("sentence_bert_config.json", '{"max_seq_length": "x"}'),
        ("sentence_bert_config.json", '{"do_lower_case": 1}'),
        ("sentence_bert_config.json", '{"do_lower_case": "true"}'),
        ("1_Pooling/config.json", "[]"),
        ("1_Pooling/config.json", b"\xff\xfe"),
        (OPTIONS, '{"prompts": ["a"]}'),
        (OPTIONS, '{"prompts": {"query": 1}}'),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(make, file, content):
    directory = make()
    (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(directory, file)
