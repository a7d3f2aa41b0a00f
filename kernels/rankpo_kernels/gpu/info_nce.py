"""InfoNCE on a GPU: which kernels run, in which order, on which chunk of rows.

    plain, exact    prepare | statistics, gradients, 2 products a chunk | finish        8MND
    plain, stored   prepare | statistics that keep exp(s), rows, gradients of rows that
                    overflowed, 2 products a chunk | finish                             6MND
    general         prepare | statistics of every block | `objective.combine` |
                    gradients and products of every block | finish                      8MND a block

plain is one softmax per query (`objective.is_plain`). Nothing waits for the device, and all but the
general form's few list-making torch calls are kernels of `rows`, `scores`, `products` and cuBLAS.
A chunk holds R rows of gradients [R, N] in the inputs' dtype; products accumulate in fp32.

M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rankpo_kernels import objective
from rankpo_kernels.gpu import products, rows, scores
from rankpo_kernels.gpu.rows import Rows, Scale, absent
from rankpo_kernels.gpu.scores import EXEMPT, MASKED, Masks, Partials, Plain, Side
from rankpo_kernels.gpu.tiles import FUSION, Tiles, score_tiles, stores_scores
from rankpo_kernels.objective import (
    PP,
    PQ,
    QP,
    QQ,
    Known,
    Relations,
    Result,
    Settings,
    Stats,
    combine,
    expand,
    gradient_dtype,
    is_plain,
    known,
    limits,
    merge,
    of_all_ranks,
    positive_pairs,
)  # fmt: skip

INLINE_PARTS = 32  # partial statistics a gradient tile sums itself; more are summed by a launch


def info_nce(
    q_MD: Tensor, p_ND: Tensor, own_HD: Tensor | None, scale: Tensor, relations: Relations,
    settings: Settings, weights_M: Tensor | None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
    *, tiles: Tiles | None = None, stored: bool | None = None,
) -> Result:  # fmt: skip
    """Losses and gradients as `chunked.info_nce`; `tiles` and `stored` override the tables."""
    needs = (False,) * 4 if weights_M is None else needs
    # kernels read integers and weights one beside the other
    integers = [None if x is None else x.contiguous() for x in relations[:9]]
    relations = Relations(*integers, *relations[9:])
    weights_M = None if weights_M is None else weights_M.contiguous()
    if not len(q_MD):
        return _nothing(q_MD, p_ND, own_HD, needs)
    plain = is_plain(relations, settings)
    if stored is None:
        stored = stores_scores(*q_MD.shape, len(p_ND))
    stored = stored and plain and any(needs[:2]) and q_MD.dtype == torch.bfloat16
    stored = stored and not settings.gradient_filter
    tiles = tiles or score_tiles(q_MD.dtype, relations, settings, stored)
    problem = _problem(q_MD, p_ND, scale, relations, settings, tiles)
    if plain:
        return _plain(problem, weights_M, needs, stored)
    return _general(problem, own_HD, weights_M, needs)


def _nothing(q_MD: Tensor, p_ND: Tensor, own_HD: Tensor | None, needs) -> Result:
    row = q_MD.new_empty(0, dtype=torch.float32)
    grads = [
        torch.zeros_like(x, dtype=gradient_dtype(x.dtype)) if need and x is not None else None
        for x, need in zip((q_MD, p_ND, own_HD), needs[:3], strict=True)
    ]
    return Result(row, row, row, *grads, q_MD.new_zeros((), dtype=torch.float32))


class Problem(NamedTuple):
    """The inputs with what every pass needs of them."""

    q_MD: Tensor
    p_ND: Tensor
    scale: Tensor | None  # fp32, for what torch computes with it
    number: Scale  # the same as kernels take it
    relations: Relations
    settings: Settings
    tiles: Tiles
    dims: tuple[int, ...]
    pairs: objective.Pairs | None  # None for a plain loss, which has the labels
    known: Known | None
    inverse_q: Tensor | None  # [L, M]
    inverse_p: Tensor | None  # [L, N]
    similarity_LP: Tensor  # of the positive pairs
    limit_LM: Tensor | None
    guide: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None  # and inverse norms


def _problem(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor, relations: Relations, settings: Settings,
    tiles: Tiles,
) -> Problem:  # fmt: skip
    M, N = len(q_MD), len(p_ND)
    dims = tuple(prefix for prefix, _ in settings.levels(q_MD.shape[1]))
    plain = is_plain(relations, settings)
    pairs = None if plain else positive_pairs(relations, torch.float32)
    of_pairs = (None, relations.labels_M) if plain else pairs[:2]
    inverse_q, inverse_p, similarity_LP = rows.prepare(
        q_MD, p_ND, *of_pairs, dims, settings.normalize
    )
    guide = None
    judged_LM = similarity_LP[:, :M]
    if relations.guide_queries is not None:
        gq, gp = relations.guide_queries, relations.guide_passages
        labels_M, width = relations.labels_M, (gq.shape[1],)
        *inverses, judged_LM = rows.prepare(gq, gp, None, labels_M, width, settings.normalize)
        guide = (gq, gp, *inverses)
    number = Scale(float(scale), None) if scale.device.type == "cpu" else Scale(0.0, scale)
    related = any(x is not None for x in relations[1:7]) or QQ in settings.directions
    return Problem(
        q_MD, p_ND,
        None if plain else _on_device(number, q_MD), number,
        relations, settings, tiles, dims, pairs,
        known(relations, N) if related or PP in settings.directions else None,
        inverse_q, inverse_p, similarity_LP,
        None if settings.margin is None else limits(judged_LM, settings).contiguous(),
        guide,
    )  # fmt: skip


def _on_device(number: Scale, like: Tensor) -> Tensor:
    """Filled, not copied: a copy would make the host wait."""
    if number.at is None:
        return torch.full((), number.value, dtype=torch.float32, device=like.device)
    return number.at.float()


def _chunks(size: int, most: int, block: int) -> Iterator[slice]:
    """About equal slices of at most `most` rows, whole tiles where that allows."""
    count = -(-size // max(1, most))
    each = -(-size // count)
    if most >= block:
        each = min(-(-each // block) * block, most // block * block)
    for start in range(0, size, each):
        yield slice(start, min(start + each, size))


def _rows_per_chunk(N: int, row_bytes: int, settings: Settings) -> int:
    if (most := settings.workspace_bytes // row_bytes) < 1:
        raise ValueError(
            f"workspace_bytes={settings.workspace_bytes} is too small for one row of {N} "
            f"passages: it takes {row_bytes}"
        )
    return most


def _side(
    x: Tensor, inverse_L: Tensor | None, index: Tensor | None = None, part: slice = slice(None)
) -> Side:
    """Rows `part` of x, or of x[index]."""
    if index is not None:
        index = index[part]
    else:
        x = x[part]
        inverse_L = None if inverse_L is None else inverse_L[:, part]
    stride = 0 if inverse_L is None else inverse_L.stride(0)
    return Side(x, *x.stride(), index, inverse_L, stride)


class Block(NamedTuple):
    """One block of scores: rows of a against rows of b."""

    a: Tensor
    inverse_a: Tensor | None
    index: Tensor | None  # rows of a, None for all
    b: Tensor
    inverse_b: Tensor | None
    guide: tuple[Any, ...] | None  # (a, inverse of a, b, inverse of b)
    masks: Masks  # of all rows
    curated: int
    row_direction: str | None
    column_direction: str | None

    @property
    def rows(self) -> int:
        return len(self.a) if self.index is None else len(self.index)

    def chunk(self, part: slice) -> tuple[Side, Side, Side, Side, Masks]:
        guide = (absent(Side), absent(Side))
        if self.guide is not None:
            ga, inverse_ga, gb, inverse_gb = self.guide
            guide = (_side(ga, inverse_ga, self.index, part), _side(gb, inverse_gb))
        return (
            _side(self.a, self.inverse_a, self.index, part), _side(self.b, self.inverse_b), *guide,
            _part_of(self.masks, part),
        )  # fmt: skip


def _part_of(masks: Masks, part: slice) -> Masks:
    limit = masks.limit_LR
    pick = lambda x: None if x is None else x[part]  # noqa: E731
    return masks._replace(
        label_R=pick(masks.label_R), class_R=pick(masks.class_R), id_R=pick(masks.id_R),
        limit_LR=None if limit is None else limit[:, part],
        limit_stride=0 if limit is None else limit.stride(0),
    )  # fmt: skip


def _score_block(problem: Problem, row: str | None, column: str | None) -> Block:
    """Queries against passages."""
    p = problem
    keyed = any(x is not None for x in p.relations[1:7])
    class_M, _, start_N, stop_N, keys = p.known if keyed else [None] * 5
    owner_N = p.relations.curated_N if p.limit_LM is not None else None
    M = len(p.q_MD)
    masks = Masks(
        p.relations.labels_M, class_M, start_N, stop_N, keys, p.limit_LM, 0,
        None if owner_N is None else torch.arange(M, device=p.q_MD.device), owner_N,
    )  # fmt: skip
    guide = p.guide and (p.guide[0], p.guide[2], p.guide[1], p.guide[3])
    curated = 0 if owner_N is None else EXEMPT
    return Block(p.q_MD, p.inverse_q, None, p.p_ND, p.inverse_p, guide, masks, curated, row, column)


def _query_block(problem: Problem) -> Block:
    """Queries against queries, who stand for the texts of their labels."""
    p, labels_M = problem, problem.relations.labels_M
    start_M, stop_M = p.known.start_N[labels_M], p.known.stop_N[labels_M]
    masks = Masks(None, p.known.class_M, start_M, stop_M, p.known.keys, p.limit_LM, 0, None, None)
    guide = p.guide and (p.guide[0], p.guide[2], p.guide[0], p.guide[2])
    return Block(p.q_MD, p.inverse_q, None, p.q_MD, p.inverse_q, guide, masks, 0, QQ, None)


def _passage_block(problem: Problem) -> Block:
    """The passage of every positive pair against all passages."""
    p, rows_P = problem, problem.pairs.rows_P
    owner_N = p.relations.curated_N
    limit_LP = None if p.limit_LM is None else p.limit_LM[:, rows_P].contiguous()
    masks = Masks(
        None, p.known.class_M[rows_P], p.known.start_N, p.known.stop_N, p.known.keys, limit_LP, 0,
        None if owner_N is None else rows_P, owner_N,
    )  # fmt: skip
    guide = p.guide and (p.guide[1], p.guide[3], p.guide[1], p.guide[3])
    curated, index = 0 if owner_N is None else MASKED, p.pairs.columns_P
    return Block(p.p_ND, p.inverse_p, index, p.p_ND, p.inverse_p, guide, masks, curated, PP, None)


def _partials(L: int, parts: int, rows: int, like: Tensor, want: tuple[bool, bool]) -> Partials:
    """`want`: the moment, for the scale's gradient; sum and count, for smoothing."""
    moment, counted = want
    return Partials(*[
        torch.empty(L, parts, rows, dtype=torch.float32, device=like.device) if wanted else None
        for wanted in (True, True, moment, counted, counted)
    ])  # fmt: skip


def _reduce(parts: Partials, out: Partials, out_part: int = 0) -> Partials:
    L, n_parts, R = parts.top.shape
    scores._reduce_kernel[(triton.cdiv(R, 128), L)](
        parts, out, n_parts, out_part, out.top.shape[1], R, 128, **FUSION
    )
    return out


def _launch_statistics(
    problem: Problem, block: Block, part: slice, row_parts: Partials | None,
    column_parts: Partials | None, positive_R=None, inverse_top=None, stored=None,
) -> None:  # fmt: skip
    tiles, R, N = problem.tiles, part.stop - part.start, len(block.b)
    grid = (triton.cdiv(R, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N),)
    scores._statistics_kernel[grid](
        *block.chunk(part), row_parts or absent(Partials), column_parts or absent(Partials),
        positive_R, inverse_top, stored,
        problem.number, R, N, 0 if stored is None else stored.stride(0),
        problem.dims, _guide_dims(block), block.curated, **_shape(tiles),
    )  # fmt: skip


def _launch_gradients(
    problem: Problem, block: Block, part: slice, out_LRN: Tensor, *, plain=None, row_slopes=None,
    column_slopes=None, label_slope_LR=None, inverse_top=None, tile_parts=None, live=None,
    along=(None, None), filter_mass: float = 0.0, only_over: bool = False,
) -> None:  # fmt: skip
    tiles, R, N = problem.tiles, part.stop - part.start, len(block.b)
    if only_over:  # a row that overflows works for all rows of its tile
        tiles = replace(tiles, BLOCK_M=min(64, tiles.BLOCK_M))
    grid = (triton.cdiv(R, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N),)
    scores._gradients_kernel[grid](
        *block.chunk(part), plain or absent(Plain), row_slopes or absent(scores.Slopes),
        column_slopes or absent(scores.Slopes), label_slope_LR, inverse_top, tile_parts, live,
        out_LRN, *along,
        problem.number, filter_mass, 0 if plain is None else plain.parts.top.shape[1], R, N,
        out_LRN.stride(1), out_LRN.stride(0),
        problem.dims, _guide_dims(block), block.curated, only_over, **_shape(tiles),
    )  # fmt: skip


def _guide_dims(block: Block) -> tuple[int, ...]:
    return () if block.guide is None else (block.guide[0].shape[1],)


def _shape(tiles: Tiles) -> dict[str, int]:
    return asdict(tiles) | FUSION


def _plain(
    problem: Problem, weights_M: Tensor | None, needs: tuple[bool, ...], stored: bool
) -> Result:
    """Every chunk of rows by itself: its softmax needs no other row."""
    p, tiles, settings = problem, problem.tiles, problem.settings
    (M, D), N, dtype = p.q_MD.shape, len(p.p_ND), p.q_MD.dtype
    need_q, need_p, _, need_scale = needs
    products_needed = need_q or need_p
    # fp16 keeps rows divided by their slopes, or the small gradients of converged rows underflow
    relative = products_needed and (stored or dtype == torch.float16)
    block = _score_block(p, QP, None)
    tiles_n = triton.cdiv(N, tiles.BLOCK_N)
    most = _rows_per_chunk(
        N, 12 * tiles_n + (N * p.q_MD.element_size() if products_needed else 0), settings
    )
    chunks = list(_chunks(M, most, tiles.BLOCK_M))
    R0 = chunks[0].stop

    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=p.q_MD.device)  # noqa: E731,E501
    loss_M, hardest_M, d_scale_M = new(M), new(M), new(M) if need_scale else None
    factor_M = new(M) if relative else None
    dq_MD = new(M, D, dtype=gradient_dtype(dtype)) if need_q else None
    dq_RD = new(R0, D) if need_q else None
    dp_ND = new(N, D) if need_p else None
    dp_out = new(N, D, dtype=gradient_dtype(dtype)) if need_p else None
    out_RN = new(R0, N, dtype=dtype) if products_needed else None
    weighted_RD = new(R0, D, dtype=dtype) if relative else None
    top = None  # the largest inverse norm of a passage, beside which columns stay in range
    if relative:
        top = torch.ones((), device=p.q_MD.device) if p.inverse_p is None else p.inverse_p.amax()
        top = top.clamp(min=1e-38)  # passages may all be zero
    for part in chunks:
        R = part.stop - part.start
        tile_parts = parts = _partials(1, tiles_n, R, p.q_MD, (need_scale, False))
        positive_R = p.similarity_LP[0, part]
        out = out_RN[:R] if products_needed else None
        keep = {"positive_R": positive_R, "inverse_top": top, "stored": out} if stored else {}
        _launch_statistics(p, block, part, parts, None, **keep)
        if tiles_n > INLINE_PARTS:
            parts = _reduce(parts, _partials(1, 1, R, p.q_MD, (need_scale, False)))
        plain = Plain(
            parts, positive_R, None if weights_M is None else weights_M[part], loss_M[part],
            hardest_M[part], None if d_scale_M is None else d_scale_M[part],
            None if factor_M is None else factor_M[part],
        )  # fmt: skip
        if stored or not products_needed:
            inverses = (p.inverse_q, p.inverse_p, top)
            _launch_rows(p, plain, part, *inverses, out, weighted_RD)
        if not products_needed:
            continue
        live = None
        if settings.gradient_filter:
            tiles_m = triton.cdiv(R, tiles.BLOCK_M)
            live = new(tiles_m, tiles_n, dtype=torch.int32)
        _launch_gradients(
            p, block, part, out[None], plain=plain, inverse_top=top, tile_parts=tile_parts,
            live=live, only_over=stored,
            filter_mass=settings.gradient_filter * tiles.BLOCK_N / N,
        )  # fmt: skip
        left_RD = p.q_MD[part]
        if relative:
            left_RD = weighted_RD[:R]
            if not stored:
                by_R = factor_M[part] / (largest := factor_M[part].abs().amax().clamp(min=1e-38))
                by_R = by_R if p.inverse_q is None else by_R * p.inverse_q[0, part]
                left_RD.copy_(p.q_MD[part] * by_R[:, None])
        first = part.start == 0
        if need_q:
            _product(out, p.p_ND, dq_RD[:R], False, live=live, tiles=tiles)
        if need_p and relative and not stored:  # the chunk's largest factor, back in fp32
            chunk_ND = torch.empty_like(dp_ND)
            _product(out, left_RD, chunk_ND, False, transpose=True, live=live, tiles=tiles)
            chunk_ND *= largest
            dp_ND.copy_(chunk_ND) if first else dp_ND.add_(chunk_ND)
        elif need_p:
            _product(out, left_RD, dp_ND, not first, transpose=True, live=live, tiles=tiles)
        ready = []
        if need_q:
            inverse_q = None if p.inverse_q is None else p.inverse_q[:, part]
            factor_R = None if factor_M is None else factor_M[part]
            ready.append(Rows.of(dq_RD[:R], p.q_MD[part], inverse_q, factor_R, None, dq_MD[part]))
        if need_p and part.stop == M:
            ready.append(Rows.of(dp_ND, p.p_ND, p.inverse_p, None, None, dp_out))
        rows.finish(ready, p.dims, top, p.number)
    d_scale = d_scale_M.sum() if need_scale else None
    return Result(loss_M, p.similarity_LP[0], hardest_M, dq_MD, dp_out, None, d_scale)


def _launch_rows(
    p: Problem, plain: Plain, part: slice, inverse_q, inverse_p, top, stored, weighted_RD
) -> None:
    D, R = p.dims[-1], part.stop - part.start
    q_RD = p.q_MD[part]
    scores._rows_kernel[(triton.cdiv(R, rows.BLOCK_R),)](
        plain, p.relations.labels_M[part], q_RD,
        None if inverse_q is None else inverse_q[0, part],
        None if inverse_p is None else inverse_p[0], top, stored, weighted_RD,
        p.number, plain.parts.top.shape[1], R, *q_RD.stride(),
        0 if stored is None else stored.stride(0), D, rows.BLOCK_R, rows.block_d(D), **FUSION,
    )  # fmt: skip


def _product(
    g_RN: Tensor, b: Tensor, out: Tensor, add: bool, *, transpose: bool = False,
    live: Tensor | None = None, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """out = (or +=) g b, or g' b, in fp32; of g the live tiles alone where they are told."""
    a = g_RN.T if transpose else g_RN
    if live is not None:
        blocks = (tiles.BLOCK_M, tiles.BLOCK_N)
        products.filtered(
            a, b, live.T if transpose else live, out, add, tiles,
            *(blocks[::-1] if transpose else blocks),
        )  # fmt: skip
    elif out.device.type == "cpu":  # the interpreter's: the CPU has no product of mixed dtypes
        out.addmm_(a.float(), b.float(), beta=int(add))
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _general(
    problem: Problem, own_HD: Tensor | None, weights_M: Tensor | None, needs: tuple[bool, ...]
) -> Result:
    """Statistics of all blocks first: a column, or a joint softmax, knows its sum only then."""
    p, settings, relations = problem, problem.settings, problem.relations
    (M, D), N, L = p.q_MD.shape, len(p.p_ND), len(p.dims)
    need_q, need_p, need_own, need_scale = needs
    directions = settings.directions
    blocks = [_score_block(p, QP if QP in directions else None, PQ if PQ in directions else None)]
    if QQ in directions:
        blocks.append(_query_block(p))
    if PP in directions:
        blocks.append(_passage_block(p))
    stats: dict[str, Stats] = {}  # [L, rows] each
    for block in blocks:
        stats |= _statistics(p, block, (need_scale, settings.label_smoothing > 0))
    stats = {direction: stats[direction] for direction in directions}
    if PQ in stats:
        stats[PQ] = of_all_ranks(stats[PQ], settings)
    own = None
    if own_HD is not None:
        own = _own(p, own_HD)
        if QP in stats:
            stats[QP] = merge(stats[QP], own.stats)
    rows_of_queries = next((d for d in (QP, QQ) if d in stats), None)
    if rows_of_queries is None:
        hardest_M = torch.full_like(p.similarity_LP[0, :M], -torch.inf)
    else:
        hardest_M = stats[rows_of_queries].top[-1] / p.scale

    loss_M = d_scale = 0.0
    slopes, slope_LP = [], []
    weights = torch.ones_like(hardest_M) if weights_M is None else weights_M
    for level, (_, weight) in enumerate(settings.levels(D)):
        of_level = {d: Stats(*(x[level] for x in stat)) for d, stat in stats.items()}
        s_P = p.similarity_LP[level] * p.scale
        level_loss, level_slopes, slope_P, level_scale = combine(
            p.pairs, s_P, of_level, weights * weight, p.scale, settings, need_scale
        )
        loss_M = loss_M + weight * level_loss
        if need_scale:
            d_scale = d_scale + level_scale
        slopes.append(level_slopes)
        slope_LP.append(slope_P)
    result = Result(loss_M, p.similarity_LP[-1, :M], hardest_M)
    if weights_M is None:
        return result
    slope_LP = _stacked(slope_LP)
    slopes = {
        d: objective.Slopes(*(_stacked(of) for of in zip(*(s[d] for s in slopes), strict=True)))
        for d in stats
    }

    new = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=p.q_MD.device)  # noqa: E731
    dq_MD, dp_ND = new(M, D) if need_q else None, new(N, D) if need_p else None
    # what `finish` takes out along each row, of several levels
    along_q, along_p = (new(L, M), new(L, N)) if L > 1 and settings.normalize else (None, None)
    if need_q or need_p:
        for block in blocks:
            _gradients(p, block, stats, slopes, slope_LP, dq_MD, dp_ND, along_q, along_p)
    d_own = None
    if own is not None and (need_q or need_own):
        d_own = None
        if need_own:
            d_own = own_HD.new_zeros(own_HD.shape, dtype=gradient_dtype(own_HD.dtype))
        g_LH = torch.zeros_like(own.logit_LH)  # d total / d logit
        if QP in stats:
            owner_H, stat, slope = own.owner_H, stats[QP], slopes[QP]
            g_LH = slope.soft[:, owner_H] * (own.logit_LH - stat.lse[:, owner_H]).exp()
            if slope.flat is not None:
                g_LH = g_LH - slope.flat[:, owner_H]
        products.own_gradients(
            p.q_MD, own_HD, p.inverse_q, own.inverse_LH, relations.own_offsets, g_LH * p.scale,
            g_LH * own.logit_LH, dq_MD, d_own, p.dims,
        )  # fmt: skip
        if along_q is not None:
            _add_at(along_q, own.owner_H, g_LH * own.logit_LH)

    outs, ready = [], []
    for x, grad, inverse, along in (
        (p.q_MD, dq_MD, p.inverse_q, along_q),
        (p.p_ND, dp_ND, p.inverse_p, along_p),
    ):
        out = None
        if grad is not None:
            # past the last prefix the gradient is 0
            new = torch.zeros_like if p.dims[-1] < D else torch.empty_like
            out = new(grad, dtype=gradient_dtype(x.dtype))
            ready.append(Rows.of(grad, x, inverse, None, along, out))
        outs.append(out)
    rows.finish(ready, p.dims)
    return result._replace(
        dq_MD=outs[0], dp_ND=outs[1], d_own_HD=d_own, d_scale=d_scale if need_scale else None
    )


def _stacked(levels: Sequence[Tensor | None]) -> Tensor | None:
    """[L, ...]; one level is no copy."""
    if levels[0] is None or len(levels) == 1:
        return levels[0] if levels[0] is None else levels[0][None]
    return torch.stack(levels)


def _statistics(p: Problem, block: Block, want: tuple[bool, bool]) -> dict[str, Stats]:
    """Of a block's directions, [L, rows] and [L, columns]."""
    L, N, tiles = len(p.dims), len(block.b), p.tiles
    if block.row_direction is None and block.column_direction is None:
        return {}
    of_row = 4 * (2 + want[0] + 2 * want[1]) * L
    row_bytes = of_row * triton.cdiv(N, tiles.BLOCK_N) + of_row * N // tiles.BLOCK_M
    chunks = list(_chunks(block.rows, _rows_per_chunk(N, row_bytes, p.settings), tiles.BLOCK_M))
    stats, row_parts = {}, []
    columns = _partials(L, len(chunks), N, block.b, want) if block.column_direction else None
    for number, part in enumerate(chunks):
        R = part.stop - part.start
        of_rows = of_columns = None
        if block.row_direction:
            of_rows = _partials(L, triton.cdiv(N, tiles.BLOCK_N), R, block.b, want)
        if block.column_direction:
            of_columns = _partials(L, triton.cdiv(R, tiles.BLOCK_M), N, block.b, want)
        _launch_statistics(p, block, part, of_rows, of_columns)
        if of_rows is not None:
            row_parts.append(_reduce(of_rows, _partials(L, 1, R, block.b, want)))
        if of_columns is not None:
            _reduce(of_columns, columns, number)
    if block.row_direction:
        stats[block.row_direction] = _stats(*(
            None if x[0] is None else (x[0] if len(x) == 1 else torch.cat(x, 2))[:, 0]
            for x in zip(*row_parts, strict=True)
        ))  # fmt: skip
    if block.column_direction:
        whole = _reduce(columns, _partials(L, 1, N, block.b, want))
        stats[block.column_direction] = _stats(*(None if x is None else x[:, 0] for x in whole))
    return stats


def _stats(
    top: Tensor, z: Tensor, zs: Tensor | None, total: Tensor | None, count: Tensor | None
) -> Stats:
    """What was not wanted is 0."""
    none = torch.zeros_like(z)
    lse = torch.where(z == 0, -torch.inf, top + z.log())
    mean = none if zs is None else torch.where(z == 0, 0, zs / z)
    return Stats(lse, mean, *(none if x is None else x for x in (total, count)), top)


class Own(NamedTuple):
    """Own negatives: their logits, and the statistics of each query over its own."""

    owner_H: Tensor
    inverse_LH: Tensor | None
    logit_LH: Tensor
    stats: Stats


def _own(p: Problem, own_HD: Tensor) -> Own:
    owner_H = expand(p.relations.own_offsets.diff(), len(own_HD))
    inverse_LH, _, similarity_LH = rows.prepare(
        own_HD, p.q_MD, None, owner_H, p.dims, p.settings.normalize
    )
    s_LH = similarity_LH * p.scale
    L, M = len(p.dims), len(p.q_MD)
    zeros_LM = s_LH.new_zeros(L, M)
    at_LH = owner_H.expand(L, -1)
    top_LM = (zeros_LM - torch.inf).scatter_reduce(1, at_LH, s_LH, "amax")
    floor_LM = top_LM.masked_fill(top_LM == -torch.inf, 0)
    e_LH = (s_LH - floor_LM[:, owner_H]).exp()
    z, zs, total = (_add_at(zeros_LM.clone(), owner_H, x) for x in (e_LH, e_LH * s_LH, s_LH))
    count = _add_at(zeros_LM.clone(), owner_H, torch.ones_like(s_LH))
    stats = _stats(top_LM, z, zs, total, count)
    return Own(owner_H, inverse_LH, s_LH, stats)


def _add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values; on the GPU by sorting, not by atomics, so always in one order."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)


def _add_at(out_LR: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The same for each level."""
    for out_R, of_level in zip(out_LR, values, strict=True):
        _add_rows(out_R, index, of_level)
    return out_LR


def _gradients(
    p: Problem, block: Block, stats: dict[str, Stats], slopes: dict[str, objective.Slopes],
    slope_LP: Tensor, dq_MD: Tensor | None, dp_ND: Tensor | None, along_q: Tensor | None,
    along_p: Tensor | None,
) -> None:  # fmt: skip
    """Add a block's gradients to dq and dp, and what is along the rows to the alongs."""
    L, N, M, tiles, settings = len(p.dims), len(block.b), len(p.q_MD), p.tiles, p.settings
    scored = block.row_direction != QQ and block.row_direction != PP  # queries against passages
    d_a, d_b = dq_MD if block.row_direction != PP else dp_ND, dp_ND
    along_a, along_b = along_q if block.row_direction != PP else along_p, along_p
    if block.row_direction == QQ:
        d_b, along_b = dq_MD, along_q
    if d_a is None and d_b is None:
        return
    # Without one bound of both rows and columns, fp16 could overflow: its gradients stay fp32.
    dtype = torch.float32 if p.q_MD.dtype == torch.float16 else p.q_MD.dtype
    most = _rows_per_chunk(N, L * N * torch.empty((), dtype=dtype).element_size(), settings)
    chunks = list(_chunks(block.rows, most, tiles.BLOCK_M))
    out = torch.empty(L, chunks[0].stop, N, dtype=dtype, device=p.q_MD.device)
    label_slope_LM = slope_LP[:, :M].contiguous() if scored else None
    for part in chunks:
        R = part.stop - part.start
        along = (None, None)
        if along_q is not None:
            new = lambda *shape: torch.empty(shape, device=p.q_MD.device)  # noqa: E731
            along = (
                new(L, triton.cdiv(N, tiles.BLOCK_N), R), new(L, triton.cdiv(R, tiles.BLOCK_M), N)
            )  # fmt: skip
        G = out[:, :R]
        _launch_gradients(
            p, block, part, G, along=along,
            row_slopes=_slopes(stats, slopes, block.row_direction, part),
            column_slopes=_slopes(stats, slopes, block.column_direction, slice(None)),
            label_slope_LR=label_slope_LM[:, part].contiguous() if scored else None,
        )  # fmt: skip
        if scored and len(p.pairs.rows_P) > M:
            _scatter_pairs(p, G, slope_LP, part)
        index = None if block.index is None else block.index[part]
        a_RD = block.a[part] if index is None else block.a[index]
        first = 0
        for level, last in enumerate(p.dims):  # dims first:last are in every prefix from `level` on
            dims = slice(first, last)
            g_RN, first = G[level], last
            if d_a is not None:
                b_ND = block.b[:, dims].to(dtype)
                if index is None:
                    _product(g_RN, b_ND, d_a[part, dims], True)
                else:
                    d_rows = torch.empty(R, last - dims.start, device=out.device)
                    _product(g_RN, b_ND, d_rows, False)
                    _add_rows(d_a[:, dims], index, d_rows)
            if d_b is not None:
                _product(g_RN, a_RD[:, dims].to(dtype), d_b[:, dims], True, transpose=True)
        if along_q is not None:
            along_b += along[1].sum(1)
            if index is None:
                along_a[:, part] += along[0].sum(1)
            else:
                _add_at(along_a, index, along[0].sum(1))
    if along_q is not None and scored and len(p.pairs.rows_P) > M:
        more = slice(M, None)
        gs_LK = (slope_LP * p.similarity_LP * p.scale)[:, more]
        _add_at(along_q, p.pairs.rows_P[more], gs_LK)
        _add_at(along_p, p.pairs.columns_P[more], gs_LK)


def _slopes(stats, slopes, direction: str | None, part: slice):
    if direction is None:
        return None
    lse, soft, flat = (
        None if x is None else x[:, part].contiguous()
        for x in (stats[direction].lse, *slopes[direction])
    )  # fmt: skip
    return scores.Slopes(lse, soft, flat, lse.stride(0))


def _scatter_pairs(p: Problem, G_LRN: Tensor, slope_LP: Tensor, part: slice) -> None:
    """Write the gradients of further positives into a chunk; the labels' are there already."""
    more = slice(len(p.q_MD), None)
    rows_K, columns_K = p.pairs.rows_P[more], p.pairs.columns_P[more]
    value_LK = slope_LP[:, more] * p.scale
    if p.inverse_q is not None:
        value_LK = value_LK * p.inverse_q[:, rows_K] * p.inverse_p[:, columns_K]
    value_LK = value_LK.flip(0).cumsum(0).flip(0).contiguous()  # of this and all longer prefixes
    (L, R, _), K = G_LRN.shape, len(rows_K)
    if K:
        scores._scatter_kernel[(triton.cdiv(K, 128), L)](
            G_LRN, rows_K, columns_K, value_LK, part.start, R, K, G_LRN.stride(1), G_LRN.stride(0),
            128, **FUSION,
        )  # fmt: skip
