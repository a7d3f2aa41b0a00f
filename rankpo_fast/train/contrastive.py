"""Stage 1: InfoNCE of each query against all passages of its batch.

M rows, N distinct passages, U distinct queries of a batch, D dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

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
from rankpo_fast.ops.info_nce import info_nce_loss_and_grads
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.loop import train
from rankpo_fast.train.output import claimed
from rankpo_fast.train.prepare import nothing_left, prepare_encoder, prepare_run
from rankpo_fast.train.result import TrainingResult
from rankpo_fast.train.resume import shared_precision
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum


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
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Run stage 1; the output directory holds the model.

    Args:
        encoder: to train, in place of the one that `model` names.

    Raises InputError for what the user can put right, most of it before the model is loaded.
    """
    with Ranks.joined(compute) as ranks, claimed(training, ranks):
        precision = shared_precision(model, training, ranks)
        with ranks.first_ahead():
            rows = training.per_device_train_batch_size * ranks.size
            batches = read_batches(
                data.train_data, rows, data.num_negatives, training.seed, data.train_data_weights
            )
            run = prepare_run(
                "contrastive", ranks, precision, model, data, loss, training, evaluation, compute,
                encoder=encoder,
            )  # fmt: skip
            if nothing_left(run):
                return TrainingResult.of(run.path, None)
            encoder = prepare_encoder(run, encoder)
            batches, texts = tokenized(batches, encoder, compute)
        about = {
            "rows": describe_rows(batches),
            "loss": f"InfoNCE, temperature {loss.temperature}",
            "negatives": describe_negatives(batches, training.gradient_accumulation_steps),
        }
        return train(run, encoder, [ContrastiveTask(batches, texts, loss)], about, callbacks)


def read_batches(
    files: Sequence[Source],
    batch_size: int,
    num_negatives: int,
    seed: int,
    weights: Sequence[float] | None = None,
    flags: RowFlags = FLAGS,
) -> ContrastiveData:
    """Rows as batches. InputError for a bad row, and where a query would have no negative at all.

    Args:
        weights: how often the rows of each file come in an epoch; None: once.
        flags: which a message names.
    """
    rows, shares = read_shares(read_contrastive, files, weights)
    batches = ContrastiveData(
        rows, batch_size=batch_size, num_negatives=num_negatives, seed=seed, shares=shares
    )
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


def describe_negatives(batches: ContrastiveData, accumulated: int) -> str:
    """Of a query; and that accumulation adds none, where there is any."""
    text = f"all passages of a query's batch of {batches.batch_size:,} rows"
    if accumulated > 1:
        text += (
            f"; --gradient_accumulation_steps {accumulated} adds none, a larger "
            f"--per_device_train_batch_size does, in the same memory"
        )
    return text


@dataclass(frozen=True, eq=False)
class ContrastiveTask(TrainingTask[ContrastiveBatch]):
    """InfoNCE of rows of stage 1."""

    data: ContrastiveData
    config: ContrastiveLossConfig

    def loss(self, queries: Tensor, passages: Tensor, batch: ContrastiveBatch) -> LossOutput:
        # Excluded columns: further positives of the same query, in whatever row they stand.
        loss, grads, stats = info_nce_loss_and_grads(
            queries[batch.query_rows],  # [M, D]
            passages,
            batch.labels,
            temperature=self.config.temperature,
            excluded=(batch.excluded_offsets, batch.excluded_columns),
        )
        d_queries = scatter_sum(len(queries), (batch.query_rows, grads.queries))
        return LossOutput(loss, d_queries, grads.passages, stats._asdict())
