"""The scripts of RankPO's authors run by our trainers, with one import changed."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModel, TrainingArguments

from rankpo_fast.integrations.hf_trainer import (
    HFContrastiveTrainer,
    HFRankPOTrainer,
    RankPOArguments,
    RankPODataCollatorWithPadding,
)
from support.hf_runs import Collator, Plain, arguments, contrastive, curve, preferences, triplets


class ModelForTraining(nn.Module):
    """As their first stage has it: a model that computes its loss, in training alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, query=None, passage=None):
        batch = {"query": query, "passage": passage}
        return SimpleNamespace(loss=Plain.loss(self.model, batch) if self.training else None)


@pytest.mark.long
def test_the_first_script_runs_with_its_own_model(tmp_path, tiny_tokenizer, tiny_llama_dir):
    curves, compiled = [], {"torch_compile": True, "torch_compile_backend": "eager"}
    for wrapped, more in ((False, {}), (True, {}), (True, compiled)):
        model = AutoModel.from_pretrained(tiny_llama_dir)
        trainer = HFContrastiveTrainer(
            model=ModelForTraining(model) if wrapped else model,
            args=arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, **more),
            train_dataset=triplets(16), tokenizer=tiny_tokenizer,
            data_collator=Collator(tiny_tokenizer), eval_dataset=triplets(4),
        )  # fmt: skip
        curves.append(curve(trainer))
        if wrapped:
            with pytest.raises(ValueError, match="ModelForTraining returns no loss in evaluation"):
                trainer.evaluate()
            torch.testing.assert_close(curves[0], curves[-1], rtol=0, atol=1e-4)


def test_adapters_and_compilation_leave_a_model_what_it_is(
    tmp_path, tiny_tokenizer, tiny_bert_dir, llama
):
    """One with its own loss, and one whose pooler gets no gradient."""
    peft = pytest.importorskip("peft")
    batch, linear = Collator(tiny_tokenizer)(triplets(4)), {"target_modules": "all-linear", "r": 2}
    expected = Plain.loss(llama, batch)
    model = peft.get_peft_model(ModelForTraining(llama), peft.LoraConfig(**linear))
    for whole in (model, torch.compile(model)):
        trainer = contrastive(whole, tiny_tokenizer, tmp_path)
        assert abs(trainer.compute_loss(model, batch) - expected) < 1e-5
    bert = AutoModel.from_pretrained(tiny_bert_dir)
    model = peft.get_peft_model(bert, peft.LoraConfig(**linear))
    contrastive(model, tiny_tokenizer, tmp_path).compute_loss(model, batch).backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


@dataclass
class TheirArguments(TrainingArguments):
    reference_free: bool = False
    use_fast: bool = True
    temperature: float = 0.02
    beta: float = 1.0
    gamma_beta_ratio: float = 0.0
    sft_weight: float = 0.0
    rankpo_weight: float = 1.0
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    generate_during_eval: bool = False
    normalize_embeddings: bool = True
    disable_dropout: bool = True
    dataset_num_proc: int = 1
    wandb_project: str = ""


def test_the_second_script_runs_with_one_import_changed(tmp_path, tiny_tokenizer, llama, other):
    """Their arguments, dataset and collator, which knows no reference, as they are passed there."""
    from datasets import Dataset

    class TheirCollator(RankPODataCollatorWithPadding):
        def __call__(self, rows):
            return super().__call__(
                [{k: row[k] for k in ("query", "chosen", "rejected")} for row in rows]
            )

    args = arguments(tmp_path, TheirArguments, max_steps=2)
    args.max_query_length, args.max_passage_length = 5, 7
    trainer = HFRankPOTrainer(
        model=llama, ref_model=other, args=args,
        data_collator=TheirCollator(pad_token_id=tiny_tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(preferences(8)), tokenizer=tiny_tokenizer,
    )  # fmt: skip
    lengths = [len(trainer.train_dataset[0][key]["input_ids"]) for key in ("query", "chosen")]
    assert lengths == [5, 7]
    result = trainer.train()
    assert result.metrics["train_loss"] > 0 and args.remove_unused_columns
    trainer.save_model(str(tmp_path / "saved"))
    AutoModel.from_pretrained(tmp_path / "saved")
    names = {"rankpo_loss"} | {
        f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins")
    }
    names |= {f"scores/{x}" for x in ("chosen", "rejected", "margins")}
    assert names <= trainer.state.log_history[0].keys()


def test_defaults_are_those_of_the_authors_script():
    args = RankPOArguments("out", use_cpu=True)
    assert (args.beta, args.temperature, args.reference_free) == (2.0, 0.1, True)
