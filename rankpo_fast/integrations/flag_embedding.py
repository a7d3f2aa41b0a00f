"""FlagEmbedding's embedders with the fused loss: one line before its runner.

    from FlagEmbedding.finetune.embedder.encoder_only.base import BiEncoderOnlyEmbedderModel

    apply_to(BiEncoderOnlyEmbedderModel)  # or AbsEmbedderModel, for all

Tried with FlagEmbedding 1.4.1, the first whose trainer runs with transformers 5, and 1.4.2; with
transformers 5.23. With 5.24 `import FlagEmbedding` fails, since one of its rerankers imports
`modeling_attn_mask_utils`, which is gone; its parts that train embedders work there too.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rankpo_fast.integrations import require
from rankpo_fast.integrations.patches import (
    gathers_otherwise,
    in_batch_loss,
    refuse_other_losses,
    replaced,
)


def apply_to(model: type[nn.Module]) -> ExitStack:
    """Have an embedder compute its loss over in-batch and cross-device negatives without scores.

    Loss and gradients are FlagEmbedding's: those of encoder-only and decoder-only models, of ICL,
    of every prefix of MRL, and of M3 without unified_finetuning. Scores come back as None, since
    its `forward` reads no others than those of unified M3. What needs scores runs FlagEmbedding's
    own code: teacher scores with either kd_loss_type; unified M3, whose ensemble adds up the scores
    of dense, sparse and ColBERT vectors; no_in_batch_neg_flag; and, with a warning, a model with a
    `_dist_gather_tensor` of its own.

    With negatives_cross_device each rank scores its own queries alone. As with FlagEmbedding, every
    rank has the loss over the queries of all W ranks, and DDP ends with 1 / W of its gradient.

    Args:
        model: a class, such as the one that a runner will load, with those subclasses that do not
            override its methods. To be called before a model is prepared or compiled, which keeps
            the code that it finds.

    Returns:
        `with apply_to(...):` or `.close()` gives the class its methods back. Until then those of
        `_compute_in_batch_neg_loss` and `_compute_cross_device_neg_loss` have this `__module__`.

    Raises:
        ImportError: FlagEmbedding is not installed, or older than 1.4.1.
        ValueError: the class has no such methods, has its own, or has been given these before; in
            training, if it scores by something else than dot products, or passages do not divide by
            queries.
    """
    require("FlagEmbedding", "1.4.1", "1.4.1 and 1.4.2")
    in_batch, cross_device = "_compute_in_batch_neg_loss", "_compute_cross_device_neg_loss"

    def fused(theirs: Callable) -> Callable:
        if theirs.__module__.partition(".")[0] != "FlagEmbedding":
            raise ValueError(
                f"{model.__name__}.{theirs.__name__} is not FlagEmbedding's and would be lost: "
                "call rankpo_fast.info_nce_loss in it"
            )
        across_devices = theirs.__name__ == cross_device

        def compute_loss(
            self: Any,
            q_reps: Tensor,
            p_reps: Tensor,
            teacher_targets: Tensor | None = None,
            compute_score_func: Callable | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor | None, Tensor]:
            if teacher_targets is not None or getattr(self, "unified_finetuning", False):
                return theirs(self, q_reps, p_reps, teacher_targets, compute_score_func, **kwargs)
            if across_devices and gathers_otherwise(self, theirs, "_dist_gather_tensor"):
                return theirs(self, q_reps, p_reps, teacher_targets, compute_score_func, **kwargs)
            score = self.compute_score
            if compute_score_func is not None:  # which theirs gives the further arguments
                score = partial(compute_score_func, **kwargs)
            refuse_other_losses(self, score, self.compute_loss, self.temperature)
            group = dist.group.WORLD if across_devices else None
            return None, in_batch_loss(q_reps, p_reps, self.temperature, group)

        return compute_loss

    return replaced(model, {in_batch: fused, cross_device: fused})
