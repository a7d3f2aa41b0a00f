"""Replay: stage 1's rows in stage 2, so that what they taught is not forgotten.

loss of a step = mean of RankPO over its batches + replay_weight * mean of InfoNCE over as many
"""

from rankpo_fast.config import ComputeConfig, ContrastiveLossConfig, ReplayConfig, TrainingConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.contrastive import (
    ContrastiveTask,
    RowFlags,
    describe_rows,
    read_batches,
    tokenized,
)

SEED_OFFSET = 2**63  # no --seed is as large, so that no random stream is shared with stage 2
FLAGS = RowFlags("--replay_data", "--replay_batch_size", "--replay_num_negatives")


def replay_batches(
    config: ReplayConfig, training: TrainingConfig, processes: int
) -> ContrastiveData:
    """The batches to be replayed, of all processes. InputError as for those of stage 1."""
    rows = config.replay_batch_size or training.per_device_train_batch_size
    return read_batches(
        config.replay_data,
        rows * processes,
        config.replay_num_negatives,
        SEED_OFFSET + training.seed,
        flags=FLAGS,
    )


def replay_task(
    config: ReplayConfig, data: ContrastiveData, encoder: Encoder, compute: ComputeConfig
) -> ContrastiveTask:
    """Their part of the loss. InputError if a text alone does not fit into a micro-batch."""
    data, texts = tokenized(data, encoder, compute, FLAGS)
    loss = ContrastiveLossConfig(config.replay_temperature)
    return ContrastiveTask(
        data, texts, loss, weight=config.replay_weight, prefix="replay/", flag=FLAGS.files
    )


def describe_replay(config: ReplayConfig, data: ContrastiveData) -> str:
    return (
        f"{config.replay_weight:g} * InfoNCE, temperature {config.replay_temperature:g}, "
        f"{data.batch_size} at a time of {describe_rows(data)}"
    )
