"""What the patches of FlagEmbedding and Tevatron share: methods that stand in for a library's until
they are taken back, and the loss that both libraries compute.

    loss = mean over queries i of all ranks of cross_entropy(q_i . p_j / temperature, positive of i)

Both gather the rows of all ranks, keep the gradients of their own and compute this on every rank.
M queries, N passages of a rank, D dims.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from rankpo_fast.integrations.overrides import warn_unfused
from rankpo_fast.ops.checks import several
from rankpo_fast.ops.info_nce import info_nce_loss


def replaced(
    theirs: type[nn.Module], methods: dict[str, Callable[[Callable], Callable]]
) -> ExitStack:
    """Give a class other methods, until the ExitStack is closed or left.

    methods: by name, what makes of their method the one that takes its place.

    Raises:
        ValueError: a method is not there, or has been replaced already; a model instead of a class.
    """
    if not isinstance(theirs, type):
        raise ValueError(f"a class is patched, not one model: give {type(theirs).__name__}")
    for name in methods:
        method = getattr(theirs, name, None)
        if method is None:
            raise ValueError(f"{theirs.__name__} has no method {name}: give the embedder's class")
        if method.__module__.startswith("rankpo_fast."):
            raise ValueError(f"{theirs.__name__}.{name} is replaced already: close that first")
    ours = {name: wrap(getattr(theirs, name)) for name, wrap in methods.items()}
    undo = ExitStack()
    for name, method in ours.items():
        if name in vars(theirs):
            undo.callback(setattr, theirs, name, vars(theirs)[name])
        else:
            undo.callback(delattr, theirs, name)
        setattr(theirs, name, method)
    return undo


def in_batch_loss(
    queries: Tensor,
    passages: Tensor,
    temperature: float,
    group: ProcessGroup | None,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss above, the same on every rank, without the M x N scores. Its gradient is that of the
    rank's own rows alone, so that the mean over ranks, which DDP takes, is 1 / W of that of one
    process with all rows.

    queries [M, D], passages [N, D] of this rank, in groups of N // M, positive first, unless labels
    [M] say which passage is.
    """
    own = info_nce_loss(
        queries, passages, labels=labels, temperature=temperature, normalize=False,
        process_group=group,
    )  # fmt: skip
    if not several(group):
        return own
    total = own.detach().clone()
    dist.all_reduce(total, group=group)
    return (own - own.detach() + total) / dist.get_world_size(group)


def gathers_otherwise(model: nn.Module, theirs: Callable, gather: str) -> bool:
    """Whether the method that brings the rows of all ranks, which a fused loss does not call, was
    written elsewhere than the method `theirs`, which does."""
    method = getattr(model, gather, None)
    otherwise = method is not None and method.__module__ != theirs.__module__
    if otherwise:
        warn_unfused(model, [gather], theirs.__module__.partition(".")[0])
    return otherwise


@torch.no_grad()
def refuse_other_losses(
    model: nn.Module, similarity: Callable, loss: Callable, temperature: float
) -> None:
    """Raise ValueError unless the model's own methods, which a fused loss does not call, make mean
    cross entropy of dot products. Two queries and three passages on the CPU tell, so that no device
    is waited for."""
    q = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]], device="cpu")
    p = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]], device="cpu")
    labels = torch.tensor([1, 2], device="cpu")
    scores = q @ p.T / temperature
    for method, given, plain in [
        (similarity, (q, p), scores),
        (loss, (scores, labels), F.cross_entropy(scores, labels)),
    ]:
        name = getattr(method, "__name__", type(method).__name__)
        refusal = ValueError(
            f"{type(model).__name__}.{name} is not that of dot products / temperature "
            "and mean cross entropy, which is what is fused: close the patch, or call "
            "rankpo_fast.info_nce_loss in a subclass"
        )
        try:
            theirs = method(*given)
        except Exception as failure:  # of one that takes other vectors
            raise refusal from failure
        if theirs.shape != plain.shape or not torch.allclose(theirs.float(), plain.float()):
            raise refusal
