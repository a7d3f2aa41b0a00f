"""Replay: stage 1's rows in stage 2, so that what they taught is not forgotten.

loss of a step = mean of RankPO over its batches + replay_weight * mean of InfoNCE over as many
"""

from rankpo_fast.config import ComputeConfig, ContrastiveLossConfig, ReplayConfig, TrainingConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.data.rows import read_contrastive
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.contrastive import ContrastiveStage
from rankpo_fast.train.step import Objective
from rankpo_fast.train.texts import Texts

APART = 2**63  # no --seed is as large, so that no random stream is shared with stage 2


def replay_batches(config: ReplayConfig, training: TrainingConfig) -> ContrastiveData:
    """The batches to be replayed. InputError names file and line of a bad row."""
    return ContrastiveData(
        read_contrastive(config.replay_data),
        batch_size=config.replay_batch_size or training.per_device_train_batch_size,
        num_negatives=config.replay_num_negatives,
        seed=APART + training.seed,
    )


def replay_objective(
    config: ReplayConfig, data: ContrastiveData, encoder: Encoder, compute: ComputeConfig
) -> Objective:
    """Their part of the loss. InputError if a text alone does not fit into a micro-batch."""
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    stage = ContrastiveStage(data, texts, ContrastiveLossConfig(config.replay_temperature))
    return Objective(stage, config.replay_weight, prefix="replay/", flag="--replay_data")
