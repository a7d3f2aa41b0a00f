"""What the losses for sentence-transformers do beyond theirs, and what they refuse."""

import copy
import json
import pickle
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch import nn

from rankpo_fast import rankpo_loss
from rankpo_fast.integrations import require
from support import fake_packages
from support.gates import in_fp64, pass_the_gates
from support.launcher import NoSync
from support.sentence_transformers_cases import (
    SENTENCES,
    Rows,
    bert,
    compared,
    error,
    flatten,
    result,
    rows_of,
    texts,
)

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # noqa: E402
from sentence_transformers.util import manhattan_sim  # noqa: E402

from rankpo_fast.integrations import sentence_transformers as ours  # noqa: E402
from rankpo_fast.integrations.sentence_transformers.duplicates import first_equal  # noqa: E402

RANKING = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
GUIDED = ["GISTEmbedLoss", "CachedGISTEmbedLoss"]
EACH_RANKING = pytest.mark.parametrize("name", RANKING)


def make(name, model, **options):
    if name in GUIDED:
        return getattr(ours, name)(model, model, **options)
    return getattr(ours, name)(model, **options)


def plain(model):
    return lambda library: library.MultipleNegativesRankingLoss(model)


# --- duplicates ---

# Row 4 has row 1's positive, row 5 has row 0's query, row 2's negative is row 3's positive, row 0's
# negative is row 4's query.
QUERIES = ["a cook", "teacher", "nurse", "welder", "tutor", "a cook"]
POSITIVES = ["he boils", "she teaches", "at night", "in Lyon", "she teaches", "they roast at home"]
NEGATIVES = ["tutor", "trains", "in Lyon", "letters", "biology", "forest"]
NO_NEGATIVES = {(1, 4), (4, 1), (0, 5), (5, 0), (3, 8), (4, 6)}  # row, document


def without_pairs(model, features, scale=20.0):
    """The loss with every pair that is no negative taken out by hand."""
    queries, *documents = [model(dict(column))["sentence_embedding"] for column in features]
    logits = scale * theirs_cosine(queries, torch.cat(documents))
    gone = torch.zeros_like(logits, dtype=torch.bool)
    gone[tuple(torch.tensor(sorted(NO_NEGATIVES)).T)] = True
    return nn.functional.cross_entropy(logits.masked_fill(gone, -torch.inf), torch.arange(6))


def theirs_cosine(a, b):
    return nn.functional.normalize(a) @ nn.functional.normalize(b).T


@pytest.mark.parametrize("padding", ["right", "left", "flattened"])
@EACH_RANKING
def test_masked_duplicates_are_pairs_left_out(name, padding, tiny_bert_dir):
    model = bert(tiny_bert_dir)
    model.tokenizer.padding_side = "left" if padding == "left" else "right"
    if padding == "flattened":
        flatten(model)
    features = [model.preprocess(column) for column in (QUERIES, POSITIVES, NEGATIVES)]

    loss = make(name, model, mask_duplicates=True)
    with in_fp64(model):
        by_hand = result(lambda columns, _: without_pairs(model, columns), features, model)
    pass_the_gates(result(loss, features, model), by_hand, logits=20)
    unmasked = result(make(name, model), features, model)
    assert error(unmasked, by_hand) > 1e-2


def test_a_text_has_one_id_wherever_it_stands(tiny_bert_dir):
    column = [*SENTENCES, "", SENTENCES[3], "a  cook"]
    model = bert(tiny_bert_dir)
    right = ours.text_ids(model.preprocess(column))
    assert len(set(right.tolist())) == len(column) - 1 and right[3] == right[-2]
    alone = [ours.text_ids(model.preprocess([text]))[0] for text in column]
    assert alone == right.tolist()
    model.tokenizer.padding_side = "left"
    left = model.preprocess(column)
    assert torch.equal(ours.text_ids(left), right)
    assert torch.equal(
        ours.text_ids({k: v.int() for k, v in left.items() if k != "modality"}), right
    )
    flatten(model)
    assert torch.equal(ours.text_ids(model.preprocess(column)), right)


def test_ids_tell_tokens_and_their_order_apart():
    ids = torch.tensor([[5, 6, 7], [7, 6, 5], [5, 7, 6], [6, 5, 7], [5, 5, 8]])
    assert len(set(ours.text_ids({"input_ids": ids, "attention_mask": ids > 0}).tolist())) == 5
    flat = {"input_ids": ids.reshape(1, -1), "cu_seq_lens_q": torch.tensor([0, 3, 9, 15])}
    with NoSync():  # with a GPU
        first_equal(ours.text_ids(flat), ours.text_ids(flat), torch.arange(3))
    tokens = torch.arange(10_000)[:, None]
    single = ours.text_ids({"input_ids": tokens, "attention_mask": tokens >= 0})
    ones = (single[:, None] >> torch.arange(64) & 1).double().mean(0)
    assert len(single.unique()) == 10_000 and ((ones - 0.5).abs() < 0.03).all()  # all bits are used


@pytest.mark.parametrize("name", GUIDED)
def test_a_duplicate_of_the_positive_is_as_similar_as_it_for_the_guide(name, tiny_tokenizer):
    """So at margin 0 it stays a negative, as theirs; rounding has no say."""
    model, guide = Rows(16, tiny_tokenizer), Rows(64, tiny_tokenizer, seed=5)
    features = rows_of(2, B=20)
    features[1]["input_ids"][10:] = features[1]["input_ids"][:10]
    options = {"temperature": 0.1}

    def make(library):
        return getattr(library, name)(model, guide, **options)

    pass_the_gates(*compared(make, ours, theirs, features, model))


# --- what a training loop does to a loss ---


@pytest.mark.parametrize("name", RANKING + GUIDED)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_of_a_loss_has_its_own_model_and_the_same_gradients(how, name, tiny_bert_dir):
    model = bert(tiny_bert_dir)
    options = {} if name in GUIDED else {"similarity_fct": model.similarity}
    loss = ours.MatryoshkaLoss(model, make(name, model, **options), [32, 8])
    features = [model.preprocess(column) for column in texts(2)]
    other = how(loss)
    assert other.model is not model and other.loss.model is other.model
    assert error(result(other, features, other.model), result(loss, features, model)) == 0


@pytest.mark.parametrize("name", RANKING + GUIDED)
def test_one_pair_is_a_batch(name, tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    value, gradient = result(make(name, model), rows_of(2, B=1), model)
    assert value == 0 and not gradient.any()
    pass_the_gates(*compared(plain(model), ours, theirs, rows_of(3, B=1), model))


@pytest.mark.parametrize("name", RANKING + GUIDED)
def test_gathering_from_one_process_is_not_gathering(name, tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    alone, gathered = [
        result(make(name, model, gather_across_devices=gather), rows_of(2), model)
        for gather in (False, True)
    ]
    assert error(gathered, alone) == 0


@pytest.mark.parametrize("name", RANKING)
def test_a_failure_inside_a_loss_leaves_it_as_it_was(name, tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    loss = make(name, model, scale=nn.Parameter(torch.tensor(7.0)))
    before = result(loss, rows_of(2), model)
    loss.scale.grad = torch.tensor(3.0)
    around = ours.MatryoshkaLoss(model, loss, [16, 8])
    ragged = [rows_of(2)[0], rows_of(2, B=6)[1]]
    with pytest.raises(ValueError, match="same number of texts"):
        around(ragged, None)
    assert loss.scale.grad == 3
    assert error(result(loss, rows_of(2), model), before) == 0


@pytest.mark.parametrize("name", RANKING + GUIDED)
def test_a_configuration_is_plain_and_names_what_theirs_names(name, tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    config = make(name, model).get_config_dict()
    theirs_config = getattr(theirs, name)(model, *[model] * (name in GUIDED)).get_config_dict()
    assert theirs_config.keys() <= config.keys()
    config.pop("guide", None)  # a model: the card names its class
    json.dumps(config)
    if name in RANKING:
        learnt = make(name, model, scale=nn.Parameter(torch.tensor(7.0)), mask_duplicates=True)
        assert {"scale": 7.0, "mask_duplicates": True}.items() <= learnt.get_config_dict().items()
        json.dumps(learnt.get_config_dict())
    assert "@misc" in make(name, model).citation


# --- bad input ---


@pytest.mark.parametrize("name", RANKING + GUIDED)
@pytest.mark.parametrize(
    "labels", [torch.arange(7) % 2, torch.linspace(0, 1, 7), torch.full([7], torch.nan)],
    ids=["classes", "scores", "not-numbers"],
)  # fmt: skip
def test_labels_that_tell_rows_apart_are_an_error(labels, name, tiny_tokenizer):
    loss = make(name, Rows(16, tiny_tokenizer))
    with pytest.raises(ValueError, match=f"{name} takes no labels.*differ.*Remove the.*or take"):
        loss(rows_of(2), labels)


@pytest.mark.parametrize("name", RANKING + GUIDED)
@pytest.mark.parametrize(
    "sizes, message",
    [
        ((7,), "2 columns or more, got 1"),
        ((7, 5), r"queries and positives need the same number of texts, got \[7, 5\]"),
    ],
    ids=["one", "ragged"],
)
def test_columns_that_do_not_fit_are_an_error(name, sizes, message, tiny_tokenizer):
    columns = [rows_of(3, B)[i] for i, B in enumerate(sizes)]
    with pytest.raises(ValueError, match=message):
        make(name, Rows(16, tiny_tokenizer))(columns, None)


@pytest.mark.parametrize("name", [*RANKING, *GUIDED, "RankPOLoss"])
def test_a_model_without_pooling_is_an_error(name, tiny_bert_dir):
    model = bert(tiny_bert_dir)
    features = [model.preprocess(column) for column in texts(3)]
    del model[1]
    with pytest.raises(ValueError, match="no sentence_embedding: add a Pooling module"):
        make(name, model)(features, None)


@EACH_RANKING
@pytest.mark.parametrize(
    "function",
    [manhattan_sim, nn.CosineSimilarity(), "of the model"],
    ids=["function", "module", "model"],
)
def test_a_similarity_that_cannot_be_fused_is_named(name, function, tiny_bert_dir):
    model = bert(tiny_bert_dir)
    model.similarity_fn_name = "euclidean"
    function = model.similarity if function == "of the model" else function
    with pytest.raises(ValueError, match="similarity_fct=.*(manhattan_sim|Cosine|euclidean_sim).* "
                                         "cannot be fused: take cos_sim or dot_score"):  # fmt: skip
        make(name, model, similarity_fct=function)


@pytest.mark.parametrize("name", GUIDED)
def test_a_negative_margin_is_an_error(name, tiny_tokenizer):
    with pytest.raises(ValueError, match="margin must be >= 0, got -0.1"):
        make(name, Rows(16, tiny_tokenizer), margin=-0.1)


def test_a_matryoshka_past_the_model_is_an_error(tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    with pytest.raises(ValueError, match="cannot exceed the model's embedding dimension of 16"):
        ours.MatryoshkaLoss(model, make(RANKING[0], model), [32, 16])
    model.get_embedding_dimension = lambda: None  # then the batch tells
    loss = ours.MatryoshkaLoss(model, make(RANKING[0], model), [32, 16])
    with pytest.raises(ValueError, match=r"of 1 to D=16, got \[32, 16\]"):
        loss(rows_of(2), None)


def test_static_embeddings_go_with_the_plain_loss_alone(tiny_tokenizer):
    static = StaticEmbedding(tiny_tokenizer.backend_tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[static], device="cpu")
    features = [model.preprocess(column) for column in texts(2)]
    pass_the_gates(*compared(plain(model), ours, theirs, features, model))
    with pytest.raises(ValueError, match="mask_duplicates needs input_ids and attention_mask"):
        make(RANKING[0], model, mask_duplicates=True)(features, None)
    with pytest.raises(ValueError, match="StaticEmbedding"):
        make(RANKING[1], model)


def test_duplicates_of_what_is_no_text_are_not_masked(tiny_tokenizer):
    loss = make(RANKING[0], Rows(16, tiny_tokenizer), mask_duplicates=True)
    images = [column | {"modality": ("image", "text")} for column in rows_of(2)]
    with pytest.raises(ValueError, match=r"needs input_ids and attention_mask of texts, got \('im"):
        loss(images, None)
    with pytest.raises(ValueError, match="looks at texts"):
        loss.compute_loss_from_embeddings([torch.zeros(2, 4)] * 2)


@pytest.mark.parametrize(
    "version, said", [("5.9.1", "5.9.1 is installed"), (None, "not installed")]
)
def test_a_version_that_does_not_fit_is_named(version, said, monkeypatch):
    def of(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", of)
    monkeypatch.delitem(sys.modules, ours.__name__)
    with pytest.raises(ImportError, match=f"needs sentence-transformers >= 6.0 .*{said}.*pip inst"):
        __import__(ours.__name__)


def test_later_versions_are_not_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "6.10.0rc1")
    require("sentence-transformers", at_least="6.9", tried="6.9")


def test_no_trainer_is_imported_by_whoever_does_not_ask_for_it():
    foreign = {"sentence_transformers", "datasets", "accelerate", "lightning", "open_clip",
               "FlagEmbedding", "tevatron", "grad_cache", "liger_kernel", "peft"}  # fmt: skip
    program = (
        "import sys, rankpo_fast, rankpo_fast.integrations\n"
        "import rankpo_fast.cli, rankpo_fast.losses\n"
        f"sys.exit(' '.join({foreign} & {{name.partition('.')[0] for name in sys.modules}}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- RankPO ---


def test_rankpo_of_a_model_is_that_of_its_embeddings(tiny_bert_dir):
    model = bert(tiny_bert_dir)
    options = {"beta": 3.0, "loss_type": "hinge", "gamma_beta_ratio": 0.2, "sft_weight": 0.5}
    features = [model.preprocess(column) for column in texts(3)]
    margins = torch.linspace(-0.3, 0.3, 6)
    embeddings = [model(dict(column))["sentence_embedding"] for column in features]
    loss = ours.RankPOLoss(model, **options)
    for labels in (None, margins):
        expected = rankpo_loss(*embeddings, reference_margins=labels, **options)
        assert loss([dict(x) for x in features], labels) == expected
    assert options.items() <= loss.get_config_dict().items() and "2503.10723" in loss.citation
    json.dumps(loss.get_config_dict())


@pytest.mark.parametrize("prompts", [None, "of all: ", {"query": "find: "}], ids=str)
def test_reference_margins_are_those_of_the_texts_as_trained_on(prompts, tiny_bert_dir):
    model = bert(tiny_bert_dir, dropout=0.5).train()
    model.prompts, model.default_prompt_name = {"query": "default: "}, "query"
    names = ["query", "chosen", "rejected"]
    rows = Dataset.from_dict(dict(zip(names, texts(3), strict=True)))
    margins = ours.with_reference_margins(rows, model, batch_size=4, prompts=prompts)
    assert margins.column_names == [*names, "label"]
    model.eval()
    query, chosen, rejected = [
        model(model.preprocess(rows[name], prompt=prompts if isinstance(prompts, str | None)
                               else prompts.get(name)))["sentence_embedding"]
        for name in names
    ]  # fmt: skip
    cosine = nn.functional.cosine_similarity
    by_hand = cosine(query, chosen) - cosine(query, rejected)
    torch.testing.assert_close(torch.tensor(margins["label"]), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "columns, labels, message",
    [
        (2, None, "3 columns or more, got 2"),
        (4, None, "columns query, chosen, rejected, got 4"),
        (3, torch.arange(7), "reference margins, got torch.int64.*with_reference_margins"),
    ],
    ids=["too-few", "too-many", "integer-labels"],
)
def test_rankpo_refuses_what_is_no_pair(columns, labels, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        ours.RankPOLoss(Rows(16, tiny_tokenizer))(rows_of(columns), labels)


def test_rankpo_names_a_wrong_option_when_it_is_made(tiny_tokenizer):
    with pytest.raises(ValueError, match="loss_type"):
        ours.RankPOLoss(Rows(16, tiny_tokenizer), loss_type="square")
    rows = Dataset.from_dict({"query": ["a"], "chosen": ["b"]})
    with pytest.raises(ValueError, match=r"query, chosen, rejected, got \['query', 'chosen'\]"):
        ours.with_reference_margins(rows, None)


# --- Liger ---


def test_ligers_kernels_go_to_the_backbone_of_the_model(tiny_bert_dir, monkeypatch):
    calls = fake_packages.liger(monkeypatch, "bert")
    model = bert(tiny_bert_dir)
    with pytest.raises(ValueError, match="need a GPU, and the device is cpu"):
        ours.use_liger_kernel(model)
    assert calls == []
    monkeypatch.setattr(SentenceTransformer, "device", torch.device("cuda"))
    ours.use_liger_kernel(model)
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert calls == [{"model": model[0].model} | off]
    with pytest.raises(ValueError, match="no transformers backbone"):
        ours.use_liger_kernel(SentenceTransformer(modules=[nn.Identity()]))
