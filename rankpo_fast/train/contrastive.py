"""Stage 1: InfoNCE of each query against all passages of its batch.

M rows, N distinct passages, U distinct queries of a batch, D dims.
"""

from dataclasses import dataclass
from pathlib import Path

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
from rankpo_fast.data.rows import read_contrastive
from rankpo_fast.errors import InputError
from rankpo_fast.ops.info_nce import info_nce_loss_and_grads
from rankpo_fast.train.loop import train
from rankpo_fast.train.run import Run
from rankpo_fast.train.step import BatchLoss, Objective, summed
from rankpo_fast.train.texts import Texts


def train_contrastive(
    model: ModelConfig,
    data: ContrastiveDataConfig,
    loss: ContrastiveLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
) -> Path:
    """Run stage 1; returns the output directory, which holds the model.

    Raises InputError for what the user can put right, most of it before the model is loaded.
    """
    rows = read_contrastive(data.train_data)
    batches = ContrastiveData(
        rows,
        batch_size=training.per_device_train_batch_size,
        num_negatives=data.num_negatives,
        seed=training.seed,
    )
    if batches.batch_size == 1 and batches.bare_rows > 0:
        raise InputError(
            f"{batches.bare_rows:,} of {len(rows):,} rows of --train_data have no negative, and "
            f"in a batch of one nothing else is one: give --per_device_train_batch_size 2 or more"
            f"{'' if data.num_negatives else ', or --num_negatives 1'}"
        )
    run = Run.prepare("contrastive", model, data, loss, training, evaluation, compute)
    if run.finished:
        return run.path
    encoder = run.load_encoder()
    texts = Texts.tokenize(encoder, batches.query_texts, batches.passage_texts, compute)
    short = f"{batches.short_rows:,} of them have fewer than {data.num_negatives} negatives"
    about = {
        "rows": f"{len(rows):,}"
        + (f", {short}: all of theirs are used" if batches.short_rows else ""),
        "loss": f"InfoNCE, temperature {loss.temperature}",
    }
    train(run, encoder, [Objective(ContrastiveStage(batches, texts, loss))], about)
    return run.path


@dataclass(frozen=True, eq=False)
class ContrastiveStage:
    data: ContrastiveData
    texts: Texts
    config: ContrastiveLossConfig

    def loss(self, queries: Tensor, passages: Tensor, batch: ContrastiveBatch) -> BatchLoss:
        # Excluded columns: further positives of the same query text, in whatever row they stand.
        loss, d_rows, d_passages, _, stats = info_nce_loss_and_grads(
            queries[batch.query_rows],  # [M, D]
            passages,
            batch.labels,
            temperature=self.config.temperature,
            excluded=(batch.excluded_offsets, batch.excluded_columns),
        )
        d_queries = summed(len(queries), (batch.query_rows, d_rows))
        return BatchLoss(loss, d_queries, d_passages, stats._asdict())
