"""Tevatron's encoders patched: their losses, gradients and trainings, on the same seeds."""

from types import SimpleNamespace

import pytest
import torch

from rankpo_fast.integrations.tevatron import GradCacheLoss, apply_to
from support import tiny_embedders
from support.gates import error, gates, in_fp64
from support.info_nce_problems import NoMatrix
from support.tiny_embedders import (
    D,
    batch,
    cached_step,
    exact_loss_and_gradients,
    loss_and_gradients,
)


def dense_model(**settings):
    pytest.importorskip("tevatron")
    return tiny_embedders.dense_model(**settings)


def both(model, texts):
    """(loss, gradients) of the patched model, and of their own code in fp64."""
    theirs = exact_loss_and_gradients(model, texts)
    with apply_to(type(model)):
        return loss_and_gradients(model, texts), theirs


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot-product"])
def test_loss_and_gradients_are_those_of_todays_encoders(normalize, group, temperature, equal):
    model = tiny_embedders.encoder(normalize=normalize, temperature=temperature)
    option = f"today's form, normalize={normalize}, temperature {temperature}"
    largest = 1 if normalize else D  # a layer norm leaves no more
    equal("Tevatron", option, *both(model, batch(6, group)), largest / temperature)


@pytest.mark.parametrize("group", [1, 8])
def test_loss_and_gradients_are_those_of_the_dense_model_of_0_1_0(group, equal):
    model = dense_model(group=group)
    equal("Tevatron", "DenseModel of 0.1.0", *both(model, batch(6, group)), D)


def test_output_in_training_has_own_rows_and_no_scores():
    model = tiny_embedders.encoder().train()
    with apply_to(type(model)):
        output = model(*batch(3, 2))
    assert output.scores is None and isinstance(output, tiny_embedders.EncoderOutput)
    assert output.q_reps.shape == (3, D) and output.p_reps.shape == (6, D)
    assert set(output.keys()) == {"loss", "q_reps", "p_reps"}


def test_encoding_and_evaluation_are_tevatrons_own():
    model, (query, passage) = tiny_embedders.encoder().eval(), batch(3, 2)
    sides = [{"query": query}, {"passage": passage}, {"query": query, "passage": passage}]
    theirs = [model(**side) for side in sides]
    with apply_to(type(model)):
        for side, output in zip(sides, theirs, strict=True):
            ours = model(**side)
            assert ours.keys() == output.keys()
            assert all(torch.equal(ours[key], output[key]) for key in output)


def test_score_matrix_is_never_stored():
    model, texts = tiny_embedders.encoder().train(), batch(1200, 1)
    with apply_to(type(model)), NoMatrix(1200 * 1200):
        model(*texts).loss.backward()


def test_bf16_autocast_keeps_the_scores_in_fp32():
    model, texts = tiny_embedders.encoder(dropout=0.0).train(), batch(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        q, p = (model.encode_query(side).double() for side in texts)
        exact = torch.nn.functional.cross_entropy(q @ p.T / 0.02, torch.arange(16) * 4)
        theirs = model(*texts).loss
        with apply_to(type(model)):
            ours = model(*texts).loss
    assert ours.dtype == torch.float32
    assert error(ours, exact) < 2e-6 < error(theirs, exact)


def test_a_class_is_patched_until_closed_with_subclasses_that_do_not_override():
    class Inherits(tiny_embedders.Encoder):
        pass

    class Overrides(tiny_embedders.Encoder):
        def forward(self, query=None, passage=None): ...

    model, theirs = tiny_embedders.encoder(), tiny_embedders.Encoder.forward
    with apply_to(tiny_embedders.Encoder):
        assert model.forward.__module__ == apply_to.__module__
        assert Inherits.forward is tiny_embedders.Encoder.forward
        assert Overrides.forward.__module__ == __name__
        with pytest.raises(ValueError, match="Encoder.forward is replaced already"):
            apply_to(tiny_embedders.Encoder)
    assert tiny_embedders.Encoder.forward is theirs
    with apply_to(Inherits):
        assert tiny_embedders.Encoder.forward is theirs is not Inherits.forward
    assert "forward" not in vars(Inherits)


def test_what_cannot_be_fused_is_named():
    class Distances(tiny_embedders.Encoder):
        def compute_similarity(self, q_reps, p_reps):
            return -torch.cdist(q_reps, p_reps)

    class Tokens(tiny_embedders.Encoder):
        def compute_similarity(self, q_reps, p_reps):  # of vectors for every token, as ColBERT's
            return torch.einsum("qid, pjd -> qpij", q_reps, p_reps).amax(3).sum(2)

    distances, tokens = (kind(tiny_embedders.backbone()) for kind in (Distances, Tokens))
    smooth = tiny_embedders.encoder()
    smooth.cross_entropy.label_smoothing = 0.1
    with apply_to(tiny_embedders.Encoder):
        with pytest.raises(ValueError, match="Distances.compute_similarity is not that of dot"):
            distances.train()(*batch(3, 2))
        with pytest.raises(ValueError, match="Tokens.compute_similarity is not that of dot"):
            tokens.train()(*batch(3, 2))
        with pytest.raises(ValueError, match="Encoder.compute_loss is not that of dot"):
            smooth.train()(*batch(3, 2))
        query, passage = batch(3, 2)
        passage = {key: x[:-1] for key, x in passage.items()}
        with pytest.raises(ValueError, match="5 passages do not divide by 3 queries"):
            tiny_embedders.encoder().train()(query, passage)
    with pytest.raises(ValueError, match="no method encode_query"):
        apply_to(torch.nn.Linear)
    with pytest.raises(ValueError, match="not one model: give Encoder"):
        apply_to(smooth)


def test_a_gradient_cache_has_the_loss_of_the_whole_batch(equal):
    pytest.importorskip("gradcache")
    texts = batch(7, 2)  # a last chunk of one query
    model = tiny_embedders.encoder(dropout=0.0)
    whole = exact_loss_and_gradients(model, texts)
    ours = cached_step(model, texts, GradCacheLoss(0.02))
    equal("GradCache", "temperature 0.02", ours, whole, 1 / 0.02)


def test_tevatrons_own_cached_loss_leaves_out_the_temperature(equal):
    pytest.importorskip("gradcache")
    loss = pytest.importorskip("tevatron.loss").SimpleContrastiveLoss(n_target=2)
    model, texts = tiny_embedders.encoder(dropout=0.0), batch(7, 2)
    with in_fp64(*tiny_embedders.backbones(model)):
        theirs = cached_step(model, texts, loss)
    equal("GradCache", "Tevatron's loss", cached_step(model, texts, GradCacheLoss(1.0)), theirs, 1)


@pytest.mark.parametrize(
    "build, temperature",
    [(tiny_embedders.encoder, 0.02), (tiny_embedders.dense_model, 1.0)],
    ids=["now", "0.1.0"],
)
def test_two_ranks_have_the_gradient_of_one_process(build, temperature, two_ranks):
    if build is tiny_embedders.dense_model:
        pytest.importorskip("tevatron")
    largest = D if build is tiny_embedders.dense_model else 1
    for answer in two_ranks(tiny_embedders.across_ranks, build, 2, temperature):
        of_loss, of_gradient = gates(torch.float32, temperature / largest)
        assert answer["loss"] < of_loss and answer["gradient"] < of_gradient
        assert answer["their loss"] == pytest.approx(2, rel=of_loss)  # each logs it over two
        assert answer["scale"] == pytest.approx(1, rel=of_gradient)
        assert answer["direction"] < 2 * of_gradient  # of both, and of its length


def test_a_gradient_cache_across_two_ranks(two_ranks):
    pytest.importorskip("gradcache"), pytest.importorskip("tevatron")
    for answer in two_ranks(tiny_embedders.cached_across_ranks, 1.0):
        of_loss, of_gradient = gates(torch.float32, 1.0)
        assert answer["loss"] < of_loss and answer["gradient"] < of_gradient
        assert answer["loss of one"] == pytest.approx(2, rel=of_loss)
        assert answer["gradient of one"] < of_gradient


def trained(build, directory, cached=False, loss_fn=None):
    """The losses of 20 steps by Tevatron 0.1.0's trainer, which Trainer has outgrown in the details
    named here."""
    pytest.importorskip("tevatron"), pytest.importorskip("gradcache")
    tiny_embedders.grad_cache()  # which their trainer imports by that name
    from tevatron import trainer as theirs
    from tevatron.arguments import DenseTrainingArguments

    class Outgrown:
        scaler = None

        def compute_loss(self, model, inputs, **_):
            return super().compute_loss(model, inputs)

        def training_step(self, model, inputs, _=None):
            return super().training_step(model, inputs)

    base = theirs.GCTrainer if cached else theirs.DenseTrainer
    arguments = DenseTrainingArguments(
        output_dir=str(directory), max_steps=20, per_device_train_batch_size=6, learning_rate=3e-3,
        logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        gc_q_chunk_size=4, gc_p_chunk_size=4,
    )  # fmt: skip
    queries, passages = batch(24, 2)
    rows = [
        (
            {key: x[i] for key, x in queries.items()},
            {key: x[2 * i : 2 * i + 2] for key, x in passages.items()},
        )
        for i in range(24)
    ]

    def collate(chosen):
        of_query, of_passages = zip(*chosen, strict=True)
        return (
            {key: torch.stack([x[key] for x in of_query]) for key in of_query[0]},
            {key: torch.cat([x[key] for x in of_passages]) for key in of_passages[0]},
        )

    model = build()
    model.data_args = SimpleNamespace(train_n_passages=2)
    trainer = type("Trainer", (Outgrown, base), {})(
        model=model, args=arguments, train_dataset=rows, data_collator=collate
    )
    if loss_fn is not None:
        trainer.gc.loss_fn = loss_fn
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def small_dense_model():
    return tiny_embedders.dense_model(group=2)


@pytest.mark.parametrize("build", [tiny_embedders.encoder, small_dense_model], ids=["now", "0.1.0"])
def test_their_trainer_trains_the_same(build, tmp_path):
    theirs = trained(build, tmp_path)
    with apply_to(type(build())):
        ours = trained(build, tmp_path)
    assert len(ours) == 20 and ours == pytest.approx(theirs, abs=1e-4)
    assert sum(ours[-5:]) < sum(ours[:5])


@pytest.mark.long
def test_their_cached_trainer_trains_the_same(tmp_path):
    theirs = trained(small_dense_model, tmp_path, cached=True)
    ours = trained(small_dense_model, tmp_path, cached=True, loss_fn=GradCacheLoss(1.0))
    assert len(ours) == 20 and ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.long
def test_the_example_trains(world, monkeypatch, capsys):
    pytest.importorskip("tevatron")
    tiny_embedders.run_example("tevatron", world, monkeypatch)
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert float(last.split()[-1]) < float(first.split()[-1]) / 2
