"""The frozen reference's ranking of a batch's passages, which the model keeps.

loss of a step = stage 2's + retention_weight * mean over rows of KL(reference || model), over all
passages of the batch. The reference's vectors are computed once, before training: 2 bytes a dim
and text on the host, mapped from the cache's file where there is one, of which a batch's rows move
with it. B rows, U and N distinct queries and passages of a batch, D and G dims.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig, ModelConfig, ReplayConfig, RetentionConfig
from rankpo_fast.data.cache import cached
from rankpo_fast.data.order import BatchData
from rankpo_fast.data.retained import RetainedBatch, RetainedData
from rankpo_fast.errors import InputError
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ops.in_batch_kl import in_batch_kl_loss_and_grads
from rankpo_fast.train.frozen import ask_frozen, key_of
from rankpo_fast.train.run import Run
from rankpo_fast.train.task import LossOutput, TrainingTask, scatter_sum

KIND = "retained"  # in the cache
DTYPE = torch.float16  # rounds a cosine by some 1e-5, and the divergence by its square


def check_retention(
    retention: RetentionConfig, replay: ReplayConfig, *, lora: bool, sharded: str | None,
    other: bool,
) -> None:  # fmt: skip
    """InputError for what does not go together.

    Args:
        lora: whether an adapter is trained.
        sharded: --shard, where weights lie in parts.
        other: whether the reference is a model of its own.
    """
    if retention.retention_rows == "replay" and not replay.replay_data:
        raise InputError("--retention_rows replay needs --replay_data", "retention_rows")
    if retention.elastic_fisher_batches and not replay.replay_data:
        raise InputError(
            "--elastic_fisher_batches needs --replay_data, the rows of stage 1 whose gradients "
            "are squared", "elastic_fisher_batches",
        )  # fmt: skip
    if retention.elastic_weight and lora:
        raise InputError(
            "--elastic_weight and --lora_rank do not go together: an adapter starts as no change, "
            "and --weight_decay pulls it there; leave out one of the two", "elastic_weight",
        )  # fmt: skip
    if sharded is None:
        return
    if retention.elastic_weight:
        raise InputError(
            f"--elastic_weight and --shard {sharded} do not go together: where weights started is "
            f"kept whole; give --shard none", "elastic_weight",
        )  # fmt: skip
    if retention.retention_weight and not other:
        raise InputError(
            f"--retention_weight and --shard {sharded}: the model as it starts lies in parts; give "
            f"--reference_model_name_or_path, and --reference_free false, or --shard none",
            "retention_weight",
        )


def rows_kept(retention: RetentionConfig, replay: ReplayConfig) -> str:
    """Whose batches' rankings: "stage2" or "replay"."""
    return retention.retention_rows or ("replay" if replay.replay_data else "stage2")


def other_model_vectors(
    name: str, model: ModelConfig, data: BatchData, device: torch.device, compute: ComputeConfig
) -> tuple[Tensor, Tensor]:
    """`reference_vectors` by the model `name`, which is loaded for it and gone afterwards."""

    def ask(encoder: Encoder) -> tuple[Tensor, Tensor]:
        texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
        return reference_vectors(encoder, texts, data, compute)

    return ask_frozen("--reference_model_name_or_path", name, model, device, ask, alike=True)


def reference_vectors(
    encoder: Encoder, texts: Texts, data: BatchData, compute: ComputeConfig
) -> tuple[Tensor, Tensor]:
    """[queries, G] and [passages, G] fp16 on the CPU, of length 1, without dropout."""
    rows = {"queries": texts.query_rows, "passages": texts.passage_rows}
    tensors = {"ids": texts.table.ids, "offsets": texts.table.offsets, **rows}
    max_tokens, made = compute.max_tokens_per_micro_batch, []

    def make() -> dict[str, Tensor]:
        named = texts.strings(data.query_texts, data.passage_texts)
        vectors = encode_texts(
            encoder, texts.table, max_tokens=max_tokens, progress="reference", texts=named
        )
        made.append(True)
        return {name: vectors[own].to(DTYPE) for name, own in rows.items()}

    key = "" if compute.cache_path is None else key_of(encoder, tensors, max_tokens)
    shapes = {name: (len(own), encoder.dim) for name, own in rows.items()}
    find = partial(cached, compute.cache_path, KIND, lambda: key, fits=partial(_fit, shapes))
    kept = find(make)
    if made and compute.cache_path is not None:
        kept = find(lambda: kept)  # now as the file's pages, which the system may take back
    return kept["queries"], kept["passages"]


def _fit(shapes: Mapping[str, tuple[int, int]], kept: Mapping[str, Tensor]) -> bool:
    """Whether they are vectors of such shapes whose elements are in [-1, 1] but for rounding."""
    return kept.keys() == shapes.keys() and all(
        x.dtype == DTYPE and tuple(x.shape) == shapes[name] and bool((x.abs() <= 1.001).all())
        for name, x in kept.items()
    )


@dataclass(frozen=True, eq=False)
class RetainedTask(TrainingTask[RetainedBatch]):
    """Another task, whose batches' rankings are kept as well."""

    data: RetainedData
    task: TrainingTask[Any]
    config: RetentionConfig

    @classmethod
    def of(
        cls, task: TrainingTask[Any], config: RetentionConfig, vectors: tuple[Tensor, Tensor]
    ) -> "RetainedTask":
        assert not isinstance(task.data, RetainedData), "it is held to one reference"
        data = RetainedData(task.data, *vectors)
        return cls(
            data, task.texts, task, config, weight=task.weight, prefix=task.prefix, flag=task.flag
        )

    @property
    def by_rows(self) -> bool:
        return self.task.by_rows

    @property
    def rates(self) -> dict[str, float]:
        return self.task.rates

    def without_texts(self) -> Self:
        return replace(self, data=self.data.without_texts(), task=self.task.without_texts())

    def ready(self, run: Run, encoder: Encoder) -> Self:
        task = self.task.ready(run, encoder)
        return replace(self, task=task, data=self.data.around(task.data))

    def loss(self, queries: Tensor, passages: Tensor, batch: RetainedBatch) -> LossOutput:
        own = self.task.loss(queries, passages, batch.batch)
        rows = batch.batch.query_rows
        kl, grads, stats = in_batch_kl_loss_and_grads(
            queries[rows],  # [B, D]
            passages,
            batch.reference_queries,
            batch.reference_passages,
            temperature=self.config.retention_temperature,
            weights=batch.row_weights,
        )
        weight = self.config.retention_weight / self.weight  # by which all of it is multiplied
        return LossOutput(
            own.loss + weight * kl,
            own.d_queries + scatter_sum(len(queries), (rows, weight * grads.queries)),
            own.d_passages + weight * grads.passages,
            {**own.metrics, **{f"retention_{name}": x for name, x in stats._asdict().items()}},
            own.others,
            own.loss,
        )


def describe_retention(config: RetentionConfig, task: RetainedTask, other: str | None) -> str:
    data, what = task.data, "the model as it starts" if other is None else other
    return (
        f"{config.retention_weight:g} * KL from the ranking by {what}, of all passages of a batch "
        f"of {task.flag}, temperature {config.retention_temperature:g}; its vectors take "
        f"{data.vector_bytes / 2**20:,.1f} MiB of the host"
    )
