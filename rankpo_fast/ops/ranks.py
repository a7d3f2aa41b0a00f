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
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankpo_fast.ops.checks import check_values, check_workspace, several
from rankpo_fast.ops.options import InfoNCECall, ScoreCall, terms
from rankpo_kernels.chunked.ring import Ring
from rankpo_kernels.problem import (
    PP,
    PQ,
    QP,
    QQ,
    InBatchProblem,
    InfoNCEProblem,
    compute_dtype,
)
from rankpo_kernels.relations import Relations, listed

# its name from torch 2.13 on, and before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# torch.compiler.disable without its import of dynamo, and of triton with it, at once
_uncompiled = torch._disable_dynamo
TERMS = 32  # places for what must be equal on all ranks

Problem = TypeVar("Problem", InfoNCEProblem, InBatchProblem)
Call = TypeVar("Call", bound=ScoreCall)


@dataclass(frozen=True)
class FromOthers:
    """What a rank's problem needs of other ranks."""

    all_queries: bool = False  # with labels and guide
    all_passages: bool = True
    column_sums: bool = False  # over the queries of all ranks
    apart: bool = False  # which passages of others are APART


@dataclass(frozen=True)
class RowCounts:
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


@dataclass(frozen=True, eq=False)
class RankPart(Generic[Problem]):
    """A rank's part of a loss: the problem of its own queries, with the passages of all."""

    problem: Problem
    weights_M: Tensor  # [M], or [] for all
    ranks: RowCounts | None  # None: there are no others
    needs: FromOthers

    @property
    def ring(self) -> bool:
        """Whether passages travel from rank to rank."""
        return self.ranks is not None and not self.needs.all_passages

    def home(self, dq: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the rank's own rows, summed over what all ranks have for them."""
        if self.ranks is not None and self.needs.all_passages:
            dp = sum_rows(dp, self.ranks.passages, self.ranks.group)
        if self.ranks is not None and self.needs.all_queries:
            dq = sum_rows(dq, self.ranks.queries, self.ranks.group)
        return dq, dp


def across_ranks(call: Call, check: Callable[[Call], tuple[Problem, Tensor]]) -> RankPart[Problem]:
    """The problem of a call and the weights of its rows, once `check` has nothing against it; with
    the passages of all ranks where it has a process group."""
    if several(call.process_group):
        return _spread(call, check)
    call.check()
    problem, weights_M = check(call)
    return RankPart(problem, weights_M, None, FromOthers())


@_uncompiled
def _spread(call: Call, check: Callable[[Call], tuple[Problem, Tensor]]) -> RankPart[Problem]:
    """With relations to the passages of all ranks, the rows of others that are needed, and the
    weights of the reduction. What can be refused is refused first, on all ranks then.

    No collective is overlapped: what needs no passages yet are a few sorts of integers.
    """
    local, ranks = _agree(call, check)
    problem, weights_M, needs = local.problem, local.weights_M, local.needs
    relations = relations_of_all(
        problem.relations, ranks, all_queries=needs.all_queries, apart=needs.apart
    )
    q, p = problem.q_MD, problem.p_ND
    if needs.all_passages:
        p = gather_rows(p, ranks.passages, ranks.group)
    if needs.all_queries:
        q = gather_rows(q, ranks.queries, ranks.group)
    if call.reduction == "mean":  # so that the mean over ranks is the mean over all queries
        weights_M = weights_M * (ranks.group.size() / ranks.weight if ranks.weight else 0.0)
    problem = problem._replace(q_MD=q, p_ND=p, relations=relations)
    check_workspace(problem.settings, max(len(p), *ranks.passages), q)
    if isinstance(problem, InfoNCEProblem):
        own = ranks.own(ranks.queries)
        settings = replace(
            problem.settings,
            group=ranks.group.group_name if needs.column_sums else None,
            window=(own.start, own.stop) if needs.all_queries else None,
        )
        problem = problem._replace(settings=settings)
    return RankPart(problem, weights_M, ranks, needs)


def _agree(
    call: Call, check: Callable[[Call], tuple[Problem, Tensor]]
) -> tuple[RankPart[Problem], RowCounts]:
    """What `check` returns and the rows of all ranks; or an error on every rank, where one refuses
    its arguments or they do not go together. The host waits for one small collective."""
    local, refusal, group, device = None, None, call.process_group, call.queries.device
    assert group is not None
    numbers = torch.zeros(5 + TERMS, dtype=torch.int64)
    said: dict[str, Any] = {}
    try:
        call.check()
        problem, weights_M = check(replace(call, reduction="sum"))  # a rank brings those of a sum
        local = RankPart(problem, weights_M, None, _needs_of(problem, call))
        said = _comparable(problem) | terms(call)
        known = [len(problem.q_MD), len(problem.p_ND), key_count(problem.relations)]
        known += [zlib.crc32(repr(value).encode()) for value in said.values()]
        numbers[1 : 1 + len(known)] = torch.tensor(known)
        weight = weights_M.expand(len(problem.q_MD)).sum(dtype=torch.float64).view(torch.int64)
    except Exception as error:  # raised below: the others, who wait, are told first
        refusal = error
    numbers[0] = refusal is None
    numbers = numbers.to(device)
    if refusal is None:
        numbers[-1] = weight
    table = _gathered(numbers[None], [1] * group.size(), group).cpu()
    if refusal is not None:
        raise refusal
    columns: list[list[int]]
    accepted, queries, passages, keys, *columns = table.T.tolist()
    if not all(accepted):
        refused = [rank for rank, yes in enumerate(accepted) if not yes]
        raise ValueError(f"arguments were refused on ranks {refused} of the process_group")
    for (name, value), of_ranks in zip(said.items(), columns, strict=False):
        if len(set(of_ranks)) > 1:
            unlike = [rank for rank, digest in enumerate(of_ranks) if digest != of_ranks[0]]
            raise ValueError(
                f"{name} must be the same on all ranks: those of ranks {unlike} and rank 0 differ; "
                f"rank {group.rank()} has {value!r}"
            )
    total = table[:, -1].clone().view(torch.float64).sum().item()
    assert local is not None
    return local, RowCounts(group, queries, passages, keys, total)


def _comparable(problem: InfoNCEProblem | InBatchProblem) -> dict[str, Any]:
    q, p, relations = problem.q_MD, problem.p_ND, problem.relations
    guide = relations.guide_passages
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (q, p)]
    # those whose backward has collectives inside
    leaves = problem.leaves if isinstance(problem, InfoNCEProblem) else ()
    any_needs = any(x.requires_grad for x in leaves if x is not None)
    return {
        "D": q.shape[1],
        "dtype": q.dtype,
        "requires_grad of queries and passages": needs,  # who gives none would not be there
        "whether there are gradients": torch.is_grad_enabled() and any_needs,
        "whether query_ids are given": relations.query_ids_M is not None,
        "whether passage_ids are given": relations.passage_ids_N is not None,
        "the guide or reference": None if guide is None else (guide.shape[1], guide.dtype),
    }


def _needs_of(problem: InfoNCEProblem | InBatchProblem, call: ScoreCall) -> FromOthers:
    """ValueError for what several ranks cannot do."""
    own = problem.own_HD if isinstance(problem, InfoNCEProblem) else None
    check_values(problem.relations, len(problem.p_ND), 0 if own is None else len(own))
    if not isinstance(problem, InfoNCEProblem) or not isinstance(call, InfoNCECall):
        return FromOthers()
    directions, ring = call.directions, call.exchange == "ring"
    if ring:
        _check_ring(problem)
    if QQ in directions and (call.backend == "triton" or call.precision != "exact"):
        raise ValueError(
            f"{QQ} across ranks is computed in torch: leave out backend='triton' and precision"
        )
    return FromOthers(
        all_queries=QQ in directions, all_passages=not ring, column_sums=PQ in directions,
        apart=PP in directions,
    )  # fmt: skip


def _check_ring(problem: InfoNCEProblem) -> None:
    relations, settings = problem.relations, problem.settings
    unlike = (relations.positive_offsets, relations.own_offsets, settings.false_negative_margin)
    if (
        settings.directions != (QP,)
        or any(x is not None for x in unlike)
        or settings.gradient_filter
        or settings.hardness_mode
        or settings.backend == "triton"
        or settings.precision != "exact"
    ):
        raise ValueError(
            "exchange='ring' goes with query_to_passage alone, without positives, own_negatives, "
            "false_negative_margin, gradient_filter, hardness_mode, backend='triton' and precision"
        )


def gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, counts[rank] of each, in their order; gradients come back summed."""
    return _GatherRows.apply(x, counts, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _gathered(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
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
    relations: Relations, ranks: RowCounts, *, all_queries: bool, apart: bool
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
    query_ids, passage_ids = relations.query_ids_M, relations.passage_ids_N
    lists: list[Tensor] = []
    counts: list[Sequence[int]] = []
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
        if all_queries and relations.guide_queries is not None:
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
def ring_losses(part: RankPart[InfoNCEProblem]) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, similarity of the label, of the hardest negative) [M] of a rank's own passages and
    relations with those of all."""
    problem, ranks = part.problem, part.ranks
    assert ranks is not None
    ring = Ring(problem.relations, problem.settings, tuple(ranks.passages), ranks.group)
    return _RingLosses.apply(problem.q_MD, problem.p_ND, problem.scale, ring)


class _RingLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, p: Tensor, scale: Tensor, ring: Ring
    ) -> tuple[Tensor, Tensor, Tensor]:
        number = scale.to(q.device, compute_dtype(q.dtype))
        with torch.autocast(q.device.type, enabled=False):
            logits, stats = ring.statistics(q, p, number)
            result = ring.losses(logits, stats, number, q.shape[1])
        ctx.save_for_backward(q, p, scale, logits, stats)
        ctx.ring = ring
        ctx.mark_non_differentiable(result.positive_M, result.hardest_M)
        return result.loss_M, result.positive_M, result.hardest_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights_M: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, p, scale, logits, stats = ctx.saved_tensors
        number, (need_q, need_p, *_) = scale.to(q.device, logits.dtype), ctx.needs_input_grad
        with torch.autocast(q.device.type, enabled=False):
            grads = ctx.ring.gradients(q, p, number, logits, stats, weights_M, (need_q, need_p))
        leaves = (q, p, scale)
        cast = [x if x is None else x.to(y) for x, y in zip(grads, leaves, strict=True)]
        return *cast, None


@torch.enable_grad()
def ring_grads(part: RankPart[InfoNCEProblem]) -> tuple[Tensor, ...]:
    """As the op `info_nce_grads` has it."""
    problem = part.problem
    leaves = [x.detach().requires_grad_() for x in (problem.q_MD, problem.p_ND, problem.scale)]
    q, p, scale = leaves
    loss_M, *rows = ring_losses(
        replace(part, problem=problem._replace(q_MD=q, p_ND=p, scale=scale))
    )
    loss = (part.weights_M * loss_M).sum()
    dq, dp, d_scale = torch.autograd.grad(loss, leaves)
    return loss.detach(), loss_M, *rows, dq, dp, q.new_empty(0), d_scale
