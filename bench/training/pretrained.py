"""What does a step of your model on your texts cost, as either trainer does it by itself?

Both take the same weights, rows, batch size and limits of length, and otherwise the defaults of
their users: ours those of `rankpo-fast contrastive`, sentence-transformers those of its trainer
with MultipleNegativesRankingLoss. Steps are timed, not learning. That both train on the same thing
is seen from the loss of a first batch, at one temperature and without dropout.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from rankpo_fast.data.rows import read_contrastive, write_jsonl
from rankpo_fast.errors import InputError
from rankpo_fast.model.settings import read_settings

from ..apart import in_a_process
from ..questions import NOT_INSTALLED, OURS, Question, Result, Row, Settings, Shape
from .corpus import SEED, batches, workplace
from .implementations import Implementation, Measured, Task, measure
from .steps import compare, rows_of

NAME, ASKS = "pretrained", __doc__.splitlines()[0]
BATCH, STEPS, ROWS = 32, {"cpu": 4, "cuda": 20}, 1024  # ROWS: of a file at most
NEGATIVES = 5  # of a row at most: our default
TEMPERATURE, GATE = 0.05, 1e-4  # at which losses are compared; of their relative difference


def ours(task: Task) -> None:
    from rankpo_fast.train.contrastive import train_contrastive

    train_contrastive(
        ModelConfig(str(task.model)),
        ContrastiveDataConfig([str(task.train_data)]),
        ContrastiveLossConfig(),
        TrainingConfig(
            str(task.output),
            max_steps=task.steps,
            per_device_train_batch_size=task.batch,
            gradient_accumulation_steps=1,
            seed=task.seed,
        ),
        EvaluationConfig(),
        ComputeConfig(task.device, cache_dir=str(task.cache)),
    )


def sentence_transformers(task: Task) -> None:
    import accelerate  # noqa: F401 - which its trainer misses only later
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(task.model), device=task.device)
    arguments = SentenceTransformerTrainingArguments(
        str(task.output),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        seed=task.seed,
        use_cpu=task.device == "cpu",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        prompts=_prompts(task),
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns(rows_at(task.train_data))),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()


def settings_of(model: Path) -> dict[str, Any]:
    """Prefixes and limits, as the directory says."""
    return read_settings(model, any_pooling=True)


IMPLEMENTATIONS: dict[str, Implementation | str] = {
    "sentence-transformers": sentence_transformers, OURS: ours,
}  # fmt: skip


def rows_at(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """As sentence-transformers has them: anchor, positive, negative_1, ..."""
    found = {
        "anchor": [row["query"] for row in rows],
        "positive": [row["positives"][0] for row in rows],
    }
    for number in range(len(rows[0]["negatives"])):
        found[f"negative_{number + 1}"] = [row["negatives"][number] for row in rows]
    return found


def _prompts(task: Task) -> dict[str, str]:
    """Of the columns, as the directory says and ours reads by itself."""
    found = settings_of(task.model)
    names = list(columns(rows_at(task.train_data)))
    return {"anchor": found["query_prefix"]} | {
        name: found["passage_prefix"] for name in names if name != "anchor"
    }


def first_losses(task: Task) -> dict[str, float]:
    """Of each one's encoder and loss on the first batch of rows, in fp32, not in training."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from rankpo_fast import info_nce_loss
    from rankpo_fast.model.load import load_encoder

    texts, prompts = columns(rows_at(task.train_data)[: task.batch]), _prompts(task)
    passages = [text for column in list(texts)[1:] for text in texts[column]]
    device = torch.device(task.device)
    encoder = load_encoder(EncoderConfig(str(task.model)), device=device).eval()
    model = SentenceTransformer(str(task.model), device=task.device).eval()
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    with torch.no_grad():
        tables = (encoder.tokenize_queries(texts["anchor"]), encoder.tokenize_passages(passages))
        q, p = (encoder.embed(t, max_tokens=max(4096, *t.lengths.tolist())) for t in tables)
        of_ours = info_nce_loss(q, p, torch.arange(len(q), device=device), temperature=TEMPERATURE)
        features = [
            model.preprocess([prompts[name] + text for text in column])
            for name, column in texts.items()
        ]
        features = [
            {key: x.to(device) if torch.is_tensor(x) else x for key, x in one.items()}
            for one in features
        ]
        theirs = loss(features, None)
    return {OURS: of_ours.item(), "sentence-transformers": theirs.item()}


def write_tokenizer(model: Path, directory: Path) -> None:
    """And the config, wherever in its directory the model has them."""
    import torch

    from rankpo_fast.model.load import load_encoder

    encoder = load_encoder(EncoderConfig(str(model)), device=torch.device("cpu"))
    encoder.tokenizer.save_pretrained(directory)
    encoder.backbone.config.save_pretrained(directory)


def write_rows(texts: Path, directory: Path) -> list[dict[str, Any]]:
    """train.jsonl of as many rows as fill batches, one positive each and as many negatives as all
    of them have; InputError where there are too few."""
    found = read_contrastive(texts)[:ROWS]
    found = found[: len(found) // BATCH * BATCH]
    if not found:
        raise InputError(f"--texts {texts}: fewer than the {BATCH} rows of a batch")
    count = min(NEGATIVES, *(len(row.negatives) for row in found))
    rows = [
        {"query": r.query, "positives": [r.positives[0]], "negatives": list(r.negatives[:count])}
        for r in found
    ]
    write_jsonl(directory / "train.jsonl", rows)
    return rows


def answer(model: Path, texts: Path, shape: Shape, settings: Settings) -> Result:
    corpus = workplace() / "pretrained"
    rows = write_rows(texts, corpus)
    negatives = len(rows[0]["negatives"])
    task = Task(
        model=model, corpus=corpus, output=Path(), cache=workplace() / "cache",
        device=settings.device, batch=BATCH, negatives=negatives, steps=shape["steps"],
        learning_rate=0.0, seed=0, repeating=False,  # neither is asked for here
    )  # fmt: skip
    longest = max(settings_of(model)[f"max_{role}_length"] for role in ("query", "passage"))
    losses = in_a_process(first_losses, task)
    in_a_process(write_tokenizer, model, corpus)
    of = batches(rows, corpus, BATCH, negatives, SEED, longest)
    answers = compare(IMPLEMENTATIONS, partial(in_a_process, measure), task, settings)

    def figures(implementation: str, given: Sequence[Measured]) -> dict[str, Any]:
        seconds = statistics.median(one.seconds for one in given)
        return {"queries": BATCH / seconds, "tokens": of.tokens / seconds}

    found = [checked(row, losses) for row in rows_of(answers, figures)]
    about = {**of.about, "negatives": negatives, "first loss": losses}
    return Result(NAME, "training", ASKS, shape, tuple(found), gate=GATE, about=about)


def checked(row: Row, losses: dict[str, float] | str) -> Row:
    """Ours, with its error; without its times where that is above the gate, or not known though
    the peer is there."""
    if row.implementation != OURS or row.note:
        return row
    if isinstance(losses, str):
        return row if losses.endswith(NOT_INSTALLED) else Row(OURS, f"first loss: {losses}")
    mine, theirs = losses[OURS], losses["sentence-transformers"]
    error = abs(mine - theirs) / abs(theirs)
    if error > GATE:
        note = f"first loss {mine:.6g}, not {theirs:.6g}: an error of {error:.1e} above the gate"
        return Row(OURS, note, error=error)
    return dataclasses.replace(row, error=error)


def question(model: Path, texts: Path) -> Question:
    """Of that model on those rows. InputError unless both are there."""
    if not model.is_dir():
        raise InputError(f"--model {model}: no such directory")
    if not texts.is_file():
        raise InputError(f"--texts {texts}: no such file")

    def shapes(device: str, level: str) -> list[Shape]:
        return [
            {"batch": BATCH, "steps": STEPS[device], "model": "/".join(model.resolve().parts[-2:])}
        ]

    return dataclasses.replace(_WITHOUT, shapes=shapes, answer=partial(answer, model, texts))


def _unasked(shape: Shape, settings: Settings) -> Result:
    raise AssertionError("it has no shapes")


_WITHOUT = Question(
    NAME, "training", f"{ASKS} (--model, --texts)", lambda *_: [], _unasked,
    lambda _: list(IMPLEMENTATIONS),
)  # fmt: skip
QUESTIONS = [_WITHOUT]
