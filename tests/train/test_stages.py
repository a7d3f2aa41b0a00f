"""Both stages learn, and what they compute is what the paper and the flags say."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    RankPOLossConfig,
)
from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.data.rows import ContrastiveRow, read_preferences
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.train.contrastive import ContrastiveTask, tokenized
from rankpo_fast.train.rankpo import RankPOTask
from rankpo_fast.train.reference import reference_similarities


def weights(output):
    return load_file(output / "model.safetensors")


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_bert_dir"])
def test_contrastive_loss_falls(model, request, run_stage, read_metrics):
    lines = read_metrics(
        run_stage("contrastive", request.getfixturevalue(model), "out", max_steps=12)
    )
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert lines[-1]["positive_similarity"] > lines[-1]["hardest_negative_similarity"]
    said = {"grad_norm", "learning_rate", "epoch", "tokens_per_second", "queries_per_second"}
    assert said | {"peak_memory_bytes"} <= lines[-1].keys()


@pytest.mark.parametrize("negatives, works", [([], False), (["a cook"], True)])
def test_a_batch_of_one_needs_negatives_of_its_own(
    negatives, works, tiny_llama_dir, run_stage, tmp_path
):
    row = {"query": "a nurse", "positives": ["nurse"], "negatives": negatives}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    data = [str(tmp_path / "rows.jsonl")]
    flags = {"train_data": data, "per_device_train_batch_size": 1, "max_steps": 1}
    if works:
        run_stage("contrastive", tiny_llama_dir, "out", **flags)
    else:
        with pytest.raises(InputError, match="2 of 2 rows .* --per_device_train_batch_size 2 or"):
            run_stage("contrastive", tiny_llama_dir, "out", **flags)


def test_fewer_rows_than_a_batch_asks_for_are_said(tiny_llama_dir, run_stage, capsys):
    run_stage("contrastive", tiny_llama_dir, "out", per_device_train_batch_size=100, max_steps=1)
    assert "1 of 2 x 24 rows" in capsys.readouterr().err


def compute(cache):
    return ComputeConfig(cache_dir=str(cache))


def embed(encoder, texts, batch):
    """Vectors of the batch's distinct queries and passages, in one graph."""
    rows, queries, passages = texts.of(batch)
    vectors = encoder.embed(texts.table, rows, max_tokens=4096)
    return vectors[queries], vectors[passages]


def test_contrastive_step_spares_every_known_positive(tiny_llama_dir, tmp_path):
    """Loss and gradient against a dense softmax whose mask is made from the texts themselves."""
    rows = [
        ContrastiveRow("a nurse", ("nurse", "midwife"), ("cook",)),
        ContrastiveRow("a nurse", ("carer",), ("pilot",)),
        ContrastiveRow("a cook", ("cook",), ("midwife", "nurse")),
    ]
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    data = ContrastiveData(rows, batch_size=3, num_negatives=2, seed=0)
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute(tmp_path))
    batch = data.batch(0, 0)
    vectors = embed(encoder, texts, batch)
    task = ContrastiveTask(data, texts, ContrastiveLossConfig(0.05))
    loss, d_queries, d_passages, metrics, *_ = task.loss(*(x.detach() for x in vectors), batch)

    queries, passages = (F.normalize(x, dim=1) for x in vectors)
    scores = queries[batch.query_rows] @ passages.T / 0.05
    columns = [data.passage_texts[i] for i in batch.passage_texts]
    for i, row in enumerate(batch.rows.tolist()):
        known = {t for other in rows if other.query == rows[row].query for t in other.positives}
        for j, text in enumerate(columns):
            if text in known and j != batch.labels[i]:
                scores[i, j] = -torch.inf
    assert scores.isinf().any()
    expected = F.cross_entropy(scores, batch.labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(expected, vectors)
    torch.testing.assert_close((d_queries, d_passages), gradients, rtol=1e-3, atol=1e-5)
    right = (scores.argmax(dim=1) == batch.labels).float().mean()
    torch.testing.assert_close(metrics["accuracy"], right)


def test_a_step_tells_texts_by_what_the_encoder_sees(uncased_llama_dir, tmp_path):
    """Twins of the only passage leave nothing to tell it from: the loss is 0, not log 3."""
    rows = [
        ContrastiveRow("a nurse", ("Nurse",), ("nurse", "A Nurse")),
        ContrastiveRow("A NURSE", ("NURSE",), ("a nurse",)),
    ]
    model = EncoderConfig(str(uncased_llama_dir), query_prefix="query: ")
    encoder = load_encoder(model, device=torch.device("cpu"))
    data = ContrastiveData(rows, batch_size=2, num_negatives=2, seed=0)
    data, texts = tokenized(data, encoder, compute(tmp_path))
    assert data.known_negatives == 3 and "1 queries and" in texts.summary()
    batch = data.batch(0, 0)
    vectors = [x.detach() for x in embed(encoder, texts, batch)]
    task = ContrastiveTask(data, texts, ContrastiveLossConfig(0.05))
    assert task.loss(*vectors, batch).loss == 0


@pytest.mark.parametrize("prefix", ["", "query: "])
@pytest.mark.parametrize("limits", [(10, 14), (14, 10), (14, 14)])
def test_queries_are_compared_with_passages_as_passages(prefix, limits, tiny_llama_dir, tmp_path):
    """Against tokenising every query as a passage."""
    model = EncoderConfig(str(tiny_llama_dir), query_prefix=prefix, max_query_length=limits[0],
                          max_passage_length=limits[1])  # fmt: skip
    encoder = load_encoder(model, device=torch.device("cpu"))
    texts = ["a cook", "software developer in Berlin", "software developer in Lyon", "nurse"]
    table = Texts.tokenize(encoder, texts, texts[1:], compute(tmp_path))
    rows = table.queries_as_passages(encoder, texts, compute(tmp_path)).tolist()
    known = {tuple(table.table[i].tolist()): i for i in range(len(table.table))}
    wanted = encoder.tokenize_passages(texts)
    for i, row in enumerate(rows):
        found = known.get(tuple(wanted[i].tolist()))
        assert row == found if found is not None else row >= len(table.table)


def test_pairs_of_equal_tokens_are_left_out_and_said(tiny_llama_dir, run_stage, tmp_path, capsys):
    pairs = [("one", "two"), ("a very long text of one", "a very long text of two")]
    rows = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"train_data": [str(tmp_path / "rows.jsonl")], "max_steps": 1, "max_passage_length": 8}
    with pytest.warns(UserWarning, match="1 of 2 pairs are left out"):
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    assert "1 pairs" in capsys.readouterr().err


def test_weighted_files_are_said(tiny_llama_dir, run_stage, contrastive_file, capsys):
    flags = {"train_data": [contrastive_file] * 2, "train_data_weights": [1, 0.5], "max_steps": 1}
    run_stage("contrastive", tiny_llama_dir, "out", **flags)
    assert "(24 x 0.5)" in capsys.readouterr().err
    with pytest.raises(InputError, match="one number for each of the 2 files of --train_data"):
        run_stage("contrastive", tiny_llama_dir, "other", **flags | {"train_data_weights": [1]})


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="simrankpo"),
        pytest.param({"reference_free": False}, id="rankpo"),
        pytest.param({"loss_type": "hinge"}, id="hinge"),
        pytest.param({"label_smoothing": 0.1, "gamma_beta_ratio": 0.2}, id="smoothed"),
        pytest.param({"sft_weight": 1.0, "rankpo_weight": 0.0}, id="sft"),
        pytest.param({"use_confidence": True}, id="confidence"),
    ],
)
def test_preferences_are_learnt(flags, tiny_llama_dir, run_stage, read_metrics):
    lines = read_metrics(run_stage("rankpo", tiny_llama_dir, "out", max_steps=10, **flags))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["rewards/accuracies"] > 0.9
    margin = lines[-1]["scores/chosen"] - lines[-1]["scores/rejected"]
    assert lines[-1]["scores/margins"] == pytest.approx(margin, abs=1e-6)


def test_with_itself_as_reference_the_first_loss_is_log_2(tiny_llama_dir, run_stage, read_metrics):
    output = run_stage("rankpo", tiny_llama_dir, "out", reference_free=False, max_steps=1)
    [line] = read_metrics(output)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert line["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(line["scores/margins"]) > 1e-5


@pytest.fixture
def rankpo_task(tiny_llama_dir, preference_file, tmp_path):
    """A function of loss flags giving the encoder and the task, on all 24 pairs at once."""

    def make(reference=None, **flags):
        encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
        data = PreferenceData(read_preferences([preference_file]), batch_size=24, seed=0)
        texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute(tmp_path))
        if reference is not None:
            data = data.with_reference(reference[0] - reference[1])
        return encoder, RankPOTask(data, texts, RankPOLossConfig(**flags), reference)

    return make


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_rankpo_step_is_the_formula_of_the_original(loss_type, rankpo_task):
    torch.manual_seed(0)
    reference = torch.rand(2, 24) - 0.5
    encoder, rankpo = rankpo_task(
        reference, loss_type=loss_type, gamma_beta_ratio=0.3, beta=1.5, sft_weight=0.5
    )
    batch = rankpo.data.batch(0, 0)
    vectors = embed(encoder, rankpo.texts, batch)
    loss, *got, metrics, _, _ = rankpo.loss(*(x.detach() for x in vectors), batch)

    queries, passages = (F.normalize(x, dim=1) for x in vectors)
    queries = queries[batch.query_rows]
    scores = torch.stack(
        [(queries * passages[rows]).sum(1) for rows in (batch.chosen_rows, batch.rejected_rows)]
    )
    over = scores[0] - scores[1] - (reference[0] - reference[1])[batch.rows]
    logits = 1.5 * (over / 0.1 - 0.3)
    losses = -F.logsigmoid(logits) if loss_type == "sigmoid" else torch.relu(1 - logits)
    sft = F.cross_entropy(scores.T / 0.1, torch.zeros(24, dtype=torch.long))
    expected = losses.mean() + 0.5 * sft
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(got), torch.autograd.grad(expected, vectors))
    rewards = 1.5 * (scores - reference[:, batch.rows])
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[0].mean())
    torch.testing.assert_close(metrics["rewards/rejected"], rewards[1].mean())


def test_reference_is_computed_once_and_kept(rankpo_task, tmp_path, monkeypatch):
    encoder, rankpo = rankpo_task()
    texts, data = rankpo.texts, rankpo.data
    first = reference_similarities(encoder, texts, data, compute(tmp_path))
    monkeypatch.setattr("rankpo_fast.train.reference.encode_texts", None)  # must not be called
    assert torch.equal(reference_similarities(encoder, texts, data, compute(tmp_path)), first)


def test_reference_is_that_of_the_model_as_it_is(rankpo_task, tmp_path):
    encoder, rankpo = rankpo_task()
    texts, data = rankpo.texts, rankpo.data
    first = reference_similarities(encoder, texts, data, compute(tmp_path))
    with torch.no_grad():
        encoder.backbone.get_input_embeddings().weight.mul_(-1)
    assert not torch.equal(reference_similarities(encoder, texts, data, compute(tmp_path)), first)


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder, settings, patch: encoder.use_kernel(None),
        lambda encoder, settings, patch: settings.update(max_tokens_per_micro_batch=64),
        lambda encoder, settings, patch: patch(lambda device: {"torch": "another"}),
    ],
    ids=["packing", "budget", "version"],
)
def test_what_changes_bits_of_the_reference_is_another_entry(
    change, rankpo_task, tmp_path, monkeypatch
):
    """So that no run's bits hang on what another left in the cache."""
    encoder, rankpo = rankpo_task()
    settings = {"cache_dir": str(tmp_path)}
    for entries in (1, 1, 2):
        if entries == 2:
            change(encoder, settings,
                   partial(monkeypatch.setattr, "rankpo_fast.train.frozen.arithmetic"))  # fmt: skip
        reference_similarities(encoder, rankpo.texts, rankpo.data, ComputeConfig(**settings))
        assert len(list(tmp_path.glob("reference-*"))) == entries


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_impossible_reference_is_computed_anew(value, rankpo_task, tmp_path, monkeypatch):
    """Whatever its checksum."""
    encoder, rankpo = rankpo_task()
    texts, data = rankpo.texts, rankpo.data
    with monkeypatch.context() as patches:
        patches.setattr("rankpo_fast.train.reference._similarities",
                        lambda *_: {"similarities": torch.full((48,), value)})  # fmt: skip
        reference_similarities(encoder, texts, data, compute(tmp_path))
    with pytest.warns(UserWarning, match="holds what cannot have been computed"):
        found = reference_similarities(encoder, texts, data, compute(tmp_path))
    assert float(found.abs().max()) <= 1.001


def test_damaged_reference_is_computed_anew(rankpo_task, tmp_path):
    encoder, rankpo = rankpo_task()
    texts, data = rankpo.texts, rankpo.data
    first = reference_similarities(encoder, texts, data, compute(tmp_path))
    [path] = tmp_path.glob("reference-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged cache file"):
        assert torch.equal(reference_similarities(encoder, texts, data, compute(tmp_path)), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reference_similarities(encoder, texts, data, compute(tmp_path)), first)


def test_another_model_can_be_the_reference(tiny_llama_dir, tiny_bert_dir, run_stage, read_metrics):
    output = run_stage(
        "rankpo",
        tiny_llama_dir,
        "out",
        reference_free=False,
        reference_model_name_or_path=str(tiny_bert_dir),
        max_steps=1,
    )
    [line] = read_metrics(output)
    assert abs(line["rewards/margins"] / 2 - line["scores/margins"]) > 1e-4


def test_accumulated_batches_give_the_mean_of_their_gradients(
    tiny_llama_dir, run_stage, read_metrics
):
    """One step over 8 pairs: as one batch, or as 4 of 2."""
    one, many = (
        run_stage(
            "rankpo",
            tiny_llama_dir,
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=24 // size,
            max_steps=1,
        )
        for name, size in (("one", 24), ("many", 6))
    )
    assert read_metrics(one)[0]["grad_norm"] == pytest.approx(
        read_metrics(many)[0]["grad_norm"], rel=1e-4
    )
    assert read_metrics(one)[0]["loss"] == pytest.approx(read_metrics(many)[0]["loss"], rel=1e-5)


def test_micro_batches_do_not_change_the_result(tiny_llama_dir, run_stage):
    whole, split = (
        run_stage("contrastive", tiny_llama_dir, name, max_steps=1, max_tokens_per_micro_batch=size)
        for name, size in (("whole", 16384), ("split", 64))
    )
    start, whole, split = map(weights, (tiny_llama_dir, whole, split))
    difference, update = (
        sum((a[name] - b[name]).square().sum() for name in start).sqrt()
        for a, b in ((whole, split), (whole, start))
    )
    # Adam divides by the gradient: where that is rounding, so is the weight's whole update.
    assert difference < 0.01 * update


def test_gradient_checkpointing_does_not_change_the_result(tiny_bert_dir, run_stage):
    """With dropout on: what is drawn again in the backward pass is the same."""
    plain, selective, full = (
        run_stage("contrastive", tiny_bert_dir, str(way), max_steps=2, gradient_checkpointing=way)
        for way in (False, "selective", True)
    )
    assert largest_difference(weights(plain), weights(selective)) == 0
    assert largest_difference(weights(plain), weights(full)) == 0


def test_a_run_by_chunks_says_so_and_ends_alike(tiny_llama_dir, run_stage, capsys):
    """Without dropout, which draws otherwise for a chunk than for all tokens."""
    flags = {"max_steps": 2, "gradient_checkpointing": "auto"}
    plain = run_stage("contrastive", tiny_llama_dir, "plain", **flags)
    assert "feed-forward" not in capsys.readouterr().err
    chunked = run_stage("contrastive", tiny_llama_dir, "chunked", mlp_chunk=32, **flags)
    assert "feed-forward 32 tokens at once, computed again" in capsys.readouterr().err
    assert 0 < largest_difference(weights(plain), weights(chunked)) < 1e-4


def test_dropout_can_be_disabled(tiny_bert_dir, run_stage, read_metrics):
    dropped, disabled, fresh = (
        read_metrics(run_stage("rankpo", tiny_bert_dir, name, max_steps=1, **flags))[0]["loss"]
        for name, flags in (
            ("dropped", {}),
            ("disabled", {"disable_dropout": True}),
            ("fresh", {"disable_dropout": True}),
        )
    )
    assert disabled == fresh != dropped


def test_from_scratch_depends_on_the_seed(tiny_llama_dir, run_stage):
    first, same, other = (
        weights(
            run_stage("rankpo", tiny_llama_dir, name, max_steps=1, from_scratch=True, seed=seed)
        )
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert largest_difference(first, same) == 0
    assert largest_difference(first, other) > 0


def test_bf16_trains_fp32_weights(tiny_llama_dir, run_stage, read_metrics):
    output = run_stage("contrastive", tiny_llama_dir, "out", bf16=True)
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.float32}
    lines = read_metrics(output)
    assert lines[-1]["loss"] < lines[0]["loss"]
