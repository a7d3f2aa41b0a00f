"""InfoNCE with in-batch negatives.

    loss_i = log(1 + sum over negatives j of exp(s_ij - s_i,label)) = softplus(lse_i - s_i,label),
    s = scale * cos(q, p)

The softplus form keeps its digits where training has converged; cross entropy's lse - s loses all
of them there. With more directions, further positives, own negatives or prefixes it is the same
sum over more negatives: see `rankpo_kernels.objective`.
M queries, N passages, H own negatives, P positive pairs, D dims, G dims of a guide. The M x N
scores are never stored: the launchers walk chunks of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankpo_fast.ops.checks import (
    as_scale,
    check_embeddings,
    check_precision,
    check_relations,
    check_sides,
    check_values,
    check_workspace,
    group_labels,
    group_owners,
    guide_sides,
    in_one_dtype,
    known_definition,
    own_negatives,
    relations_of,
    takes_triton,
    widest_dtype,
)
from rankpo_fast.ops.common import (
    LossAndGrads,
    batch_weights,
    called,
    crossing,
    in_own_memory,
    loss_op,
    mean,
    register_gradients,
    unit_rows,
    weighted_sum,
)
from rankpo_fast.ops.options import InfoNCECall, takes
from rankpo_fast.ops.ranks import (
    across_ranks,
    ring_grads,
    ring_losses,
)
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.objective import limits, softplus
from rankpo_kernels.problem import (
    HARD,
    PP,
    PQ,
    QP,
    QQ,
    InfoNCEProblem,
    InfoNCEResult,
    InfoNCESettings,
    compute_dtype,
    gradient_dtype,
    is_plain,
)
from rankpo_kernels.relations import APART, Relations, expand, positive_pairs


def info_nce_definition(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor | float, relations: Relations,
    settings: InfoNCESettings, own_HD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Losses [M]: what the ops must equal. Stores M x N: for tests and debugging."""
    M, labels_M, owner_N = len(q_MD), relations.labels_M, relations.curated_N
    i_P, a_P, share_P = positive_pairs(relations, q_MD.dtype)
    known_MN = known_definition(relations, len(p_ND))
    mine_MN = torch.zeros_like(known_MN)  # curated for this query
    if owner_N is not None:
        mine_MN = owner_N == torch.arange(M, device=q_MD.device)[:, None]
    smooth, loss_M = settings.label_smoothing, q_MD.new_zeros(M)
    chosen, other = settings.hardness
    apart_MN = mine_MN if owner_N is None else mine_MN | (owner_N == APART)
    for prefix, weight in settings.levels(q_MD.shape[1]):
        unit = unit_rows if settings.normalize else Tensor.clone
        q, p = unit(q_MD[:, :prefix]), unit(p_ND[:, :prefix])
        blocks = {  # similarities of every pair's query or positive, and who is no negative there
            QP: (q @ p.T, known_MN), QQ: (q @ q.T, known_MN[:, labels_M]),
            PP: ((p @ p.T)[a_P], (known_MN | apart_MN)[i_P]),
        }  # fmt: skip
        if settings.false_negative_margin is not None:
            judge = (q, p) if relations.guide is None else map(unit, relations.guide)
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
        s_MN, masked_MN = blocks[QP][0].detach(), blocks[QP][1]
        hardness_MN = torch.where(mine_MN, chosen * s_MN, other * s_MN)
        hardness_PN = hardness_MN.masked_fill(masked_MN, 0)[i_P]
        if own_HD is not None:
            assert relations.own_offsets is not None
            owner_H = expand(relations.own_offsets.diff(), len(own_HD))
            own_PH, others_PH = (q @ unit(own_HD[:, :prefix]).T)[i_P], owner_H != i_P[:, None]
            hardness_PH = (chosen * own_PH.detach()).masked_fill(others_PH, 0)
            hardness_PN = torch.cat([hardness_PN, hardness_PH], 1)
            own_PH = (scale * own_PH).masked_fill(others_PH, -torch.inf)
            of_pairs[QP] = torch.cat([of_pairs[QP], own_PH], 1)
        hardened = of_pairs | {QP: of_pairs[QP] + hardness_PN}
        parts = [settings.directions] if settings.joint else [(d,) for d in settings.directions]
        for part in parts:
            copies = max(1, sum(d in (QP, PQ) for d in part))  # of the positive
            negatives = torch.cat([of_pairs[d] for d in part], 1)
            positive_P1 = s_P[:, None].expand(-1, copies)
            lse_P = torch.cat([hardened[d] for d in part], 1).logsumexp(1)
            gap_P = lse_P - positive_P1.logsumexp(1)
            loss_P = softplus(gap_P) + math.log(copies)
            if smooth:
                candidates = torch.cat([positive_P1, negatives], 1)
                count_P = candidates.isfinite().sum(1)
                mean_P = candidates.masked_fill(candidates == -torch.inf, 0).sum(1) / count_P
                loss_P = loss_P + smooth * (s_P - mean_P)
            loss_M = loss_M.index_add(0, i_P, weight * share_P * loss_P / len(parts))
    return loss_M


@loss_op("info_nce")
def _info_nce(
    q: Tensor, p: Tensor, own: Tensor | None, scale: Tensor,
    relations: list[Tensor | None], settings: str,
) -> Tensor:  # fmt: skip
    """Losses [M] in 2MND flops; their backward recomputes the scores (8MND in all)."""
    return in_own_memory(_launch(q, p, own, scale, relations, settings).loss_M)[0]


@loss_op("info_nce_grads")
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
    made = (result.dq_MD, result.dp_ND, result.d_own_HD, result.d_scale)
    grads = [
        empty if grad is None else grad.to(empty.device)
        for grad, empty in zip(made, _no_grads(q, scale), strict=True)
    ]
    total = result.total
    if total is None:
        if weights.dim():  # else it is a number for the kernel; a copy would make the host wait
            weights = weights.to(q.device, result.loss_M.dtype)
        total = (weights * result.loss_M).sum()
    rows = in_own_memory(result.loss_M, result.positive_M, result.hardest_M)
    (loss_M, positive_M, hardest_M), (dq, dp, d_own, d_scale) = rows, grads
    return total, loss_M, positive_M, hardest_M, dq, dp, d_own, d_scale


def _launch(
    q: Tensor, p: Tensor, own: Tensor | None, scale: Tensor, relations: list[Tensor | None],
    settings: str, weights: Tensor | None = None, needs: Sequence[bool] = (False,) * 4,
) -> InfoNCEResult:  # fmt: skip
    problem = InfoNCEProblem(
        q, p, own, scale, Relations._make(relations), InfoNCESettings.parse(settings)
    )
    if q.device.type == "cpu":
        own_rows = problem.relations.rows(problem.settings.window)
        check_values(own_rows, len(p), 0 if own is None else len(own))
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        return launcher_of(problem)(problem, weights, needs)


def launcher_of(problem: InfoNCEProblem) -> Callable[..., InfoNCEResult]:
    q, settings = problem.q_MD, problem.settings
    # The kernels have no queries besides those with a loss, and a rank without queries takes part
    # in the collectives.
    alone = settings.window is None and (settings.group is None or len(q))
    if not alone or not takes_triton(q, settings):
        return chunked.info_nce
    from rankpo_kernels.triton import info_nce as triton  # Linux alone has it

    return triton.info_nce


def _no_grads(q: Tensor, scale: Tensor) -> list[Tensor]:
    """Empty tensors of the gradients' dtypes and devices; a scale may live on the CPU."""
    embeddings = [q.new_empty(0, dtype=gradient_dtype(q.dtype)) for _ in range(3)]
    return [*embeddings, scale.new_empty(0, dtype=compute_dtype(q.dtype))]


@_info_nce.register_fake
def _(q: Tensor, p: Tensor, own: Any, scale: Tensor, relations: Any, settings: str) -> Tensor:
    return q.new_empty(_losses(q, settings), dtype=compute_dtype(q.dtype))


def _losses(q: Tensor, settings: str) -> int:
    window = InfoNCESettings.parse(settings).window
    return q.shape[0] if window is None else window[1] - window[0]


@_info_nce_grads.register_fake
def _(
    q: Tensor, p: Tensor, own: Tensor | None, scale: Tensor, relations: list, settings: str,
    weights: Tensor, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, M = compute_dtype(q.dtype), _losses(q, settings)
    rows = [q.new_empty(M, dtype=dtype) for _ in range(3)]
    shapes = (q.shape, p.shape, own.shape if own is not None else (0,), ())
    grads = [
        empty.new_empty(shape) if need else empty
        for empty, shape, need in zip(_no_grads(q, scale), shapes, needs, strict=True)
    ]
    return rows[0].new_empty(()), *rows, *grads


register_gradients(_info_nce, _info_nce_grads)


@takes(InfoNCECall)
def info_nce_loss(call: InfoNCECall) -> Tensor:
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
        curated: [N] int64, the query that a passage was chosen for, or -1; or -2 for none, and it
            stands in no sum of passage_to_passage, for any query. Where labels are None, the query
            of its group. No margin masks it for that query, nor do passages chosen for one query
            repel its positives in passage_to_passage; own negatives are exempt as well.
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
        hardness_mode: which negatives of query_to_passage weigh the more the more similar they are
            (Lan et al. 2025, eq. 5): "in_batch_negatives", those that were not chosen for the
            query; "hard_negatives", those that were (curated, own_negatives); "all_negatives".
        hardness_strength: > 0. That times their similarity, without its gradient, is added to their
            logits in the softmax; what label_smoothing adds is as without it.
        gradient_filter: in [0, 1): the gradient products may leave out the queries with the least
            to learn. Their pulls, weight * (1 - the positive's share of the softmax), sum to at
            most this share of all pulls, and so do the norms of what the gradients of the unit
            vectors lose: those of queries and those of passages to at most 2 * gradient_filter *
            scale * the sum of all pulls each. 2**-8 is how bf16 rounds; at least eps / 2 of the
            dtype. Loss and the gradient of the scale stay exact. For query_to_passage alone,
            without further positives, own negatives, smoothing or prefixes; in fp64, and in
            torch on CUDA, nothing is left out.
        workspace_bytes: at most, for scores that are there at once; default 90 MiB on the CPU
            (256 MiB in both directions, where it spares a product to keep them), 256 MiB on CUDA,
            1 GiB on GPUs of 80 GB and more.
        backend: "torch" or "triton"; default triton on CUDA and torch on the CPU and in fp64.
        precision: of products in Triton. "exact": fp32 on the plain cores, 16 bits on tensor cores.
            "tf32x3", of fp32: as three products of tf32, of a large and a small part each, which
            are several times as fast; the error stays within what is asked of fp32, by a model of
            how tensor cores round that no GPU has been held against yet. "fp8", of cosines of bf16:
            those of negatives come from e4m3, each about 0.05 / sqrt(D) off; gradients are
            multiplied in bf16.
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
            query_to_passage without further positives, own negatives, margin, hardness, filter and
            precision.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). A query without any negative has loss 0 (log 2
        where a joint softmax lists its positive twice).

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    part = across_ranks(call, check_info_nce)
    problem, weights, leaves = part.problem, part.weights_M, part.problem.leaves
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    if part.ring or call.reduction == "none" or not any(needs):
        if part.ring:
            loss_M = ring_losses(part)[0]
        elif any(needs):
            loss_M = _info_nce(*crossing(problem))
        else:
            loss_M = called(_info_nce, *crossing(problem))
        loss_M = loss_M * weights
        return loss_M if call.reduction == "none" else loss_M.sum()
    return weighted_sum(_info_nce_grads, problem, weights, needs)


class InfoNCEStats(NamedTuple):
    """What a training log wants to know of a batch; tensors on its device, no host sync. Of no
    queries all are 0."""

    accuracy: Tensor  # share of queries whose positive beats every negative
    positive_similarity: Tensor  # mean over queries
    hardest_negative_similarity: Tensor  # mean over the queries that have a negative


class InfoNCEGrads(NamedTuple):
    queries: Tensor  # [M, D]
    passages: Tensor  # [N, D]
    own_negatives: Tensor | None  # in their shape; None where none were given
    scale: Tensor  # 0-dim, with the queries unless it was given on the CPU


@takes(InfoNCECall)
@torch.no_grad()
def info_nce_loss_and_grads(call: InfoNCECall) -> LossAndGrads[InfoNCEGrads, InfoNCEStats]:
    """`info_nce_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        All are those of `info_nce_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, grads, stats): `InfoNCEGrads` in the dtypes of their inputs, and `InfoNCEStats` of
        the labels, with the most dims, and of a rank's own queries.
    """
    # The scale's gradient lies where the scale does: on the CPU the host would wait for it.
    check = partial(check_info_nce, scale_on=call.queries.device)
    part, own = across_ranks(call, check), call.own_negatives
    if call.reduction == "none":  # told after the ranks have agreed on it
        raise ValueError("info_nce_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    needs = [True, True, own is not None, True]
    loss, _, positive_M, hardest_M, dq, dp, d_own, d_scale = (
        ring_grads(part)
        if part.ring
        else called(_info_nce_grads, *crossing(part.problem), part.weights_M, needs)
    )
    dq, dp = part.home(dq, dp)
    has_negative_M = hardest_M > -torch.inf
    stats = InfoNCEStats(
        mean((positive_M > hardest_M).float()),
        mean(positive_M),
        hardest_M.masked_fill(~has_negative_M, 0).sum() / has_negative_M.sum().clamp(min=1),
    )
    grads = InfoNCEGrads(
        dq.to(call.queries.dtype),
        dp.to(call.passages.dtype),
        None if own is None else d_own.to(own.dtype).reshape(own.shape),
        d_scale,
    )
    return LossAndGrads(loss, grads, stats)


def check_info_nce(
    call: InfoNCECall, scale_on: torch.device | str = "cpu"
) -> tuple[InfoNCEProblem, Tensor]:
    """The problem and the weights of its rows. Refused is what can be told without looking at
    values on a device. `scale_on`: where a scale that is a number becomes a tensor."""
    check_sides(call)
    (M, D), N, device = call.queries.shape, len(call.passages), call.queries.device
    if call.guide is not None and call.false_negative_margin is None:
        raise ValueError("guide decides about the false_negative_margin, which is not given")
    embeddings = {
        "queries": call.queries, "passages": call.passages, "own_negatives": call.own_negatives,
    }  # fmt: skip
    check_embeddings(embeddings | guide_sides("guide", call.guide, M, N))
    if call.matryoshka_dims is not None and max(call.matryoshka_dims) > D:
        raise ValueError(
            f"matryoshka_dims must be distinct and of 1 to D={D}, got {call.matryoshka_dims}"
        )
    dtype = widest_dtype(embeddings.values())
    q, p = call.queries.to(dtype), call.passages.to(dtype)
    check_workspace(call, N, q)
    check_precision(call, q)
    own, own_offsets = own_negatives(call)

    labels, curated = call.labels, call.curated
    if labels is None:
        labels, group = group_labels(M, N, device)
        curated = group_owners(call, group) if curated is None else curated
    none_chosen = own is None and (curated is None or (call.curated is None and N == M))
    if call.hardness_mode == HARD and M and none_chosen:
        raise ValueError(
            "hardness_mode='hard_negatives' finds none: give curated, own_negatives, or (without "
            "labels) more than one passage per query"
        )
    positive_offsets, positive_columns = call.positives or (None, None)
    relations = relations_of(
        call, labels, in_one_dtype(call.guide, dtype), positive_offsets=positive_offsets,
        positive_columns=positive_columns, own_offsets=own_offsets, curated_N=curated,
    )  # fmt: skip
    settings = InfoNCESettings.of(call, group=None, window=None)
    if settings.gradient_filter:
        if not is_plain(relations, settings):
            raise ValueError("gradient_filter goes with no positives and no own_negatives")
        if settings.gradient_filter < (least := torch.finfo(dtype).eps / 2):
            raise ValueError(
                f"gradient_filter must be 0, or at least {least:.2g}, which {dtype} can tell, got "
                f"{settings.gradient_filter}"
            )
    check_relations(relations, call)
    weights = batch_weights(q, call.weights, call.reduction)
    scale = as_scale(call.temperature, call.scale, scale_on, device)
    own = None if own is None else own.to(dtype)
    return InfoNCEProblem(q, p, own, scale, relations, settings), weights
