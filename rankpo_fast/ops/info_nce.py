"""InfoNCE with in-batch negatives.

    loss_i = log(1 + sum over negatives j of exp(s_ij - s_i,label)) = softplus(lse_i - s_i,label),
    s = scale * cos(q, p)

The softplus form keeps its digits where training has converged; cross entropy's lse - s loses all
of them there. With more directions, further positives, own negatives or prefixes it is the same
sum over more negatives: see `rankpo_kernels.objective`.
M queries, N passages, H own negatives, P positive pairs, D dims, G dims of a guide. The M x N
scores are never stored: the launchers walk chunks of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rankpo_fast.ops import ranks
from rankpo_fast.ops.common import Reduction, row_weights, scaled_grads, uniform_weight, unit_rows
from rankpo_kernels import chunked
from rankpo_kernels.norms import compute_dtype
from rankpo_kernels.objective import (
    DEFAULT_WORKSPACE,
    DIRECTIONS,
    PP,
    PQ,
    QP,
    QQ,
    Relations,
    Result,
    Settings,
    expand,
    gradient_dtype,
    is_plain,
    limits,
    own_rows,
    positive_pairs,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of embeddings
Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]


def info_nce_definition(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor | float, relations: Relations, settings: Settings,
    own_HD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Losses [M]: what the ops must equal. Stores M x N: for tests and debugging."""
    M, labels_M, owner_N = len(q_MD), relations.labels_M, relations.curated_N
    i_P, a_P, share_P = positive_pairs(relations, q_MD.dtype)
    known_MN = known_definition(relations, len(p_ND))
    mine_MN = torch.zeros_like(known_MN)  # curated for this query
    if owner_N is not None:
        mine_MN = owner_N == torch.arange(M, device=q_MD.device)[:, None]
    smooth, loss_M = settings.label_smoothing, q_MD.new_zeros(M)
    for prefix, weight in settings.levels(q_MD.shape[1]):
        unit = unit_rows if settings.normalize else Tensor.clone
        q, p = unit(q_MD[:, :prefix]), unit(p_ND[:, :prefix])
        blocks = {  # similarities of every pair's query or positive, and who is no negative there
            QP: (q @ p.T, known_MN), QQ: (q @ q.T, known_MN[:, labels_M]),
            PP: ((p @ p.T)[a_P], (known_MN | mine_MN)[i_P]),
        }  # fmt: skip
        if settings.margin is not None:
            judge = (q, p)
            if relations.guide_queries is not None:
                judge = [unit(x) for x in relations[-2:]]
            gq, gp = (x.detach().to(q.dtype) for x in judge)
            limit_M1 = limits((gq * gp[labels_M]).sum(1), settings)[:, None]
            above = {QP: (gq @ gp.T > limit_M1) & ~mine_MN, QQ: gq @ gq.T > limit_M1,
                     PP: (gp @ gp.T)[a_P] > limit_M1[i_P]}  # fmt: skip
            blocks = {d: (s, masked | above[d]) for d, (s, masked) in blocks.items()}
        s_P = scale * blocks[QP][0][i_P, a_P]
        logits = {
            d: (scale * s).masked_fill(masked, -torch.inf) for d, (s, masked) in blocks.items()
        }
        of_pairs = {QP: logits[QP][i_P], PQ: logits[QP].T[a_P], QQ: logits[QQ][i_P], PP: logits[PP]}
        if own_HD is not None:
            owner_H = expand(relations.own_offsets.diff(), len(own_HD))
            own_PH = scale * (q @ unit(own_HD[:, :prefix]).T)[i_P]
            own_PH = own_PH.masked_fill(owner_H != i_P[:, None], -torch.inf)
            of_pairs[QP] = torch.cat([of_pairs[QP], own_PH], 1)
        parts = [[of_pairs[d]] for d in settings.directions]
        if settings.joint:  # each direction that holds the positive lists it
            parts = [[of_pairs[d] for d in settings.directions]]
        for part in parts:
            copies = max(
                1, sum(d in (QP, PQ) for d in settings.directions) if settings.joint else 1
            )
            negatives = torch.cat(part, 1)
            positive_P1 = s_P[:, None].expand(-1, copies)
            gap_P = negatives.logsumexp(1) - positive_P1.logsumexp(1)
            loss_P = softplus(gap_P) + math.log(copies)
            if smooth:
                candidates = torch.cat([positive_P1, negatives], 1)
                count_P = candidates.isfinite().sum(1)
                mean_P = candidates.masked_fill(candidates == -torch.inf, 0).sum(1) / count_P
                loss_P = loss_P + smooth * (s_P - mean_P)
            loss_M = loss_M.index_add(0, i_P, weight * share_P * loss_P / len(parts))
    return loss_M


def known_definition(relations: Relations, N: int) -> Tensor:
    """[M, N]: passage j has the text of a positive or exclusion of a query with the text of i."""
    labels_M, device = relations.labels_M, relations.labels_M.device
    M = len(labels_M)
    query_M = torch.arange(M, device=device)
    query_M = query_M if relations.query_ids_M is None else relations.query_ids_M
    text_N = torch.arange(N, device=device)
    text_N = text_N if relations.passage_ids_N is None else relations.passage_ids_N
    known_MN = torch.zeros(M, N, dtype=torch.bool, device=device)
    i_P, a_P, _ = positive_pairs(relations, torch.float32)
    lists = [(i_P, a_P)]
    if relations.excluded_offsets is not None:
        columns = relations.excluded_columns
        lists.append((expand(relations.excluded_offsets.diff(), len(columns)), columns))
    for rows, columns in lists:
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
            known_MN |= (query_M == query_M[i])[:, None] & (text_N == text_N[j])
    return known_MN


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus overflows to its threshold form."""
    return torch.logaddexp(x, torch.zeros_like(x))


@torch.library.custom_op("rankpo_fast::info_nce", mutates_args=())
def _info_nce(
    q: Tensor, p: Tensor, own: Tensor | None, scale: Tensor,
    relations: list[Tensor | None], settings: str,
) -> Tensor:  # fmt: skip
    """Losses [M] in 2MND flops; their backward recomputes the scores (8MND in all)."""
    return _apart(_launch(q, p, own, scale, relations, settings).loss_M)[0]


@torch.library.custom_op("rankpo_fast::info_nce_grads", mutates_args=())
def _info_nce_grads(
    q: Tensor, p: Tensor, own: Tensor | None, scale: Tensor,
    relations: list[Tensor | None], settings: str, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_i weights_i loss_i with its gradients of (q, p, own, scale), in 6MND flops; those not
    needed are empty. One weight of all is of shape () and on the CPU, where no launch fills it.

    Gradients of fp16 come in fp32: a loss scale still to be multiplied in would find them
    underflowed.
    """
    result = _launch(q, p, own, scale, relations, settings, weights, tuple(needs))
    grads = [
        empty if grad is None else grad.to(empty.device)
        for grad, empty in zip(result[3:7], _no_grads(q, scale), strict=True)
    ]
    total = result.total
    if total is None:
        if weights.dim():  # else it is a number for the kernel; a copy would make the host wait
            weights = weights.to(q.device, result.loss_M.dtype)
        total = (weights * result.loss_M).sum()
    return total, *_apart(*result[:3]), *grads


def _apart(*rows: Tensor) -> list[Tensor]:
    """Each in memory of its own, as torch wants an op's outputs; launchers give parts of larger
    tensors."""
    return [
        x if x.numel() and x.untyped_storage().nbytes() == x.nbytes else x.clone() for x in rows
    ]


def _launch(q, p, own, scale, relations, settings, weights=None, needs=(False,) * 4) -> Result:
    relations, settings = Relations(*relations), Settings.parse(settings)
    if q.device.type == "cpu":
        _check_values(own_rows(relations, settings), len(p), 0 if own is None else len(own))
    launcher = _launcher(q, settings)
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return launcher(q, p, own, scale, relations, settings, weights, needs)


def _launcher(q: Tensor, settings: Settings) -> Callable[..., Result]:
    if not takes_triton(q, settings):
        return chunked.info_nce
    from rankpo_kernels.gpu import info_nce  # triton: Linux alone has it

    return info_nce.info_nce


def takes_triton(q: Tensor, settings: Settings) -> bool:
    """On CUDA, except in fp64; chunks of torch GEMMs elsewhere and where asked for."""
    on_gpu, exact = q.device.type == "cuda", q.dtype == torch.float64
    if settings.window is not None:
        return False  # the kernels have no queries besides those with a loss
    if settings.group is not None and not len(q):
        return False  # a rank without queries takes part in the collectives
    if settings.backend == "torch" or (settings.backend is None and (exact or not on_gpu)):
        return False
    if exact:
        raise ValueError("backend='triton' computes in fp32: embeddings of fp64 take 'torch'")
    if not on_gpu and not _is_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA, but the embeddings are on {q.device}: take 'torch', or "
            "set TRITON_INTERPRET=1 before triton is imported to debug its kernels"
        )
    return True


def _is_interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret


def _no_grads(q: Tensor, scale: Tensor) -> list[Tensor]:
    """Empty tensors of the gradients' dtypes and devices; a scale may live on the CPU."""
    embeddings = [q.new_empty(0, dtype=gradient_dtype(q.dtype)) for _ in range(3)]
    return [*embeddings, scale.new_empty(0, dtype=compute_dtype(q.dtype))]


@_info_nce.register_fake
def _(q, p, own, scale, relations, settings):
    return q.new_empty(_losses(q, settings), dtype=compute_dtype(q.dtype))


def _losses(q: Tensor, settings: str) -> int:
    window = Settings.parse(settings).window
    return q.shape[0] if window is None else window[1] - window[0]


@_info_nce_grads.register_fake
def _(q, p, own, scale, relations, settings, weights, needs):
    dtype, M = compute_dtype(q.dtype), _losses(q, settings)
    rows = [q.new_empty(M, dtype=dtype) for _ in range(3)]
    shapes = (q.shape, p.shape, own.shape if own is not None else (0,), ())
    grads = [
        empty.new_empty(shape) if need else empty
        for empty, shape, need in zip(_no_grads(q, scale), shapes, needs, strict=True)
    ]
    return rows[0].new_empty(()), *rows, *grads


def _save(ctx, inputs, output):
    *leaves, relations, ctx.settings = inputs
    ctx.save_for_backward(*leaves, *relations)


def _grads(ctx, grad_loss_M):
    """One more pass with the upstream gradients as row weights."""
    q, p, own, scale, *relations = ctx.saved_tensors
    leaves, needs = (q, p, own, scale), list(ctx.needs_input_grad[:4])
    outputs = _info_nce_grads(*leaves, relations, ctx.settings, grad_loss_M.contiguous(), needs)
    grads = [
        grad.to(leaf.dtype) if need else None
        for grad, leaf, need in zip(outputs[4:], leaves, needs, strict=True)
    ]
    return *grads, _no_grad_of(relations), None


def _no_grad_of(relations: list[Tensor | None]) -> list[None] | None:
    """What torch expects for a list: a None each, but one None if the list itself has a None."""
    return [None] * len(relations) if all(x is not None for x in relations) else None


def _save_grads(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros for every output
    *leaves, relations, _, _, ctx.needs = inputs
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
    ctx.no_grad_of_relations = _no_grad_of(relations)
    ctx.save_for_backward(*output[4:])


def _scaled_grads(ctx, grad_loss, *others):
    if any(other is not None for other in others):
        raise RuntimeError("the loss has no second derivative")
    grads = scaled_grads(ctx.saved_tensors, grad_loss, ctx.needs, ctx.dtypes)
    return *grads, ctx.no_grad_of_relations, None, None, None


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
    positives: tuple[Tensor, Tensor] | None = None,
    own_negatives: Tensor | None = None,
    own_offsets: Tensor | None = None,
    curated: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_type: Literal["absolute", "relative"] = "absolute",
    guide: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    directions: Sequence[Direction] = ("query_to_passage",),
    partition: Literal["joint", "per_direction"] = "joint",
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    gradient_filter: float = 0.0,
    workspace_bytes: int | None = None,
    backend: Literal["torch", "triton"] | None = None,
    process_group: ProcessGroup | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> Tensor:
    """InfoNCE of each query against all passages of the batch (van den Oord et al. 2018, eq. 4).

    Args:
        queries: [M, D] of fp64, fp32, bf16 or fp16, on the CPU or CUDA.
        passages: [N, D], same device; where dtypes differ, the widest one is taken.
        labels: [M] int64, the passage that is each query's positive. None: passages come in groups
            of N // M per query, positive first.
        temperature: similarities are divided by it; default 0.02.
        scale: 1 / temperature, instead of it. As a tensor of one number, on the CPU or with the
            queries, it receives a gradient.
        normalize: similarities are cosines, else dot products. A zero vector has similarity and
            gradient 0.
        reduction: "mean" (weighted by `weights`), "sum", or "none" for [M].
        weights: [M] >= 0, the importance of each query.
        query_ids, passage_ids: [M] and [N] int64, equal ids being the same text. A passage with the
            text of any positive or exclusion of any query with the text of this one is no negative
            of it. No M x N mask is made of them.
        excluded: (offsets [M + 1], columns) int64. Passages columns[offsets[i] : offsets[i + 1]]
            are no negatives of query i either.
        positives: the same for further positives of query i: distinct, and without its label. The
            loss of a query is the mean over its positives, each against the negatives alone.
        own_negatives: [M, K, D], or [H, D] with own_offsets [M + 1] int64: rows own_offsets[i] :
            own_offsets[i + 1] are negatives of query i and of no other, in query_to_passage.
        curated: [N] int64, the query that a passage was chosen for, or -1. Where labels are None,
            the query of its group. No margin masks it for that query, nor do passages chosen for
            one query repel its positives in passage_to_passage; own negatives are exempt as well.
        false_negative_margin: passages (or queries) more similar than the label minus this are
            left out of the negatives, without gradient through the limit (NV-Retriever, Moreira et
            al. 2024). Similarities are those before the scale. In passage_to_query the limit is
            that of the other query.
        margin_type: "absolute", or "relative": the limit is positive - |positive| * margin.
        guide: (queries [M, G], passages [N, G]) whose similarities decide about the margin, in
            place of those in training (GISTEmbed, Solatorio 2024). They receive no gradient.
        label_smoothing: in [0, 1): this share of the target lies on all candidates alike.
        directions: whose similarities are in the sum: "query_to_passage"; "passage_to_query", of
            the positive to the other queries; "query_to_query"; "passage_to_passage", of the
            positive to all other passages. All four, joint: GTE (Li et al. 2023).
        partition: "joint", one softmax over all directions, in which query_to_passage and
            passage_to_query list the positive once each; or "per_direction", the mean of one loss
            each (with these two: CLIP's).
        matryoshka_dims: the sum of the losses of the first d dims for these d, distinct and of 1 to
            D (Kusupati et al. 2022). A guide is never cut.
        matryoshka_weights: factor of each; default 1.
        gradient_filter: eps > 0 lets the gradient products leave out scores whose gradients are
            small: the gradient of each unit vector is off by at most eps * scale * the weight of
            its softmax. For query_to_passage alone, without further positives, own negatives,
            smoothing or prefixes. 0 is exact; the loss always is.
        workspace_bytes: at most, for the scores of one chunk of queries; default 90 MiB on the CPU,
            256 MiB on CUDA.
        backend: "torch" or "triton"; default triton on CUDA and torch on the CPU and in fp64.
        process_group: of torch.distributed. Each of its ranks scores its own queries against the
            passages of all: the loss is that of one process with all rows in rank order, and
            labels, positives, excluded and curated count in the rank's own rows. Every rank calls
            with the same options and its own rows, few, many or none, and each calls backward or
            none does. reduction "mean": the mean of the ranks' losses is the loss of one process,
            and the mean of their parameter gradients, which DDP takes, its gradient. "sum": their
            sum is. "none": losses of the own queries. Gradients of passages (in query_to_query of
            queries) that others used are summed over the ranks; the scale's is that of the own
            loss. The host waits once, for the ranks' numbers of rows. query_to_query across ranks
            is computed in torch, on CUDA too.
        exchange: "gather" brings all passages to every rank. "ring" passes them on from rank to
            rank, holds those of two ranks at a time, and computes scores twice; in torch, for
            query_to_passage without further positives, own negatives, margin and filter.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). A query without any negative has loss 0 (log 2
        where a joint softmax lists its positive twice).

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    options = InfoNCEOptions(
        normalize, reduction, label_smoothing, directions, partition, false_negative_margin,
        margin_type, matryoshka_dims, matryoshka_weights, gradient_filter, workspace_bytes, backend,
        process_group, exchange,
    )  # fmt: skip
    batch = Batch(
        queries, passages, labels, weights, query_ids, passage_ids, excluded, positives,
        own_negatives, own_offsets, curated, guide,
    )  # fmt: skip
    arguments, weights, of_all = _prepared(batch, temperature, scale, options)
    if of_all is not None and exchange == "ring":
        loss_M = ranks.ring_losses(*arguments, of_all)[0] * weights
        return loss_M if reduction == "none" else loss_M.sum()
    leaves = arguments[:4]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
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
    temperature: float | None = None,
    scale: float | Tensor | None = None,
    **options: Any,
) -> (
    tuple[Tensor, Tensor, Tensor, Tensor, InfoNCEStats]
    | tuple[Tensor, Tensor, Tensor, Tensor, InfoNCEStats, Tensor]
):
    """`info_nce_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        options: all others are those of `info_nce_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, d_queries [M, D], d_passages [N, D], d_scale, stats), gradients in the dtypes of
        their inputs; with own_negatives also d_own_negatives, in their shape. Stats are those of
        the labels, with the most dims, and of a rank's own queries.
    """
    static = {field.name: options.pop(field.name) for field in _STATIC if field.name in options}
    if static.get("reduction") == "none":
        raise ValueError("info_nce_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    batch = Batch(queries, passages, labels, **options)
    # The scale's gradient lies where the scale does: on the CPU the host would wait for it.
    arguments, weights, of_all = _prepared(
        batch, temperature, scale, InfoNCEOptions(**static), scale_on=queries.device
    )
    own = batch.own_negatives
    if of_all is not None and static.get("exchange") == "ring":
        outputs = ranks.ring_grads(*arguments, of_all, weights)
    else:
        outputs = _info_nce_grads(*arguments, weights, [True, True, own is not None, True])
    loss, _, positive_M, hardest_M, dq, dp, d_own, d_scale = outputs
    if of_all is not None and static.get("exchange") != "ring":
        dp = ranks.sum_rows(dp, of_all.passages, of_all.group)
        if len(dq) != len(queries):
            dq = ranks.sum_rows(dq, of_all.queries, of_all.group)
    has_negative_M = hardest_M > -torch.inf
    count = has_negative_M.sum().clamp(min=1)
    stats = InfoNCEStats(
        (positive_M > hardest_M).float().mean(),
        positive_M.mean(),
        hardest_M.masked_fill(~has_negative_M, 0).sum() / count,
    )
    values = loss, dq.to(queries.dtype), dp.to(passages.dtype), d_scale, stats
    return values if own is None else (*values, d_own.to(own.dtype).reshape(own.shape))


class Batch(NamedTuple):
    """The tensors of one batch, as `info_nce_loss` takes them."""

    queries: Tensor
    passages: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None
    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    excluded: tuple[Tensor, Tensor] | None = None
    positives: tuple[Tensor, Tensor] | None = None
    own_negatives: Tensor | None = None
    own_offsets: Tensor | None = None
    curated: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class InfoNCEOptions:
    """What stays from batch to batch, as `info_nce_loss` takes it; wrong values are named when it
    is made."""

    normalize: bool = True
    reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    directions: Sequence[Direction] = (QP,)
    partition: str = "joint"
    false_negative_margin: float | None = None
    margin_type: str = "absolute"
    matryoshka_dims: Sequence[int] | None = None
    matryoshka_weights: Sequence[float] | None = None
    gradient_filter: float = 0.0
    workspace_bytes: int | None = None
    backend: str | None = None
    process_group: ProcessGroup | None = None
    exchange: str = "gather"

    def __post_init__(self):
        one_of = {
            "reduction": ("mean", "sum", "none"),
            "partition": ("joint", "per_direction"),
            "margin_type": ("absolute", "relative"),
            "backend": (None, "torch", "triton"),
            "exchange": ("gather", "ring"),
        }
        for name, allowed in one_of.items():
            if getattr(self, name) not in allowed:
                names = ", ".join([repr(value) for value in allowed])
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise ValueError(f"workspace_bytes must be an integer, got {self.workspace_bytes!r}")
        if self.exchange == "ring" and self.process_group is None:
            raise ValueError("exchange='ring' is given without process_group")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        for name in ("false_negative_margin", "gradient_filter"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        directions = list(self.directions)
        known = all(direction in DIRECTIONS for direction in directions)
        if not directions or not known or len(set(directions)) < len(directions):
            raise ValueError(
                f"directions must be distinct and of {', '.join(DIRECTIONS)}, got {self.directions}"
            )
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None and weights is not None:
            raise ValueError(f"matryoshka_weights {weights} are given without matryoshka_dims")
        if dims is None:
            return
        if not len(dims) or len(set(dims)) < len(dims) or min(dims) < 1:
            raise ValueError(f"matryoshka_dims must be distinct and of 1 to D, got {dims}")
        if weights is None:
            return
        if len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights must be one for each of the {len(dims)} matryoshka_dims, got "
                f"{len(weights)}"
            )
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"matryoshka_weights must be >= 0 and finite, got {weights}")

    def settings(self, device_type: str) -> Settings:
        dims = () if self.matryoshka_dims is None else list(self.matryoshka_dims)
        weights = [1.0] * len(dims) if self.matryoshka_weights is None else self.matryoshka_weights
        ascending = sorted(dims)
        margin, workspace_bytes = self.false_negative_margin, self.workspace_bytes
        return Settings(
            normalize=bool(self.normalize),
            workspace_bytes=(
                DEFAULT_WORKSPACE[device_type] if workspace_bytes is None else workspace_bytes
            ),
            directions=tuple([name for name in DIRECTIONS if name in self.directions]),
            joint=self.partition == "joint",
            label_smoothing=float(self.label_smoothing),
            margin=None if margin is None else float(margin),
            relative_margin=self.margin_type == "relative",
            dims=tuple(ascending),
            dim_weights=tuple([float(weights[dims.index(prefix)]) for prefix in ascending]),
            gradient_filter=float(self.gradient_filter),
            backend=self.backend,
        )


_STATIC = fields(InfoNCEOptions)


def _prepared(
    batch: Batch, temperature: float | None, scale: float | Tensor | None, options: InfoNCEOptions,
    scale_on: torch.device | str = "cpu",
) -> tuple[tuple, Tensor, ranks.Ranks | None]:  # fmt: skip
    """`_arguments`, with the passages of all ranks where there are several."""
    group = options.process_group
    if not ranks.several(group):
        return *_arguments(batch, temperature, scale, options, scale_on), None

    ring, across = options.exchange == "ring", QQ in options.directions

    def prepare() -> ranks.Local:
        of_sum = replace(options, reduction="sum")
        arguments, weights = _arguments(batch, temperature, scale, of_sum, scale_on)
        q, p, own, number, relations, text = arguments
        relations, settings = Relations(*relations), Settings.parse(text)
        _check_values(relations, len(p), 0 if own is None else len(own))
        if ring:
            _check_ring(relations, settings)
        if across and options.backend == "triton":
            raise ValueError(f"backend='triton' has no {QQ} across ranks: leave it out, or 'torch'")
        terms = {field.name: getattr(options, field.name) for field in _STATIC} | {
            "process_group": None,
            "temperature": temperature,
            "scale": "a tensor" if isinstance(scale, Tensor) else scale,
            "whether there are gradients": torch.is_grad_enabled()
            and any(x.requires_grad for x in (q, p, own, number) if x is not None),
        }
        return ranks.Local(q, p, relations, weights, terms, (own, number, settings))

    local, of_all = ranks.spread(
        group, batch.queries.device, prepare, options.reduction, all_queries=across,
        all_passages=not ring,
    )  # fmt: skip
    q, p, relations, weights, _, (own, scale, settings) = local
    most = max(of_all.passages) if ring else len(p)
    _check_workspace(settings, most, compute_dtype(q.dtype))
    own_queries = of_all.own(of_all.queries)
    settings = replace(
        settings,
        group=group.group_name if PQ in settings.directions else None,
        window=(own_queries.start, own_queries.stop) if across else None,
    )
    return (q, p, own, scale, list(relations), _text(settings)), weights, of_all


def _arguments(
    batch: Batch, temperature: float | None, scale: float | Tensor | None, options: InfoNCEOptions,
    scale_on: torch.device | str = "cpu",
) -> tuple[tuple, Tensor]:  # fmt: skip
    """The ops' arguments and the row weights."""
    q, p, own, relations, settings, weights = _checked(batch, options)
    scale = _scale(temperature, scale, scale_on, q.device)
    return (q, p, own, scale, list(relations), _text(settings)), weights


def _checked(
    batch: Batch, options: InfoNCEOptions, judge: str = "guide"
) -> tuple[Tensor, Tensor, Tensor | None, Relations, Settings, Tensor]:
    """(q, p, own, relations, settings, row weights): everything that can be told without looking at
    values on a device. `judge` is what the batch's guide is called."""
    M, N, device = _check_embeddings(batch, options, judge)
    settings = options.settings(device.type)
    embeddings = (batch.queries, batch.passages, batch.own_negatives)
    dtypes = [x.dtype for x in embeddings if x is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    _check_workspace(settings, N, compute_dtype(dtype))
    own, own_offsets = _own_negatives(batch, settings)
    labels, curated = batch.labels, batch.curated
    if labels is None:
        if M and (N < M or N % M):
            raise ValueError(
                f"without labels, passages must come in equal groups per query, positive first: "
                f"{N} passages do not divide by {M} queries"
            )
        group = N // max(M, 1)
        labels = torch.arange(0, M * group, max(group, 1), device=device)
        if curated is None and M and (settings.margin is not None or PP in settings.directions):
            curated = torch.arange(N, device=device) // group
    relations = Relations(
        labels, *(batch.positives or (None, None)), batch.query_ids, batch.passage_ids,
        *(batch.excluded or (None, None)), own_offsets, curated,
        *_guide(batch.guide, dtype),
    )  # fmt: skip
    if settings.gradient_filter and not is_plain(relations, settings):
        raise ValueError(
            "gradient_filter goes with query_to_passage alone, without positives, own_negatives, "
            "label_smoothing or matryoshka_dims"
        )
    _check_integers(relations, M, N, device)
    if device.type == "cuda" and not ranks.several(options.process_group):
        _assert_in_range(relations, batch.labels is not None, N)
    q, p, own = (x if x is None else x.to(dtype) for x in (batch.queries, batch.passages, own))
    weights = uniform_weight(M, options.reduction)
    if batch.weights is not None:
        weights = row_weights(q, batch.weights, M, options.reduction)
    return q, p, own, relations, settings, weights


def _check_ring(relations: Relations, settings: Settings) -> None:
    unlike = (relations.positive_offsets, relations.own_offsets, settings.margin)
    if (
        settings.directions != (QP,)
        or any(x is not None for x in unlike)
        or settings.gradient_filter
        or settings.backend == "triton"
    ):
        raise ValueError(
            "exchange='ring' goes with query_to_passage alone, without positives, own_negatives, "
            "false_negative_margin, gradient_filter and backend='triton'"
        )


def _check_workspace(settings: Settings, N: int, dtype: torch.dtype) -> None:
    if settings.workspace_bytes < (row_bytes := N * dtype.itemsize):
        raise ValueError(
            f"workspace_bytes={settings.workspace_bytes} is too small for one row of {N} passages: "
            f"it takes {row_bytes}"
        )


def _check_embeddings(
    batch: Batch, options: InfoNCEOptions, judge: str
) -> tuple[int, int, torch.device]:
    queries, passages = batch.queries, batch.passages
    if queries.dim() != 2 or passages.dim() != 2:
        raise ValueError(
            f"queries and passages must be [M, D] and [N, D], got {tuple(queries.shape)} and "
            f"{tuple(passages.shape)}"
        )
    (M, D), N, device = queries.shape, passages.shape[0], queries.device
    if passages.shape[1] != D:
        raise ValueError(f"queries have D={D} but passages have D={passages.shape[1]}")
    if device.type not in DEFAULT_WORKSPACE:
        raise ValueError(f"embeddings are on {device}: the losses run on cpu and cuda")
    others = {"passages": passages, "own_negatives": batch.own_negatives}
    if batch.guide is not None:
        others[f"{judge} queries"], others[f"{judge} passages"] = guide = batch.guide
        if judge == "guide" and options.false_negative_margin is None:
            raise ValueError("guide decides about the false_negative_margin, which is not given")
        if [x.dim() for x in guide] != [2, 2] or [len(x) for x in guide] != [M, N]:
            raise ValueError(
                f"{judge} must be [{M}, G] and [{N}, G], got {tuple(guide[0].shape)} and "
                f"{tuple(guide[1].shape)}"
            )
        if guide[0].shape[1] != guide[1].shape[1]:
            raise ValueError(
                f"{judge} queries have G={guide[0].shape[1]} but {judge} passages have "
                f"G={guide[1].shape[1]}"
            )
    for name, tensor in {"queries": queries, **others}.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"queries are on {device} but {name} are on {tensor.device}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp64, fp32, bf16 or fp16, got {tensor.dtype}")
        if tensor.shape[-1:] == (0,):
            raise ValueError(f"{name} have no dims: {tuple(tensor.shape)}")
    if options.matryoshka_dims is not None and max(options.matryoshka_dims) > D:
        raise ValueError(
            f"matryoshka_dims must be distinct and of 1 to D={D}, got {options.matryoshka_dims}"
        )
    return M, N, device


def _guide(guide: tuple[Tensor, Tensor] | None, embeddings: torch.dtype) -> list[Tensor]:
    """In one dtype, above fp32 only where the embeddings are."""
    if guide is None:
        return []
    dtype = torch.promote_types(*[x.dtype for x in guide])
    if dtype == torch.float64:
        dtype = compute_dtype(embeddings)
    return [x.detach().to(dtype) for x in guide]


def _own_negatives(batch: Batch, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
    """(own [H, D], offsets [M + 1])."""
    (M, D), own, offsets = batch.queries.shape, batch.own_negatives, batch.own_offsets
    if own is None:
        if offsets is not None:
            raise ValueError("own_offsets are given without own_negatives")
        return None, None
    if QP not in settings.directions:
        raise ValueError(
            f"own_negatives belong to {QP}, which is not among directions={settings.directions}"
        )
    shape = tuple(own.shape)
    if own.dim() == 2 and shape[1] == D:
        if offsets is None:
            raise ValueError(f"own_negatives [H, D]={shape} need own_offsets [{M + 1}]")
        return own, offsets
    if own.dim() == 3 and (shape[0], shape[2]) == (M, D):
        if offsets is not None:
            raise ValueError(
                f"own_offsets belong to own_negatives [H, D], not to [M, K, D]={shape}"
            )
        K = own.shape[1]
        return own.reshape(M * K, D), torch.arange(M + 1, device=own.device) * K
    raise ValueError(f"own_negatives must be [{M}, K, {D}] or [H, {D}], got {shape}")


def _check_integers(relations: Relations, M: int, N: int, device: torch.device) -> None:
    (
        labels, positive_offsets, positive_columns, query_ids, passage_ids,
        excluded_offsets, excluded_columns, own_offsets, curated, *_,
    ) = relations  # fmt: skip
    for name, tensor, length in (
        ("labels", labels, M),
        ("query_ids", query_ids, M),
        ("passage_ids", passage_ids, N),
        ("curated", curated, N),
        ("excluded offsets", excluded_offsets, M + 1),
        ("excluded columns", excluded_columns, None),
        ("positives offsets", positive_offsets, M + 1),
        ("positives columns", positive_columns, None),
        ("own_offsets", own_offsets, M + 1),
    ):
        if tensor is None:
            continue
        shape = (tensor.numel() if length is None else length,)
        if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != device:
            raise ValueError(
                f"{name} must be int64 {list(shape)} on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def _check_values(relations: Relations, N: int, H: int) -> None:
    """What only the values tell, for tensors on the CPU, where looking at them costs no sync."""
    M = len(relations.labels_M)
    _check_range("labels", relations.labels_M, 0, N, "passages")
    if relations.curated_N is not None:
        _check_range("curated", relations.curated_N, -1, M, "queries")
    for name, offsets, columns in (
        ("excluded", relations.excluded_offsets, relations.excluded_columns),
        ("positives", relations.positive_offsets, relations.positive_columns),
    ):
        if offsets is not None:
            _check_range(f"{name} columns", columns, 0, N, "passages")
            _check_offsets(f"{name} offsets", offsets, len(columns), "columns")
    if relations.own_offsets is not None:
        _check_offsets("own_offsets", relations.own_offsets, H, "own_negatives")
    if relations.positive_offsets is not None:
        rows_P, columns_P, _ = positive_pairs(relations, torch.float32)
        keys, counts = (rows_P * N + columns_P).unique(return_counts=True)
        if (counts > 1).any():
            i, a = divmod(keys[counts > 1][0].item(), N)
            raise ValueError(
                f"positives must be distinct and without the label: query {i} has passage {a} twice"
            )


def _check_range(name: str, values: Tensor, low: int, stop: int, what: str) -> None:
    if not values.numel():
        return
    least, most = (x.item() for x in values.aminmax())
    if least < low or most >= stop:
        raise ValueError(f"{name} lie in [{least}, {most}] but there are {stop} {what}")


def _check_offsets(name: str, offsets: Tensor, length: int, what: str) -> None:
    if offsets[0] != 0 or offsets[-1] != length or (offsets.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to the {length} {what}, got "
            f"{offsets[0].item()} ... {offsets[-1].item()}"
        )


def _assert_in_range(relations: Relations, labels_given: bool, N: int) -> None:
    """The same for columns on CUDA, where asking would cost a sync: the device asserts."""
    columns = [relations.labels_M] if labels_given else []
    columns += [relations.positive_columns, relations.excluded_columns]
    for column in columns:
        if column is not None:
            torch._assert_async(((column >= 0) & (column < N)).all(), f"not all columns < {N}")
    if relations.own_offsets is not None:
        torch._assert_async(relations.own_offsets[0] == 0, "own_offsets do not start at 0")
    if relations.positive_offsets is not None:
        rows_P, columns_P, _ = positive_pairs(relations, torch.float32)
        keys = (rows_P * N + columns_P).sort().values
        torch._assert_async((keys[1:] > keys[:-1]).all(), "positives repeat, or hold the label")


def _scale(
    temperature: float | None, scale: float | Tensor | None, scale_on: torch.device | str,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """The scale as a tensor: the caller's, or a new one on `scale_on`."""
    if temperature is not None and scale is not None:
        raise ValueError(f"give temperature or scale, not both (got {temperature} and {scale})")
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"scale must be one number, got a tensor of shape {tuple(scale.shape)}"
            )
        if not scale.is_floating_point():
            raise ValueError(f"scale must be floating point, got a tensor of {scale.dtype}")
        if scale.device.type != "cpu" and scale.device != device:
            raise ValueError(
                f"scale must be on the CPU or with the queries on {device}, got {scale.device}"
            )
        return scale.reshape(())
    name, value = ("scale", scale) if scale is not None else ("temperature", temperature)
    value = 0.02 if value is None else value
    if isinstance(value, Tensor):
        raise ValueError(
            "temperature must be a number; a tensor goes in as scale = 1 / temperature"
        )
    if not 0 < value < math.inf or not 0 < 1 / value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    # fp64: the ops cast it once, to the dtype they compute in
    value = value if name == "scale" else 1 / value
    return torch.full((), value, dtype=torch.float64, device=scale_on)


def _text(settings: Settings) -> str:
    """`Settings.text()` in steps that torch.compile can trace, which json's encoder is not."""
    items = [f'"{name}": {_json(value)}' for name, value in asdict(settings).items()]
    return "{" + ", ".join(items) + "}"


def _json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(element) for element in value]) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"
