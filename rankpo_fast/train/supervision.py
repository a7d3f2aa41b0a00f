"""Grades and a teacher's scores in stage 2: losses of several passages of a query at once.

B queries with K passages each, U and N distinct queries and passages of a batch, D dims.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from rankpo_fast.config import (
    ComputeConfig,
    GradedConfig,
    RankPODataConfig,
    RankPOLossConfig,
    TeacherConfig,
    TrainingConfig,
)
from rankpo_fast.data.group_batches import GroupBatch, GroupData
from rankpo_fast.data.groups import read_graded, read_scored
from rankpo_fast.data.shares import read_shares
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.common import mean
from rankpo_fast.ops.distillation import distill_kl_loss, margin_mse_loss, similarities
from rankpo_fast.ops.rankpo_group import rankpo_group_loss
from rankpo_fast.train.reference import similarities_by_ranks
from rankpo_fast.train.run import Run
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum

# No --seed is as large, nor any seed of the replay: no random stream is shared.
GRADED_SEED, TEACHER_SEED = 2 * 2**63, 3 * 2**63
GRADED, TEACHER = "--graded_data", "--teacher_data"
OF_PAIRS = ("sft_weight", "rankpo_weight")  # of the loss settings
OF_MARGINS = ("gamma_beta_ratio", "loss_type", "label_smoothing")


def check_mixture(
    data: RankPODataConfig, loss: RankPOLossConfig, graded: GradedConfig, teacher: TeacherConfig
) -> None:
    """InputError where there is nothing to learn, or a setting of the loss would do nothing."""
    if not (data.train_data or graded.graded_data or teacher.teacher_data):
        raise InputError(
            f"nothing to train on: give --train_data, {GRADED} or {TEACHER}", "train_data"
        )
    for name in [] if data.train_data else loss.changed():
        if name in OF_PAIRS:
            raise InputError(f"--{name} needs --train_data, preference pairs", name)
        if not graded.graded_data:
            raise InputError(f"--{name} needs --train_data or {GRADED}", name)
        if name in OF_MARGINS and graded.graded_form == "plackett_luce":
            raise InputError(f"--{name} is not of --graded_form plackett_luce", name)


def graded_batches(config: GradedConfig, training: TrainingConfig, processes: int) -> GroupData:
    """The graded rows as batches, of all processes. InputError for bad ones."""
    read = partial(read_graded, split=config.graded_split)
    rows, shares = read_shares(read, config.graded_data, None)
    size = config.graded_batch_size or training.per_device_train_batch_size
    return GroupData(
        rows, batch_size=size * processes, group_size=config.graded_group_size,
        seed=GRADED_SEED + training.seed, shares=shares, graded=True,
    )  # fmt: skip


def teacher_batches(config: TeacherConfig, training: TrainingConfig, processes: int) -> GroupData:
    """The rows with scores as batches, of all processes. InputError for bad ones."""
    rows, shares = read_shares(read_scored, config.teacher_data, None)
    size = config.teacher_batch_size or training.per_device_train_batch_size
    return GroupData(
        rows, batch_size=size * processes, group_size=config.teacher_group_size,
        seed=TEACHER_SEED + training.seed, shares=shares, graded=False,
    )  # fmt: skip


def tokenized_groups(
    data: GroupData, encoder: Encoder, compute: ComputeConfig, flag: str
) -> tuple[GroupData, Texts]:
    """The batches with texts of equal token ids as one, and their texts; says of how many rows too
    little is left."""
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    data = data.merged(texts.query_rows, texts.passage_rows)
    if data.left_out:
        warnings.warn(
            f"{flag}: {data.left_out:,} of {data.num_rows:,} rows are left out: passages with the "
            f"same tokens, up to --max_passage_length, count once, and then nothing is left to "
            f"compare",
            stacklevel=2,
        )
    return data, texts


@dataclass(frozen=True, eq=False)
class GroupTask(TrainingTask[GroupBatch]):
    """A loss of queries [B, D], their passages [B, K, D] and the batch."""

    data: GroupData
    group_loss: Callable[[Tensor, Tensor, GroupBatch], Tensor]
    uses_reference: bool = False

    def ready(self, run: Run, encoder: Encoder) -> Self:
        """An encoder in parts that is its own reference is asked now, by all ranks."""
        if not self.uses_reference or self.data.has_reference:
            return self
        found = similarities_by_ranks(encoder, self.texts, self.data, run.compute, run.ranks)
        return replace(self, data=self.data.with_reference(found))

    def loss(self, queries: Tensor, passages: Tensor, batch: GroupBatch) -> LossOutput:
        q_BD = queries[batch.query_rows].detach().requires_grad_()
        p_BKD = passages[batch.passage_rows].detach().requires_grad_()
        with torch.enable_grad():
            loss = self.group_loss(q_BD, p_BKD, batch)
        d_queries, d_passages = torch.autograd.grad(loss, (q_BD, p_BKD))
        places = batch.passage_rows.flatten()
        return LossOutput(
            loss.detach(),
            scatter_sum(len(queries), (batch.query_rows, d_queries)),
            scatter_sum(len(passages), (places, d_passages.flatten(0, 1))),
            {"accuracy": _accuracy(similarities(q_BD, p_BKD).detach(), batch.values)},
        )


def _accuracy(s_BK: Tensor, values_BK: Tensor) -> Tensor:
    """Mean over queries of the share of pairs of different values that are ranked so."""
    above_BKK = values_BK[:, :, None] > values_BK[:, None]
    right_BKK = above_BKK & (s_BK[:, :, None] > s_BK[:, None])
    counts_B = above_BKK.sum((1, 2)).clamp(min=1)
    return mean(right_BKK.sum((1, 2)) / counts_B)


def graded_task(
    config: GradedConfig, loss: RankPOLossConfig, data: GroupData, texts: Texts
) -> GroupTask:
    """Their part of the loss."""
    form = config.graded_form
    names = ("beta", "temperature", *(() if form == "plackett_luce" else OF_MARGINS))
    options = {name: getattr(loss, name) for name in names}

    return GroupTask(
        data, texts, partial(_graded_loss, form=form, **options), not loss.reference_free,
        weight=config.graded_weight, prefix="graded/", flag=GRADED,
    )  # fmt: skip


def _graded_loss(
    queries: Tensor, passages: Tensor, batch: GroupBatch, **options: Any
) -> Tensor:  # fmt: skip
    return rankpo_group_loss(
        queries, passages, batch.values, weights=batch.weights,
        reference_similarities=batch.reference, **options,
    )  # fmt: skip


def teacher_task(config: TeacherConfig, data: GroupData, texts: Texts) -> GroupTask:
    """Their part of the loss."""
    options: dict[str, Any] = {
        "temperature": config.student_temperature,
        "teacher_temperature": config.teacher_temperature,
    }
    loss: Callable[..., Tensor] = distill_kl_loss
    if config.teacher_loss == "margin_mse":
        loss, options = margin_mse_loss, {**options, "pairs": config.teacher_pairs}
    return GroupTask(
        data, texts, partial(_teacher_loss, loss=loss, **options), weight=config.teacher_weight,
        prefix="teacher/", flag=TEACHER,
    )  # fmt: skip


def _teacher_loss(
    queries: Tensor, passages: Tensor, batch: GroupBatch, loss: Callable[..., Tensor],
    **options: Any,
) -> Tensor:  # fmt: skip
    return loss(queries, passages, batch.values, weights=batch.weights, **options)


def describe_graded(config: GradedConfig, loss: RankPOLossConfig, data: GroupData) -> str:
    form = {"pairs": "all pairs", "plackett_luce": "Plackett-Luce", "lambda": "lambda"}
    name = form[config.graded_form]
    return (
        f"{config.graded_weight:g} * RankPO of graded passages ({name}, beta {loss.beta:g}, "
        f"temperature {loss.temperature:g}), {_describe_rows(data, config.graded_group_size)}"
    )


def describe_teacher(config: TeacherConfig, data: GroupData) -> str:
    kinds = {"kl": "KL", "margin_mse": f"MarginMSE of {config.teacher_pairs} pairs"}
    return (
        f"{config.teacher_weight:g} * {kinds[config.teacher_loss]}, temperature "
        f"{config.student_temperature:g}, the teacher's {config.teacher_temperature:g}, "
        f"{_describe_rows(data, config.teacher_group_size)}"
    )


def _describe_rows(data: GroupData, group_size: int) -> str:
    rows = data.num_rows - data.left_out
    equal = f", {data.equal_passages:,} equal passages counted once" if data.equal_passages else ""
    return f"{data.batch_size} at a time of {rows:,} rows, up to {group_size} passages each{equal}"
