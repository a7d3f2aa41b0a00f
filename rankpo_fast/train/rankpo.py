"""Stage 2: RankPO on preference pairs, against a frozen reference model or without one.

B pairs, U and N distinct queries and passages of a batch, D dims.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankpo_fast.config import (
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import PreferenceBatch, PreferenceData
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ops.common import row_weights
from rankpo_fast.ops.rankpo import margin_loss, pair_similarities
from rankpo_fast.train.loop import train
from rankpo_fast.train.reference import other_model_similarities, reference_similarities
from rankpo_fast.train.run import Run
from rankpo_fast.train.texts import Texts


def train_rankpo(
    model: ModelConfig,
    data: RankPODataConfig,
    loss: RankPOLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
) -> Path:
    """Run stage 2; returns the output directory, which holds the model.

    The reference is the model as it starts, unless the loss config names another one, which is gone
    again before the model to train is loaded. Raises InputError for what the user can put right.
    """
    rows = read_preferences(data.train_data, use_confidence=data.use_confidence)
    pairs = PreferenceData(
        rows, batch_size=training.per_device_train_batch_size, seed=training.seed
    )
    run = Run.prepare("rankpo", model, data, loss, training, evaluation, compute)
    if run.finished:
        return run.path
    other, reference = loss.reference_model_name_or_path, None
    if loss.uses_reference and other is not None:
        reference = other_model_similarities(other, model, pairs, run.device, compute)
    encoder = run.load_encoder()
    texts = Texts.tokenize(encoder, pairs.query_texts, pairs.passage_texts, compute)
    if loss.uses_reference and other is None:
        reference = reference_similarities(encoder, texts, pairs, compute.cache_path)
    if reference is not None:
        pairs = pairs.with_reference(reference[0] - reference[1])
    about = {"rows": f"{len(rows):,} pairs", "loss": _describe(loss)}
    train(run, encoder, RankPOStage(pairs, texts, loss, reference), about)
    return run.path


@dataclass(frozen=True, eq=False)
class RankPOStage:
    data: PreferenceData
    texts: Texts
    loss: RankPOLossConfig
    reference: Tensor | None  # [2, rows] similarities of chosen and rejected, for the rewards

    def step_loss(
        self, encoder: Encoder, batch: PreferenceBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        queries, passages = self.texts.embed(encoder, batch)  # [U, D], [N, D]
        device = queries.device
        queries = queries[batch.query_rows.to(device)]  # [B, D]
        chosen = passages[batch.chosen_rows.to(device)]
        rejected = passages[batch.rejected_rows.to(device)]
        margins = batch.reference_margins
        scores = torch.stack(pair_similarities(queries, chosen, rejected))  # [2, B]
        losses = margin_loss(
            scores[0] - scores[1],
            reference_margins=None if margins is None else margins.to(device),
            beta=self.loss.beta,
            temperature=self.loss.temperature,
            gamma_beta_ratio=self.loss.gamma_beta_ratio,
            label_smoothing=self.loss.label_smoothing,
            loss_type=self.loss.loss_type,
            sft_weight=self.loss.sft_weight,
            rankpo_weight=self.loss.rankpo_weight,
        )
        weights = row_weights(losses, batch.weights.to(device), len(losses), "mean")
        return (losses * weights).sum(), self._metrics(scores.detach(), batch)

    def _metrics(self, scores: Tensor, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Scores are cosines, rewards beta * (score - reference score), as the original has it."""
        reference = 0.0 if self.reference is None else self.reference[:, batch.rows].to(scores)
        rewards = self.loss.beta * (scores - reference)
        metrics = {"rewards/accuracies": (rewards[0] > rewards[1]).float().mean()}
        for name, values in (("rewards", rewards), ("scores", scores)):
            metrics[f"{name}/chosen"], metrics[f"{name}/rejected"] = values.mean(dim=1)
            metrics[f"{name}/margins"] = (values[0] - values[1]).mean()
        return metrics


def _describe(loss: RankPOLossConfig) -> str:
    name = "RankPO" if loss.uses_reference else "SimRankPO"
    terms = {
        f"{name} ({loss.loss_type}, beta {loss.beta:g})": loss.rankpo_weight,
        "SFT": loss.sft_weight,
    }
    weighted = [f"{weight:g} * {term}" for term, weight in terms.items() if weight > 0]
    return f"{' + '.join(weighted)}, temperature {loss.temperature:g}"
