"""Who trains: each implementation trains the task's model on its rows.

All get the same weights (or, of a backbone without any on disk, random ones), rows, batch size and
number of steps, InfoNCE of cosines at TEMPERATURE, AdamW on a cosine schedule, weights in fp32 and
no dropout; fp32 throughout on the CPU, bf16 by autocast on a GPU.
"""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)

from ..gpu import Readings, watching
from ..measure import mark_resident, peak_resident

if TYPE_CHECKING:
    from rankpo_fast.model.encoder import Encoder

TEMPERATURE, WARMUP = 0.02, 0.1
CUTOFF = 20


@dataclass(frozen=True)
class Task:
    """What to train on; `corpus` is as write_corpus leaves it, `output` and `cache` are made."""

    model: Path
    corpus: Path
    output: Path
    cache: Path
    device: str
    batch: int
    negatives: int  # of each row
    steps: int
    learning_rate: float
    seed: int
    repeating: bool  # whether a text may stand in several rows
    ndcg: bool = False  # whether to measure what was learnt

    @property
    def train_data(self) -> Path:
        return self.corpus / "train.jsonl"

    @property
    def bf16(self) -> bool:
        return self.device == "cuda"

    @property
    def from_scratch(self) -> bool:
        return not (self.model / "model.safetensors").exists()

    @property
    def max_tokens(self) -> int | None:
        """Of a micro-batch of ours: what a CPU's cache likes; a GPU's are found by trying."""
        return 4096 if self.device == "cpu" else None


Implementation = Callable[[Task], None]


@dataclass(frozen=True)
class Measured:
    """seconds: of a step, the mean over the last three quarters of them, from the end of an update
    to the end of the next. peak: bytes at most, as Memory counts them; watts, joules and throttled:
    of the device during those steps, `counted` in number."""

    seconds: float
    counted: int
    peak: int
    ndcg: float | None = None
    watts: float | None = None
    joules: float | None = None
    throttled: str | None = None


class Done(Exception):
    """Raised out of an update after which nothing is left to measure; so nothing is saved."""


def measure(implementation: Implementation, task: Task) -> Measured:
    """In a process of its own, whose peak is the implementation's."""
    first = max(1, task.steps // 4)  # whoever compiles or tries does it before this update
    marks: list[Any] = []  # the ends of updates
    memory = Memory(task.device)
    watch, readings = contextlib.ExitStack(), Readings()

    def updated() -> None:
        nonlocal readings
        if len(marks) + 1 == first:
            _wait(task.device)  # what came before is no part of what follows
            memory.settle()
            readings = watch.enter_context(watching(task.device))
        marks.append(_mark(task.device))
        if len(marks) == task.steps:
            _wait(task.device)
            watch.close()
            if not task.ndcg:
                raise Done

    with watch, hooks(memory.start, updated, memory.made), contextlib.suppress(Done):
        implementation(task)
    assert len(marks) == task.steps, f"{len(marks)} updates"
    counted = task.steps - first
    return Measured(
        _between(marks[first - 1], marks[-1], task.device) / counted,
        counted,
        memory.peak(),
        ndcg(task.output, task) if task.ndcg else None,
        readings.watts,
        readings.joules,
        readings.throttled,
    )


@contextlib.contextmanager
def hooks(
    first_call: Callable[[nn.Module], None],
    updated: Callable[[], None],
    made: Callable[[Optimizer], None],
) -> Iterator[None]:
    """Torch's own, alike for all: `first_call` of the first module that is called, `updated` at the
    end of every update, `made` where an optimizer made its state before."""
    began = False

    def call(module: nn.Module, *_: Any) -> None:
        calls.remove()
        first_call(module)

    def step(optimizer: Optimizer, *_: Any) -> None:
        nonlocal began
        # Ours makes the optimizer's state by an update of its own, which changes nothing.
        began = began or not getattr(optimizer, "found_inf", False)
        if began:
            updated()
        else:
            made(optimizer)

    calls = register_module_forward_pre_hook(call)
    steps = register_optimizer_step_post_hook(step)
    try:
        yield
    finally:
        calls.remove()
        steps.remove()


class Memory:
    """Of this process at most, once training has settled: what ours tries out before is over then.
    Weights, gradients and optimizer, whenever they are made, and what came on top since the first
    text entered the model; neither libraries nor texts, which are resident on a CPU too."""

    def __init__(self, device: str):
        self.device, self.before, self.of_optimizer = device, 0, 0

    def made(self, optimizer: Optimizer) -> None:
        tensors = (x for state in optimizer.state.values() for x in state.values())
        self.of_optimizer = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

    def start(self, module: nn.Module) -> None:
        there = mark_resident() if self.device == "cpu" else torch.cuda.memory_allocated()
        weights = list(module.parameters())
        gradients = [p.grad for p in weights if p.grad is not None]
        self.before = there - sum(x.nbytes for x in weights + gradients) - self.of_optimizer

    def settle(self) -> None:
        if self.device == "cpu":
            mark_resident()  # from where the peak starts anew
        else:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        if self.device == "cpu":
            return peak_resident() - self.before
        return torch.cuda.max_memory_allocated() - self.before


def _mark(device: str) -> Any:
    """A moment of the device's own, for which nothing waits."""
    if device == "cpu":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any, device: str) -> float:
    """Seconds."""
    return end - start if device == "cpu" else start.elapsed_time(end) / 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def evaluator(model: Path, task: Task) -> tuple["Encoder", Callable[[], float]]:
    """The encoder of a directory, and what tells its nDCG on the held-out queries as it then is."""
    from rankpo_fast.data.retrieval import read_retrieval
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.evaluate import measure

    encoder = load_encoder(EncoderConfig(str(model)), device=torch.device(task.device))
    retrieval = read_retrieval(task.corpus / "queries.jsonl", task.corpus / "corpus.jsonl")

    def measured() -> float:
        figures = measure(
            encoder, retrieval=retrieval, cutoffs=[CUTOFF], max_tokens=task.max_tokens,
            cache_dir=task.cache,
        ).figures  # fmt: skip
        return figures[f"ndcg@{CUTOFF}"]

    return encoder, measured


def ndcg(model: Path, task: Task) -> float:
    """Of a directory that an implementation left, on the held-out queries."""
    _, measured = evaluator(model, task)
    return measured()


def rankpo_fast(task: Task, **settings: Any) -> None:
    """`settings` are further ones of ModelConfig and TrainingConfig."""
    from rankpo_fast.train.contrastive import train_contrastive

    train_contrastive(
        _model(task, settings),
        ContrastiveDataConfig([str(task.train_data)], num_negatives=task.negatives),
        ContrastiveLossConfig(temperature=TEMPERATURE),
        _training(task, settings),
        EvaluationConfig(),
        _compute(task),
    )


def rankpo_fast_adapters(task: Task, **settings: Any) -> None:
    """As `rankpo_fast`, on weights of a file: an adapter beside random ones is refused, as their
    directory has none, so they are drawn once and written."""
    if task.from_scratch:
        task = dataclasses.replace(task, model=written(task.model, task.device))
    rankpo_fast(task, **settings)


def written(model: Path, device: str) -> Path:
    """The directory beside it that has random weights too, in bf16."""
    from rankpo_fast.model.load import load_encoder

    directory = model.with_name(f"{model.name}-written")
    if not directory.exists():
        config = ModelConfig(str(model), from_scratch=True, weights_dtype="bf16",
                             save_dtype="bfloat16", gradient_checkpointing=False)  # fmt: skip
        encoder = load_encoder(config, device=torch.device(device))
        encoder.save(directory)
        del encoder
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return directory


def one_graph(task: Task, **settings: Any) -> None:
    """Our encoder, batches and loss in a plain loop: one graph, one backward, no more."""
    from rankpo_fast import info_nce_loss
    from rankpo_fast.data.batches import ContrastiveData
    from rankpo_fast.data.moving import to_device
    from rankpo_fast.data.rows import read_contrastive
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.train.contrastive import tokenized
    from rankpo_fast.train.optim import learning_rate, make_optimizer

    config = _training(task, settings)
    encoder = load_encoder(_model(task, settings), device=torch.device(task.device)).train()
    data = ContrastiveData(
        read_contrastive(task.train_data),
        batch_size=task.batch,
        num_negatives=task.negatives,
        seed=task.seed,
    )
    data, texts = tokenized(data, encoder, _compute(task))
    optimizer = make_optimizer(encoder, config)
    for step in range(task.steps):
        batch = data.batch(*divmod(step, data.batches_per_epoch))
        rows, queries, passages = texts.of(batch)
        batch = to_device(batch, encoder.device)
        vectors = encoder.embed(texts.table, rows, max_tokens=task.max_tokens)
        loss = info_nce_loss(
            vectors[queries][batch.query_rows],
            vectors[passages],
            batch.labels,
            temperature=TEMPERATURE,
            excluded=(batch.excluded_offsets, batch.excluded_columns),
        )
        loss.backward()
        rate = learning_rate(step, task.steps, config)
        optimizer.update([loss.detach()], rate, config.max_grad_norm)
    encoder.save(task.output)


def sentence_transformers(
    task: Task,
    *,
    cached: int | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
) -> None:
    """Its trainer as its documentation advises; `cached` are the rows that its cached loss encodes
    at once, None is the plain one. Its loop tokenises, and pads every column of a batch to the
    longest there, unless flash attention takes texts end to end."""
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
    with _random_weights(task) if task.from_scratch else contextlib.nullcontext():
        model = SentenceTransformer(
            str(task.model),
            device=task.device,
            model_kwargs={"attn_implementation": attn_implementation},
        )
    if cached is None:
        loss: nn.Module = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=1 / TEMPERATURE, mini_batch_size=cached
        )
    arguments = SentenceTransformerTrainingArguments(
        str(task.output),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,  # below 1: their share
        optim="adamw_torch_fused",
        gradient_checkpointing=gradient_checkpointing,
        seed=task.seed,
        bf16=task.bf16,
        # What its documentation asks for with this loss, and pays for in time.
        batch_sampler="no_duplicates" if task.repeating else "batch_sampler",
        dataloader_drop_last=True,
        dataloader_pin_memory=task.device == "cuda",
        use_cpu=task.device == "cpu",
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


@contextlib.contextmanager
def _random_weights(task: Task) -> Iterator[None]:
    """What then loads a backbone makes it on the device, of its config alone."""
    from transformers import AutoModel

    def new(_: str, config: Any, **others: Any) -> nn.Module:
        with torch.device(task.device):
            return AutoModel.from_config(config)

    with mock.patch.object(AutoModel, "from_pretrained", new):
        yield


def _model(task: Task, settings: dict[str, Any]) -> ModelConfig:
    given = {"bf16": task.bf16, "gradient_checkpointing": False} | _of(ModelConfig, settings)
    return ModelConfig(str(task.model), from_scratch=task.from_scratch, **given)


def _training(task: Task, settings: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig(
        str(task.output),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=1,
        save_minutes=0,
        learning_rate=task.learning_rate,
        warmup_ratio=WARMUP,
        seed=task.seed,
        **_of(TrainingConfig, settings),
    )


def _of(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are the config's."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in settings.items() if name in names}


def _compute(task: Task) -> ComputeConfig:
    return ComputeConfig(task.device, task.max_tokens, cache_dir=str(task.cache))
