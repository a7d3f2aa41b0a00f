"""Stage 1: InfoNCE of each query against all passages of its batch.

M rows, N distinct passages, C of them candidates for all rows, H drawn for single rows, U distinct
queries of a batch, D dims.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import ContrastiveBatch, ContrastiveData
from rankpo_fast.data.memory import Source
from rankpo_fast.data.rows import read_contrastive
from rankpo_fast.data.shares import describe_shares, read_shares
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.node import reading_once
from rankpo_fast.ops.common import mean
from rankpo_fast.ops.info_nce import info_nce_loss_and_grads
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.arithmetic import summed_in_order
from rankpo_fast.train.auto import settle
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.guide import guide_vectors
from rankpo_fast.train.loop import train
from rankpo_fast.train.output import claimed
from rankpo_fast.train.prepare import nothing_left, prepare_encoder, prepare_run
from rankpo_fast.train.result import TrainingResult
from rankpo_fast.train.resume import shared_precision
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum

LEAST_TEMPERATURE = 0.01  # that is learnt: the losses are tested down to it


class RowFlags(NamedTuple):
    """Through which the user gives rows and says what batches of them hold."""

    files: str
    batch_size: str
    num_negatives: str


FLAGS = RowFlags("--train_data", "--per_device_train_batch_size", "--num_negatives")


def train_contrastive(
    model: ModelConfig,
    data: ContrastiveDataConfig,
    loss: ContrastiveLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    *,
    encoder: Encoder | None = None,
    named: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Run stage 1; the output directory holds the model.

    Args:
        encoder: to train; None: the one that `model` names is loaded.
        named: whether the encoder given is that one, as it is loaded.
        callbacks: called on the first rank.

    Raises InputError for what the user can put right, most of it before the model is loaded.
    """
    in_order = summed_in_order(training.deterministic)
    with Ranks.joined(compute) as ranks, claimed(training, ranks), in_order:
        model, training = settle(
            model, training, ranks, negatives=data.num_negatives, lent=encoder is not None
        )
        precision = shared_precision(model, training, ranks)
        # Which tokens are kept of a vocabulary follows from texts, so that all must have them.
        once = reading_once(ranks, compute.cache_path, wanted=not model.trim_vocabulary)
        with once as node, ranks.first_ahead():
            task, read = node.given(), []
            if task is None:
                rows = training.per_device_train_batch_size * ranks.size
                batches = read_batches(
                    data.train_data, rows, data.num_negatives, training.seed,
                    data.train_data_weights, own_negatives=loss.own_negatives,
                )  # fmt: skip
                read = [batches]
            run = prepare_run(
                "contrastive", ranks, precision, model, data, loss, training, evaluation, compute,
                encoder=None if named else encoder,
            )  # fmt: skip
            if nothing_left(run):
                return TrainingResult.of(run.path, None)
            encoder = prepare_encoder(run, encoder, *read)
            _check_dims(loss, encoder)
            if task is None:
                batches, texts = tokenized(batches, encoder, compute)
                if (guide := loss.guide_model_name_or_path) is not None:
                    of_guide = guide_vectors(guide, run.model, batches, run.device, compute)
                    batches = batches.with_guide(*of_guide)
                task = node.hand(ContrastiveTask(batches, texts, loss).without_texts())
                del read, batches, texts  # strings, which nobody needs any more
        about = {
            "rows": describe_rows(task.data),
            "loss": describe_loss(loss),
            "negatives": describe_negatives(
                task.data, training.gradient_accumulation_steps, own=loss.own_negatives
            ),
        }
        with temperature_learnt(encoder, loss, run.device) as log_scale:
            task = replace(task, log_scale=log_scale)
            return train(run, encoder, [task], about, callbacks)


def read_batches(
    files: Sequence[Source],
    batch_size: int,
    num_negatives: int,
    seed: int,
    weights: Sequence[float] | None = None,
    *,
    own_negatives: bool = False,
    flags: RowFlags = FLAGS,
) -> ContrastiveData:
    """Rows as batches. InputError for a bad row, and where a query would have no negative at all.

    Args:
        weights: how often the rows of each file come in an epoch; None: once.
        own_negatives: whether what is drawn for a row is a negative of no other.
        flags: which a message names.
    """
    rows, shares = read_shares(read_contrastive, files, weights)
    batches = ContrastiveData(
        rows, batch_size=batch_size, num_negatives=num_negatives, seed=seed, shares=shares,
        own_negatives=own_negatives,
    )  # fmt: skip
    _check_negatives(batches, flags)
    return batches


def tokenized(
    batches: ContrastiveData,
    encoder: Encoder,
    compute: ComputeConfig,
    flags: RowFlags = FLAGS,
) -> tuple[ContrastiveData, Texts]:
    """The batches with texts of equal token ids as one, and their texts. InputError as above."""
    texts = Texts.tokenize(encoder, batches.query_texts, batches.passage_texts, compute)
    own = texts.queries_as_passages(encoder, batches.query_texts, compute)
    batches = batches.merged(texts.query_rows, texts.passage_rows, own)
    _check_negatives(batches, flags)
    return batches, texts


def _check_negatives(batches: ContrastiveData, flags: RowFlags) -> None:
    if batches.batch_size == 1 and batches.bare_rows > 0:
        raise InputError(
            f"{batches.bare_rows:,} of {batches.num_rows:,} rows of {flags.files} have no "
            f"negative, and in a batch of one nothing else is one: give {flags.batch_size} 2 or "
            f"more{'' if batches.num_negatives else f', or {flags.num_negatives} 1'}"
        )


def describe_rows(batches: ContrastiveData) -> str:
    """How many there are, and what of them is not used."""
    said = [f"{batches.num_rows:,} rows"]
    if batches.known_negatives:
        known = "negatives are positives of their query or the query itself: left out"
        said.append(f"{batches.known_negatives:,} {known}")
    if batches.short_rows:
        short = f"{batches.short_rows:,} of them have fewer than {batches.num_negatives} negatives"
        said.append(f"{short}: all of theirs are used")
    return ", ".join(said) + describe_shares(batches.shares)


def describe_loss(loss: ContrastiveLossConfig) -> str:
    """Its temperature, and what else differs from plain InfoNCE."""
    learnt = loss.temperature_learning_rate is not None
    said = [f"InfoNCE, temperature {loss.temperature}{', which is learnt' if learnt else ''}"]
    for name, value in loss.changed().items():
        if not name.startswith("temperature"):
            listed = " ".join(map(str, value)) if isinstance(value, list) else value
            said.append(f"{name} {listed}")
    return ", ".join(said)


def describe_negatives(batches: ContrastiveData, accumulated: int, *, own: bool = False) -> str:
    """Of a query; and that accumulation adds none, where there is any."""
    text = f"all passages of a query's batch of {batches.batch_size:,} rows"
    if own:
        text = f"its own and the positives of its batch of {batches.batch_size:,} rows"
    if accumulated > 1:
        text += (
            f"; --gradient_accumulation_steps {accumulated} adds none, a larger "
            f"--per_device_train_batch_size does, in the same memory"
        )
    return text


def _check_dims(loss: ContrastiveLossConfig, encoder: Encoder) -> None:
    dims = loss.matryoshka_dims
    if dims is not None and max(dims) > encoder.dim:
        raise InputError(f"--matryoshka_dims {max(dims)}: the model has {encoder.dim} dims")


@contextmanager
def temperature_learnt(
    encoder: Encoder, loss: ContrastiveLossConfig, device: torch.device
) -> Iterator[nn.Parameter | None]:
    """Inside, log(1 / temperature) is a parameter of the encoder, if it is to be learnt: trained,
    and in checkpoints."""
    if loss.temperature_learning_rate is None:
        yield None
        return
    dtype = torch.promote_types(torch.float32, encoder.backbone.dtype)
    start = torch.tensor(-math.log(loss.temperature), dtype=dtype, device=device)
    encoder.log_scale = nn.Parameter(start)
    try:
        yield encoder.log_scale
    finally:
        encoder.log_scale = None


@dataclass(frozen=True, eq=False)
class ContrastiveTask(TrainingTask[ContrastiveBatch]):
    """InfoNCE of rows of stage 1."""

    data: ContrastiveData
    config: ContrastiveLossConfig
    log_scale: nn.Parameter | None = None  # of a temperature that is learnt

    @property
    def by_rows(self) -> bool:
        return self.config.one_directional

    @property
    def rates(self) -> dict[str, float]:
        rate = self.config.temperature_learning_rate
        return {} if rate is None or self.log_scale is None else {"log_scale": rate}

    def loss(self, queries: Tensor, passages: Tensor, batch: ContrastiveBatch) -> LossOutput:
        config = self.config
        more = self._temperature() | config.options()
        if config.own_negatives:
            negatives = passages[batch.negatives]  # [H, D]
            more |= {"own_negatives": negatives, "own_offsets": batch.negative_offsets}
        if config.tells_chosen:
            more["curated"] = batch.chosen_for
        if batch.guide_queries is not None and batch.guide_passages is not None:
            of_candidates = batch.guide_passages
            if batch.candidates is not None:
                of_candidates = of_candidates[batch.candidates]
            more["guide"] = (batch.guide_queries, of_candidates)
        # Excluded columns: further positives of the same query, in whatever row they stand.
        loss, grads, stats = info_nce_loss_and_grads(
            queries[batch.query_rows],  # [M, D]
            passages if batch.candidates is None else passages[batch.candidates],  # [C, D]
            batch.labels,
            excluded=(batch.excluded_offsets, batch.excluded_columns),
            **more,
        )
        d_passages = grads.passages
        if batch.candidates is not None:
            d_passages = scatter_sum(len(passages), (batch.candidates, d_passages))
        if grads.own_negatives is not None:
            d_passages = d_passages.index_put(
                (batch.negatives,), grads.own_negatives, accumulate=True
            )
        d_queries = scatter_sum(len(queries), (batch.query_rows, grads.queries))
        metrics, others = stats._asdict(), []
        if config.gradient_filter:  # whose gradient is 0, in bits
            metrics["queries_left_out"] = mean((grads.queries == 0).all(1).float())
        if self.log_scale is not None:  # d loss / d log(s) = s * d loss / d s
            scale = self.log_scale.detach().exp()
            metrics["temperature"] = 1 / scale
            others.append((self.log_scale, grads.scale * scale))
        return LossOutput(loss, d_queries, d_passages, metrics, others)

    def _temperature(self) -> dict[str, Any]:
        if self.log_scale is None:
            return {"temperature": self.config.temperature}
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(1 / min(self.config.temperature, LEAST_TEMPERATURE)))
        return {"scale": self.log_scale.detach().exp()}
