"""InfoNCE across ranks without all passages in one place: they travel round a ring of ranks.

    round 1   every block of passages passes by; statistics of its scores are merged      2MND
    round 2   they pass by again, the gradients behind them, which so come home           6MND

One softmax per query, on any device, in chunks of torch GEMMs: query_to_passage without further
positives, own negatives and margins. A rank holds the block it looks at and the one that comes; in
round 2 also gradients in fp32: what it adds, what comes, what goes. M queries, N passages of all
ranks, D dims, L prefixes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rankpo_kernels.chunked.blocks import Block, Line, Lines, Side, add_pairs, pair_logits, take
from rankpo_kernels.chunked.chunks import column_lists
from rankpo_kernels.objective import Stats, combine, merge
from rankpo_kernels.problem import QP, InfoNCEResult, InfoNCESettings, compute_dtype
from rankpo_kernels.relations import Relations, known, positive_pairs


def travel(
    x: Tensor, counts: Sequence[int], group: dist.ProcessGroup
) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows) of all ranks, the own first; the next are on their way meanwhile."""
    size, rank, block = group.size(), group.rank(), x.contiguous()
    for step in range(size):
        owner, coming = (rank - step) % size, block
        flights: list[dist.Work] = []
        if step < size - 1:
            coming, flights = pass_on(block, counts[owner - 1], group)
        yield owner, block
        for flight in flights:
            flight.wait()
        block = coming


def pass_on(block: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """To the next rank, and from the one before `rows`, there when the work is waited for."""
    coming, size, rank = block.new_empty(rows, *block.shape[1:]), group.size(), group.rank()
    sides = ((dist.isend, block, (rank + 1) % size), (dist.irecv, coming, (rank - 1) % size))
    messages = [dist.P2POp(how, x, None, group, 0, peer) for how, x, peer in sides if x.numel()]
    return coming, dist.batch_isend_irecv(messages) if messages else []


@dataclass(frozen=True)
class Ring:
    """What both rounds need besides the vectors; relations hold the passages of all ranks."""

    relations: Relations
    settings: InfoNCESettings
    counts: tuple[int, ...]  # passages of each rank
    group: dist.ProcessGroup

    def sides(
        self, q: Tensor, needs: tuple[bool, bool]
    ) -> tuple[list[tuple[int, int]], Side, Callable[[Tensor], Side], Tensor]:
        """(bounds of the prefixes, the queries, how to look at a block of passages, the labels
        within the own block)."""
        prefixes = [prefix for prefix, _ in self.settings.levels(q.shape[1])]
        bounds = list(zip((0, *prefixes), prefixes, strict=False))
        like = bounds, compute_dtype(q.dtype), self.settings.normalize
        first = sum(self.counts[: self.group.rank()])
        passages = lambda p: Side.of(p, *like, needs[1])  # noqa: E731
        return bounds, Side.of(q, *like, needs[0]), passages, self.relations.labels_M - first

    def visits(
        self, queries: Side, passages: Callable[[Tensor], Side], p: Tensor, scale: Tensor,
        bounds: list[tuple[int, int]],
    ) -> Iterator[Block]:  # fmt: skip
        """The own scores against the passages of every rank."""
        keys = known(self.relations, sum(self.counts))
        each_M = torch.arange(len(queries.x_ND), device=scale.device)
        rest = (None, QP, None, None, None, scale, bounds, self.settings)
        for owner, block_ND in travel(p, self.counts, self.group):
            start = sum(self.counts[:owner])
            lists = column_lists(keys, slice(start, start + self.counts[owner]))
            yield Block(queries, passages(block_ND), None, each_M, lists, *rest)

    def statistics(self, q: Tensor, p: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Round 1: logits of the labels [L, M], and of the negatives `Stats` as [5, L, M]."""
        bounds, queries, passages, labels_M = self.sides(q, (False, False))
        each_M = torch.arange(len(q), device=q.device)
        s_LM = pair_logits(queries, passages(p), each_M, labels_M, scale, bounds)
        none = torch.zeros_like(s_LM)
        stats = Stats(none - torch.inf, none, none, none, none - torch.inf)
        for block in self.visits(queries, passages, p, scale, bounds):
            of_chunks = [
                [torch.stack(of) for of in zip(*chunk.stats([], True, True), strict=True)]
                for chunk in block.chunks()
            ]
            if of_chunks:
                parts = zip(*of_chunks, strict=True)
                stats = merge(stats, Stats(*(torch.cat(part, 1) for part in parts)))
        return s_LM, torch.stack(stats)

    def settle(
        self, s_LM: Tensor, stats_5LM: Tensor, weights_M: Tensor, scale: Tensor, D: int
    ) -> tuple[Tensor, Lines, Tensor, Tensor]:
        """(losses, lines of each level, slopes of the labels, d total / d scale)."""
        pairs = positive_pairs(self.relations, scale.dtype)
        loss_M, d_scale = torch.zeros_like(weights_M), torch.zeros_like(scale)
        lines: Lines = []
        slope_LM = torch.zeros_like(s_LM)
        for level, (_, weight) in enumerate(self.settings.levels(D)):
            of = {QP: Stats(*stats_5LM[:, level])}
            level_loss, slopes, slope_LM[level], level_scale = combine(
                pairs, s_LM[level], of, weights_M * weight, scale, self.settings, True
            )
            assert level_scale is not None
            loss_M, d_scale = loss_M + weight * level_loss, d_scale + level_scale
            lines.append({QP: Line.of(of[QP], slopes[QP])})
        return loss_M, lines, slope_LM, d_scale

    def losses(self, s_LM: Tensor, stats_5LM: Tensor, scale: Tensor, D: int) -> InfoNCEResult:
        none_M = torch.zeros_like(s_LM[0])
        loss_M = self.settle(s_LM, stats_5LM, none_M, scale, D)[0]
        return InfoNCEResult(loss_M, s_LM[-1] / scale, Stats(*stats_5LM).top[-1] / scale)

    def gradients(
        self, q: Tensor, p: Tensor, scale: Tensor, s_LM: Tensor, stats_5LM: Tensor,
        weights_M: Tensor, needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        """Round 2: of q, p and the scale, in the dtype of computing."""
        D, rank, (need_q, need_p) = q.shape[1], self.group.rank(), needs
        bounds, queries, passages, labels_M = self.sides(q, needs)
        _, lines, slope_LM, d_scale = self.settle(s_LM, stats_5LM, weights_M, scale, D)
        each_M, normalize = torch.arange(len(q), device=q.device), self.settings.normalize
        dp: Tensor | None = None
        flights: list[dist.Work] = []
        for step, block in enumerate(self.visits(queries, passages, p, scale, bounds)):
            for chunk in block.chunks():
                local = [{QP: take(chunk.rows, of[QP])} for of in lines]
                chunk.add_gradients(local, logits=False)
            if not step:
                of_pairs = each_M, labels_M, slope_LM, s_LM
                add_pairs(queries, block.b, *of_pairs, scale, bounds)
            if need_p:  # what comes has been on its way during this block's products
                own = block.b.gradient(bounds, D, normalize)
                for flight in flights:
                    flight.wait()
                sent = own if dp is None else own.add_(dp)
                dp, flights = pass_on(
                    sent, self.counts[(rank - step - 1) % len(self.counts)], self.group
                )
        for flight in flights:
            flight.wait()
        return queries.gradient(bounds, D, normalize) if need_q else None, dp, d_scale
