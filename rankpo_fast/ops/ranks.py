"""Negatives across ranks: a rank scores its own queries against the passages of all ranks.

    sum   loss_r = sum of its w_i loss_i            sum of loss_r over ranks  = loss of one process
    mean  loss_r = W sum of its w_i loss_i / sum w  mean of loss_r over ranks = loss of one process

So each rank calls backward on its own loss; gradients of rows that it gave to others come back
summed over the ranks, and what DDP averages (mean) or sums is the gradient of one process.
Collectives stand outside the ops, but for the sums over columns that passage_to_query needs between
its passes (`rankpo_kernels.objective`). M queries, N passages of a rank, K keys, W ranks.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankpo_fast.ops.common import Reduction
from rankpo_kernels.norms import compute_dtype
from rankpo_kernels.objective import Relations, Settings, listed
from rankpo_kernels.ring import Ring

# its name from torch 2.13 on, and before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# torch.compiler.disable without its import of dynamo, and of triton with it, at once
_uncompiled = torch._disable_dynamo
TERMS = 32  # places for what must be equal on all ranks


class Local(NamedTuple):
    """The checked arguments of a loss: a rank's own, or with the passages of all."""

    q: Tensor
    p: Tensor
    relations: Relations
    weights_M: Tensor  # [M], or [] for all; a rank brings those of a sum
    terms: dict[str, Any]  # by name, what must be the same on all ranks besides
    reduction: Reduction
    all_queries: bool = False  # whether the loss needs those of all ranks, with labels and guide
    all_passages: bool = True
    rest: Any = None
    apart: bool = False  # whether it needs to know which passages of others are APART


@dataclass(frozen=True)
class Ranks:
    """How many rows each rank has."""

    group: dist.ProcessGroup
    queries: list[int]
    passages: list[int]
    keys: list[int]  # what it tells of its queries' texts
    weight: float  # of the queries of all ranks

    def own(self, counts: Sequence[int]) -> slice:
        """Where this rank's rows stand among those of all."""
        start = sum(counts[: self.group.rank()])
        return slice(start, start + counts[self.group.rank()])


def several(group: dist.ProcessGroup | None) -> bool:
    """Whether there is anyone to talk to."""
    if group is None:
        return False
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"process_group must be one that this rank is in, got {group!r}")
    return group.size() > 1


@_uncompiled
def spread(
    group: dist.ProcessGroup, device: torch.device, prepare: Callable[[], Local]
) -> tuple[Local, Ranks]:
    """What `prepare` returns, with relations to the passages of all ranks, the rows of others that
    it asks for, and the weights of the reduction. What can be refused is refused in `prepare`.

    No collective is overlapped: what needs no passages yet are a few sorts of integers.
    """
    local, ranks = agree(group, device, prepare)
    q, p, relations, weights_M = local[:4]
    relations = relations_of_all(relations, ranks, all_queries=local.all_queries, apart=local.apart)
    if local.all_passages:
        p = gather_rows(p, ranks.passages, group)
    if local.all_queries:
        q = gather_rows(q, ranks.queries, group)
    if local.reduction == "mean":  # so that the mean over ranks is the mean over all queries
        weights_M = weights_M * (group.size() / ranks.weight if ranks.weight else 0.0)
    return Local(q, p, relations, weights_M, *local[4:]), ranks


def agree(
    group: dist.ProcessGroup, device: torch.device, prepare: Callable[[], Local]
) -> tuple[Local, Ranks]:
    """What `prepare` returns and the rows of all ranks; or an error on every rank, where one
    refuses its arguments or they do not go together. The host waits for one small collective."""
    local, refusal = None, None
    numbers, names = torch.zeros(5 + TERMS, dtype=torch.int64), ()
    try:
        local = prepare()
        q, p, relations = local[:3]
        names, values = zip(*(_terms(local) | local.terms).items(), strict=True)
        digests = [zlib.crc32(repr(value).encode()) for value in values]
        rows = len(q), len(p), key_count(relations)
        numbers[1 : 4 + len(digests)] = torch.tensor([*rows, *digests])
        weight = local.weights_M.expand(len(q)).sum(dtype=torch.float64).view(torch.int64)
    except Exception as error:  # raised below: the others, who wait, are told first
        refusal = error
    numbers[0] = refusal is None
    numbers = numbers.to(device)
    if refusal is None:
        numbers[-1] = weight
    table = _gathered(numbers[None], [1] * group.size(), group).cpu()
    if refusal is not None:
        raise refusal
    accepted, *columns = table.T.tolist()
    if not all(accepted):
        refused = [rank for rank, yes in enumerate(accepted) if not yes]
        raise ValueError(f"arguments were refused on ranks {refused} of the process_group")
    for name, value, digests in zip(names, values, columns[3:], strict=False):
        if len(set(digests)) > 1:
            unlike = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise ValueError(
                f"{name} must be the same on all ranks: those of ranks {unlike} and rank 0 differ; "
                f"rank {group.rank()} has {value!r}"
            )
    total = table[:, -1].clone().view(torch.float64).sum().item()
    return local, Ranks(group, *columns[:3], total)


def _terms(local: Local) -> dict[str, Any]:
    q, p, relations = local[:3]
    guide = relations.guide_passages
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (q, p)]
    return {
        "D": q.shape[1],
        "dtype": q.dtype,
        "requires_grad of queries and passages": needs,  # who gives none would not be there
        "whether query_ids are given": relations.query_ids_M is not None,
        "whether passage_ids are given": relations.passage_ids_N is not None,
        "the guide or reference": None if guide is None else (guide.shape[1], guide.dtype),
    }


def gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, counts[rank] of each, in their order; gradients come back summed."""
    return _GatherRows.apply(x, counts, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.group = counts, group
        return _gathered(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return sum_rows(grad, ctx.counts, ctx.group), None, None


def _gathered(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    most = max(counts)
    if len(x) < most:
        x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    out = x.new_empty(len(counts) * most, *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    if min(counts) == most:
        return out
    return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])


@_uncompiled
def sum_rows(grad: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Each rank's rows, summed over what all ranks have for them.

    An all-to-all and a sum move the bytes of a reduce-scatter, take uneven counts, and round the
    sum of W bf16 numbers once, in one order.
    """
    own = counts[group.rank()]
    parts = grad.new_empty(len(counts), own, *grad.shape[1:])
    dist.all_to_all_single(
        parts.flatten(0, 1), grad.contiguous(), [own] * len(counts), list(counts), group=group
    )
    return parts.sum(0, dtype=compute_dtype(grad.dtype)).to(grad.dtype)


def gather_lists(
    lists: list[Tensor], counts: list[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Each list over all ranks, counts[list][rank] long there, in one collective."""
    if not lists:
        return []
    of_ranks = list(zip(*counts, strict=True))
    joined = _gathered(torch.cat(lists), [sum(of_rank) for of_rank in of_ranks], group)
    parts = joined.split([count for of_rank in of_ranks for count in of_rank])
    return [torch.cat(parts[which :: len(lists)]) for which in range(len(lists))]


def key_count(relations: Relations) -> int:
    """Pairs that `relations_of_all` will tell the other ranks."""
    if relations.query_ids_M is None:
        return 0  # a query is like no other, then
    columns = (relations.labels_M, relations.positive_columns, relations.excluded_columns)
    return sum(len(x) for x in columns if x is not None)


def relations_of_all(
    relations: Relations, ranks: Ranks, *, all_queries: bool, apart: bool
) -> Relations:
    """A rank's relations with the passages of all ranks; labels and guide are those of the queries
    of all ranks where `all_queries` says so, and others' passages that are APART so with `apart`.
    """
    group, own = ranks.group, ranks.own(ranks.passages)
    shifted = {
        name: column + own.start
        for name in ("labels_M", "positive_columns", "excluded_columns")
        if (column := getattr(relations, name)) is not None
    }
    relations = relations._replace(**shifted)
    query_ids, passage_ids = relations[3:5]
    lists, counts = [], []
    if passage_ids is not None:
        lists, counts = [passage_ids], [ranks.passages]
    if query_ids is not None:
        lists += listed(relations, query_ids)
        counts += [ranks.keys] * 2
    if all_queries:
        lists.append(relations.labels_M)
        counts.append(ranks.queries)
    curated_N, own_N = None, relations.curated_N
    if apart:  # on all ranks, whoever has some
        if own_N is None:
            own_N = relations.labels_M.new_full((ranks.passages[group.rank()],), -1)
        lists.append(own_N.clamp(max=-1))
        counts.append(ranks.passages)
    gathered = gather_lists(lists, counts, group)
    changes = {}
    if apart:
        curated_N = gathered.pop()
    if all_queries:
        changes["labels_M"] = gathered.pop()
    if passage_ids is not None:
        changes["passage_ids_N"] = gathered.pop(0)
    if query_ids is not None:
        keys = _excluded(query_ids, relations.labels_M, *gathered)
        changes["excluded_offsets"], changes["excluded_columns"] = keys
    if own_N is not None:  # passages of other ranks are chosen for none of ours
        if curated_N is None:
            curated_N = own_N.new_full((sum(ranks.passages),), -1)
        curated_N[own] = own_N
        changes["curated_N"] = curated_N
    if relations.guide_passages is not None:
        changes["guide_passages"] = _gathered(relations.guide_passages, ranks.passages, group)
        if all_queries:
            changes["guide_queries"] = _gathered(relations.guide_queries, ranks.queries, group)
    return relations._replace(**changes)


def _excluded(
    class_M: Tensor, labels_M: Tensor, class_K: Tensor, column_K: Tensor
) -> tuple[Tensor, Tensor]:
    """What queries anywhere know, as exclusions of an own query of the same text: lists that hold
    all the rank's own. Without a host sync, so a key of no own query stays, as its first label."""
    M = len(class_M)
    if not M:
        return class_M.new_zeros(1), class_M
    sorted_M, order_M = class_M.sort()
    at_K = torch.searchsorted(sorted_M, class_K).clamp(max=M - 1)
    rows_K = torch.where(sorted_M[at_K] == class_K, order_M[at_K], 0)
    columns_K = torch.where(class_M[rows_K] == class_K, column_K, labels_M[0])
    rows_K, order_K = rows_K.sort(stable=True)
    offsets = torch.searchsorted(rows_K, torch.arange(M + 1, device=rows_K.device))
    return offsets, columns_K[order_K]


@_uncompiled
def ring_losses(
    q: Tensor, p: Tensor, own: None, scale: Tensor, relations: list[Tensor | None], settings: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(losses, similarity of the label, of the hardest negative) [M] of a rank's own passages and
    relations with those of all; the arguments are those of the ops."""
    ring = Ring(Relations(*relations), Settings.parse(settings), tuple(ranks.passages), ranks.group)
    return _RingLosses.apply(q, p, scale, ring)


class _RingLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, p, scale, ring):
        number = scale.to(q.device, compute_dtype(q.dtype))
        with torch.autocast(q.device.type, enabled=False):
            logits, stats = ring.statistics(q, p, number)
            result = ring.losses(logits, stats, number, q.shape[1])
        ctx.save_for_backward(q, p, scale, logits, stats)
        ctx.ring = ring
        ctx.mark_non_differentiable(*result[1:3])
        return result[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx, weights_M, *_):
        q, p, scale, logits, stats = ctx.saved_tensors
        number, needs = scale.to(q.device, logits.dtype), ctx.needs_input_grad[:2]
        with torch.autocast(q.device.type, enabled=False):
            grads = ctx.ring.gradients(q, p, number, logits, stats, weights_M, needs)
        leaves = (q, p, scale)
        cast = [x if x is None else x.to(y) for x, y in zip(grads, leaves, strict=True)]
        return *cast, None


@torch.enable_grad()
def ring_grads(
    q: Tensor, p: Tensor, own: None, scale: Tensor, relations: list[Tensor | None], settings: str,
    ranks: Ranks, weights_M: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As the op `info_nce_grads` has it."""
    leaves = [x.detach().requires_grad_() for x in (q, p, scale)]
    loss_M, *rows = ring_losses(*leaves[:2], own, leaves[2], relations, settings, ranks)
    loss = (weights_M * loss_M).sum()
    dq, dp, d_scale = torch.autograd.grad(loss, leaves)
    return loss.detach(), loss_M, *rows, dq, dp, None, d_scale
