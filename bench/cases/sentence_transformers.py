"""What do sentence-transformers' in-batch losses cost beside the same losses with our kernels?

Given the embeddings of B queries and of 1 + 7 documents each, loss and gradients of all of them:
all that a trainer does with a batch besides running its model. The cached losses' part is the one
between their two passes over the texts, in chunks of `mini_batch_size` queries as theirs has it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..measure import Case, Run
from ..questions import OURS, Shape
from . import loss
from .loss import GATE, loss_question

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DOCUMENTS = 8  # a query: one positive, seven negatives
MINI_BATCH = 32  # theirs by default
SHAPES = {
    "cpu": {
        "quick": [(512, 384)],
        "default": [(512, 384), (2048, 384)],
        "full": [(512, 384), (2048, 384), (4096, 384)],
    },
    "cuda": {  # up to where one of them no longer fits
        "quick": [(4096, 384)],
        "default": [(4096, 384), (16384, 384), (65536, 384)],
        "full": [(4096, 384), (16384, 384), (65536, 384), (262144, 384)],
    },
}
FOR_ERRORS = 512  # queries: fp64 is slow
THEIRS = "sentence-transformers"
IMPLEMENTATIONS = [OURS, f"{OURS}, cached", THEIRS, f"{THEIRS}, cached"]


def draw(B: int, D: int, device: str, dtype: torch.dtype, **state: bool) -> list[Tensor]:
    """Columns [B, D]: queries, positives, negatives."""
    q, p, _ = loss.draw(B, B * DOCUMENTS, D, device, dtype, **state)
    columns = [q, *p.detach().reshape(B, DOCUMENTS, D).unbind(1)]
    return [column.detach().contiguous().requires_grad_() for column in columns]


def implementations(columns: list[Tensor]) -> dict[str, Run]:
    """(loss, gradients) of each loss, by name."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from rankpo_fast.integrations import sentence_transformers as ours

    # The losses are given embeddings, and no labels.
    model, no_labels = cast("SentenceTransformer", nn.Sequential(nn.Identity())), cast(Tensor, None)
    batches = [
        [x.detach().requires_grad_() for x in column.split(MINI_BATCH)] for column in columns
    ]

    def plain(of: theirs.MultipleNegativesRankingLoss) -> Run:
        return loss.forward_backward(
            lambda: of.compute_loss_from_embeddings(columns, no_labels), columns
        )

    def cached(of: theirs.CachedMultipleNegativesRankingLoss) -> Run:
        def run() -> Sequence[Tensor]:
            total = of.calculate_loss(batches, with_backward=True)
            leaves = [x for column in batches for x in column]
            grads = [cast(Tensor, x.grad) for x in leaves]
            for x in leaves:
                x.grad = None
            return total, *grads

        return run

    return {
        OURS: plain(ours.MultipleNegativesRankingLoss(model)),
        f"{OURS}, cached": cached(ours.CachedMultipleNegativesRankingLoss(model)),
        THEIRS: plain(theirs.MultipleNegativesRankingLoss(model)),
        f"{THEIRS}, cached": cached(theirs.CachedMultipleNegativesRankingLoss(model)),
    }


def errors(D: int, device: str, dtype: torch.dtype, **state: bool) -> loss.Errors:
    """Of each implementation against ours in fp64."""
    columns = draw(FOR_ERRORS, D, device, dtype, **state)
    truth = {
        name: run() for name, run in implementations(loss.exact(columns)).items() if OURS in name
    }
    return loss.Errors(implementations(columns), lambda name: truth[name.replace(THEIRS, OURS)])


def case(shape: Shape, device: str) -> Case:
    B, D, dtype = shape["B"], shape["D"], loss.dtype_of(shape)
    fresh, converged = (errors(D, device, dtype, converged=c) for c in (False, True))
    columns = draw(B, D, device, dtype)
    queries, passages = columns[0], torch.cat([x.detach() for x in columns[1:]])
    return loss.beside_gemms(
        3, queries, passages, columns, implementations(columns), errors=fresh, converged=converged,
        gate=GATE[dtype],
    )  # fmt: skip


QUESTIONS = [loss_question(THEIRS, __doc__.splitlines()[0], "BD", SHAPES, case, IMPLEMENTATIONS)]
