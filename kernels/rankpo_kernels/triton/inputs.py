"""A batch of InfoNCE with what every pass needs of it, and the blocks of scores that it has.

M queries, N passages, P positive pairs, L prefixes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.objective import limits
from rankpo_kernels.problem import PP, QP, QQ, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Known, Pairs, Relations, known, positive_pairs
from rankpo_kernels.triton import rows
from rankpo_kernels.triton.blocks import Block, Guide, as_number
from rankpo_kernels.triton.rows import Scale
from rankpo_kernels.triton.scores import EXEMPT, MASKED, Hardness, Masks
from rankpo_kernels.triton.tiles import Tiles


def in_range_of_fp8(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """(rows times powers of two, which change no cosine and no digit; these powers): the largest
    element of a row lies in [128, 256), e4m3 ends at 448."""
    _, exponent_R = x_RD.abs().amax(1).float().frexp()
    power_R = (8 - exponent_R).clamp(max=120)  # of rows that are all but 0
    factor_R = torch.ldexp(torch.ones_like(power_R, dtype=x_RD.dtype), power_R)
    return x_RD * factor_R[:, None], factor_R


class Inputs(NamedTuple):
    """An `InfoNCEProblem` with norms, keys and limits."""

    q_MD: Tensor
    p_ND: Tensor
    scored: tuple[Tensor, Tensor]  # both as the scores take them: in fp8, or as they are
    scale: Scale
    relations: Relations
    settings: InfoNCESettings
    tiles: Tiles
    streamed: Tiles | None  # of `streamed`, for passes over the scores that it can do
    dims: tuple[int, ...]
    pairs: Pairs | None  # None where there are the labels alone
    known: Known | None  # None where it is labels and their places alone
    inverse_q: Tensor | None  # [L, M]
    inverse_p: Tensor | None  # [L, N]
    similarity_LP: Tensor  # of the positive pairs
    limit_LM: Tensor | None
    guide: Guide | None

    @staticmethod
    def of(problem: InfoNCEProblem, tiles: Tiles, streamed: Tiles | None) -> "Inputs":
        q_MD, p_ND, _, scale, relations, settings = problem
        M, N, labels_M = len(q_MD), len(p_ND), relations.labels_M
        dims = tuple(prefix for prefix, _ in settings.levels(q_MD.shape[1]))
        pairs, rows_P, columns_P = None, None, labels_M
        if relations.positive_offsets is not None:
            pairs = positive_pairs(relations, torch.float32)
            rows_P, columns_P, _ = pairs
        inverse_q, inverse_p, similarity_LP = rows.prepare(
            q_MD, p_ND, rows_P, columns_P, dims, settings.normalize
        )
        guide, judged_LM = None, similarity_LP[:, :M]
        if relations.guide is not None:
            gq, gp = relations.guide
            *inverses, judged_LM = rows.prepare(
                gq, gp, None, labels_M, (gq.shape[1],), settings.normalize
            )
            guide = Guide(gq, inverses[0], gp, inverses[1])
        margin = settings.false_negative_margin is not None
        keyed = not relations.labels_alone or {QQ, PP} & set(settings.directions)
        scored = (q_MD, p_ND)
        if settings.precision == "fp8":
            scored = (q_MD.to(torch.float8_e4m3fn), p_ND.to(torch.float8_e4m3fn))
        return Inputs(
            q_MD, p_ND, scored, as_number(scale), relations, settings, tiles, streamed, dims, pairs,
            known(relations, N) if keyed else None, inverse_q, inverse_p, similarity_LP,
            limits(judged_LM, settings).contiguous() if margin else None, guide,
        )  # fmt: skip

    @property
    def M(self) -> int:
        return self.q_MD.shape[0]

    @property
    def N(self) -> int:
        return self.p_ND.shape[0]

    @property
    def columns_P(self) -> Tensor:
        return self.relations.labels_M if self.pairs is None else self.pairs.columns_P

    @property
    def rows_P(self) -> Tensor:
        if self.pairs is None:
            return torch.arange(len(self.q_MD), device=self.q_MD.device)
        return self.pairs.rows_P

    @property
    def row_tiles(self) -> Tiles:
        """Of a pass along rows alone."""
        return self.streamed or self.tiles

    @property
    def workspace_bytes(self) -> int:
        return self.settings.workspace(self.q_MD.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q_MD.device)


def score_block(p: Inputs, row: str | None, column: str | None) -> Block:
    """Queries against passages."""
    keys = None if p.relations.labels_alone else p.known
    M, owner_N, (chosen, other) = p.M, p.relations.curated_N, p.settings.hardness
    if p.limit_LM is None and chosen == other:
        owner_N = None
    hardness = None
    if row == QP and (other or (chosen and owner_N is not None)):
        hardness = Hardness(chosen, other)
    id_M = None if owner_N is None else torch.arange(M, device=p.q_MD.device)
    masks = Masks.of(p.relations.labels_M, keys, p.limit_LM, id_M, owner_N)
    curated = 0 if owner_N is None else EXEMPT
    q_MD, p_ND = p.scored
    return Block(
        q_MD, p.inverse_q, None, p_ND, p.inverse_p, p.guide, masks, curated, row, column, hardness
    )


def query_block(p: Inputs) -> Block:
    """Queries against queries, who stand for the texts of their labels."""
    labels_M = p.relations.labels_M
    assert p.known is not None
    keys = p.known._replace(start_N=p.known.start_N[labels_M], stop_N=p.known.stop_N[labels_M])
    masks = Masks.of(None, keys, p.limit_LM, None, None)
    guide = p.guide and p.guide.among_queries()
    return Block(p.q_MD, p.inverse_q, None, p.q_MD, p.inverse_q, guide, masks, 0, QQ, None)


def passage_block(p: Inputs) -> Block:
    """The passage of every positive pair against all passages."""
    rows_P, owner_N = p.rows_P, p.relations.curated_N
    limit_LP = None if p.limit_LM is None else p.limit_LM[:, rows_P].contiguous()
    assert p.known is not None
    keys = p.known._replace(class_M=p.known.class_M[rows_P])
    masks = Masks.of(None, keys, limit_LP, None if owner_N is None else rows_P, owner_N)
    guide = p.guide and p.guide.among_passages()
    curated, index = 0 if owner_N is None else MASKED, p.columns_P
    return Block(p.p_ND, p.inverse_p, index, p.p_ND, p.inverse_p, guide, masks, curated, PP, None)
