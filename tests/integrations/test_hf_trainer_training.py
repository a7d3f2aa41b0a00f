"""Whole trainings by transformers' Trainer with our losses: the curves of plain torch."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModel, Trainer, TrainerCallback

from rankpo_fast import info_nce_loss
from rankpo_fast.integrations.hf_trainer import HFContrastiveTrainer
from support import hf_runs, rank_runs
from support.hf_runs import (
    IN_ORDER,
    Collator,
    all_trained,
    arguments,
    close,
    contrastive,
    curve,
    gradients,
    plain,
    plain_pairs,
    rankpo,
    trained,
    triplets,
)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (1, 3), (2, 1)])
def test_curve_of_a_training_is_that_of_plain_torch(
    stage, accumulation, tmp_path, tiny_tokenizer, tiny_llama_dir, other
):
    """Of 30 rows, the last batch has 2; of its 8 micro-batches a step takes 3, 3 and 2."""
    more, curves = {"gradient_accumulation_steps": accumulation}, []
    makes = (contrastive, plain) if stage == 1 else (partial(rankpo, reference=other), plain_pairs)
    for make in makes:
        model = AutoModel.from_pretrained(tiny_llama_dir)
        trainer = make(model, tiny_tokenizer, tmp_path, **more)
        trainer.reference = other  # plain torch asks it every time
        curves.append(curve(trainer))
    torch.testing.assert_close(*curves, rtol=0, atol=1e-4)
    assert len(curves[0]) == 30 and curves[0][-3:].mean() < 0.8 * curves[0][:3].mean()


class Gradients(TrainerCallback):
    """Those that optimizers get."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append(torch.cat([x.grad.flatten() for x in model.parameters()]))


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulated_gradients_are_those_of_the_mean(stage, tmp_path, tiny_tokenizer, llama):
    """Labels do not change that, though the Trainer counts them."""
    make, gradient = (contrastive, rankpo)[stage - 1], Gradients()
    more = {"gradient_accumulation_steps": 2, "max_steps": 1} | IN_ORDER
    trainer = make(llama, tiny_tokenizer, tmp_path, rows=8, **more)
    trainer.add_callback(gradient)
    if stage == 1:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: collate(rows) | {"labels": torch.tensor([1, 2, 5, 6])}
    trainer.train()
    rows = [trainer.train_dataset[i] for i in range(8)]
    halves = [trainer.data_collator(half) for half in (rows[:4], rows[4:])]
    losses = [trainer.compute_loss(llama, half) for half in halves]
    close(*gradient.seen, gradients(sum(losses) / 2, llama))


def test_compute_loss_func_would_double_them(tmp_path, tiny_tokenizer, llama):
    """Why the trainers have a compute_loss; the Trainer takes that of a function for scaled."""

    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama

        def forward(self, query, passage):
            return hf_runs.vectors(llama, query), hf_runs.vectors(llama, passage)

    more, gradient = {"gradient_accumulation_steps": 2, "max_steps": 1} | IN_ORDER, Gradients()
    trainer = Trainer(
        Vectors(), arguments(tmp_path, remove_unused_columns=False, **more), callbacks=[gradient],
        data_collator=Collator(tiny_tokenizer), train_dataset=triplets(8),
        compute_loss_func=lambda vectors, *_, **__: info_nce_loss(*vectors),
    )  # fmt: skip
    trainer.train()
    ours = contrastive(llama, tiny_tokenizer, tmp_path, rows=8, callbacks=[gradient], **more)
    ours.train()
    close(gradient.seen[0], 2 * gradient.seen[1])
    with pytest.raises(ValueError, match="compute_loss_func is given, but the loss is this"):
        HFContrastiveTrainer(llama, arguments(tmp_path), compute_loss_func=info_nce_loss)


RUNS = {  # options of both, of one process
    "negatives of all ranks": (
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 8},
    ),
    "negatives of each rank": ({"across": False}, {"gradient_accumulation_steps": 2}),
    "pairs and reference": ({"stage": 2}, {"per_device_train_batch_size": 8}),
    "rows of a stream": ({"stream": True}, {"per_device_train_batch_size": 8}),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tiny_tokenizer, tiny_bert_dir):
    """Of two ranks, of all runs."""
    directory = tmp_path_factory.mktemp("ranks")
    runs = [both for both, _ in RUNS.values()]
    args = (directory / "out", tiny_bert_dir, tiny_tokenizer)
    started = rank_runs.start(2, directory / "said", all_trained, runs, *args)
    for rank in (ended := started.ended()):
        assert rank.code == 0, rank.said
    return dict(zip(RUNS, zip(*[rank.answer for rank in ended], strict=True), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process_does(
    name, answers, tmp_path, tiny_tokenizer, tiny_bert_dir
):
    """BERT has a pooler, of no gradient. Without negatives of other ranks, they are two
    micro-batches. The reference is computed of one row as well, fewer than ranks."""
    both, alone = RUNS[name]
    expected = trained(tmp_path, tiny_bert_dir, tiny_tokenizer, **both, **alone)
    for rank in answers[name]:
        for ours, theirs in zip(rank, expected, strict=True):
            close(ours, theirs)


def test_mixed_precision_is_the_models_alone(tmp_path, tiny_tokenizer, tiny_llama_dir):
    """Losses are fp32, of states that come in bf16."""
    curves, seen = [], set()
    for bf16 in (False, True):
        model = AutoModel.from_pretrained(tiny_llama_dir)
        projection = model.layers[0].self_attn.q_proj
        projection.register_forward_hook(lambda *args: seen.add(args[2].dtype))
        trainer = contrastive(model, tiny_tokenizer, tmp_path, bf16=bf16, max_steps=6)
        compute, dtypes = trainer.loss_and_grads, set()

        def spied(q, p, batch, compute=compute, dtypes=dtypes):
            assert not torch.is_autocast_enabled("cpu")
            loss, *others = compute(q, p, batch)
            dtypes |= {x.dtype for x in (q, p, loss)}
            return loss, *others

        trainer.loss_and_grads = spied
        curves.append(curve(trainer))
        assert dtypes == {torch.float32}
    assert seen == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(*curves, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("make", [contrastive, rankpo])
def test_a_resumed_training_goes_on_as_if_uninterrupted(
    make, tmp_path, tiny_tokenizer, tiny_llama_dir
):
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    curves = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = AutoModel.from_pretrained(tiny_llama_dir)
        if make is rankpo:
            more["reference"] = model  # as it starts, not as it was when it was saved
        curves.append(curve(make(model, tiny_tokenizer, tmp_path, **more), resume))
    torch.testing.assert_close(*curves, rtol=0, atol=0)


@pytest.mark.long
def test_a_compiled_model_has_the_same_curve(tmp_path, tiny_tokenizer, tiny_llama_dir):
    curves = []
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = AutoModel.from_pretrained(tiny_llama_dir)
        trainer = contrastive(model, tiny_tokenizer, tmp_path, max_steps=2, **more)
        curves.append(curve(trainer))
    torch.testing.assert_close(*curves, rtol=0, atol=1e-4)
