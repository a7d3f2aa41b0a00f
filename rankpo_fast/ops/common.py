"""What every loss shares: unit vectors for the definitions, how per-row losses become one number,
and how gradients that come with a loss reach autograd.

mean is sum_i w_i loss_i / sum_i w_i (0 without rows or weight), sum is sum_i w_i loss_i, none is
w_i loss_i.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rankpo_fast.ops.options import Reduction
from rankpo_kernels.problem import InBatchProblem, InfoNCEProblem, compute_dtype

NO_SECOND_DERIVATIVE = "the loss has no second derivative"

Grads = TypeVar("Grads")
Stats = TypeVar("Stats")


class LossAndGrads(NamedTuple, Generic[Grads, Stats]):
    """What a loss without autograd gives; nothing in it has a graph."""

    loss: Tensor  # 0-dim
    grads: Grads  # by the names of the loss's tensors, in their dtypes and shapes
    stats: Stats  # for a training log: 0-dim tensors on the device


def unit_rows(x_ND: Tensor) -> Tensor:
    """x / |x| per row; 0 with gradient 0 for a row of zeros, where F.normalize has a gradient of
    1e12."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    return x_ND / norm_N1.masked_fill(norm_N1 == 0, torch.inf)


def mean(x: Tensor) -> Tensor:
    """0 of no elements, as the mean of no losses is."""
    return x.sum() / max(x.numel(), 1)


def batch_weights(queries: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    """`row_weights`; without weights one factor of all rows, on the CPU: no launch fills it."""
    M = len(queries)
    if weights is not None:
        return row_weights(queries, weights, M, reduction)
    value = 1 / max(M, 1) if reduction == "mean" else 1.0
    return torch.tensor(value, dtype=torch.float64)


def row_weights(like: Tensor, weights: Tensor | None, rows: int, reduction: Reduction) -> Tensor:
    """[rows] factors whose weighted sum of losses is the reduction; computed in fp32 (fp64)."""
    dtype = compute_dtype(like.dtype)
    if weights is None:
        return torch.full(
            (rows,),
            1 / max(rows, 1) if reduction == "mean" else 1.0,
            dtype=dtype,
            device=like.device,
        )
    if weights.shape != (rows,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({rows},)")
    if weights.requires_grad:
        raise ValueError("weights require a gradient, which the losses do not give: detach them")
    on_cpu = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and rows and not weights.min() >= 0:  # on CUDA asking would cost a sync
        raise ValueError(f"weights must be >= 0, got {weights.min().item()}")
    weights = weights.to(like.device, dtype)
    if reduction == "mean":
        weights = weights / weights.sum().clamp(min=torch.finfo(dtype).tiny)
    return weights


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph  # private: see its test


def scaled_grads(
    grads: Sequence[Tensor], by: Tensor | None, needs: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Gradients that came with the loss, times its upstream gradient, where they are needed.

    In place unless the graph is kept for another backward: no second copy of the gradients. A
    number on the CPU can be looked at: one, as of `loss.backward()`, is no work.
    """
    if by is None:
        return [None] * len(grads)
    # torch 2.11 does not say that it is compiling here, but has a tensor of another kind then.
    traced = torch.compiler.is_compiling() or type(by) is not Tensor
    kept = traced or _graph_is_kept()
    one = not kept and by.device.type == "cpu" and by == 1
    times = Tensor.mul if kept else (lambda grad, _: grad) if one else Tensor.mul_
    return [
        times(grad, by.to(grad.device)).to(dtype) if need else None
        for grad, need, dtype in zip(grads, needs, dtypes, strict=True)
    ]


def crossing(problem: InfoNCEProblem | InBatchProblem) -> tuple:
    """The arguments by which an op takes a problem."""
    return (*problem.leaves, list(problem.relations), problem.settings.text())


_function_of: dict[CustomOpDef, Callable] = {}


def loss_op(name: str) -> Callable[[Callable], CustomOpDef]:
    """Register a function with torch, and keep it as it is: see `called`."""

    def decorate(function: Callable) -> CustomOpDef:
        op = torch.library.custom_op(f"rankpo_fast::{name}", function, mutates_args=())
        _function_of[op] = function
        return op

    return decorate


def called(op: CustomOpDef, *arguments: Any) -> Any:
    """What an op gives, in no graph; by itself where nobody would see that torch was not asked, who
    takes a third of a millisecond."""
    if _are_watched(x for x in arguments if isinstance(x, Tensor)):
        return op(*arguments)
    with torch.no_grad():
        return _function_of[op](*arguments)


def weighted_sum(
    op: CustomOpDef, problem: InfoNCEProblem | InBatchProblem, weights: Tensor, needs: list[bool]
) -> Tensor:
    """The first of what an op `with_grads` (see `register_gradients`) gives, in the graph."""
    arguments = (*crossing(problem), weights, needs)
    if _are_watched(x for x in problem.leaves if x is not None):
        return op(*arguments)[0]
    leaf = problem.leaves[needs.index(True)]
    assert leaf is not None
    nothing = leaf.reshape(-1)[:0].clone()  # of the leaf in the graph, without its memory
    return _WithGrads.apply(_function_of[op], nothing, *arguments)


def _are_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether something may look at torch's calls: a compiler, a mode, a transform, a subclass."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, Parameter) for x in tensors)
    )


class _WithGrads(torch.autograd.Function):
    """What the op's registered gradients do."""

    @staticmethod
    def forward(ctx: Any, function: Callable, of_leaf: Tensor, *arguments: Any) -> Tensor:
        total, _, _, _, *grads = function(*arguments)
        ctx.needs, ctx.inputs = arguments[-1], len(arguments)
        leaves = arguments[: len(ctx.needs)]
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.save_for_backward(*grads, of_leaf)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple:
        *saved, of_leaf = ctx.saved_tensors
        grads = scaled_grads(saved, grad_total, ctx.needs, ctx.dtypes)
        if torch.is_grad_enabled():  # or they would pass for constants
            grads = _NoDerivative.apply(of_leaf, *grads)
        return None, None, *grads, *[None] * (ctx.inputs - len(grads))


class _NoDerivative(torch.autograd.Function):
    """Values that depend on a leaf, in a way that nobody computes."""

    @staticmethod
    def forward(ctx: Any, of_leaf: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple([None if x is None else x.view_as(x) for x in values])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def in_own_memory(*rows: Tensor) -> list[Tensor]:
    """Each in memory of its own, as torch wants an op's outputs; launchers give parts of larger
    tensors."""
    return [
        x if x.numel() and x.untyped_storage().nbytes() == x.nbytes else x.clone() for x in rows
    ]


def register_gradients(losses: CustomOpDef, with_grads: CustomOpDef) -> None:
    """Autograd of two ops. `losses` has the arguments (*leaves, relations, settings) and gives
    losses [M]; `with_grads` has row weights and needs besides, and gives (weighted sum, three
    outputs for the log, *gradients of the leaves)."""
    losses.register_autograd(functools.partial(_second_pass, with_grads), setup_context=_save)
    with_grads.register_autograd(_scaled_grads, setup_context=_save_grads)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *leaves, relations, ctx.settings = inputs
    ctx.leaves = len(leaves)
    ctx.save_for_backward(*leaves, *relations)


def _second_pass(with_grads: Callable, ctx: Any, grad_loss_M: Tensor) -> tuple:
    """One more pass with the upstream gradients as row weights."""
    saved = ctx.saved_tensors
    leaves, relations = saved[: ctx.leaves], list(saved[ctx.leaves :])
    needs = list(ctx.needs_input_grad[: ctx.leaves])
    arguments = (*leaves, relations, ctx.settings, grad_loss_M.contiguous(), needs)
    _, _, _, _, *grads = with_grads(*arguments)
    grads = [
        grad.to(leaf.dtype) if need else None
        for grad, leaf, need in zip(grads, leaves, needs, strict=True)
    ]
    return *grads, _no_grad_of(relations), None


def _no_grad_of(relations: list[Tensor | None]) -> list[None] | None:
    """What torch expects for a list: a None each, but one None if the list itself has a None."""
    return [None] * len(relations) if all(x is not None for x in relations) else None


def _save_grads(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros for every output
    *leaves, relations, _, _, ctx.needs = inputs
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
    ctx.no_grad_of_relations = _no_grad_of(relations)
    _, _, _, _, *grads = output
    ctx.save_for_backward(*grads)


def _scaled_grads(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple:
    if any(other is not None for other in others):
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    grads = scaled_grads(ctx.saved_tensors, grad_loss, ctx.needs, ctx.dtypes)
    return *grads, ctx.no_grad_of_relations, None, None, None
