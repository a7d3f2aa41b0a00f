"""Stage 2: RankPO on preference pairs, against a frozen reference model or without one.

B pairs, U and N distinct queries and passages of a batch, D dims.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from rankpo_fast.config import (
    NO_REPLAY,
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import ContrastiveData, PreferenceBatch, PreferenceData
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.data.shares import describe_shares, read_shares
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.common import mean
from rankpo_fast.ops.rankpo import RankPOStats, rankpo_loss_and_grads
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.auto import settle
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.loop import train
from rankpo_fast.train.node import reading_once
from rankpo_fast.train.output import claimed
from rankpo_fast.train.prepare import nothing_left, prepare_encoder, prepare_run
from rankpo_fast.train.reference import (
    other_model_similarities,
    reference_similarities,
    similarities_by_ranks,
)
from rankpo_fast.train.replay import describe_replay, replay_batches, replay_task
from rankpo_fast.train.result import TrainingResult
from rankpo_fast.train.resume import shared_precision
from rankpo_fast.train.run import Run
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum


def train_rankpo(
    model: ModelConfig,
    data: RankPODataConfig,
    loss: RankPOLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    replay: ReplayConfig = NO_REPLAY,
    *,
    encoder: Encoder | None = None,
    named: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Run stage 2; the output directory holds the model.

    The reference is the model as it starts, unless the loss config names another one, which is gone
    again before the model to train is loaded. What is replayed goes through the model beside the
    pairs, batch by batch. Raises InputError for what the user can put right.

    Args:
        encoder, named, callbacks: as of `train_contrastive`.
    """
    with Ranks.joined(compute) as ranks, claimed(training, ranks):
        model, training = settle(model, training, ranks, negatives=1, lent=encoder is not None)
        precision = shared_precision(model, training, ranks)
        # Which tokens are kept of a vocabulary follows from texts, so that all must have them.
        once = reading_once(ranks, compute.cache_path, wanted=not model.trim_vocabulary)
        with once as node, ranks.first_ahead():
            given = node.given()
            read: list[PreferenceData | ContrastiveData] = []
            if given is None:
                pairs, number = _read_pairs(data, training, ranks)
                replayed = []
                if replay.replay_data:
                    replayed.append(replay_batches(replay, training, ranks.size))
                read = [pairs, *replayed]
            run = prepare_run(
                "rankpo", ranks, precision, model, data, loss, training, evaluation, compute,
                replay, encoder=None if named else encoder,
            )  # fmt: skip
            if nothing_left(run):
                return TrainingResult.of(run.path, None)
            other, reference = loss.reference_model_name_or_path, None
            if given is None and loss.uses_reference and other is not None:
                reference = other_model_similarities(other, run.model, pairs, run.device, compute)
            encoder = prepare_encoder(run, encoder, *read)
            if given is None:
                pairs, texts = _tokenized(pairs, number, encoder, compute)
                number -= pairs.equal_pairs
                rows = f"{number:,} pairs{describe_shares(pairs.shares)}"
                about = {"rows": rows, "loss": _describe(loss)}
                if loss.uses_reference and other is None and not run.sharded:
                    reference = reference_similarities(encoder, texts, pairs, compute)
                tasks: list[TrainingTask[Any]] = [RankPOTask(pairs, texts, loss, reference)]
                for batches in replayed:
                    task = replay_task(replay, batches, encoder, compute)
                    about["replay"] = describe_replay(replay, task.data)
                    tasks.append(task)
                    del task, batches
                given = node.hand((about, [one.without_texts() for one in tasks]))
                del read, pairs, replayed, texts, tasks  # strings, which nobody needs any more
        about, tasks = given
        return train(run, encoder, tasks, about, callbacks)


def _read_pairs(
    data: RankPODataConfig, training: TrainingConfig, ranks: Ranks
) -> tuple[PreferenceData, int]:
    """Pairs as batches, and the number of pairs."""
    read = partial(read_preferences, use_confidence=data.use_confidence)
    rows, shares = read_shares(read, data.train_data, data.train_data_weights)
    pairs = PreferenceData(
        rows,
        batch_size=training.per_device_train_batch_size * ranks.size,
        seed=training.seed,
        shares=shares,
    )
    return pairs, len(rows)


def _tokenized(
    pairs: PreferenceData, number: int, encoder: Encoder, compute: ComputeConfig
) -> tuple[PreferenceData, Texts]:
    """The batches with texts of equal token ids as one, and their texts; says of how many pairs
    nothing is left to tell apart."""
    texts = Texts.tokenize(encoder, pairs.query_texts, pairs.passage_texts, compute)
    pairs = pairs.merged(texts.query_rows, texts.passage_rows)
    if pairs.equal_pairs:
        warnings.warn(
            f"--train_data: {pairs.equal_pairs:,} of {number:,} pairs are left out: "
            f"their two passages have the same tokens, up to --max_passage_length",
            stacklevel=3,
        )
    return pairs, texts


@dataclass(frozen=True, eq=False)
class RankPOTask(TrainingTask[PreferenceBatch]):
    """RankPO, SimRankPO or SFT of pairs."""

    data: PreferenceData
    config: RankPOLossConfig
    reference: Tensor | None  # [2, rows] similarities of chosen and rejected

    def ready(self, run: Run, encoder: Encoder) -> Self:
        """With the margins of its reference, which is on the device. An encoder in parts that is
        its own reference is asked now, by all ranks."""
        if not self.config.uses_reference:
            return self
        reference = self.reference
        if reference is None:
            reference = similarities_by_ranks(
                encoder, self.texts, self.data, run.compute, run.ranks
            )
        data = self.data.with_reference(reference[0] - reference[1])
        return replace(self, data=data, reference=reference.to(run.device))

    def loss(self, queries: Tensor, passages: Tensor, batch: PreferenceBatch) -> LossOutput:
        config = self.config
        loss, grads, stats = rankpo_loss_and_grads(
            queries[batch.query_rows],  # [B, D]
            passages[batch.chosen_rows],
            passages[batch.rejected_rows],
            reference_margins=batch.reference_margins,
            beta=config.beta,
            temperature=config.temperature,
            gamma_beta_ratio=config.gamma_beta_ratio,
            label_smoothing=config.label_smoothing,
            loss_type=config.loss_type,
            sft_weight=config.sft_weight,
            rankpo_weight=config.rankpo_weight,
            weights=batch.weights,
        )
        pairs = (batch.chosen_rows, grads.chosen), (batch.rejected_rows, grads.rejected)
        return LossOutput(
            loss,
            scatter_sum(len(queries), (batch.query_rows, grads.queries)),
            scatter_sum(len(passages), *pairs),
            self._metrics(stats, batch),
        )

    def _metrics(self, stats: RankPOStats, batch: PreferenceBatch) -> dict[str, Tensor]:
        reference: Tensor | float = 0.0
        if self.reference is not None:
            reference = torch.stack([*map(mean, self.reference[:, batch.rows])])
        return stats.metrics(self.config.beta, reference)


def _describe(loss: RankPOLossConfig) -> str:
    name = "RankPO" if loss.uses_reference else "SimRankPO"
    terms = {
        f"{name} ({loss.loss_type}, beta {loss.beta:g})": loss.rankpo_weight,
        "SFT": loss.sft_weight,
    }
    weighted = [f"{weight:g} * {term}" for term, weight in terms.items() if weight > 0]
    return f"{' + '.join(weighted)}, temperature {loss.temperature:g}"
