"""Who trains: each contender trains the task's model on its rows and leaves a directory.

All get the same weights, rows, batch size and number of steps, InfoNCE of cosines at TEMPERATURE,
AdamW on a cosine schedule, fp32 and no dropout.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.measure import mark_resident, peak_resident
from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)

TEMPERATURE, WARMUP = 0.02, 0.1
MAX_TOKENS = 4096  # of a micro-batch of ours: what a CPU's cache likes
CUTOFF = 20


@dataclass(frozen=True)
class Task:
    """What to train on; `corpus` is as write_corpus leaves it, `output` and `cache` are made."""

    model: Path
    corpus: Path
    output: Path
    cache: Path
    batch_size: int
    negatives: int  # of each row
    steps: int
    learning_rate: float
    seed: int
    repeats: bool  # whether a text may stand in several rows
    ndcg: bool  # whether to measure what was learnt

    @property
    def train_data(self) -> Path:
        return self.corpus / "train.jsonl"


Contender = Callable[[Task], None]


@dataclass(frozen=True)
class Measured:
    """seconds: of a step, the mean over all but the first, from the end of an update to the end of
    the next. peak: bytes resident at most, above those when the first text entered the model."""

    seconds: float
    peak: int
    ndcg: float | None


def measure(contender: Contender, task: Task) -> Measured:
    """In a process of its own, whose peak is the contender's. Alike for all: torch's own hooks tell
    when a model is first called and when an optimizer has made its step."""
    before: list[int] = []
    updates: list[float] = []

    def first_call(*_: Any) -> None:
        calls.remove()
        before.append(mark_resident())

    calls = register_module_forward_pre_hook(first_call)
    steps = register_optimizer_step_post_hook(lambda *_: updates.append(perf_counter()))
    contender(task)
    steps.remove()
    peak = peak_resident() - before[0]
    # Ours makes the optimizer's state by an update of its own, before the first step.
    assert len(updates) in (task.steps, task.steps + 1), f"{len(updates)} updates"
    updates = updates[-task.steps :]
    seconds = (updates[-1] - updates[0]) / (task.steps - 1)
    return Measured(seconds, peak, ndcg(task.output, task.corpus) if task.ndcg else None)


def ndcg(model: Path, corpus: Path) -> float:
    """Of a directory that a contender left, on the held-out queries."""
    from rankpo_fast.data.rows import read_retrieval
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.evaluate import evaluate

    encoder = load_encoder(EncoderConfig(str(model)), device=torch.device("cpu"))
    retrieval = read_retrieval(corpus / "queries.jsonl", corpus / "corpus.jsonl")
    figures = evaluate(encoder, retrieval=retrieval, cutoffs=[CUTOFF], max_tokens=MAX_TOKENS)
    return figures[f"ndcg@{CUTOFF}"]


def rankpo_fast(task: Task, *, model: dict | None = None, training: dict | None = None) -> None:
    """`model` and `training` are further settings of ModelConfig and TrainingConfig."""
    from rankpo_fast.train.contrastive import train_contrastive

    train_contrastive(
        _model(task, **(model or {})),
        ContrastiveDataConfig([str(task.train_data)], num_negatives=task.negatives),
        ContrastiveLossConfig(temperature=TEMPERATURE),
        _training(task, **(training or {})),
        EvaluationConfig(),
        ComputeConfig("cpu", MAX_TOKENS, cache_dir=str(task.cache)),
    )


def one_graph(task: Task) -> None:
    """Our encoder, batches and loss in a plain loop: one graph, one backward, no more."""
    from rankpo_fast import info_nce_loss
    from rankpo_fast.data.batches import ContrastiveData
    from rankpo_fast.data.rows import read_contrastive
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.train.optim import adamw, learning_rate, update
    from rankpo_fast.train.texts import Texts

    config = _training(task)
    encoder = load_encoder(_model(task), device=torch.device("cpu")).train()
    data = ContrastiveData(
        read_contrastive(task.train_data),
        batch_size=task.batch_size,
        num_negatives=task.negatives,
        seed=task.seed,
    )
    compute = ComputeConfig("cpu", MAX_TOKENS, cache_dir=str(task.cache))
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    optimizer = adamw(encoder, config)
    for step in range(task.steps):
        batch = data.batch(*divmod(step, data.batches_per_epoch))
        rows, queries, passages = texts.of(batch)
        vectors = encoder.embed(texts.table, rows, max_tokens=MAX_TOKENS)
        loss = info_nce_loss(
            vectors[queries][batch.query_rows],
            vectors[passages],
            batch.labels,
            temperature=TEMPERATURE,
            excluded=(batch.excluded_offsets, batch.excluded_columns),
        )
        loss.backward()
        rate = learning_rate(step, task.steps, config)
        update(optimizer, [loss.detach()], rate, config.max_grad_norm)
    encoder.save(task.output)


def sentence_transformers(task: Task, *, cached: dict | None = None) -> None:
    """Its trainer as its documentation advises; `cached` are settings of its cached loss, None is
    the plain one. Its loop tokenises, and pads every column of a batch to the longest there."""
    import accelerate  # noqa: F401 - which its trainer misses only later
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    rows = [json.loads(line) for line in task.train_data.read_text("utf-8").splitlines()]
    columns = {
        "anchor": [row["query"] for row in rows],
        "positive": [row["positives"][0] for row in rows],
    }
    for number in range(task.negatives):
        columns[f"negative_{number + 1}"] = [row["negatives"][number] for row in rows]
    model = SentenceTransformer(str(task.model), device="cpu")
    if cached is None:
        loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **cached)
    arguments = SentenceTransformerTrainingArguments(
        str(task.output),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,  # below 1: their share
        optim="adamw_torch_fused",
        seed=task.seed,
        # What its documentation asks for with this loss, and pays for in time.
        batch_sampler="no_duplicates" if task.repeats else "batch_sampler",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
    )
    trainer.train()
    model.save(str(task.output), create_model_card=False)


def _model(task: Task, **more: Any) -> ModelConfig:
    return ModelConfig(str(task.model), bf16=False, gradient_checkpointing=False, **more)


def _training(task: Task, **more: Any) -> TrainingConfig:
    return TrainingConfig(
        str(task.output),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=task.learning_rate,
        warmup_ratio=WARMUP,
        seed=task.seed,
        **more,
    )
