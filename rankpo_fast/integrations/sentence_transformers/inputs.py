"""What the losses check of what they are given: columns, labels, similarities, embeddings."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sentence_transformers.util import (
    SimilarityFunction,
    cos_sim,
    dot_score,
    pytorch_cos_sim,
    similarity_fct_name,
)
from torch import Tensor, nn


def check_labels(loss: nn.Module, labels: Tensor | None) -> None:
    """Raise ValueError if labels tell one row from another, which the loss would not look at.

    Equal ones say nothing: the zeros that `smart_batching_collate` makes where nobody set any, or
    the label=1 that examples carry for "these belong together". Nor do the rows' own numbers, the
    targets of the loss. For labels on a GPU the host waits.
    """
    if labels is None or not labels.numel():
        return
    labels = labels.detach().flatten()
    numbers = torch.arange(len(labels), device=labels.device)
    if not ((labels == labels[0]).all() | (labels == numbers).all()):
        raise ValueError(
            f"{type(loss).__name__} takes no labels, and those of a batch differ: "
            f"{', '.join(f'{x:g}' for x in labels[:4].tolist())}, ... Remove the dataset's label "
            "column (columns are query, positive, negatives), or take a loss that learns from "
            "labels"
        )


def check_columns(embeddings: list[Tensor], at_least: int = 2, any_negatives: bool = True) -> None:
    """Raise ValueError unless all columns have as many rows as there are queries; with
    any_negatives those after the positives may have any number."""
    if len(embeddings) < at_least:
        raise ValueError(f"the loss needs {at_least} columns or more, got {len(embeddings)}")
    rows = [len(column) for column in embeddings]
    if len(set(rows[:2] if any_negatives else rows)) > 1:
        which = "queries and positives" if any_negatives else "all columns"
        raise ValueError(f"{which} need the same number of texts, got {rows}")


def is_cosine(similarity_fct: Callable) -> bool:
    """Whether it is the cosine; otherwise it is the dot product, or ValueError."""
    fct = similarity_fct
    while isinstance(fct, functools.partial) and not fct.args and not fct.keywords:
        fct = fct.func
    owner = getattr(fct, "__self__", None)
    kind = getattr(owner, "similarity_fn_name", None)
    if getattr(fct, "__name__", "") == "similarity" and kind is not None:
        fct = SimilarityFunction.to_similarity_fn(kind)
    if fct not in (cos_sim, pytorch_cos_sim, dot_score):
        raise ValueError(
            f"similarity_fct={similarity_fct_name(similarity_fct)} cannot be fused: take cos_sim "
            "or dot_score, or the loss of sentence-transformers"
        )
    return fct is not dot_score


@contextmanager
def named_if_unpooled() -> Iterator[None]:
    """A model without pooling is a ValueError that says so."""
    try:
        yield
    except KeyError as error:
        if error.args == ("sentence_embedding",):
            raise ValueError(
                "the model gives no sentence_embedding: add a Pooling module after its Transformer"
            ) from error
        raise
