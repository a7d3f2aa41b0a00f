"""Every option of sentence-transformers' losses: loss and gradients are theirs in fp64."""

import itertools

import pytest
import torch
from torch import nn

from rankpo_fast.ops import checks
from rankpo_kernels.chunked import info_nce_both
from support.gates import error as off
from support.gates import gates, in_fp64, pass_the_gates
from support.info_nce_problems import NoMatrix
from support.sentence_transformers_cases import (
    Rows,
    bert,
    compared,
    error,
    flatten,
    largest_logit,
    result,
    rows_of,
    texts,
)

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import dot_score  # noqa: E402

from rankpo_fast.integrations import sentence_transformers as ours  # noqa: E402

PEER = "sentence-transformers "
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
OPTIONS = {
    "default": {},
    "scale": {"scale": 3.5},
    "dot": {"similarity_fct": dot_score, "scale": 0.3},
    "both-ways": {"directions": ("query_to_doc", "doc_to_query")},
    "both-ways-apart": {"directions": GTE[::2], "partition_mode": "per_direction"},
    "query-to-query": {"directions": GTE[:2]},
    "doc-to-doc": {"directions": (GTE[0], GTE[3])},
    "gte": {"directions": GTE},
    "gte-dot": {"directions": GTE, "similarity_fct": dot_score, "scale": 0.3},
    "mode-without-strength": {"hardness_mode": "all_negatives", "directions": GTE},
}
HARD = {
    f"{mode}/{name}": {"hardness_mode": mode, "hardness_strength": 9.0} | options
    for mode, (name, options) in itertools.product(
        MODES, {"alone": {}, "gte": OPTIONS["gte"], "apart": OPTIONS["both-ways-apart"],
                "dot": OPTIONS["dot"]}.items(),
    )
}  # fmt: skip
GRID = [
    pytest.param(name.partition("/")[0], options, documents, id=f"{name}-{documents}")
    for each, numbers in ((OPTIONS, (1, 2, 4)), (HARD, (2,)))
    for name, options in each.items()
    for documents in numbers
]
GUIDED = [
    pytest.param(
        {"margin": margin, "margin_strategy": strategy, "contrast_anchors": anchors,
         "contrast_positives": positives, "temperature": 0.1},
        id=f"{strategy}-{margin}{'-anchors' * anchors}{'-positives' * positives}",
    )
    for (strategy, margin), anchors, positives in itertools.product(
        [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.2)], [False, True], [False, True]
    )
]  # fmt: skip
CACHED = pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
DIMS = {"matryoshka_dims": [16, 5, 12], "matryoshka_weights": [1.0, 0.3, 2.0]}
WRAPPED = pytest.mark.parametrize("around", [None, DIMS], ids=["alone", "matryoshka"])


def of_rows(name, around, columns, tokenizer, *args, **options) -> tuple:
    """`compared` of that class, with a Matryoshka of its own around each."""
    model = Rows(16, tokenizer)
    if name.startswith("Cached"):
        options["mini_batch_size"] = 3

    def make(library):
        loss = getattr(library, name)(model, *args, **options)
        return library.MatryoshkaLoss(model, loss, **around) if around else loss

    return compared(make, ours, theirs, rows_of(columns), model)


@WRAPPED
@CACHED
@pytest.mark.parametrize("option, options, documents", GRID)
def test_ranking_losses_are_theirs(
    option, options, documents, cached, around, tiny_tokenizer, equal
):
    name = "Cached" * cached + "MultipleNegativesRankingLoss"
    both = of_rows(name, around, 1 + documents, tiny_tokenizer, **options)
    equal(PEER + name, "in a MatryoshkaLoss" if around else option, *both)


@WRAPPED
@CACHED
@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("options", GUIDED)
def test_guided_losses_are_theirs(options, documents, cached, around, tiny_tokenizer, equal):
    guide = Rows(6, tiny_tokenizer, seed=5)
    name = "Cached" * cached + "GISTEmbedLoss"
    both = of_rows(name, around, 1 + documents, tiny_tokenizer, guide, **options)
    option = "margin {margin_strategy} {margin}".format(**options)
    equal(PEER + name, "in a MatryoshkaLoss" if around else option, *both)


@pytest.mark.parametrize("documents", [3, 4])
def test_the_plain_guided_loss_takes_more_columns_than_theirs(documents, tiny_tokenizer):
    """Their plain one takes three, their cached one any number."""
    model, guide = Rows(16, tiny_tokenizer), Rows(6, tiny_tokenizer, seed=5)
    got = result(ours.GISTEmbedLoss(model, guide, 0.1), rows_of(1 + documents), model)
    with in_fp64(model, guide):
        loss = theirs.CachedGISTEmbedLoss(model, guide, 0.1)
        true = result(loss, rows_of(1 + documents), model)
    pass_the_gates(got, true, logits=1 / 0.1)


FORMS = {
    "plain": ("MultipleNegativesRankingLoss", {"directions": GTE}),
    "cached": ("CachedMultipleNegativesRankingLoss", {"directions": GTE, "mini_batch_size": 4}),
    "cached-by-tokens": (
        "CachedMultipleNegativesRankingLoss", {"directions": GTE, "mini_batch_num_tokens": 40},
    ),
    "guided": ("GISTEmbedLoss", {}),
    "guided-cached": ("CachedGISTEmbedLoss", {"mini_batch_size": 4}),
}  # fmt: skip
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def made(library, form, model, guide, **more):
    name, options = FORMS[form]
    arguments = [guide] * form.startswith("guided")
    return getattr(library, name)(model, *arguments, **options | more)


@pytest.mark.parametrize("inputs, around", [
    ("padded", None), ("padded", DIMS), ("prompts", None), ("prompts-not-pooled", None),
    ("flattened", DIMS),
], ids=lambda x: "matryoshka" if x == DIMS else x or "alone")  # fmt: skip
@EACH_FORM
def test_gradients_of_a_model_are_theirs(form, around, inputs, tiny_bert_dir, equal):
    """With a guide that sees the same tokens, or others, made of what the model's say."""
    model, guide = [bert(tiny_bert_dir, seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    if inputs != "prompts":
        guide.max_seq_length = 9
    if inputs == "flattened":
        flatten(model)
    if inputs == "prompts-not-pooled":
        model[1].include_prompt = False
    prompts = ["find: ", "text: ", "text: "] if inputs.startswith("prompts") else [None] * 3
    columns = zip(texts(3), prompts, strict=True)
    features = [model.preprocess(column, prompt=prompt) for column, prompt in columns]
    assert ("cu_seq_lens_q" in features[0]) == (inputs == "flattened")

    def make(library):
        loss = made(library, form, model, guide)
        return library.MatryoshkaLoss(model, loss, **around) if around else loss

    both = compared(make, ours, theirs, features, model)
    equal(PEER + FORMS[form][0], f"{inputs} texts through a model", *both)


@EACH_FORM
def test_a_matryoshka_of_few_dims_draws_theirs(form, tiny_tokenizer):
    model, guide = Rows(16, tiny_tokenizer), Rows(6, tiny_tokenizer, seed=5)
    few = {"matryoshka_dims": [16, 8, 4, 2], "n_dims_per_step": 2}

    def make(library):
        return library.MatryoshkaLoss(model, made(library, form, model, guide), **few)

    pass_the_gates(*compared(make, ours, theirs, rows_of(3), model))


@EACH_FORM
def test_dropout_is_drawn_as_theirs(form, tiny_bert_dir):
    model, guide = bert(tiny_bert_dir, dropout=0.2).train(), bert(tiny_bert_dir, seed=1)
    features = [model.preprocess(column) for column in texts(3)]
    of = compared(lambda x: made(x, form, model, guide), ours, theirs, features, model)
    pass_the_gates(*of)


@EACH_FORM
def test_a_loss_is_theirs_where_there_are_no_gradients(form, tiny_bert_dir):
    model, guide = bert(tiny_bert_dir), bert(tiny_bert_dir, seed=1)
    features = [model.preprocess(column) for column in texts(3)]
    with torch.no_grad():
        got, loss = made(ours, form, model, guide)(features, None), made(theirs, form, model, guide)
        with in_fp64(model, guide):
            true = loss(features, None)
    pass_the_gates([got], [true], largest_logit(loss, features))


@EACH_FORM
def test_their_matryoshka_takes_our_losses(form, tiny_tokenizer):
    model, guide = Rows(16, tiny_tokenizer), Rows(6, tiny_tokenizer, seed=5)

    def make(library):
        return theirs.MatryoshkaLoss(model, made(library, form, model, guide), **DIMS)

    pass_the_gates(*compared(make, ours, theirs, rows_of(3), model))


@pytest.mark.parametrize("wrapper", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("form", ["plain", "guided"])
def test_their_losses_over_layers_take_our_losses(form, wrapper, tiny_bert_dir):
    model, guide = bert(tiny_bert_dir), bert(tiny_bert_dir, seed=1)
    features = [model.preprocess(column) for column in texts(3)]
    more = {"matryoshka_dims": [32, 8]} if wrapper == "Matryoshka2dLoss" else {}

    def make(library):
        return getattr(theirs, wrapper)(model, made(library, form, model, guide), **more)

    pass_the_gates(*compared(make, ours, theirs, features, model))


def test_our_matryoshka_is_theirs_around_any_other_loss(tiny_tokenizer):
    model = Rows(16, tiny_tokenizer)
    loss = theirs.TripletLoss(model)
    true, got = [
        result(library.MatryoshkaLoss(model, loss, [16, 8]), rows_of(3), model)
        for library in (theirs, ours)
    ]
    assert error(got, true) == 0  # all of it is their code


@CACHED
def test_a_loss_in_two_matryoshkas_is_cut_by_each_alone_and_not_by_itself(cached, tiny_tokenizer):
    model, features = Rows(16, tiny_tokenizer), rows_of(2)
    name = "Cached" * cached + "MultipleNegativesRankingLoss"
    loss = getattr(ours, name)(model)
    wrapped = [ours.MatryoshkaLoss(model, loss, dims) for dims in ([16, 8], [4])]
    for dims, ours_around in zip(([16, 8], [4]), wrapped, strict=True):
        reference = theirs.MatryoshkaLoss(model, getattr(theirs, name)(model), dims)
        with in_fp64(model):
            true = result(reference, features, model)
        pass_the_gates(result(ours_around, features, model), true, logits=20)
    with in_fp64(model):
        true = result(getattr(theirs, name)(model), features, model)
    pass_the_gates(result(loss, features, model), true, logits=20)


def test_embeddings_made_once_serve_our_loss_and_their_regulariser(tiny_tokenizer):
    class Both(nn.Module):
        def __init__(self, library, model):
            super().__init__()
            self.model = model
            self.ranking = library.MultipleNegativesRankingLoss(model)
            self.spread = theirs.GlobalOrthogonalRegularizationLoss(model)

        def forward(self, features, labels):
            embeddings = [self.model(column)["sentence_embedding"] for column in features]
            ranking = self.ranking.compute_loss_from_embeddings(embeddings, labels)
            return ranking + sum(self.spread.compute_loss_from_embeddings(embeddings).values())

    model = Rows(16, tiny_tokenizer)
    got = result(Both(ours, model), rows_of(3), model)
    with in_fp64(model):
        true = result(Both(theirs, model), rows_of(3), model)
    pass_the_gates(got, true, logits=20)


@pytest.mark.parametrize("name", ["cosine", "dot"])
def test_the_similarity_of_a_model_is_fused(name, tiny_bert_dir):
    model = bert(tiny_bert_dir)
    model.similarity_fn_name = name
    features = [model.preprocess(column) for column in texts(2)]
    options = {"similarity_fct": model.similarity, "scale": 2.0}

    def make(library):
        return library.MultipleNegativesRankingLoss(model, **options)

    pass_the_gates(*compared(make, ours, theirs, features, model))


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_embeddings_of_low_precision_come_nearer_the_truth_than_theirs(dtype, form, tiny_tokenizer):
    model, guide = Rows(16, tiny_tokenizer), Rows(6, tiny_tokenizer, seed=5)
    for each in (model, guide):
        each.to(dtype)
    low = [result(made(x, form, model, guide), rows_of(3), model) for x in (theirs, ours)]
    for each in (model, guide):
        each.double()
    truth = result(made(theirs, form, model, guide), rows_of(3), model)
    of_theirs, of_ours = [error(x, truth) for x in low]
    # the gradient itself is stored in the dtype
    assert low[1][1].dtype == dtype and of_ours < 2 * torch.finfo(dtype).eps and of_ours < of_theirs


@CACHED
def test_a_learnt_scale_has_their_gradient(cached, tiny_tokenizer):
    """Their plain loss takes a parameter for the scale; grads add up, scaled as fp16 scales."""
    model, features = Rows(16, tiny_tokenizer), rows_of(3)
    reference = theirs.MultipleNegativesRankingLoss(model, nn.Parameter(torch.tensor(7.0)))
    name = "Cached" * cached + "MultipleNegativesRankingLoss"
    loss = getattr(ours, name)(model, nn.Parameter(torch.tensor(7.0)))
    for around in (None, DIMS):
        both = [
            library.MatryoshkaLoss(model, x, **around) if around else x
            for library, x in ((theirs, reference), (ours, loss))
        ]
        for of in ([model, model], [reference.scale, loss.scale]):
            with in_fp64(model):
                true = result(both[0], features, of[0], factor=1024)
            pass_the_gates(result(both[1], features, of[1], factor=1024), true, logits=7)
    with in_fp64(model):
        alone = result(reference, features, reference.scale)[1][0]
    loss.scale.grad = torch.tensor(3.0)
    for _ in range(2):
        value, before = loss(rows_of(3), None), loss.scale.grad.clone()
        assert loss.scale.grad == before
        (value * 0.5).backward()
    assert off(loss.scale.grad, 3 + alone) < gates(torch.float32, 1 / 7)[1]


@pytest.mark.parametrize(
    "around", [None, {"matryoshka_dims": [16, 4]}], ids=["alone", "matryoshka"]
)
@EACH_FORM
def test_no_matrix_of_scores_is_made(form, around, tiny_tokenizer, monkeypatch):
    B, documents = 256, 2
    workspace = 4 * B * documents * 4 * 8
    monkeypatch.setitem(checks.DEFAULT_WORKSPACE, "cpu", workspace)
    monkeypatch.setattr(info_nce_both, "KEPT_ON_CPU", workspace)
    model = Rows(16, tiny_tokenizer, rows=B * (1 + documents))
    guide = Rows(6, tiny_tokenizer, seed=5, rows=B * (1 + documents))
    loss = made(ours, form, model, guide)
    if around:
        loss = ours.MatryoshkaLoss(model, loss, **around)
    with NoMatrix(limit=B * B):
        loss(rows_of(1 + documents, B), None).backward()
    assert model[0].weight.grad.norm() > 0
