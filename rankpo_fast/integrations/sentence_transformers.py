"""Sentence-transformers' in-batch losses without a score matrix, and RankPO for its trainer.

    from rankpo_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

in place of `from sentence_transformers.losses import ...` is all that changes: names, arguments,
losses and gradients are theirs. `sentence_features` are one dict of tensors a column, padded or
flattened; B texts a column, D dims; documents of a batch lie column by column, positives first.
Tried with sentence-transformers 6.0 to 6.2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from random import sample
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rankpo_fast.integrations import require
from rankpo_fast.losses import RankPOLoss as PairLoss
from rankpo_fast.model.liger import apply_liger
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_fast.ops.rankpo import pair_similarities
from rankpo_fast.ops.ranks import several

require("sentence-transformers", at_least="6.0", tried="6.0 to 6.2")

from sentence_transformers.base.losses.merged_forward import embed_columns  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import (  # noqa: E402
    SimilarityFunction,
    all_gather_with_grad,
    batch_to_device,
    cos_sim,
    dot_score,
    get_rank,
    similarity_fct_name,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

Features = dict[str, Any]  # of one column
Prefixes = Mapping[str, Any]  # options that a MatryoshkaLoss adds while it calls a loss
DIRECTIONS = {
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
        mask_duplicates: equal texts of a batch are no negatives of each other, which otherwise
            takes `BatchSamplers.NO_DUPLICATES`: a document with the text of a positive of the same
            query text, or of the query, if that is on its rank. Equal are tokens, prompts too.
        others: as theirs.

    Raises:
        ValueError: a label column, columns of unequal length, a model without pooling, or a
            similarity_fct that cannot be fused.
    """

    prefixes: Prefixes = {}

    def __init__(
        self,
        model: "SentenceTransformer",
        scale: float | nn.Parameter = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        mask_duplicates: bool = False,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength,
        )  # fmt: skip
        _is_cosine(similarity_fct)  # names one that cannot be fused
        self.mask_duplicates = mask_duplicates

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        _check_no_labels(self, labels)
        features = list(sentence_features)
        ids = self.text_ids(features)
        with _named_if_unpooled():
            embeddings = embed_columns(self.model, features)
        return self.contrast(embeddings, ids, self.prefixes)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        _check_no_labels(self, labels)
        if self.mask_duplicates:
            raise ValueError("mask_duplicates looks at texts: call the loss, not its embeddings")
        return self.contrast(embeddings, None, self.prefixes)

    def text_ids(self, features: list[Features]) -> list[Tensor] | None:
        """[B] int64 a column, equal for equal texts, if duplicates are masked.

        Of the features before the model has seen them: pooling may change an attention mask.
        """
        return [text_ids(column) for column in features] if self.mask_duplicates else None

    def contrast(
        self, embeddings: list[Tensor], ids: list[Tensor] | None, prefixes: Prefixes
    ) -> Tensor:
        """The loss of embeddings, [B, D] a column."""
        _check_columns(embeddings, at_least=2)
        queries, passages = embeddings[0], torch.cat(embeddings[1:])
        each_B = torch.arange(len(queries), device=queries.device)
        options: dict[str, Any] = dict(prefixes)
        if "doc_to_doc" in self.directions or self.hardness_mode:
            options["curated"] = each_B.repeat(len(embeddings) - 1)
        if self.hardness_mode and self.hardness_strength:
            options["hardness_mode"] = self.hardness_mode
            options["hardness_strength"] = self.hardness_strength
        if ids is not None:
            ids_B, ids_N = ids[0], torch.cat(ids[1:])
            same_B = _first_equal(ids_B, ids_N, otherwise=each_B)
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
            normalize="matryoshka_dims" in options or _is_cosine(self.similarity_fct),
            directions=[DIRECTIONS[direction] for direction in self.directions],
            partition=self.partition_mode,
            **options,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {
            "scale": _number(self.scale), "mask_duplicates": self.mask_duplicates,
        }  # fmt: skip


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """The same by gradient caching: texts are encoded `mini_batch_size` at a time, or packed into
    `mini_batch_num_tokens`, without a graph; then again, with the gradients of their embeddings.

    The loss is computed at once over all of them, whatever the mini-batch. Arguments are those of
    theirs and of `MultipleNegativesRankingLoss`.
    """

    prefixes: Prefixes = {}

    def __init__(
        self,
        model: "SentenceTransformer",
        scale: float | nn.Parameter = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
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

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        _check_no_labels(self, labels)
        features = list(sentence_features)
        ids = self.loss.text_ids(features)
        with _named_if_unpooled():
            if not isinstance(self.scale, Tensor):
                return self.forward_cached(features, ids)
            # The scale's gradient is there too soon: like the embeddings' it comes with backward.
            before, self.scale.grad = self.scale.grad, None
            try:
                loss = self.forward_cached(features, ids)
            finally:
                gradient, self.scale.grad = self.scale.grad, before
        return loss if gradient is None else loss + gradient * (self.scale - self.scale.detach())

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: list[Tensor] | None = None,
        *, with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        """reps: mini-batches of embeddings, a list a column; `labels`: the texts' ids, if any."""
        loss = self.loss.contrast([torch.cat(column) for column in reps], labels, self.prefixes)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {
            "scale": _number(self.scale), "mask_duplicates": self.loss.mask_duplicates,
        }  # fmt: skip


class GISTEmbedLoss(theirs.GISTEmbedLoss):
    """InfoNCE without the negatives that a guide model finds more similar than the positive, less
    a margin (GISTEmbed, Solatorio 2024). Arguments as theirs; any number of negative columns. A
    query is never its own negative: with theirs it is, where its positive has its text.

    Raises:
        ValueError: a label column, columns of unequal length, a model without pooling, or a
            negative margin.
    """

    prefixes: Prefixes = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_margin(self)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        _check_no_labels(self, labels)
        features = list(sentence_features)
        of_guide = [dict(column) for column in features]  # a model writes into what it is given
        with _named_if_unpooled():
            embeddings = embed_columns(self.model, features)
            with torch.no_grad():
                if self.must_retokenize:
                    of_guide = [self._retokenized(column) for column in of_guide]
                guide = embed_columns(self.guide, of_guide)
        return _guided(self, embeddings, guide)

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

    prefixes: Prefixes = {}
    citation = theirs.GISTEmbedLoss.citation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_margin(self)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        _check_no_labels(self, labels)
        with _named_if_unpooled():
            return super().forward(sentence_features, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]],
        *, with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        embeddings, guide = ([torch.cat(column) for column in side] for side in (reps, reps_guided))
        loss = _guided(self, embeddings, guide)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


class MatryoshkaLoss(theirs.MatryoshkaLoss):
    """A loss at several prefixes of the embeddings (Kusupati et al. 2022). Arguments as theirs.

    Around one of the four losses above all prefixes come from one product; around any other it is
    theirs.
    """

    def __init__(self, model: "SentenceTransformer", loss: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, loss, *args, **kwargs)
        self.fused = hasattr(loss, "prefixes")
        if self.fused:
            vars(loss).pop("calculate_loss", None)  # theirs, which would cut a second time

    def drawn(self) -> Prefixes:
        """matryoshka_dims and matryoshka_weights of one step."""
        dims, count = range(len(self.matryoshka_dims)), self.n_dims_per_step
        drawn = sorted(sample(dims, count)) if 0 < count < len(dims) else dims
        return {
            "matryoshka_dims": [self.matryoshka_dims[i] for i in drawn],
            "matryoshka_weights": [float(self.matryoshka_weights[i]) for i in drawn],
        }

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        if not self.fused:
            return super().forward(sentence_features, labels)
        self.loss.prefixes = self.drawn()
        try:
            return self.loss(sentence_features, labels)
        finally:
            del self.loss.prefixes


class RankPOLoss(nn.Module):
    """RankPO (arXiv 2503.10723) over (query, chosen, rejected) columns.

    A label column holds reference margins, as `with_reference_margins` makes it: the reference
    model's similarity of chosen minus that of rejected. Without one it is SimRankPO.

    Args:
        beta, temperature, gamma_beta_ratio, label_smoothing, loss_type, sft_weight, rankpo_weight:
            as in `rankpo_fast.rankpo_loss`.

    Raises:
        ValueError: another number of columns, columns of unequal length, labels that are no margins
            or a model without pooling.
    """

    def __init__(self, model: "SentenceTransformer", **options: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = PairLoss(**options)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        with _named_if_unpooled():
            embeddings = embed_columns(self.model, sentence_features)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        _check_columns(embeddings, at_least=3)
        if len(embeddings) > 3:
            raise ValueError(
                f"RankPOLoss takes the columns query, chosen, rejected, got {len(embeddings)}"
            )
        if labels is not None and not labels.is_floating_point():
            raise ValueError(
                f"labels of RankPOLoss are reference margins, got {labels.dtype}: remove the "
                "column, or make it with `with_reference_margins`"
            )
        return self.loss(*embeddings, reference_margins=labels)

    def get_config_dict(self) -> dict[str, Any]:
        return dict(self.loss.options)

    @property
    def citation(self) -> str:
        return """
@misc{zhang2025rankpo,
    title={RankPO: Preference Optimization for Job-Talent Matching},
    author={Yafei Zhang and Murray Wang and Yu Wang and Xiaohui Wang},
    year={2025},
    eprint={2503.10723},
    archivePrefix={arXiv},
}
"""


def with_reference_margins(
    dataset: "Dataset",
    model: "SentenceTransformer",
    batch_size: int = 32,
    prompts: str | dict[str, str] | None = None,
) -> "Dataset":
    """The dataset with a column "label" for `RankPOLoss`: margins of a frozen reference model.

    Args:
        dataset: its columns are query, chosen, rejected, in this order.
        model: the reference, which need not be in memory while training.
        batch_size: texts encoded at a time.
        prompts: as in the arguments of the trainer: of all columns, or by column.
    """
    if len(dataset.column_names) != 3:
        raise ValueError(f"columns must be query, chosen, rejected, got {dataset.column_names}")
    embeddings = [
        # A prompt, if an empty one: the trainer knows nothing of a model's default.
        model.encode(
            list(dataset[name]),
            prompt=prompts if isinstance(prompts, str) else (prompts or {}).get(name, ""),
            batch_size=batch_size,
            convert_to_tensor=True,
        )
        for name in dataset.column_names
    ]
    chosen_B, rejected_B = pair_similarities(*embeddings)
    return dataset.add_column("label", (chosen_B - rejected_B).tolist())


def use_liger_kernel(model: "SentenceTransformer") -> None:
    """Liger's kernels in the transformers backbones of a model on a GPU, where the argument
    `use_liger_kernel=True` of the trainer changes nothing.

    Raises:
        ValueError: a backbone that Liger has no kernels for, a model on the CPU, no backbone at
            all, or liger-kernel missing or too old.
    """
    from transformers import PreTrainedModel

    backbones = [
        child
        for module in model.modules() if not isinstance(module, PreTrainedModel)
        for child in module.children() if isinstance(child, PreTrainedModel)
    ]  # fmt: skip
    if not backbones:
        raise ValueError("use_liger_kernel: the model has no transformers backbone")
    for backbone in backbones:
        apply_liger(backbone, model.device)


def text_ids(features: Features) -> Tensor:
    """[B] int64 hashes of a column's tokens, wherever their padding is: equal texts are equal, and
    of a million unequal ones hardly two (3e-8)."""
    tokens = features.get("input_ids")
    ends = "cu_seq_lens_q" in features or "attention_mask" in features
    if tokens is None or not ends or features.get("modality", "text") != "text":
        raise ValueError(
            "mask_duplicates needs input_ids and attention_mask of texts, got "
            f"{features.get('modality', 'text')} with {sorted(features)}"
        )
    if "cu_seq_lens_q" in features:
        tokens = tokens[0]  # [T]
        ends = features["cu_seq_lens_q"].to(tokens.device, torch.int64)
        text_T = torch.searchsorted(
            ends[1:], torch.arange(len(tokens), device=ends.device), right=True
        )
        mixed_T = _mixed(tokens, torch.arange(len(tokens), device=ends.device) - ends[text_T])
        return mixed_T.new_zeros(len(ends) - 1).index_add(0, text_T, mixed_T)
    mask = features["attention_mask"].to(torch.int64)
    return (_mixed(tokens, mask.cumsum(1) - 1) * mask).sum(1)


def _mixed(tokens: Tensor, positions: Tensor) -> Tensor:
    """A random-looking int64 for each token at its place (the finaliser of splitmix64)."""
    x = (tokens.to(torch.int64) + 1) * -7046029254386353131 + (positions + 1) * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * factor
    return x


def _first_equal(ids_B: Tensor, ids_N: Tensor, otherwise: Tensor) -> Tensor:
    """A column [B] of ids_N that equals each of ids_B, where there is one."""
    order_N = ids_N.argsort()
    found_B = order_N[torch.searchsorted(ids_N[order_N], ids_B).clamp(max=len(ids_N) - 1)]
    return torch.where(ids_N[found_B] == ids_B, found_B, otherwise)


def _guided(loss: nn.Module, embeddings: list[Tensor], guide: list[Tensor]) -> Tensor:
    """GISTEmbed of embeddings and the guide's, [B, D] and [B, G] a column.

    Across ranks documents are gathered and queries are not, as theirs: its query-to-query part is
    that of a rank's own.
    """
    _check_columns(embeddings, at_least=2)
    (queries, *passages), (guide_queries, *guide_passages) = embeddings, guide
    B, first = len(queries), 0
    if loss.gather_across_devices:
        passages, guide_passages = (
            [all_gather_with_grad(column) for column in side] for side in (passages, guide_passages)
        )
        first = get_rank() * B
    directions = ["query_to_passage"]
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


def _number(scale: float | Tensor) -> float:
    return scale.item() if isinstance(scale, Tensor) else scale


def _is_cosine(similarity_fct: Callable) -> bool:
    """Whether it is the cosine; otherwise it is the dot product, or ValueError."""
    owner = getattr(similarity_fct, "__self__", None)
    if getattr(similarity_fct, "__name__", "") == "similarity" and owner is not None:
        similarity_fct = SimilarityFunction.to_similarity_fn(owner.similarity_fn_name)
    if similarity_fct not in (cos_sim, dot_score):
        raise ValueError(
            f"similarity_fct={similarity_fct_name(similarity_fct)} cannot be fused: take cos_sim "
            "or dot_score, or the loss of sentence-transformers"
        )
    return similarity_fct is cos_sim


def _check_no_labels(loss: nn.Module, labels: Tensor | None) -> None:
    if labels is not None:
        raise ValueError(
            f"{type(loss).__name__} takes no labels, and the dataset has a label column: remove it "
            "(columns are query, positive, negatives), or take a loss that learns from labels"
        )


def _check_columns(embeddings: list[Tensor], at_least: int) -> None:
    if len(embeddings) < at_least:
        raise ValueError(f"the loss needs {at_least} columns or more, got {len(embeddings)}")
    rows = [len(column) for column in embeddings]
    if len(set(rows)) > 1:
        raise ValueError(f"all columns need the same number of texts, got {rows}")


def _check_margin(loss: nn.Module) -> None:
    if loss.margin < 0:
        raise ValueError(
            f"margin must be >= 0, got {loss.margin}: negatives more similar than the positive "
            "cannot be asked to stay; take the loss of sentence-transformers"
        )


@contextmanager
def _named_if_unpooled() -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        if error.args == ("sentence_embedding",):
            raise ValueError(
                "the model gives no sentence_embedding: add a Pooling module after its Transformer"
            ) from error
        raise
