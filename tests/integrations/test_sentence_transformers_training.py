"""Whole trainings by sentence-transformers' trainer: their losses' curves are ours."""

import pytest
import torch
from st_cases import SENTENCES, bert
from torch import nn

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402

from rankpo_fast.integrations import sentence_transformers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


def dataset(rows: int = 22) -> Dataset:
    """Batches of 4, and 2 at the end of an epoch; a number tells which texts belong together."""
    numbers = [str(10 + 7 * i % 80) for i in range(rows)]
    return Dataset.from_dict({
        "anchor": [f"{number} {SENTENCES[i % 5]}" for i, number in enumerate(numbers)],
        "positive": [f"a {SENTENCES[5 + i % 7]} {number}" for i, number in enumerate(numbers)],
        "negative": [SENTENCES[i % 12] for i in range(rows)],
    })  # fmt: skip


def trainer(directory, model, loss, rows=None, **options) -> SentenceTransformerTrainer:
    torch.manual_seed(0)  # for whatever a loss draws when it is made
    args = SentenceTransformerTrainingArguments(
        str(directory), seed=0, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=2,
        logging_steps=1, report_to="none", disable_tqdm=True,
        **{"max_steps": 20, "save_strategy": "no"} | options,
    )  # fmt: skip
    return SentenceTransformerTrainer(
        model=model, args=args, loss=loss, train_dataset=dataset() if rows is None else rows
    )


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
    "guided": lambda x, model, guide: x.GISTEmbedLoss(
        model, guide, temperature=0.05, contrast_positives=False
    ),
    "guided-cached": lambda x, model, guide: x.CachedGISTEmbedLoss(
        model, guide, temperature=0.05, mini_batch_size=3, contrast_positives=False
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


@pytest.mark.parametrize("accumulation, form", [
    (1, "plain"), (2, "plain"), (1, "cached"), (2, "cached"), (2, "matryoshka"), (1, "guided"),
    (2, "guided-cached"),
])  # fmt: skip
def test_curves_are_theirs(form, accumulation, tiny_bert_dir, tmp_path):
    true, got = curves(
        form, tiny_bert_dir, tmp_path, gradient_accumulation_steps=accumulation, num_train_epochs=4,
        max_steps=-1,
    )  # fmt: skip
    first, *_, last = true.reshape(4, -1)  # epochs
    assert last.numel() == 6 // accumulation and last.mean() < 0.9 * first.mean()
    torch.testing.assert_close(got, true, rtol=1e-4, atol=0)
