"""Whole trainings by sentence-transformers' trainer: their losses' curves are ours."""

import pytest
import torch
from torch import nn

from support.sentence_transformers_cases import SENTENCES, bert, texts

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import train_sentence_transformers as example_ranking  # noqa: E402
import train_sentence_transformers_rankpo as example_rankpo  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from rankpo_fast.integrations import sentence_transformers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


def dataset(rows: int = 18) -> Dataset:
    """Batches of 4, and 2 at the end of an epoch; a number tells which texts belong together."""
    numbers = [str(10 + 7 * i % 80) for i in range(rows)]
    return Dataset.from_dict({
        "anchor": [f"{number} {SENTENCES[i % 5]}" for i, number in enumerate(numbers)],
        "positive": [f"a {SENTENCES[5 + i % 7]} {number}" for i, number in enumerate(numbers)],
        "negative": [SENTENCES[i % 12] for i in range(rows)],
    })  # fmt: skip


def trainer(
    directory, model, loss, rows=None, eval_dataset=None, **options
) -> SentenceTransformerTrainer:
    torch.manual_seed(0)  # for whatever a loss draws when it is made
    args = SentenceTransformerTrainingArguments(
        str(directory), seed=0, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=2,
        logging_steps=1, report_to="none", disable_tqdm=True,
        **{"max_steps": 20, "save_strategy": "no"} | options,
    )  # fmt: skip
    rows = dataset() if rows is None else rows
    return SentenceTransformerTrainer(model, args, rows, eval_dataset, loss)


def curve(trainer: SentenceTransformerTrainer) -> torch.Tensor:
    trainer.train()
    return torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x])


DIMS = [32, 8]
FORMS = {
    "plain": lambda x, model, guide: x.MultipleNegativesRankingLoss(model),
    "cached": lambda x, model, guide: x.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=3
    ),
    "matryoshka": lambda x, model, guide: x.MatryoshkaLoss(
        model, x.MultipleNegativesRankingLoss(model), DIMS
    ),
    "guided": lambda x, model, guide: x.GISTEmbedLoss(model, guide, temperature=0.05),
    "guided-cached": lambda x, model, guide: x.CachedGISTEmbedLoss(
        model, guide, temperature=0.05, mini_batch_size=3
    ),
}


def curves(form, directory, tmp_path, **options):
    """(theirs, ours), with dropout."""
    for library in (theirs, ours):
        model, guide = [
            bert(directory, dropout=0.1, seed=seed, num_hidden_layers=1) for seed in (0, 1)
        ]
        loss = FORMS[form](library, model, guide)
        yield curve(trainer(tmp_path, model, loss, **options))


@pytest.mark.long
@pytest.mark.parametrize("accumulation, form", [
    (1, "plain"), (2, "plain"), (2, "cached"), (2, "matryoshka"), (1, "guided"),
    (2, "guided-cached"),
])  # fmt: skip
def test_curves_are_theirs(form, accumulation, tiny_bert_dir, tmp_path):
    true, got = curves(
        form, tiny_bert_dir, tmp_path, gradient_accumulation_steps=accumulation, num_train_epochs=4,
        max_steps=-1,
    )  # fmt: skip
    first, *_, last = true.reshape(4, -1)  # epochs
    assert last.numel() == {1: 5, 2: 3}[accumulation] and last.mean() < first.mean()
    torch.testing.assert_close(got, true, rtol=1e-4, atol=0)


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(tiny_bert_dir, tmp_path):
    """A learnt scale's too, cached or not."""
    grads = {}

    def gradients(loss):
        return [x.grad.clone() for x in loss.parameters() if x.grad is not None]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            grads[name] = gradients(loss)

    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        model, scale = bert(tiny_bert_dir), nn.Parameter(torch.tensor(7.0))
        loss = getattr(ours, name)(model, scale)
        options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0}
        run = trainer(tmp_path, model, loss, **options)
        run.add_callback(Watch())
        batches = [run._prepare_inputs(batch) for batch in run.get_train_dataloader()][:2]
        reference = theirs.MultipleNegativesRankingLoss(model, scale)
        sum(reference(*run.collect_features(batch)) / 2 for batch in batches).backward()
        by_hand = gradients(loss)
        loss.zero_grad()
        run.train()
        for got, true in zip(grads[name], by_hand, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("form", ["plain", "cached"])
def test_autocast_curves_are_theirs_within_the_rounding_of_their_logits(
    form, tiny_bert_dir, tmp_path
):
    """Their scores are bf16 under autocast: of 20 * cosine up to 20 * 2^-8; ours stay fp32."""
    true, got = curves(form, tiny_bert_dir, tmp_path, bf16=True, use_cpu=True, max_steps=4)
    torch.testing.assert_close(got, true, rtol=0, atol=20 * 2**-8)
    assert not torch.equal(got, true)


def test_nested_losses_call_the_compiled_model(tiny_bert_dir, tmp_path):
    model = bert(tiny_bert_dir, num_hidden_layers=1)
    loss = ours.MatryoshkaLoss(model, ours.CachedMultipleNegativesRankingLoss(model), DIMS)
    with torch.compiler.set_stance("force_eager"):  # compiled in name alone: it takes ten seconds
        losses = curve(trainer(tmp_path, model, loss, max_steps=2, torch_compile=True))
        compiled = loss.loss.loss.model
        assert isinstance(compiled, torch._dynamo.OptimizedModule)
        assert compiled is loss.model is loss.loss.model and compiled._orig_mod is model
        # and goes on without a trainer
        features = [model.preprocess(column) for column in texts(2)]
        assert loss(features, None).isfinite() and losses.isfinite().all()


def test_a_run_resumes_with_the_scale_that_it_had(tiny_bert_dir, tmp_path):
    """The trainer saves the model and the optimizer, not the loss."""

    def start(scale, directory):
        model = bert(tiny_bert_dir, dropout=0.1, num_hidden_layers=1)
        loss = ours.CachedMultipleNegativesRankingLoss(model, nn.Parameter(torch.tensor(scale)))
        return trainer(directory, model, loss, max_steps=8, save_steps=4, save_strategy="steps")

    scales = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            scales.append(whole.loss.scale.item())

    whole = start(20.0, tmp_path / "whole")
    whole.add_callback(Watch())
    expected = curve(whole)
    assert scales[0] != scales[3] != scales[7]
    resumed = start(scales[3], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    got = torch.tensor([x["loss"] for x in resumed.state.log_history if "loss" in x])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert resumed.loss.scale.item() == pytest.approx(scales[7], rel=1e-5)

    loaded = SentenceTransformer(str(tmp_path / "whole" / "checkpoint-8"), device="cpu")
    for got, true in zip(loaded.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, true)


def test_losses_by_dataset_are_evaluated_and_stand_on_the_card(tiny_bert_dir, tmp_path):
    class Named(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.model, self.loss = loss.model, loss

        def forward(self, features, labels):
            return {"ranking": self.loss(features, labels)}

    model = bert(tiny_bert_dir, num_hidden_layers=1)
    losses = {
        "ranking": ours.CachedMultipleNegativesRankingLoss(model, mask_duplicates=True),
        "named": Named(ours.MultipleNegativesRankingLoss(model)),
        "cut": ours.MatryoshkaLoss(model, ours.MultipleNegativesRankingLoss(model), DIMS),
        "guided": ours.CachedGISTEmbedLoss(model, bert(tiny_bert_dir, seed=1)),
        "pairs": ours.RankPOLoss(model, beta=1.5),
    }
    rows = DatasetDict({name: dataset(8) for name in losses})
    run = trainer(tmp_path, model, losses, rows, eval_dataset=rows, max_steps=10)
    logs = run.evaluate()
    for name, loss in losses.items():
        features = [model.preprocess(dataset(8)[column]) for column in dataset(8).column_names]
        with torch.no_grad():
            value = loss(features, None)
        value = value["ranking"] if name == "named" else value
        assert logs[f"eval_{name}_loss"] == pytest.approx(value.item(), rel=1e-4)
    run.train()
    assert any("ranking" in x for x in run.state.log_history)

    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    for name in ("CachedMultipleNegativesRankingLoss", "MatryoshkaLoss", "CachedGISTEmbedLoss"):
        assert f"<code>{ours.__name__}.{name}</code> with these parameters" in card
    for said in ('"mask_duplicates": true', '"beta": 1.5', "zhang2025rankpo", "kusupati2024"):
        assert said in card


@pytest.mark.long
@pytest.mark.parametrize("example", [example_ranking, example_rankpo])
def test_the_examples_learn(example, world, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "small_world", lambda: world)
    monkeypatch.chdir(tmp_path)
    before, after = example.main()
    if example is example_ranking:
        assert after < 0.2 * before
    else:
        assert before < 0.6 and after > 0.8  # the alignment


def test_rankpo_trains_without_reference_margins(tiny_bert_dir, tmp_path):
    model = bert(tiny_bert_dir, num_hidden_layers=1)
    losses = curve(trainer(tmp_path, model, ours.RankPOLoss(model)))
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
