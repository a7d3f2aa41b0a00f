"""MultipleNegativesRankingLoss without the matrix of similarities, plain and by gradient caching.

B texts a column, N documents of all columns, D dims.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch import distributed as dist

from rankpo_fast.integrations.overrides import overridden
from rankpo_fast.integrations.sentence_transformers.duplicates import (
    Features,
    first_equal,
    text_ids,
)
from rankpo_fast.integrations.sentence_transformers.inputs import (
    check_columns,
    check_labels,
    is_cosine,
    named_if_unpooled,
)
from rankpo_fast.ops.checks import several
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_kernels.problem import Direction, HardnessMode

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Prefixes = Mapping[str, Any]  # options that a MatryoshkaLoss adds while it calls a loss
DocDirection = Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
DIRECTIONS: dict[DocDirection, Direction] = {
    "query_to_doc": "query_to_passage", "doc_to_query": "passage_to_query",
    "query_to_query": "query_to_query", "doc_to_doc": "passage_to_passage",
}  # fmt: skip


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """InfoNCE over (query, positive) or (query, positive, negative, ...) columns.

    Args:
        scale: as theirs, or a parameter of one number, which the trainer then learns; ranks share
            its gradient. Checkpoints hold the model and the optimizer, not the loss: to resume,
            make it with the scale that it had.
        similarity_fct: `cos_sim`, `dot_score`, or the `similarity` of a model that has one of them.
            Another is an error, when it is given and when it is set.
        mask_duplicates: equal texts of a batch are no negatives of each other, which otherwise
            takes `BatchSamplers.NO_DUPLICATES`: a document with the text of a positive of the same
            query text, or of the query, if that is on its rank. Equal are tokens, prompts too.
        others: as theirs.

    Columns of negatives may have any number of texts, where neither doc_to_doc nor a hardness_mode
    asks whose each of them is.

    Raises:
        ValueError: labels that differ, a query without a positive, a model without pooling, or a
            similarity_fct that cannot be fused.
    """

    prefixes: Prefixes = {}

    def __init__(
        self,
        model: "SentenceTransformer",
        scale: float | nn.Parameter = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[DocDirection, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        mask_duplicates: bool = False,
    ) -> None:
        super().__init__(
            model, cast(float, scale),  # kept as it is
            similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength,
        )  # fmt: skip
        is_cosine(similarity_fct)  # names one that cannot be fused
        self.mask_duplicates = mask_duplicates

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        check_labels(self, labels)
        features = list(sentence_features)
        ids = self.text_ids(features)
        with named_if_unpooled():
            embeddings = embed_columns(self.model, features)
        if ids is None:
            return self.compute_loss_from_embeddings(embeddings, labels)
        if "compute_loss_from_embeddings" in self.changes():
            raise ValueError(
                f"mask_duplicates looks at texts, and {type(self).__name__} overrides "
                "compute_loss_from_embeddings, which is given none: leave one of them out"
            )
        return self.contrast(embeddings, ids, self.prefixes)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        check_labels(self, labels)
        return self.contrast(embeddings, None, self.prefixes)

    def changes(self) -> list[str]:
        """What was overridden of the methods that a MatryoshkaLoss around it does without."""
        methods = ("forward", "compute_loss_from_embeddings")
        return overridden(MultipleNegativesRankingLoss, self, methods)

    def text_ids(self, features: list[Features]) -> list[Tensor] | None:
        """[B] int64 a column, equal for equal texts, if duplicates are masked.

        Of the features before the model has seen them: pooling may change an attention mask.
        """
        return [text_ids(column) for column in features] if self.mask_duplicates else None

    def contrast(
        self, embeddings: list[Tensor], ids: list[Tensor] | None, prefixes: Prefixes
    ) -> Tensor:
        """The loss of embeddings, [B, D] a column."""
        if self.mask_duplicates and ids is None:
            raise ValueError("mask_duplicates looks at texts: call the loss, not its embeddings")
        by_owner = "doc_to_doc" in self.directions or bool(self.hardness_mode)
        check_columns(embeddings, any_negatives=not by_owner)
        queries, passages = embeddings[0], torch.cat(embeddings[1:])
        each_B = torch.arange(len(queries), device=queries.device)
        options: dict[str, Any] = dict(prefixes)
        if by_owner:
            options["curated"] = each_B.repeat(len(embeddings) - 1)
        if self.hardness_mode and self.hardness_strength:
            options["hardness_mode"] = self.hardness_mode
            options["hardness_strength"] = self.hardness_strength
        if ids is not None:
            ids_B, ids_N = ids[0], torch.cat(ids[1:])
            same_B = first_equal(ids_B, ids_N, otherwise=each_B)
            options |= {
                "query_ids": ids_B, "passage_ids": ids_N,
                "excluded": (torch.arange(len(ids_B) + 1, device=ids_B.device), same_B),
            }  # fmt: skip
        if self.gather_across_devices:
            options["process_group"] = dist.group.WORLD  # None where there is one process
        # Prefixes are compared by cosine: theirs normalises what it has cut.
        return info_nce_loss(
            queries, passages, each_B,
            scale=_shared(self.scale),
            normalize="matryoshka_dims" in options or is_cosine(self.similarity_fct),
            directions=[DIRECTIONS[direction] for direction in self.directions],
            partition=self.partition_mode,
            **options,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | _config(self)


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """The same by gradient caching: texts are encoded `mini_batch_size` at a time, or packed into
    `mini_batch_num_tokens`, without a graph; then again, with the gradients of their embeddings.

    The loss is computed at once over all of them, whatever the mini-batch. Arguments are those of
    theirs and of `MultipleNegativesRankingLoss`.
    """

    prefixes: Prefixes = {}
    loss: MultipleNegativesRankingLoss

    def __init__(
        self,
        model: "SentenceTransformer",
        scale: float | nn.Parameter = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[DocDirection, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        mask_duplicates: bool = False,
    ) -> None:
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = MultipleNegativesRankingLoss(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength, mask_duplicates=mask_duplicates,
        )  # fmt: skip

    @property
    def mask_duplicates(self) -> bool:
        return self.loss.mask_duplicates

    @mask_duplicates.setter
    def mask_duplicates(self, value: bool) -> None:
        self.loss.mask_duplicates = value

    def changes(self) -> list[str]:
        """What was overridden of the methods that a MatryoshkaLoss around it does without."""
        methods = ("forward", "calculate_loss")
        return overridden(CachedMultipleNegativesRankingLoss, self, methods)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        check_labels(self, labels)
        features = list(sentence_features)
        ids = self.loss.text_ids(features)
        # Which theirs hands on to calculate_loss as they are.
        labels = cast(Tensor | None, labels if ids is None else ids)
        with named_if_unpooled():
            if not isinstance(self.scale, Tensor):
                return self.forward_cached(features, labels)
            # The scale's gradient is there too soon: like the embeddings' it comes with backward.
            before, self.scale.grad = self.scale.grad, None
            try:
                loss = self.forward_cached(features, labels)
            finally:
                gradient, self.scale.grad = self.scale.grad, before
        return loss if gradient is None else loss + gradient * (self.scale - self.scale.detach())

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | list[Tensor] | None = None,
        *, with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        """reps: mini-batches of embeddings, a list a column. labels: with mask_duplicates the ids
        of the texts, else not looked at."""
        ids = cast(list[Tensor], labels) if self.mask_duplicates else None
        loss = self.loss.contrast([torch.cat(column) for column in reps], ids, self.prefixes)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | _config(self)


class _AverageGradient(torch.autograd.Function):
    """The identity, whose gradient is the mean of the ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def _shared(scale: float | Tensor) -> float | Tensor:
    """A learnt scale is the loss's, which no DDP wraps: ranks would drift apart."""
    if isinstance(scale, Tensor) and scale.requires_grad and several(dist.group.WORLD):
        return _AverageGradient.apply(scale)
    return scale


def _config(
    loss: MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss,
) -> dict[str, Any]:
    """What a model card says beside what theirs says: numbers, and our option where it is on."""
    scale = loss.scale.item() if isinstance(loss.scale, Tensor) else loss.scale
    return {"scale": scale} | ({"mask_duplicates": True} if loss.mask_duplicates else {})
