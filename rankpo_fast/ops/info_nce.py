"""InfoNCE with in-batch negatives.

    loss_i = log(1 + sum over negatives j of exp(s_ij - s_i,label)) = softplus(lse_i - s_i,label),
    s = scale * cos(q, p)

The softplus form keeps its digits where training has converged; cross entropy's lse - s loses all
of them there.
M queries, N passages, D dims. The M x N scores are never stored: `rankpo_kernels.chunked` walks
chunks of rows.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankpo_fast.ops.common import Reduction, row_weights, unit_rows
from rankpo_kernels import chunked


def info_nce_definition(
    q_MD: Tensor, p_ND: Tensor, labels_M: Tensor, scale: Tensor | float,
    excluded_MN: Tensor | None = None, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Losses [M]: what the ops must equal. Stores M x N: for tests and debugging."""
    if normalize:
        q_MD, p_ND = unit_rows(q_MD), unit_rows(p_ND)
    s_MN = scale * q_MD @ p_ND.T
    label_M1 = labels_M[:, None]
    negatives_MN = s_MN.scatter(1, label_M1, -torch.inf)
    if excluded_MN is not None:
        negatives_MN = negatives_MN.masked_fill(excluded_MN, -torch.inf)
    gap_M = negatives_MN.logsumexp(1) - s_MN.gather(1, label_M1)[:, 0]
    return torch.logaddexp(gap_M, torch.zeros_like(gap_M))


@torch.library.custom_op("rankpo_fast::info_nce", mutates_args=())
def _info_nce(
    q: Tensor, p: Tensor, labels: Tensor, scale: Tensor,
    query_ids: Tensor | None, passage_ids: Tensor | None,
    excluded_offsets: Tensor | None, excluded_columns: Tensor | None,
    normalize: bool, workspace_bytes: int,
) -> Tensor:  # fmt: skip
    """Losses [M] in 2MND flops; their backward recomputes the scores (8MND in all)."""
    ids = (query_ids, passage_ids, excluded_offsets, excluded_columns)
    with torch.autocast(q.device.type, enabled=False):
        return chunked.info_nce(
            q, p, labels, scale, *ids, None, normalize=normalize, workspace_bytes=workspace_bytes
        ).loss_M


@torch.library.custom_op("rankpo_fast::info_nce_grads", mutates_args=())
def _info_nce_grads(
    q: Tensor, p: Tensor, labels: Tensor, scale: Tensor,
    query_ids: Tensor | None, passage_ids: Tensor | None,
    excluded_offsets: Tensor | None, excluded_columns: Tensor | None,
    normalize: bool, workspace_bytes: int, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_i weights_i loss_i with its gradients of (q, p, scale), in 6MND flops; those not needed
    are empty.

    Gradients of fp16 come in fp32: a loss scale still to be multiplied in would find them
    underflowed.
    """
    ids = (query_ids, passage_ids, excluded_offsets, excluded_columns)
    with torch.autocast(q.device.type, enabled=False):
        result = chunked.info_nce(
            q, p, labels, scale, *ids, weights, tuple(needs),
            normalize=normalize, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    loss_M, positive_M, hardest_M, *grads = result
    grads = [
        empty if grad is None else grad.to(empty.device)
        for grad, empty in zip(grads, _no_grads(q, scale), strict=True)
    ]
    return (weights * loss_M).sum(), loss_M, positive_M, hardest_M, *grads


def _no_grads(q: Tensor, scale: Tensor) -> list[Tensor]:
    """Empty tensors of the gradients' dtypes and devices; a scale may live on the CPU."""
    dtype = chunked.gradient_dtype(q.dtype)
    d_scale = scale.new_empty(0, dtype=chunked.compute_dtype(q.dtype))
    return [q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype), d_scale]


@_info_nce.register_fake
def _(q, p, labels, scale, *rest):
    return q.new_empty(q.shape[0], dtype=chunked.compute_dtype(q.dtype))


@_info_nce_grads.register_fake
def _(q, p, labels, scale, *rest):
    row_M = q.new_empty(q.shape[0], dtype=chunked.compute_dtype(q.dtype))
    shapes = zip(_no_grads(q, scale), (q.shape, p.shape, ()), rest[-1], strict=True)
    grads = [empty.new_empty(shape) if need else empty for empty, shape, need in shapes]
    return row_M.new_empty(()), row_M, torch.empty_like(row_M), torch.empty_like(row_M), *grads


def _save(ctx, inputs, output):
    q, p, labels, scale, *ids, ctx.normalize, ctx.workspace_bytes = inputs
    ctx.save_for_backward(q, p, labels, scale, *ids)


def _grads(ctx, grad_loss_M):
    """One more pass with the upstream gradients as row weights."""
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    arguments = (*ctx.saved_tensors, ctx.normalize, ctx.workspace_bytes, grad_loss_M.contiguous())
    *_, dq, dp, d_scale = _info_nce_grads(*arguments, needs)
    q, p, _, scale = ctx.saved_tensors[:4]
    dq, dp, d_scale = (
        grad.to(leaf.dtype) if need else None
        for grad, leaf, need in zip((dq, dp, d_scale), (q, p, scale), needs, strict=True)
    )
    return dq, dp, None, d_scale, *[None] * 6


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph  # private: see its test


def _save_grads(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros for every output
    ctx.needs, ctx.dtypes = inputs[-1], [inputs[i].dtype for i in (0, 1, 3)]
    ctx.save_for_backward(*output[-3:])


def _scaled_grads(ctx, grad_loss, *others):
    if any(other is not None for other in others):
        raise RuntimeError("info_nce_loss has no second derivative")
    if grad_loss is None:
        return (None,) * 12
    # In place unless the graph is kept for another backward: no second copy of the gradients.
    kept = torch.compiler.is_compiling() or _graph_is_kept()
    times = Tensor.mul if kept else Tensor.mul_
    dq, dp, d_scale = (
        times(grad, grad_loss.to(grad.device)).to(dtype) if need else None
        for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return dq, dp, None, d_scale, *[None] * 8


_info_nce.register_autograd(_grads, setup_context=_save)
_info_nce_grads.register_autograd(_scaled_grads, setup_context=_save_grads)


def info_nce_loss(
    queries: Tensor,
    passages: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | None = None,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """InfoNCE of each query against all passages of the batch (van den Oord et al. 2018, eq. 4).

    Args:
        queries: [M, D] of fp64, fp32, bf16 or fp16, on the CPU or CUDA.
        passages: [N, D], same device; where dtypes differ, the wider one is taken.
        labels: [M] int64, the passage that is each query's positive. None: passages come in groups
            of N // M per query, positive first.
        temperature: similarities are divided by it; default 0.02.
        scale: 1 / temperature, instead of it. As a tensor of one number it receives a gradient.
        normalize: similarities are cosines, else dot products. A zero vector has similarity and
            gradient 0.
        reduction: "mean" (weighted by `weights`), "sum", or "none" for [M].
        weights: [M] >= 0, the importance of each query.
        query_ids, passage_ids: [M] and [N] int64, equal ids being the same text. A passage equal to
            the positive, and the positive of an equal query, are no negatives. No M x N mask is
            made of them.
        excluded: (offsets [M + 1], columns) int64. Passages columns[offsets[i] : offsets[i + 1]]
            are no negatives of query i either, such as its further positives.
        workspace_bytes: at most, for the scores of one chunk of queries; default 90 MiB on the CPU,
            256 MiB on CUDA.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). A query without any negative has loss 0.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit.
    """
    arguments = _arguments(
        queries, passages, labels, temperature, scale, normalize, query_ids, passage_ids, excluded,
        workspace_bytes,
    )  # fmt: skip
    weights = row_weights(queries, weights, queries.shape[0], reduction)
    q, p, _, scale = arguments[:4]
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (q, p, scale)]
    if reduction == "none" or not any(needs):
        loss_M = _info_nce(*arguments) * weights
        return loss_M if reduction == "none" else loss_M.sum()
    return _info_nce_grads(*arguments, weights, needs)[0]


class InfoNCEStats(NamedTuple):
    """What a training log wants to know of a batch; tensors on its device, no host sync."""

    accuracy: Tensor  # share of queries whose positive beats every negative
    positive_similarity: Tensor  # mean over queries
    hardest_negative_similarity: Tensor  # mean over the queries that have a negative


@torch.no_grad()
def info_nce_loss_and_grads(
    queries: Tensor,
    passages: Tensor,
    labels: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, InfoNCEStats]:
    """`info_nce_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        reduction: "mean" or "sum".
        options: all others are those of `info_nce_loss`.

    Returns:
        (loss, d_queries [M, D], d_passages [N, D], d_scale, stats), gradients in the dtypes of
        their inputs.
    """
    if reduction == "none":
        raise ValueError("info_nce_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    arguments = _arguments(queries, passages, labels, **options)
    weights = row_weights(queries, weights, queries.shape[0], reduction)
    loss, _, positive_M, hardest_M, dq, dp, d_scale = _info_nce_grads(
        *arguments, weights, [True, True, True]
    )
    has_negative_M = hardest_M > -torch.inf
    count = has_negative_M.sum().clamp(min=1)
    stats = InfoNCEStats(
        (positive_M > hardest_M).float().mean(),
        positive_M.mean(),
        hardest_M.masked_fill(~has_negative_M, 0).sum() / count,
    )
    return loss, dq.to(queries.dtype), dp.to(passages.dtype), d_scale, stats


def _arguments(
    queries, passages, labels, temperature=None, scale=None, normalize=True, query_ids=None,
    passage_ids=None, excluded=None, workspace_bytes=None,
):  # fmt: skip
    """The ops' arguments, checked; everything that can be told without looking at values on a
    device."""
    if queries.dim() != 2 or passages.dim() != 2:
        raise ValueError(
            f"queries and passages must be [M, D] and [N, D], got {tuple(queries.shape)} and "
            f"{tuple(passages.shape)}"
        )
    (M, D), N, device = queries.shape, passages.shape[0], queries.device
    if passages.shape[1] != D:
        raise ValueError(f"queries have D={D} but passages have D={passages.shape[1]}")
    if passages.device != device:
        raise ValueError(f"queries are on {device} but passages are on {passages.device}")
    if device.type not in chunked.DEFAULT_WORKSPACE:
        raise ValueError(f"embeddings are on {device}: the losses run on cpu and cuda")
    if not (queries.is_floating_point() and passages.is_floating_point()):
        raise ValueError(
            f"embeddings must be floating point, got {queries.dtype}, {passages.dtype}"
        )
    dtype = torch.promote_types(queries.dtype, passages.dtype)
    if labels is None:
        if M and (N < M or N % M):
            raise ValueError(
                f"without labels, passages must come in equal groups per query, positive first: "
                f"{N} passages do not divide by {M} queries"
            )
        labels = torch.arange(M, device=device) * (N // max(M, 1))
    integers = {"labels": (labels, M), "query_ids": (query_ids, M), "passage_ids": (passage_ids, N)}
    if excluded is not None:
        integers["excluded offsets"] = (excluded[0], M + 1)
        integers["excluded columns"] = (excluded[1], excluded[1].numel())
    for name, (tensor, length) in integers.items():
        if tensor is None:
            continue
        if tensor.shape != (length,) or tensor.dtype != torch.int64 or tensor.device != device:
            raise ValueError(
                f"{name} must be int64 [{length}] on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if temperature is not None and scale is not None:
        raise ValueError(f"give temperature or scale, not both (got {temperature} and {scale})")
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"scale must be one number, got a tensor of shape {tuple(scale.shape)}"
            )
        scale = scale.reshape(())
    else:
        name, value = ("scale", scale) if scale is not None else ("temperature", temperature)
        value = 0.02 if value is None else value
        if isinstance(value, Tensor):
            raise ValueError(
                "temperature must be a number; a tensor goes in as scale = 1 / temperature"
            )
        if not 0 < value < math.inf or not 0 < 1 / value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
        # fp64 on the CPU: the ops cast it once, to the dtype they compute in
        value = value if name == "scale" else 1 / value
        scale = torch.full((), value, dtype=torch.float64)
    if workspace_bytes is None:
        workspace_bytes = chunked.DEFAULT_WORKSPACE[device.type]
    ids = (query_ids, passage_ids, *(excluded or (None, None)))
    return queries.to(dtype), passages.to(dtype), labels, scale, *ids, normalize, workspace_bytes
