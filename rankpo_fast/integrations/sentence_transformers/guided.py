"""GISTEmbedLoss without the matrix of similarities, plain and by gradient caching.

B texts a column, D dims of the model, G of the guide.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import all_gather_with_grad, batch_to_device, get_rank
from torch import Tensor, nn

from rankpo_fast.integrations.overrides import overridden, warn_unfused
from rankpo_fast.integrations.sentence_transformers.duplicates import Features
from rankpo_fast.integrations.sentence_transformers.inputs import (
    check_columns,
    check_labels,
    named_if_unpooled,
)
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_kernels.problem import Direction

THEIRS = "sentence-transformers"


class GISTEmbedLoss(theirs.GISTEmbedLoss):
    """InfoNCE without the negatives that a guide model finds more similar than the positive, less
    a margin (GISTEmbed, Solatorio 2024). Arguments as theirs; any number of negative columns. A
    query is never its own negative: with theirs it is, where its positive has its text.

    Where sim_matrix is overridden, or similarity_fct or cross_entropy_loss replaced, theirs runs.

    Raises:
        ValueError: labels that differ, a query without a positive, a model without pooling, or a
            negative margin.
    """

    prefixes: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_margin(self)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        check_labels(self, labels)
        if changed := _scoring_changes(GISTEmbedLoss, self):
            warn_unfused(self, changed, THEIRS)
            return super().forward(sentence_features, cast(Tensor, labels))
        features = list(sentence_features)
        of_guide = [dict(column) for column in features]  # a model writes into what it is given
        with named_if_unpooled():
            embeddings = embed_columns(self.model, features)
            with torch.no_grad():
                if self.must_retokenize:
                    of_guide = [self._retokenized(column) for column in of_guide]
                guide = embed_columns(self.guide, of_guide)
        return _guided(self, embeddings, guide)

    def changes(self) -> list[str]:
        """What was changed of that which a MatryoshkaLoss around it does without."""
        return overridden(GISTEmbedLoss, self, ["forward"]) + _scoring_changes(GISTEmbedLoss, self)

    def _retokenized(self, column: Features) -> Features:
        ids = column["input_ids"]
        if "cu_seq_lens_q" in column:
            ids = ids[0].tensor_split(column["cu_seq_lens_q"][1:-1].long().cpu())
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(theirs.CachedGISTEmbedLoss):
    """`GISTEmbedLoss` by gradient caching. Arguments as theirs.

    From 6.2 on the guide may have another tokenizer.
    """

    prefixes: Mapping[str, Any] = {}
    citation = theirs.GISTEmbedLoss.citation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_margin(self)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        check_labels(self, labels)
        with named_if_unpooled():
            return super().forward(sentence_features, cast(Tensor, labels))

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]],
        *, with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        if changed := _scoring_changes(CachedGISTEmbedLoss, self):
            warn_unfused(self, changed, THEIRS)
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        embeddings, guide = ([torch.cat(column) for column in side] for side in (reps, reps_guided))
        loss = _guided(self, embeddings, guide)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def changes(self) -> list[str]:
        """What was changed of that which a MatryoshkaLoss around it does without."""
        methods = overridden(CachedGISTEmbedLoss, self, ["forward", "calculate_loss"])
        return methods + _scoring_changes(CachedGISTEmbedLoss, self)


def _scoring_changes(owner: type, loss: GISTEmbedLoss | CachedGISTEmbedLoss) -> list[str]:
    """What is no longer as theirs is made, of the parts that `_guided` stands for."""
    changed = overridden(owner, loss, ["sim_matrix"])
    similarity, entropy = loss.similarity_fct, loss.cross_entropy_loss
    if type(similarity) is not nn.CosineSimilarity or similarity.dim != -1:
        changed.append("similarity_fct")
    settings = [getattr(entropy, key, 0) for key in ("reduction", "label_smoothing", "weight")]
    if type(entropy) is not nn.CrossEntropyLoss or settings != ["mean", 0.0, None]:
        changed.append("cross_entropy_loss")
    return changed


def _guided(
    loss: GISTEmbedLoss | CachedGISTEmbedLoss, embeddings: list[Tensor], guide: list[Tensor]
) -> Tensor:
    """GISTEmbed of embeddings and the guide's, [B, D] and [B, G] a column.

    Across ranks documents are gathered and queries are not, as theirs: its query-to-query part is
    that of a rank's own.
    """
    _check_margin(loss)
    check_columns(embeddings)
    (queries, *passages), (guide_queries, *guide_passages) = embeddings, guide
    B, first = len(queries), 0
    if loss.gather_across_devices:
        passages, guide_passages = (
            [all_gather_with_grad(column) for column in side] for side in (passages, guide_passages)
        )
        first = get_rank() * B
    directions: list[Direction] = ["query_to_passage"]
    options: dict[str, Any] = dict(loss.prefixes)
    if loss.contrast_anchors:
        directions.append("query_to_query")
    if loss.contrast_positives:
        directions.append("passage_to_passage")  # positives alone: -2 takes negatives out of it
        curated = queries.new_full((sum(map(len, passages)),), -2, dtype=torch.int64)
        curated[: len(passages[0])] = -1
        options["curated"] = curated
    return info_nce_loss(
        queries, torch.cat(passages), torch.arange(first, first + B, device=queries.device),
        temperature=loss.temperature,
        directions=directions,
        false_negative_margin=loss.margin,
        margin_type=loss.margin_strategy,
        guide=(guide_queries, torch.cat(guide_passages)),
        **options,
    )  # fmt: skip


def _check_margin(loss: GISTEmbedLoss | CachedGISTEmbedLoss) -> None:
    if loss.margin < 0:
        raise ValueError(
            f"margin must be >= 0, got {loss.margin}: negatives more similar than the positive "
            "cannot be asked to stay; take the loss of sentence-transformers"
        )
