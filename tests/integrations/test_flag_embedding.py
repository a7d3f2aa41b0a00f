"""FlagEmbedding's embedders patched: their losses, gradients and trainings, on the same seeds."""

import json
from importlib import metadata

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from rankpo_fast.integrations.flag_embedding import apply_to
from support import tiny_embedders
from support.gates import error, gates
from support.info_nce_problems import NoMatrix
from support.tiny_embedders import (
    VOCABULARY,
    D,
    backbone,
    batch,
    bi_encoder,
    embedders,
    exact_loss_and_gradients,
    loss_and_gradients,
)

if not tiny_embedders.util.find_spec("FlagEmbedding"):
    pytest.skip("FlagEmbedding is not installed", allow_module_level=True)

M = 6
LOGITS = 1 / 0.02  # of cosines over the temperature that embedders have here


def both(model, texts, exact=True, **more):
    """(loss, gradients) of the patched model, and of their own code; that one in fp64 from the
    backbone's states on, if `exact`."""
    theirs = (exact_loss_and_gradients if exact else loss_and_gradients)(model, texts, **more)
    with apply_to(type(model)):
        return loss_and_gradients(model, texts, **more), theirs


@pytest.fixture
def fused(monkeypatch):
    """The shapes of queries and passages whose loss was fused."""
    from rankpo_fast.integrations import patches

    shapes, loss = [], patches.info_nce_loss

    def spied(queries, passages, **options):
        shapes.append((tuple(queries.shape), tuple(passages.shape)))
        return loss(queries, passages, **options)

    monkeypatch.setattr(patches, "info_nce_loss", spied)
    return shapes


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot-product"])
def test_loss_and_gradients_are_theirs(normalize, group, temperature, fused, equal):
    model = bi_encoder(normalize_embeddings=normalize, temperature=temperature)
    option = f"normalize_embeddings={normalize}, temperature {temperature}"
    largest = 1 if normalize else D  # a layer norm leaves no more
    equal("FlagEmbedding", option, *both(model, batch(M, group)), largest / temperature)
    assert fused == [((M, D), (M * group, D))]


def test_sub_batches_are_encoded_as_theirs(fused, equal):
    model = bi_encoder(sub_batch_size=4)
    equal("FlagEmbedding", "sub_batch_size", *both(model, batch(M, 2)), LOGITS)
    queries, passages = batch(M, 2)
    lists = [queries], [{k: x[i : i + 4] for k, x in passages.items()} for i in (0, 4, 8)]
    equal("FlagEmbedding", "sub_batch_size", *both(bi_encoder(), lists), LOGITS)
    assert len(fused) == 2


def test_every_prefix_of_matryoshka_is_fused(fused, equal):
    model = bi_encoder(use_mrl=True, mrl_dims=[4, D])
    equal("FlagEmbedding", "mrl_dims", *both(model, batch(M, 2)), LOGITS)
    assert fused == [((M, 4), (2 * M, 4)), ((M, D), (2 * M, D))]


@pytest.mark.parametrize("room", ["base", "icl"])
def test_decoders_are_fused(room, fused, equal):
    decoders = embedders(f"decoder_only.{room}")
    name = {"base": "BiDecoderOnlyEmbedderModel", "icl": "BiDecoderOnlyEmbedderICLModel"}[room]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(decoders, name)(LlamaModel(config), temperature=0.02, normalize_embeddings=True)
    equal("FlagEmbedding", f"decoder_only.{room}", *both(model, batch(M, 2)), LOGITS)
    assert len(fused) == 1


def m3(tokenizer, unified, **settings):
    bert = backbone()
    parts = {"model": bert, "colbert_linear": nn.Linear(D, D), "sparse_linear": nn.Linear(D, 1)}
    model = embedders("encoder_only.m3").EncoderOnlyEmbedderM3Model
    return model(
        parts, tokenizer, temperature=0.02, normalize_embeddings=True, unified_finetuning=unified,
        **settings,
    )  # fmt: skip


def test_m3_is_fused_where_dense_vectors_are_all(tiny_tokenizer, fused, equal):
    model = m3(tiny_tokenizer, unified=False)
    equal("FlagEmbedding", "M3, dense", *both(model, batch(M, 2)), LOGITS)
    assert len(fused) == 1


@pytest.fixture
def tokenizer_with_cls(tiny_tokenizer):
    names = {"cls_token": "<s>", "unk_token": "<pad>"}
    return type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        **names,
    )


@pytest.mark.parametrize("distil", [False, True], ids=["ensemble", "self-distillation"])
def test_unified_m3_is_their_own_code(distil, tokenizer_with_cls, fused):
    model = m3(tokenizer_with_cls, unified=True, use_self_distill=distil)
    assert all(map(torch.equal, *both(model, batch(M, 2), exact=False)))
    assert fused == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"teacher_scores": [0.1 * i for i in range(2 * M)]}, id="teacher"),
        pytest.param({"no_in_batch_neg_flag": True}, id="no-in-batch-negatives"),
    ],
)
@pytest.mark.parametrize("kind", ["kl_div", "m3_kd_loss"])
def test_what_needs_scores_is_their_own_code(kind, more, fused):
    model = bi_encoder(kd_loss_type=kind)
    assert all(map(torch.equal, *both(model, batch(M, 2), exact=False, **more)))
    assert fused == []


def test_score_matrix_is_never_stored():
    model, texts = bi_encoder().train(), batch(1200, 1)
    with apply_to(type(model)), NoMatrix(1200 * 1200):
        model(*texts).loss.backward()


def test_bf16_autocast_keeps_the_scores_in_fp32():
    model, texts = bi_encoder(dropout=0.0, normalize_embeddings=False).train(), batch(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        q, p = (model.encode(side).double() for side in texts)
        exact = nn.functional.cross_entropy(q @ p.T / 0.02, torch.arange(16) * 4)
        theirs = model(*texts).loss
        with apply_to(type(model)):
            ours = model(*texts).loss
    assert ours.dtype == torch.float32
    assert error(ours, exact) < 2e-6 < error(theirs, exact)


def test_the_class_of_all_embedders_takes_the_patch_and_gives_it_back():
    model = bi_encoder()
    every = type(model).__mro__[1]
    assert every.__name__ == "AbsEmbedderModel"
    theirs = every._compute_in_batch_neg_loss
    with apply_to(every) as patch:
        assert type(model)._compute_in_batch_neg_loss.__module__ == apply_to.__module__
        with pytest.raises(ValueError, match="_compute_in_batch_neg_loss is replaced already"):
            apply_to(type(model))
        patch.close()
        assert every._compute_in_batch_neg_loss is theirs
    with apply_to(type(model)):
        assert "_compute_in_batch_neg_loss" in vars(type(model))
    assert "_compute_in_batch_neg_loss" not in vars(type(model))


def test_what_cannot_be_fused_is_named():
    class Halved(type(bi_encoder())):
        def compute_score(self, q_reps, p_reps):
            return super().compute_score(q_reps, p_reps) / 2

    smooth = bi_encoder()
    smooth.cross_entropy.label_smoothing = 0.1
    with apply_to(Halved.__base__):
        with pytest.raises(ValueError, match="Halved.compute_score is not that of dot products"):
            Halved(backbone()).train()(*batch(3, 2))
        with pytest.raises(ValueError, match="BiEncoderOnlyEmbedderModel.compute_loss is not that"):
            smooth.train()(*batch(3, 2))
        queries, passages = batch(3, 2)
        passages = {key: x[:-1] for key, x in passages.items()}
        with pytest.raises(ValueError, match="5 passages do not divide by 3 queries"):
            bi_encoder().train()(queries, passages)
    with pytest.raises(ValueError, match="Linear has no method _compute_in_batch_neg_loss"):
        apply_to(nn.Linear)
    with pytest.raises(ValueError, match="not one model: give BiEncoderOnlyEmbedderModel"):
        apply_to(smooth)


def test_versions_that_do_not_run_with_transformers_5_are_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.4.0")
    with pytest.raises(ImportError, match="FlagEmbedding >= 1.4.1 .* and 1.4.0 is installed"):
        apply_to(nn.Linear)


def test_two_ranks_have_half_the_gradient_of_one_process_as_theirs_have(two_ranks):
    for answer in two_ranks(tiny_embedders.across_ranks, bi_encoder, 2, 0.02):
        of_loss, of_gradient = gates(torch.float32, 0.02)
        assert answer["loss"] < of_loss and answer["gradient"] < of_gradient
        assert answer["their loss"] == pytest.approx(1, rel=of_loss)
        assert answer["scale"] == pytest.approx(1 / 2, rel=of_gradient)
        assert answer["direction"] < 2 * of_gradient  # of both, and of its length


def trained(directory, model_dir, data, **flags):
    """The losses of 20 steps by their runner."""
    base = embedders("encoder_only.base")
    runner = base.EncoderOnlyEmbedderRunner(
        base.EncoderOnlyEmbedderModelArguments(model_name_or_path=str(model_dir)),
        base.EncoderOnlyEmbedderDataArguments(
            train_data=[str(data)], cache_path=str(directory / "cache"), train_group_size=3
        ),
        base.EncoderOnlyEmbedderTrainingArguments(
            output_dir=str(directory / "out"), max_steps=20, per_device_train_batch_size=4,
            learning_rate=1e-3, logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", **flags,
        ),
    )  # fmt: skip
    runner.run()
    return [row["loss"] for row in runner.trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    towns = ["Berlin", "Lyon", "Porto", "Turin", "Gent", "Graz", "Bern", "Oslo"]
    lines = [
        {"query": f"nurse in {town}", "pos": [f"a nurse at work in {town}"],
         "neg": [f"a teacher from {other}" for other in towns if other != town]}
        for town in towns
    ]  # fmt: skip
    path.write_text("\n".join([json.dumps(line) for line in lines]))
    return path


def test_their_runner_trains_the_same(tmp_path, tiny_bert_dir, rows, fused):
    theirs = trained(tmp_path / "theirs", tiny_bert_dir, rows)
    assert fused == [] and len(theirs) == 20
    with apply_to(type(bi_encoder())):
        ours = trained(tmp_path / "ours", tiny_bert_dir, rows)
    assert len(fused) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(ours[-5:]) < sum(ours[:5])


def test_their_runner_trains_in_bf16_where_their_own_scores_are_rounded(
    tmp_path, tiny_bert_dir, rows, fused
):
    theirs = trained(tmp_path / "theirs", tiny_bert_dir, rows, bf16=True)
    with apply_to(type(bi_encoder())):
        ours = trained(tmp_path / "ours", tiny_bert_dir, rows, bf16=True)
    assert len(fused) == 20
    assert ours == pytest.approx(theirs, abs=0.2)  # 2^-9 of a score of up to 50, either way
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.01)


@pytest.mark.long
def test_the_example_trains(world, monkeypatch, capsys):
    embedders("encoder_only.base")
    tiny_embedders.run_example("flag_embedding", world, monkeypatch)
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert float(last.split()[-1]) < float(first.split()[-1]) / 2
