"""Runs of transformers' Trainer: ours, and plain torch by the definitions of both stages."""

import os
import random
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from transformers import AutoModel, Trainer, TrainingArguments

from rankpo_fast.integrations import hf_trainer
from rankpo_fast.integrations.hf_trainer import HFContrastiveTrainer, HFRankPOTrainer

WORDS = ["senior", "data", "engineer", "Berlin", "nurse", "Lyon", "night", "teacher", "Python"]
OPTIONS = {"beta": 1.5, "temperature": 0.1, "gamma_beta_ratio": 0.3}


def triplets(count):
    """A positive repeats its query; lengths differ."""
    dice = random.Random(0)

    def words(most):
        return " ".join(dice.choices(WORDS, k=dice.randint(2, most)))

    queries = [words(6) for _ in range(count)]
    return [{"query": q, "positive": f"{q} {words(4)}", "negative": words(9)} for q in queries]


def preferences(count):
    dice, rows = random.Random(1), []
    for row in triplets(count):
        passages = dice.sample([row["positive"], row["negative"]], 2)
        rows.append({"query": row["query"], "passage1": passages[0], "passage2": passages[1],
                     "preferred": dice.choice("AB")})  # fmt: skip
    return rows


def pair(row):
    """The preferred passage, and the other."""
    return (row["passage1"], row["passage2"])[:: 1 if row["preferred"] == "A" else -1]


class Stream(IterableDataset):
    """Triplets without length."""

    def __iter__(self):
        return iter(triplets(32))


class Collator:
    """Rows of texts -> what the trainers take; of triplets or of preferences."""

    def __init__(self, tokenizer, side="right"):
        self.tokenizer, self.side = tokenizer, side

    def __call__(self, rows):
        passages = [
            [row["positive"], row["negative"]] if "positive" in row else pair(row) for row in rows
        ]
        texts = {"query": [row["query"] for row in rows], "passage": sum(map(list, passages), [])}
        keys = {"padding": True, "padding_side": self.side, "return_tensors": "pt"}
        return {side: dict(self.tokenizer(texts[side], **keys)) for side in texts}


# --- plain torch ---


def vectors(model, features, pooling="last"):
    """Text by text."""
    states, rows = model(**features).last_hidden_state, []
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    for text, mask in zip(states, features["attention_mask"], strict=True):
        text = text[mask.bool()]
        rows.append({"last": text[-1], "cls": text[0], "mean": text.mean(0)}[pooling])
    return F.normalize(torch.stack(rows), dim=-1)


class Plain(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss(model, inputs)

    @staticmethod
    def loss(model, batch, pooling="last"):
        q, p = (vectors(model, batch[side], pooling) for side in ("query", "passage"))
        return F.cross_entropy(q @ p.T / 0.02, torch.arange(len(q)) * (len(p) // len(q)))


class PlainRankPO(Plain):
    reference, options, weights, hinge = None, OPTIONS, (1.0, 0.0), False  # of RankPO, of SFT

    @staticmethod
    def scores(model, batch, pooling="last"):
        q, p = (vectors(model, batch[side], pooling) for side in ("query", "passage"))
        return torch.einsum("bd,bgd->bg", q, p.view(len(q), 2, -1))

    def loss(self, model, batch, pooling="last"):
        scores, over = self.scores(model, batch, pooling), 0.0
        if self.reference is not None:
            with torch.no_grad():
                over = self.scores(self.reference.eval(), batch, pooling).diff(dim=1)[:, 0]
        beta, temperature, gamma = self.options.values()
        margin = (-scores.diff(dim=1)[:, 0] + over) / temperature - gamma
        rows = F.relu(1 - beta * margin) if self.hinge else -F.logsigmoid(beta * margin)
        sft = F.cross_entropy(scores / temperature, torch.zeros(len(scores), dtype=torch.int64))
        return self.weights[0] * rows.mean() + self.weights[1] * sft


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([
        (torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in model.parameters()
    ])  # fmt: skip


def close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())


# --- a run ---

IN_ORDER = {"train_sampling_strategy": "sequential", "learning_rate": 0.0, "max_grad_norm": 0.0}


def arguments(directory, kind=TrainingArguments, **more):
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,  # or Adam divides rounding by rounding
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**settings | more)


def pair_arguments(directory, **more):
    return arguments(directory, hf_trainer.RankPOArguments, **OPTIONS | more)


def contrastive(model, tokenizer, directory, rows=30, **more):
    settings = {
        name: more.pop(name)
        for name in ("loss", "pooling", "eval_dataset", "callbacks")
        if name in more
    }
    return HFContrastiveTrainer(
        model, arguments(directory, **more), data_collator=Collator(tokenizer),
        train_dataset=triplets(rows), **settings,
    )  # fmt: skip


def rankpo(model, tokenizer, directory, rows=30, reference=None, **more):
    settings = {
        name: more.pop(name)
        for name in ("pooling", "eval_dataset", "peft_config", "compute_metrics") if name in more
    }  # fmt: skip
    args = pair_arguments(directory, reference_free=reference is None, **more)
    return HFRankPOTrainer(
        model, reference, args, train_dataset=preferences(rows), tokenizer=tokenizer, **settings
    )


def plain(model, tokenizer, directory, kind=Plain, rows=triplets, **more):
    args = arguments(directory, remove_unused_columns=False, **more)
    return kind(model, args, data_collator=Collator(tokenizer), train_dataset=rows(30))


plain_pairs = partial(plain, kind=PlainRankPO, rows=preferences)


def curve(trainer, resume=None):
    """Losses of a training, one a log."""
    trainer.train(resume_from_checkpoint=resume)
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


def trained(directory, model, tokenizer, *, stage=1, across=True, stream=False, **more):
    """Gradient descent by ours: (losses, metrics, weights, references of one row)."""
    more = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0} | more
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as BERT has it
    model = AutoModel.from_pretrained(model, **dropout)
    if stage == 1:
        loss = None if across else hf_trainer.InfoNCELoss()
        trainer = hf_trainer.HFContrastiveTrainer(
            model, arguments(directory, **more), data_collator=Collator(tokenizer),
            train_dataset=Stream() if stream else triplets(32), loss=loss,
        )  # fmt: skip
    else:
        args = pair_arguments(directory, reference_free=False, **more)
        trainer = hf_trainer.HFRankPOTrainer(
            model, model, args, train_dataset=preferences(32), tokenizer=tokenizer,
            eval_dataset=preferences(1),
        )  # fmt: skip
    losses = curve(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = ["accuracy", "positive_similarity"] if stage == 1 else ["rewards/margins"]
    metrics = torch.tensor([[log[name] for name in names] for log in logs])
    weights = torch.cat([x.detach().flatten() for x in model.parameters()])
    reference = trainer.eval_dataset["reference"][:] if stage == 2 else []
    return losses, metrics, weights, torch.tensor(reference)


def all_trained(runs, *args):
    return [trained(*args, **run) for run in runs]


def accelerated(world):
    """The example's first vectors and loss: (queries, passages, loss)."""
    import train_accelerate

    seen = []

    class Spied(hf_trainer.InfoNCELoss):
        def forward(self, q, p):
            seen.append((q.detach(), p.detach(), super().forward(q, p)))
            return seen[-1][2]

    put = {"small_world": lambda: world, "InfoNCELoss": Spied}
    on_cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
    with on_cpu, mock.patch.multiple(train_accelerate, **put):
        train_accelerate.main()
    return [x.detach() for x in seen[0]]
