"""InfoNCE with every option, in torch, on any device.

With query_to_passage alone a chunk has its statistics as soon as it has its scores (6MND flops).
Other directions read the blocks twice, since a column, or a joint softmax, knows its sum only after
the first time; the scores are computed twice where they take more than KEPT_BYTES.

M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rankpo_kernels.chunked.blocks import (
    Block,
    Chunk,
    ColumnStats,
    Line,
    Lines,
    Side,
    add_pairs,
    joined,
    own_stats,
    pair_logits,
    take,
)
from rankpo_kernels.chunked.chunks import ALL, column_lists
from rankpo_kernels.objective import Stats, add_ranks_, combine, limits, merge, of_all_ranks
from rankpo_kernels.problem import (
    PP,
    PQ,
    QP,
    QQ,
    InfoNCEProblem,
    InfoNCEResult,
    InfoNCESettings,
    Needs,
)
from rankpo_kernels.relations import Pairs, Relations, expand, known, positive_pairs

# Of scores that are kept between two readings, as long as they fit the workspace: a batch of 4,096
# pairs in fp32 saves a product of four, and a larger one would take memory that grows as M N does.
KEPT_BYTES = 64 * 2**20


def general(problem: InfoNCEProblem, weights_M: Tensor | None, needs: Needs) -> InfoNCEResult:
    """As `chunked.info_nce`, whose scale and weights are of the dtype of computing by now."""
    form = GeneralForm.of(problem, weights_M, needs)
    if problem.settings.directions == (QP,):
        lines = form.chunk_by_chunk()
    else:
        stats, kept = form.read()
        lines = form.losses(slice(0, len(form.loss_M)), ALL, stats)
        if any(needs):
            form.add_columns_of_ranks(lines)
            form.write(lines, kept)
    return form.result(lines)


@dataclass(frozen=True)
class OwnNegatives:
    """Negatives of one query each."""

    side: Side
    owner_H: Tensor
    logit_LH: Tensor
    by: Tensor | float  # hardness multiplies their logits
    stats: list[Stats]  # of each prefix, per query

    @classmethod
    def of(
        cls, side: Side, queries: Side, relations: Relations, scale: Tensor,
        bounds: list[tuple[int, int]], settings: InfoNCESettings,
    ) -> "OwnNegatives":  # fmt: skip
        H, M = len(side.x_ND), len(queries.x_ND)
        assert relations.own_offsets is not None
        owner_H = expand(relations.own_offsets.diff(), H)
        each_H = torch.arange(H, device=owner_H.device)
        logit_LH = pair_logits(queries, side, owner_H, each_H, scale, bounds)
        chosen, _ = settings.hardness
        by = 1 + chosen / scale if chosen else 1.0
        return cls(side, owner_H, logit_LH, by, [own_stats(s, by, owner_H, M) for s in logit_LH])

    def slopes(self, lines: Lines) -> Tensor:
        """[L, H] of d total / d logit."""
        return torch.stack([
            soft[self.owner_H] * (s_H * self.by - lse[self.owner_H]).exp() - flat[self.owner_H]
            for (lse, soft, flat), s_H in zip((of[QP] for of in lines), self.logit_LH, strict=True)
        ])  # fmt: skip


@dataclass(frozen=True)
class GeneralForm:
    """What its passes share, and what they fill in."""

    problem: InfoNCEProblem
    relations: Relations  # of the queries that have a loss
    weights_M: Tensor
    needs: Needs
    bounds: list[tuple[int, int]]  # dims of each prefix that the one before has not
    all_queries: Side
    queries: Side  # those that have a loss
    passages: Side
    own: OwnNegatives | None
    pairs: Pairs
    s_LP: Tensor  # logits of the pairs
    # filled in
    slope_LP: Tensor
    loss_M: Tensor
    hardest_M: Tensor
    d_scale: Tensor

    @classmethod
    def of(
        cls, problem: InfoNCEProblem, weights_M: Tensor | None,
        needs: Needs,
    ) -> "GeneralForm":  # fmt: skip
        q_MD, p_ND, own_HD, scale, of_all, settings = problem
        relations = of_all.rows(settings.window)
        prefixes = [prefix for prefix, _ in settings.levels(q_MD.shape[1])]
        bounds = list(zip((0, *prefixes), prefixes, strict=False))

        def side_of(x: Tensor, need: bool) -> Side:
            return Side.of(x, bounds, scale.dtype, settings.normalize, need)

        all_queries, passages = side_of(q_MD, needs.q), side_of(p_ND, needs.p)
        queries = all_queries.part(settings.own)
        pairs = positive_pairs(relations, scale.dtype)
        s_LP = pair_logits(queries, passages, pairs.rows_P, pairs.columns_P, scale, bounds)
        own = None
        if own_HD is not None:
            side = side_of(own_HD, needs.own)
            own = OwnNegatives.of(side, queries, relations, scale, bounds, settings)
        loss_M = s_LP.new_zeros(len(relations.labels_M))
        return cls(
            problem, relations, torch.zeros_like(loss_M) if weights_M is None else weights_M, needs,
            bounds, all_queries, queries, passages, own, pairs, s_LP,
            slope_LP=torch.zeros_like(s_LP), loss_M=loss_M,
            hardest_M=torch.full_like(loss_M, -torch.inf), d_scale=torch.zeros_like(scale),
        )  # fmt: skip

    @property
    def want(self) -> tuple[bool, bool]:
        """(the softmax mean, for the scale's gradient; sum and count, for smoothing)."""
        return self.needs.scale, self.problem.settings.label_smoothing > 0

    @property
    def similarity_LM(self) -> Tensor:
        """Of the labels, which are the first pairs."""
        return self.s_LP[:, : len(self.loss_M)] / self.problem.scale

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The blocks that the directions read."""
        settings, relations = self.problem.settings, self.relations
        queries, passages = self.queries, self.passages
        keys = known(relations, len(passages.x_ND))
        passage_lists, each_M = column_lists(keys), self.pairs.rows_P[: len(self.loss_M)]
        guides = self._guides()
        # each block is judged by the same sides of the guide as it has of the embeddings
        judges: dict[str, tuple[Side, Side] | None] = dict.fromkeys((QP, QQ, PP))
        if guides is not None:
            guide, all_guides, guide_passages = guides
            judges = {QP: (guide, guide_passages), QQ: (guide, all_guides),
                      PP: (guide_passages, guide_passages)}  # fmt: skip
        block = functools.partial(
            Block, limit_LM=self._limits(guides), scale=self.problem.scale, bounds=self.bounds,
            settings=settings,
        )  # fmt: skip
        blocks = []
        rows, columns = (d if d in settings.directions else None for d in (QP, PQ))
        if rows or columns:
            blocks.append(block(
                queries, passages, None, each_M, passage_lists, relations.curated_N, rows, columns,
                judges[QP],
            ))  # fmt: skip
        if QQ in settings.directions:
            labels = column_lists(keys, self.problem.relations.labels_M)
            blocks.append(block(
                queries, self.all_queries, None, each_M, labels, None, QQ, None, judges[QQ]
            ))  # fmt: skip
        if PP in settings.directions:
            pairs = self.pairs
            blocks.append(block(
                passages, passages, pairs.columns_P, pairs.rows_P, passage_lists,
                relations.curated_N, PP, None, judges[PP],
            ))  # fmt: skip
        return blocks

    def _guides(self) -> tuple[Side, Side, Side] | None:
        """Of the queries that have a loss, of all, of passages."""
        settings, guide = self.problem.settings, self.problem.relations.guide
        if settings.false_negative_margin is None or guide is None:
            return None
        dtype = self.problem.scale.dtype
        queries, passages = (
            Side.of(x, [(0, x.shape[1])], dtype, settings.normalize, False) for x in guide
        )
        return queries.part(settings.own), queries, passages

    def _limits(self, guides: tuple[Side, Side, Side] | None) -> Tensor | None:
        """[L, M]: the similarity above which nothing is a negative; of a guide [1, M]."""
        settings = self.problem.settings
        if settings.false_negative_margin is None:
            return None
        similarity_LM = self.similarity_LM
        if guides is not None:
            queries, _, passages = guides
            labels_M, one = self.relations.labels_M, torch.ones_like(self.problem.scale)
            each_M = torch.arange(len(labels_M), device=labels_M.device)
            dims = [(0, queries.x_ND.shape[1])]
            similarity_LM = pair_logits(queries, passages, each_M, labels_M, one, dims)
        return limits(similarity_LM, settings)

    # --- the passes ---

    def chunk_by_chunk(self) -> Lines:
        """Of one direction along rows: losses and gradients of a chunk at a time."""
        [block], of_chunks = self.blocks, []
        for chunk in block.chunks():
            stats = [{QP: rows} for rows in chunk.stats([], *self.want)]
            lines = self.losses(chunk.rows, self._pairs_of(chunk.rows), stats)
            if self.needs.q or self.needs.p:
                chunk.add_gradients(lines, logits=True)
            of_chunks.append(lines)
        levels = zip(*of_chunks, strict=True)
        return [{QP: joined([of[QP] for of in level])} for level in levels]

    def read(self) -> tuple[list[dict[str, Stats]], dict[int, Chunk]]:
        """(statistics of each prefix by direction; by the number of a block, all its logits where
        they are kept for the gradients)."""
        settings = self.problem.settings
        stats: list[dict[str, Stats]] = [{} for _ in self.bounds]
        workspace = settings.workspace(self.s_LP.device)
        kept_bytes = min(KEPT_BYTES, workspace) // len(self.blocks)
        kept: dict[int, Chunk] = {}
        for number, block in enumerate(self.blocks):
            columns: list[ColumnStats] = []
            rows: list[list[Stats]] = []  # of each chunk, by prefix
            keep = any(self.needs) and block.nbytes <= kept_bytes
            if block.along_columns:
                columns = [ColumnStats(self.s_LP, len(block.b.x_ND)) for _ in self.bounds]
            for chunk in block.chunks(at_once=keep):
                rows.append(chunk.stats(columns, *self.want))
                if keep:
                    kept[number] = chunk
                del chunk  # its unit vectors need not outlast the next one's
            if block.along_columns:  # of all prefixes at once: across ranks it is a collective
                whole = Stats(*map(torch.stack, zip(*(x.result() for x in columns), strict=True)))
                whole = of_all_ranks(whole, settings)
            for level, of in enumerate(stats):
                if block.along_rows:
                    none = Stats(*self.s_LP.new_empty(5, 0))
                    of[block.along_rows] = joined([none, *(chunk[level] for chunk in rows)])
                if block.along_columns:
                    of[block.along_columns] = take(level, whole)
        return stats, kept

    def losses(self, rows: slice, at_P: slice | Tensor, stats: list[dict[str, Stats]]) -> Lines:
        """Fill in losses of the queries `rows`, whose pairs are at `at_P`; what decides the slopes
        of their negatives."""
        scale, settings = self.problem.scale, self.problem.settings
        part = Pairs(*(x[at_P] for x in self.pairs))
        part = part._replace(rows_P=part.rows_P - rows.start)
        levels = settings.levels(self.problem.q_MD.shape[1])
        lines = []
        for level, (of, (_, weight)) in enumerate(zip(stats, levels, strict=True)):
            if self.own is not None and QP in of:
                of[QP] = merge(of[QP], take(rows, self.own.stats[level]))
            loss_R, slopes, self.slope_LP[level, at_P], d_scale = combine(
                part, self.s_LP[level, at_P], of, self.weights_M[rows] * weight, scale, settings,
                self.needs.scale,
            )  # fmt: skip
            self.loss_M[rows] += weight * loss_R
            if d_scale is not None:
                self.d_scale.add_(d_scale)
            lines.append({d: Line.of(of[d], slopes[d]) for d in of})
        hardest_of = QP if QP in settings.directions else QQ
        if hardest_of in of:
            self.hardest_M[rows] = of[hardest_of].top / scale
        return lines

    def add_columns_of_ranks(self, lines: Lines) -> None:
        """What decides the slopes of columns comes from the pairs of all ranks."""
        settings = self.problem.settings
        if PQ not in settings.directions:
            return
        for name in ("soft", "flat")[: 1 + (settings.label_smoothing > 0)]:
            own = torch.stack([getattr(of[PQ], name) for of in lines])
            for of, whole in zip(lines, add_ranks_(own, settings), strict=True):
                of[PQ] = of[PQ]._replace(**{name: whole})

    def write(self, lines: Lines, kept: dict[int, Chunk]) -> None:
        """Read the blocks once more, and add their gradients to both sides."""
        for number, block in enumerate(self.blocks):
            if block.a.grad_ND is None and block.b.grad_ND is None:
                continue
            for chunk in [kept[number]] if number in kept else block.chunks():
                local = [
                    {d: take(chunk.rows, x) if d == block.along_rows else x for d, x in of.items()}
                    for of in lines
                ]
                chunk.add_gradients(local, logits=number in kept)

    def result(self, lines: Lines) -> InfoNCEResult:
        result = InfoNCEResult(self.loss_M, self.similarity_LM[-1], self.hardest_M)
        if not any(self.needs):
            return result
        scale, bounds, settings = self.problem.scale, self.bounds, self.problem.settings
        rows_P, columns_P, _ = self.pairs
        add_pairs(
            self.queries, self.passages, rows_P, columns_P, self.slope_LP, self.s_LP, scale, bounds
        )
        own = self.own
        if own is not None and QP in settings.directions and len(self.loss_M):
            each_H = torch.arange(len(own.owner_H), device=own.owner_H.device)
            slope_LH = own.slopes(lines)
            add_pairs(
                self.queries, own.side, own.owner_H, each_H, slope_LH, own.logit_LH, scale, bounds
            )
        D, needs = self.problem.q_MD.shape[1], self.needs
        gradient = lambda side: side.gradient(bounds, D, settings.normalize)  # noqa: E731
        return result._replace(
            dq_MD=gradient(self.all_queries) if needs.q else None,
            dp_ND=gradient(self.passages) if needs.p else None,
            d_own_HD=gradient(own.side) if needs.own and own is not None else None,
            d_scale=self.d_scale if needs.scale else None,
        )

    def _pairs_of(self, rows: slice) -> Tensor:
        """Where the positive pairs of a chunk of queries stand among all."""
        labels_M, offsets = self.relations.labels_M, self.relations.positive_offsets
        labels = torch.arange(rows.start, rows.stop, device=labels_M.device)
        if offsets is None:
            return labels
        first, last = offsets[[rows.start, rows.stop]].tolist()
        more = torch.arange(first, last, device=labels.device) + len(labels_M)
        return torch.cat([labels, more])
