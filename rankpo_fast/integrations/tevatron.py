"""Tevatron's encoders with the fused loss: one line before its trainer, another for its GradCache.

    apply_to(DenseModel)  # or EncoderModel, for all
    trainer.gc.loss_fn = GradCacheLoss(model.temperature, torch.distributed.group.WORLD)

Tried with the DenseModel of tevatron 0.1.0 from PyPI, which has no temperature, and with a model
built as those of its repository (tevatron.retriever). Version numbers do not tell them apart: the
repository says 0.0.1. So methods are asked for instead.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rankpo_fast.integrations.patches import (
    gathers_otherwise,
    in_batch_loss,
    refuse_other_losses,
    replaced,
)
from rankpo_fast.ops.checks import several


@dataclass(frozen=True)
class GradCacheLoss:
    """The `loss_fn` of a GradCache (luyug's, as Tevatron's GradCacheTrainer has it in `gc`).

    Tevatron's own leaves out the temperature that its other trainer divides by. Apart from that
    loss and gradients are the same: across W ranks, W times the loss over the queries of all, so
    that DDP ends with the gradient of one process with all rows.

    temperature: similarities, dot products of what the encoders return, are divided by it.
    process_group: of the ranks whose passages are negatives; `torch.distributed.group.WORLD`, which
        is None in one process alone.
    """

    temperature: float
    process_group: ProcessGroup | None = None

    def __call__(
        self,
        queries: Tensor,
        passages: Tensor,
        target: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss; the arguments are those of luyug's, as its README calls the cache:
        `gc(queries, passages, reduction="mean")`.

        Args:
            queries, passages: [M, D] and [N, D].
            target: [M] int64, the passage that is each query's positive; in one process alone.
                None: passages come in groups of N // M per query, positive first.
            reduction: "mean" or "sum" over the queries.
        """
        group = self.process_group
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if target is not None and several(group):
            raise ValueError(
                "target names passages of one process, and there are several: leave it out, with "
                "passages in groups, the positive first"
            )
        loss = in_batch_loss(queries, passages, self.temperature, group, target)
        if reduction == "sum":
            count = torch.tensor(len(queries), device=queries.device)
            if several(group):
                dist.all_reduce(count, group=group)
            loss = loss * count
        return loss if group is None else group.size() * loss


def apply_to(model: type[nn.Module]) -> ExitStack:
    """Have an encoder compute its training loss without scores.

    Loss and gradients are Tevatron's, across ranks too (`negatives_x_device` of 0.1.0, always
    later): W times the loss over the queries of all W ranks, so that DDP ends with the gradient of
    one process with all rows. The output in training has no scores, which Tevatron's distillation
    trainer alone reads, and the representations of the rank's own rows. Encoding one side and
    evaluation run Tevatron's own code, and so does, with a warning, a model with a
    `dist_gather_tensor` of its own.

    Args:
        model: a class, with those subclasses that do not override its `forward`. To be called
            before a model is prepared or compiled, which keeps the code that it finds.

    Returns:
        `with apply_to(...):` or `.close()` gives the class its `forward` back, whose `__module__`
        is this one until then.

    Raises:
        ValueError: the class has no `encode_query` and `encode_passage`, or has been given this
            before; in training, if it scores by something else than dot products, or passages do
            not divide by queries.
    """
    for name in ("encode_query", "encode_passage"):
        if not hasattr(model, name):
            raise ValueError(f"{model} has no method {name}: give one of Tevatron's encoders")

    def fused(theirs: Callable) -> Callable:
        def forward(self: Any, query: dict | None = None, passage: dict | None = None) -> Any:
            if not (self.training and query and passage):
                return theirs(self, query, passage)
            if gathers_otherwise(self, theirs, "dist_gather_tensor"):
                return theirs(self, query, passage)
            if not hasattr(self, "compute_similarity"):  # of 0.1.0
                refuse_other_losses(self, _dot_products, self.cross_entropy, 1.0)
            else:
                refuse_other_losses(self, self.compute_similarity, self.compute_loss, 1.0)
            output = theirs(self, query=query)
            q_reps, p_reps = output.q_reps, theirs(self, passage=passage).p_reps
            # world_size is there where rows of all ranks are gathered
            group = dist.group.WORLD if hasattr(self, "world_size") else None
            loss = GradCacheLoss(getattr(self, "temperature", 1.0), group)
            return type(output)(loss=loss(q_reps, p_reps), q_reps=q_reps, p_reps=p_reps)

        return forward

    return replaced(model, {"forward": fused})


def _dot_products(queries: Tensor, passages: Tensor) -> Tensor:
    return queries @ passages.T
