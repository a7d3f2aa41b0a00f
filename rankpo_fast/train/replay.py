"""Replay: stage 1's rows in stage 2, so that what they taught is not forgotten.

loss of a step = mean of RankPO over its batches + replay_weight * mean of InfoNCE over as many
"""

from rankpo_fast.config import ComputeConfig, ContrastiveLossConfig, ReplayConfig, TrainingConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.contrastive import (
    ContrastiveStage,
    describe_rows,
    read_batches,
    tokenized,
)
from rankpo_fast.train.step import Objective

APART = 2**63  # no --seed is as large, so that no random stream is shared with stage 2
FLAGS = ("--replay_data", "--replay_batch_size", "--replay_num_negatives")


def replay_batches(
    config: ReplayConfig, training: TrainingConfig, processes: int
) -> ContrastiveData:
    """The batches to be replayed, of all processes. InputError as for those of stage 1."""
    rows = config.replay_batch_size or training.per_device_train_batch_size
    return read_batches(
        config.replay_data,
        rows * processes,
        config.replay_num_negatives,
        APART + training.seed,
        flags=FLAGS,
    )


def replay_objective(
    config: ReplayConfig, data: ContrastiveData, encoder: Encoder, compute: ComputeConfig
) -> Objective:
    """Their part of the loss. InputError if a text alone does not fit into a micro-batch."""
    data, texts = tokenized(data, encoder, compute, FLAGS)
    stage = ContrastiveStage(data, texts, ContrastiveLossConfig(config.replay_temperature))
    return Objective(stage, config.replay_weight, prefix="replay/", flag=FLAGS[0])


def describe_replay(config: ReplayConfig, data: ContrastiveData) -> str:
    return (
        f"{config.replay_weight:g} * InfoNCE, temperature {config.replay_temperature:g}, "
        f"{data.batch_size} at a time of {describe_rows(data)}"
    )
