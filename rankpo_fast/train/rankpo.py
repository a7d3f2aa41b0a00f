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
    NO_GRADES,
    NO_REPLAY,
    NO_RETENTION,
    NO_TEACHER,
    ComputeConfig,
    EvaluationConfig,
    GradedConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    RetentionConfig,
    TeacherConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import ContrastiveData, PreferenceBatch, PreferenceData
from rankpo_fast.data.group_batches import GroupData
from rankpo_fast.data.order import BatchData
from rankpo_fast.data.retained import RetainedData
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.data.shares import describe_shares, read_shares
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.node import reading_once
from rankpo_fast.ops.common import mean
from rankpo_fast.ops.rankpo import RankPOStats, rankpo_loss_and_grads
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.arithmetic import summed_in_order
from rankpo_fast.train.auto import settle
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.loop import train
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
from rankpo_fast.train.retention import (
    RetainedTask,
    check_retention,
    describe_retention,
    other_model_vectors,
    reference_vectors,
    rows_kept,
)
from rankpo_fast.train.run import Run
from rankpo_fast.train.supervision import (
    GRADED,
    TEACHER,
    check_mixture,
    describe_graded,
    describe_teacher,
    graded_batches,
    graded_task,
    teacher_batches,
    teacher_task,
    tokenized_groups,
)
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum

PAIRS = "--train_data"


def train_rankpo(
    model: ModelConfig,
    data: RankPODataConfig,
    loss: RankPOLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    replay: ReplayConfig = NO_REPLAY,
    graded: GradedConfig = NO_GRADES,
    teacher: TeacherConfig = NO_TEACHER,
    retention: RetentionConfig = NO_RETENTION,
    *,
    encoder: Encoder | None = None,
    named: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Run stage 2; the output directory holds the model.

    The reference is the model as it starts, unless the loss config names another one, which is gone
    again before the model to train is loaded. Graded passages, a teacher's scores and what is
    replayed go through the model beside the pairs, batch by batch; of the first three those that
    are given make the run, whose steps and epochs are counted in the first of them. Raises
    InputError for what the user can put right.

    Args:
        encoder, named, callbacks: as of `train_contrastive`.
    """
    in_order = summed_in_order(training.deterministic)
    with Ranks.joined(compute) as ranks, claimed(training, ranks), in_order:
        model, training = settle(model, training, ranks, negatives=1, lent=encoder is not None)
        precision = shared_precision(model, training, ranks)
        check_mixture(data, loss, graded, teacher)
        check_retention(
            retention, replay, lora=model.lora_rank is not None,
            sharded=training.shard if ranks.size > 1 and training.shard != "none" else None,
            other=loss.reference_model_name_or_path is not None,
        )  # fmt: skip
        # Which tokens are kept of a vocabulary follows from texts, so that all must have them.
        once = reading_once(ranks, compute.cache_path, wanted=not model.trim_vocabulary)
        with once as node, ranks.first_ahead():
            given = node.given()
            read = None
            if given is None:
                read = _read(data, graded, teacher, replay, training, ranks)
            run = prepare_run(
                "rankpo", ranks, precision, model, data, loss, training, evaluation, compute,
                replay, graded, teacher, retention, encoder=None if named else encoder,
            )  # fmt: skip
            if nothing_left(run):
                return TrainingResult.of(run.path, None)
            other = {} if read is None else _other_references(loss, run, read)
            kept = None if read is None else _other_vectors(loss, run, read, retention, replay)
            encoder = prepare_encoder(run, encoder, *([] if read is None else read.all))
            if read is not None:
                about, tasks = _tasks(read, run, encoder, loss, graded, teacher, replay, other)
                if retention.retention_weight:
                    rows = rows_kept(retention, replay)
                    about |= _retain(tasks, rows, kept, run, encoder, retention, loss)
                given = node.hand((about, [task.without_texts() for task in tasks]))
                del read, tasks  # strings, which nobody needs any more
        about, tasks = given
        return train(run, encoder, tasks, about, callbacks, retention)


@dataclass(frozen=True)
class _Rows:
    """What was read; None: nothing of the kind was given."""

    pairs: PreferenceData | None
    grades: GroupData | None
    scores: GroupData | None
    replayed: ContrastiveData | None

    @property
    def all(self) -> list[BatchData]:
        every = (self.pairs, self.grades, self.scores, self.replayed)
        return [rows for rows in every if rows is not None]


def _read(
    data: RankPODataConfig, graded: GradedConfig, teacher: TeacherConfig, replay: ReplayConfig,
    training: TrainingConfig, ranks: Ranks,
) -> _Rows:  # fmt: skip
    return _Rows(
        _read_pairs(data, training, ranks) if data.train_data else None,
        graded_batches(graded, training, ranks.size) if graded.graded_data else None,
        teacher_batches(teacher, training, ranks.size) if teacher.teacher_data else None,
        replay_batches(replay, training, ranks.size) if replay.replay_data else None,
    )


def _read_pairs(data: RankPODataConfig, training: TrainingConfig, ranks: Ranks) -> PreferenceData:
    read = partial(read_preferences, use_confidence=data.use_confidence)
    rows, shares = read_shares(read, data.train_data, data.train_data_weights)
    return PreferenceData(
        rows,
        batch_size=training.per_device_train_batch_size * ranks.size,
        seed=training.seed,
        shares=shares,
    )


def _other_references(loss: RankPOLossConfig, run: Run, read: _Rows) -> dict[str, Tensor]:
    """`reference_similarities` of what compares with those of another model, by its flag."""
    other = loss.reference_model_name_or_path
    compared: dict[str, PreferenceData | GroupData] = {}
    if other is not None and read.pairs is not None and loss.uses_reference:
        compared[PAIRS] = read.pairs
    if other is not None and read.grades is not None:
        compared[GRADED] = read.grades
    if other is None or not compared:
        return {}
    found = other_model_similarities(
        other, run.model, [*compared.values()], run.device, run.compute
    )
    return dict(zip(compared, found, strict=True))


def _other_vectors(
    loss: RankPOLossConfig, run: Run, read: _Rows, retention: RetentionConfig, replay: ReplayConfig
) -> tuple[Tensor, Tensor] | None:
    """Another model's vectors of the texts whose ranking is kept."""
    other = loss.reference_model_name_or_path
    if other is None or not retention.retention_weight:
        return None
    data = read.replayed if rows_kept(retention, replay) == "replay" else read.all[0]
    assert data is not None
    return other_model_vectors(other, run.model, data, run.device, run.compute)


def _retain(
    tasks: list[TrainingTask[Any]], rows: str, vectors: tuple[Tensor, Tensor] | None, run: Run,
    encoder: Encoder, retention: RetentionConfig, loss: RankPOLossConfig,
) -> dict[str, str]:  # fmt: skip
    """Hold one of the tasks to the reference, in its place; says so.

    Args:
        vectors: of another model; None: the encoder is asked, which is as it starts.
    """
    place = len(tasks) - 1 if rows == "replay" else 0  # which comes last
    task = tasks[place]
    if vectors is None:
        assert not isinstance(task.data, RetainedData)
        vectors = reference_vectors(encoder, task.texts, task.data, run.compute)
    held = tasks[place] = RetainedTask.of(task, retention, vectors)
    return {"retention": describe_retention(retention, held, loss.reference_model_name_or_path)}


def _tasks(
    read: _Rows, run: Run, encoder: Encoder, loss: RankPOLossConfig, graded: GradedConfig,
    teacher: TeacherConfig, replay: ReplayConfig, other: dict[str, Tensor],
) -> tuple[dict[str, str], list[TrainingTask[Any]]]:  # fmt: skip
    """The parts of the loss, and what the start says of each.

    Args:
        other: similarities under another model; where there are none the encoder is asked, now or,
            where its weights will lie in parts, by the task once they do.
    """

    def reference(flag: str, texts: Texts, rows: PreferenceData | GroupData) -> Tensor | None:
        if flag in other or run.sharded:
            return other.get(flag)
        return reference_similarities(encoder, texts, rows, run.compute)

    about: dict[str, str] = {}
    tasks: list[TrainingTask[Any]] = []
    if read.pairs is not None:
        pairs, texts = _tokenized(read.pairs, encoder, run.compute)
        found = reference(PAIRS, texts, pairs) if loss.uses_reference else None
        tasks.append(RankPOTask(pairs, texts, loss, found))
        about |= {"rows": _describe_rows(pairs), "loss": _describe(loss)}
    if read.grades is not None:
        grades, texts = tokenized_groups(read.grades, encoder, run.compute, GRADED)
        found = None if loss.reference_free else reference(GRADED, texts, grades)
        if found is not None:
            grades = grades.with_reference(found)
        tasks.append(graded_task(graded, loss, grades, texts))
        about["graded"] = describe_graded(graded, loss, grades)
    if read.scores is not None:
        scores, texts = tokenized_groups(read.scores, encoder, run.compute, TEACHER)
        tasks.append(teacher_task(teacher, scores, texts))
        about["teacher"] = describe_teacher(teacher, scores)
    if read.replayed is not None:
        again = replay_task(replay, read.replayed, encoder, run.compute)
        tasks.append(again)
        about["replay"] = describe_replay(replay, again.data)
    return about, tasks


def _tokenized(
    pairs: PreferenceData, encoder: Encoder, compute: ComputeConfig
) -> tuple[PreferenceData, Texts]:
    """The batches with texts of equal token ids as one, and their texts; says of how many pairs
    nothing is left to tell apart."""
    texts = Texts.tokenize(encoder, pairs.query_texts, pairs.passage_texts, compute)
    pairs = pairs.merged(texts.query_rows, texts.passage_rows)
    if pairs.equal_pairs:
        warnings.warn(
            f"--train_data: {pairs.equal_pairs:,} of {pairs.num_rows:,} pairs are left out: "
            f"their two passages have the same tokens, up to --max_passage_length",
            stacklevel=3,
        )
    return pairs, texts


@dataclass(frozen=True, eq=False)
class RankPOTask(TrainingTask[PreferenceBatch]):
    """RankPO, SimRankPO or SFT of pairs."""

    data: PreferenceData
    config: RankPOLossConfig
    # Of chosen and rejected, [2 rows], on the device [2, rows] once it is ready.
    reference: Tensor | None

    def ready(self, run: Run, encoder: Encoder) -> Self:
        """With the margins of its reference, which is on the device. An encoder in parts that is
        its own reference is asked now, by all ranks."""
        if not self.config.uses_reference:
            return self
        found = self.reference
        if found is None:
            found = similarities_by_ranks(encoder, self.texts, self.data, run.compute, run.ranks)
        chosen, rejected = reference = found.view(2, -1)
        data = self.data.with_reference(chosen - rejected)
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


def _describe_rows(pairs: PreferenceData) -> str:
    return f"{pairs.num_rows - pairs.equal_pairs:,} pairs{describe_shares(pairs.shares)}"


def _describe(loss: RankPOLossConfig) -> str:
    name = "RankPO" if loss.uses_reference else "SimRankPO"
    terms = {
        f"{name} ({loss.loss_type}, beta {loss.beta:g})": loss.rankpo_weight,
        "SFT": loss.sft_weight,
    }
    weighted = [f"{weight:g} * {term}" for term, weight in terms.items() if weight > 0]
    return f"{' + '.join(weighted)}, temperature {loss.temperature:g}"
