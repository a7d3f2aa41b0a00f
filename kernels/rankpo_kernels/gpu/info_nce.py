"""InfoNCE on a GPU: which kernels run, in which order, on which chunk of rows.

    few launches    prepare | statistics, pairs, columns, gradients | products that finish   8MND
    plain, exact    prepare | statistics, pairs, gradients, 2 products a chunk | finish      8MND
    plain, stored   prepare | statistics that keep exp(s), pairs, gradients of rows that
                    overflowed, 2 products a chunk | finish                                  6MND
    general         prepare | statistics of every block | pairs, columns |
                    gradients and products of every block | finish                      8MND a block

plain is one softmax per query (`objective.is_plain`). Nothing waits for the device, and all but the
rarer options' list-making torch calls are kernels of `rows`, `scores`, `slopes`, `products` and
cuBLAS. A chunk holds R rows of gradients [R, N] in the inputs' dtype; products accumulate in fp32.

M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes.
"""

from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rankpo_kernels.gpu import products, rows, scores, slopes
from rankpo_kernels.gpu.blocks import (
    Block,
    add_relative,
    add_rows,
    addressable,
    as_number,
    chunks_of,
    largest_inverse,
    padded,
    product,
    torch_number,
)
from rankpo_kernels.gpu.products import Product, Totals
from rankpo_kernels.gpu.rows import Rows, Scale, absent
from rankpo_kernels.gpu.scores import EXEMPT, MASKED, Hardness, Masks, Partials, Slopes
from rankpo_kernels.gpu.slopes import Found, Softmaxes, Stored
from rankpo_kernels.gpu.tiles import FUSION, Tiles, score_tiles, stores_scores, takes_few_launches
from rankpo_kernels.objective import (
    PP,
    PQ,
    QP,
    QQ,
    Known,
    Pairs,
    Relations,
    Result,
    Settings,
    Stats,
    add_ranks_,
    expand,
    gradient_dtype,
    is_plain,
    known,
    limits,
    of_all_ranks,
    positive_pairs,
)  # fmt: skip


def info_nce(
    q_MD: Tensor, p_ND: Tensor, own_HD: Tensor | None, scale: Tensor, relations: Relations,
    settings: Settings, weights_M: Tensor | None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
    *, tiles: Tiles | None = None, stored: bool | None = None, few: bool | None = None,
) -> Result:  # fmt: skip
    """Losses and gradients as `chunked.info_nce`; `tiles`, `stored` and `few` (launches) override
    the tables."""
    needs = (False,) * 4 if weights_M is None else needs
    if not len(q_MD):
        return _nothing(q_MD, p_ND, own_HD, needs)
    # kernels read integers and weights one beside the other
    integers = [None if x is None else x.contiguous() for x in relations[:9]]
    guides = [None if x is None else addressable(x) for x in relations[9:]]
    relations = Relations(*integers, *guides)
    weights = Scale(1.0, None)  # of all rows, or [M]
    if weights_M is not None:
        on_device = weights_M.dim() or weights_M.device.type != "cpu"
        weights = as_number(weights_M.expand(len(q_MD)).contiguous() if on_device else weights_M)
    q_MD, p_ND, own_HD = (None if x is None else addressable(x) for x in (q_MD, p_ND, own_HD))
    plain = is_plain(relations, settings)
    if stored is None:
        stored = stores_scores(*q_MD.shape, len(p_ND))
    stored = stored and plain and any(needs[:2]) and q_MD.dtype == torch.bfloat16
    stored = stored and not settings.gradient_filter
    if few is None:
        few = takes_few_launches(q_MD.dtype, *q_MD.shape, len(p_ND))
    few = few and not stored and any(needs[:2])
    tiles = tiles or score_tiles(q_MD.dtype, relations, settings, stored, few)
    problem = _problem(q_MD, p_ND, scale, relations, settings, tiles)
    if few and _is_one_chunk(problem):
        return _in_few_launches(problem, weights, needs)
    if plain:
        return _plain(problem, weights, needs, stored)
    return _general(problem, own_HD, weights, needs)


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
    scale: Scale
    relations: Relations
    settings: Settings
    tiles: Tiles
    dims: tuple[int, ...]
    pairs: Pairs | None  # None where there are the labels alone
    known: Known | None
    inverse_q: Tensor | None  # [L, M]
    inverse_p: Tensor | None  # [L, N]
    similarity_LP: Tensor  # of the positive pairs
    limit_LM: Tensor | None
    guide: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None  # and inverse norms

    @property
    def columns_P(self) -> Tensor:
        return self.relations.labels_M if self.pairs is None else self.pairs.columns_P

    @property
    def rows_P(self) -> Tensor:
        if self.pairs is None:
            return torch.arange(len(self.q_MD), device=self.q_MD.device)
        return self.pairs.rows_P

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q_MD.device)


def _problem(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor, relations: Relations, settings: Settings,
    tiles: Tiles,
) -> Problem:  # fmt: skip
    M, N = len(q_MD), len(p_ND)
    dims = tuple(prefix for prefix, _ in settings.levels(q_MD.shape[1]))
    pairs, of_pairs = None, (None, relations.labels_M)
    if relations.positive_offsets is not None:
        pairs = positive_pairs(relations, torch.float32)
        of_pairs = pairs[:2]
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
    related = any(x is not None for x in relations[1:7]) or QQ in settings.directions
    return Problem(
        q_MD, p_ND, as_number(scale),
        relations, settings, tiles, dims, pairs,
        known(relations, N) if related or PP in settings.directions else None,
        inverse_q, inverse_p, similarity_LP,
        None if settings.margin is None else limits(judged_LM, settings).contiguous(),
        guide,
    )  # fmt: skip


def _score_block(problem: Problem, row: str | None, column: str | None) -> Block:
    """Queries against passages."""
    p = problem
    keyed = any(x is not None for x in p.relations[1:7])
    class_M, _, start_N, stop_N, keys = p.known if keyed else [None] * 5
    M, owner_N, (chosen, other) = len(p.q_MD), p.relations.curated_N, p.settings.hardness
    if p.limit_LM is None and chosen == other:
        owner_N = None
    hardness = None
    if row == QP and (other or (chosen and owner_N is not None)):
        hardness = Hardness(chosen, other)
    masks = Masks(
        p.relations.labels_M, class_M, start_N, stop_N, keys, p.limit_LM, 0,
        None if owner_N is None else torch.arange(M, device=p.q_MD.device), owner_N,
    )  # fmt: skip
    guide = p.guide and (p.guide[0], p.guide[2], p.guide[1], p.guide[3])
    curated = 0 if owner_N is None else EXEMPT
    return Block(
        p.q_MD, p.inverse_q, None, p.p_ND, p.inverse_p, guide, masks, curated, row, column, hardness
    )  # fmt: skip


def _query_block(problem: Problem) -> Block:
    """Queries against queries, who stand for the texts of their labels."""
    p, labels_M = problem, problem.relations.labels_M
    start_M, stop_M = p.known.start_N[labels_M], p.known.stop_N[labels_M]
    masks = Masks(None, p.known.class_M, start_M, stop_M, p.known.keys, p.limit_LM, 0, None, None)
    guide = p.guide and (p.guide[0], p.guide[2], p.guide[0], p.guide[2])
    return Block(p.q_MD, p.inverse_q, None, p.q_MD, p.inverse_q, guide, masks, 0, QQ, None)


def _passage_block(problem: Problem) -> Block:
    """The passage of every positive pair against all passages."""
    p, rows_P = problem, problem.rows_P
    owner_N = p.relations.curated_N
    limit_LP = None if p.limit_LM is None else p.limit_LM[:, rows_P].contiguous()
    masks = Masks(
        None, p.known.class_M[rows_P], p.known.start_N, p.known.stop_N, p.known.keys, limit_LP, 0,
        None if owner_N is None else rows_P, owner_N,
    )  # fmt: skip
    guide = p.guide and (p.guide[1], p.guide[3], p.guide[1], p.guide[3])
    curated, index = 0 if owner_N is None else MASKED, p.columns_P
    return Block(p.p_ND, p.inverse_p, index, p.p_ND, p.inverse_p, guide, masks, curated, PP, None)


def _partials(
    p: Problem, parts: int, rows: int, want: tuple[bool, bool], hard: bool = False
) -> Partials:
    """`want`: the moment, for the scale's gradient; sum and count, for smoothing. `hard`: with
    hardness."""
    moment, counted = want
    return Partials(*[
        p.new(len(p.dims), parts, rows) if wanted else None
        for wanted in (True, True, moment, counted, counted, hard)
    ])  # fmt: skip


def _launch_statistics(
    problem: Problem, block: Block, part: slice, row_parts: Partials | None,
    column_parts: Partials | None, positive_R=None, inverse_top=None, stored=None,
) -> None:  # fmt: skip
    tiles, R, N = problem.tiles, part.stop - part.start, len(block.b)
    grid = (triton.cdiv(R, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N),)
    scores._statistics_kernel[grid](
        *block.chunk(part), block.hardness or absent(Hardness),
        row_parts or absent(Partials), column_parts or absent(Partials),
        positive_R, inverse_top, stored,
        problem.scale, R, N, 0 if stored is None else stored.stride(0),
        problem.dims, _guide_dims(block), block.curated, **_shape(tiles),
    )  # fmt: skip


def _launch_gradients(
    problem: Problem, block: Block, part: slice, out_LRN: Tensor, *, row_slopes=None,
    column_slopes=None, label_slope_LR=None, inverse_top=None, tile_parts=None, live=None,
    along=(None, None), filter_mass: float = 0.0, only_over: bool = False,
) -> None:  # fmt: skip
    tiles, R, N = problem.tiles, part.stop - part.start, len(block.b)
    if only_over:  # a row that overflows works for all rows of its tile
        tiles = replace(tiles, BLOCK_M=min(64, tiles.BLOCK_M))
    grid = (triton.cdiv(R, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N),)
    scores._gradients_kernel[grid](
        *block.chunk(part), block.hardness or absent(Hardness),
        row_slopes or absent(Slopes), column_slopes or absent(Slopes), label_slope_LR,
        inverse_top, tile_parts or absent(Partials), live, out_LRN, *along,
        problem.scale, filter_mass, R, N, out_LRN.stride(1), out_LRN.stride(0),
        0 if label_slope_LR is None else label_slope_LR.stride(0),
        problem.dims, _guide_dims(block), block.curated, only_over, **_shape(tiles),
    )  # fmt: skip


def _along(p: Problem, block: Block, R: int) -> tuple[Tensor, Tensor]:
    """Memory for the parts of gradients along R rows and along all columns."""
    L, N = len(p.dims), len(block.b)
    tiles_m, tiles_n = triton.cdiv(R, p.tiles.BLOCK_M), triton.cdiv(N, p.tiles.BLOCK_N)
    return p.new(L, tiles_n, R), p.new(L, tiles_m, N)


def _guide_dims(block: Block) -> tuple[int, ...]:
    return () if block.guide is None else (block.guide[0].shape[1],)


def _shape(tiles: Tiles) -> dict[str, int]:
    return asdict(tiles) | FUSION


def _found(p: Problem, gradients: bool, need_scale: bool) -> Found:
    """Memory for what the pairs leave."""
    L, M, P = len(p.dims), len(p.q_MD), len(p.columns_P)
    directions, smooth = p.settings.directions, p.settings.label_smoothing > 0

    def slopes_of(direction: str, rows: int) -> Slopes:
        if not gradients or direction not in directions:
            return absent(Slopes)
        flat = p.new(L, rows) if smooth else None
        return Slopes(p.new(L, rows), p.new(L, rows), flat, rows if L > 1 else 0)

    by_columns = gradients and PQ in directions
    of_columns = len(p.p_ND) if by_columns else 0  # whose share `_settle` adds
    d_scale = p.new(L, M + of_columns) if need_scale else None
    return Found(
        p.new(L, M), p.new(M), p.new(L, P) if gradients else None,
        slopes_of(QP, M), slopes_of(QQ, M), slopes_of(PP, P),
        p.new(L, P) if by_columns else None, p.new(L, P) if by_columns and smooth else None,
        d_scale, M + of_columns, None,
    )  # fmt: skip


def _part_of_found(found: Found, part: slice) -> Found:
    """Of a plain loss, which has one level and a pair a row."""
    names = ("loss_LM", "hardest_M", "slope_LP", "d_scale_LM", "factor_M")
    pick = lambda x: None if x is None else x[..., part]  # noqa: E731
    of_rows = found.qp._replace(lse=pick(found.qp.lse), soft=pick(found.qp.soft))
    return found._replace(qp=of_rows, **{name: pick(getattr(found, name)) for name in names})


def _settle(
    p: Problem, sums: dict[str, Partials], own: Partials | None, weights: Scale, found: Found,
    stored: Stored | None = None, part: slice = slice(None),
) -> Slopes | None:  # fmt: skip
    """Fill `found` from the statistics of all directions; returns the slopes of columns."""
    settings, columns_P = p.settings, p.columns_P[part]
    if settings.group is not None:
        sums = sums | {PQ: _of_all_ranks(p, sums[PQ])}
    M, N, P, L, D = len(found.hardest_M), len(p.p_ND), len(columns_P), len(p.dims), p.dims[-1]
    of = Softmaxes(*map(slopes.Softmax.of, [sums.get(QP), own, *map(sums.get, (PQ, QQ, PP))]))
    smoothing = settings.label_smoothing or None
    levels = tuple([weight for _, weight in settings.levels(D)])
    slopes._pairs_kernel[(triton.cdiv(M, slopes.BLOCK), L)](
        of, found, stored or absent(Stored), columns_P,
        p.relations.positive_offsets, p.similarity_LP[:, part],
        weights, smoothing, p.scale, M, N, P, D,
        levels, settings.joint, slopes.BLOCK, min(128, rows.block_d(D)),
        num_warps=4, **FUSION,
    )  # fmt: skip
    if found.pull_LP is None:
        return None
    flat = None if smoothing is None else p.new(L, N)
    out = Slopes(p.new(L, N), p.new(L, N), flat, N if L > 1 else 0)
    d_scale = found.d_scale_LM
    slopes._columns_kernel[(triton.cdiv(N, 32), L)](
        of.pq, columns_P, found.pull_LP, found.flat_LP, out,
        None if d_scale is None else d_scale[:, M:], found.d_scale_stride, p.scale, N, P,
        32, 256, **FUSION,
    )  # fmt: skip
    for x in (out.soft, out.flat):
        if x is not None:
            add_ranks_(x, settings)
    return out


def _of_all_ranks(p: Problem, parts: Partials) -> Partials:
    """Of columns, over the queries of all ranks: one part."""
    want = (parts.zs is not None, parts.sum is not None)
    one = slopes.reduce(parts, _partials(p, 1, len(p.p_ND), want))
    top, z, *rest, _ = one
    none = torch.zeros_like(z)
    zs, total, count = (none if x is None else x for x in rest)
    lse, mean = top + z.log(), zs / z.masked_fill(z == 0, 1)  # z = 0: log is -inf, and so is top
    stats = of_all_ranks(Stats(lse, mean, total, count, top), p.settings)
    whole = (stats.lse, (stats.lse != -torch.inf).float(), stats.mean, stats.sum, stats.count, None)
    return Partials(*(x if y is not None else None for x, y in zip(whole, one, strict=True)))


def _hardest(found: Found, directions: tuple[str, ...]) -> Tensor:
    of_rows = QP in directions or QQ in directions
    return found.hardest_M if of_rows else found.hardest_M.fill_(-torch.inf)


def _is_one_chunk(p: Problem) -> bool:
    """One block of scores, whose gradients fit the workspace and are all there is: no prefixes,
    filter, further positives or own negatives."""
    settings, relations, (M, D), N = p.settings, p.relations, p.q_MD.shape, len(p.p_ND)
    parts = M * triton.cdiv(N, p.tiles.BLOCK_N) + N * triton.cdiv(M, p.tiles.BLOCK_M)
    return (
        p.dims == (D,)
        and not settings.gradient_filter
        and not {QQ, PP} & set(settings.directions)
        and relations.positive_offsets is None
        and relations.own_offsets is None
        and M * padded(N) * p.q_MD.element_size() + 6 * 4 * parts <= settings.workspace_bytes
    )


def _in_few_launches(p: Problem, weights: Scale, needs: tuple[bool, ...]) -> Result:
    """All rows at once: where launches cost what flops do."""
    M, N, directions = len(p.q_MD), len(p.p_ND), p.settings.directions
    need_q, need_p, _, need_scale = needs
    block = _score_block(p, *(d if d in directions else None for d in (QP, PQ)))
    sums = _statistics(p, block, (need_scale, p.settings.label_smoothing > 0), True)
    found = _found(p, True, need_scale)
    column_slopes = _settle(p, sums, None, weights, found)
    del sums
    along = _along(p, block, M) if p.inverse_q is not None else (None, None)
    G_MN = p.new(M, padded(N), dtype=p.q_MD.dtype)
    _launch_gradients(
        p, block, slice(0, M), G_MN[None], row_slopes=found.qp if QP in directions else None,
        column_slopes=column_slopes, label_slope_LR=found.slope_LP, along=along,
    )  # fmt: skip
    new = lambda x, need: p.new(*x.shape, dtype=gradient_dtype(x.dtype)) if need else None  # noqa: E731
    dq_MD, dp_ND = new(p.q_MD, need_q), new(p.p_ND, need_p)
    total, d_scale = p.new(), p.new() if need_scale else None
    products.finished(
        G_MN,
        Product.of(G_MN, p.q_MD, p.p_ND, p.inverse_q, along[0], dq_MD, transpose=False),
        Product.of(G_MN, p.p_ND, p.q_MD, p.inverse_p, along[1], dp_ND, transpose=True),
        Totals(found.loss_LM, weights, M, total, found.d_scale_LM, found.d_scale_stride, d_scale),
    )
    return Result(
        found.loss_LM[0], p.similarity_LP[0], _hardest(found, directions), dq_MD, dp_ND, None,
        d_scale, total,
    )  # fmt: skip


def _plain(problem: Problem, weights: Scale, needs: tuple[bool, ...], stored: bool) -> Result:
    """Every chunk of rows by itself: its softmax needs no other row."""
    p, tiles, settings = problem, problem.tiles, problem.settings
    (M, D), N, dtype = p.q_MD.shape, len(p.p_ND), p.q_MD.dtype
    need_q, need_p, _, need_scale = needs
    products_needed = need_q or need_p
    # fp16 keeps rows divided by their slopes, or the small gradients of converged rows underflow
    relative = products_needed and (stored or dtype == torch.float16)
    block = _score_block(p, QP, None)
    tiles_n = triton.cdiv(N, tiles.BLOCK_N)
    hard = block.hardness is not None
    row_bytes = 4 * (3 + hard) * tiles_n
    row_bytes += padded(N) * p.q_MD.element_size() if products_needed else 0
    chunks = chunks_of(M, N, row_bytes, settings.workspace_bytes, tiles.BLOCK_M)
    R0 = chunks[0].stop

    found = _found(p, products_needed, need_scale)
    if relative:
        found = found._replace(factor_M=p.new(M))
    in_fp32 = gradient_dtype(dtype) == torch.float32  # then sums become results where they are
    new = lambda x, need: p.new(*x.shape, dtype=gradient_dtype(dtype)) if need else None  # noqa: E731
    dq_MD, dp_out = new(p.q_MD, need_q), new(p.p_ND, need_p)
    dq_RD = p.new(R0, D) if need_q and not in_fp32 else None
    dp_ND = dp_out if in_fp32 or not need_p else p.new(N, D)
    out_RN = p.new(R0, padded(N), dtype=dtype) if products_needed else None
    weighted_RD = p.new(R0, D, dtype=dtype) if stored else None
    top = largest_inverse(p.inverse_p, p.p_ND) if relative else None
    for part in chunks:
        R = part.stop - part.start
        parts = _partials(p, tiles_n, R, (need_scale, False), hard)
        q_RD, inverse_q = p.q_MD[part], None if p.inverse_q is None else p.inverse_q[:, part]
        out, keep, beside = out_RN[:R] if products_needed else None, {}, None
        if stored:
            keep = {"positive_R": p.similarity_LP[0, part], "inverse_top": top, "stored": out}
            of_q, of_p = (None if x is None else x[0] for x in (inverse_q, p.inverse_p))
            of_q = (q_RD, *q_RD.stride(), of_q)
            beside = Stored(out, out.stride(0), weighted_RD, *of_q, of_p, top)
        _launch_statistics(p, block, part, parts, None, **keep)
        of_weights = weights if weights.at is None else Scale(0.0, weights.at[part])
        of_part = _part_of_found(found, part)
        _settle(p, {QP: parts}, None, of_weights, of_part, beside, part)
        if not products_needed:
            continue
        live = None
        if settings.gradient_filter:
            live = p.new(triton.cdiv(R, tiles.BLOCK_M), tiles_n, dtype=torch.int32)
        _launch_gradients(
            p, block, part, out[None], row_slopes=of_part.qp, label_slope_LR=of_part.slope_LP,
            inverse_top=top, tile_parts=None if live is None else parts, live=live,
            only_over=stored, filter_mass=settings.gradient_filter * tiles.BLOCK_N / N,
        )  # fmt: skip
        out = out[:, :N]
        first = part.start == 0
        dq = dq_MD[part] if need_q and in_fp32 else dq_RD[:R] if need_q else None
        if need_q:
            product(out, p.p_ND, dq, False, live=live, tiles=tiles)
        if need_p and relative and not stored:
            of_rows = (of_part.factor_M, None if inverse_q is None else inverse_q[0])
            add_relative(out, q_RD, *of_rows, dp_ND, first, live=live, tiles=tiles)
        elif need_p:
            left_RD = weighted_RD[:R] if stored else q_RD
            product(out, left_RD, dp_ND, not first, transpose=True, live=live, tiles=tiles)
        ready = []
        if need_q:
            ready.append(Rows.of(dq, q_RD, inverse_q, of_part.factor_M, None, dq_MD[part]))
        if need_p and part.stop == M:
            ready.append(Rows.of(dp_ND, p.p_ND, p.inverse_p, None, None, dp_out))
        rows.finish(ready, p.dims, top, p.scale)
    d_scale = found.d_scale_LM.sum() if need_scale else None
    loss_M, hardest_M = found.loss_LM[0], found.hardest_M
    return Result(loss_M, p.similarity_LP[0], hardest_M, dq_MD, dp_out, None, d_scale)


def _general(
    problem: Problem, own_HD: Tensor | None, weights: Scale, needs: tuple[bool, ...]
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
    sums: dict[str, Partials] = {}
    want = (need_scale, settings.label_smoothing > 0)
    for block in blocks:
        sums |= _statistics(p, block, want, len(blocks) == 1 and p.pairs is None)
    own = None if own_HD is None or QP not in directions else _own(p, own_HD)
    found = _found(p, any(needs), need_scale)
    column_slopes = _settle(p, sums, own and own.sums, weights, found)
    del sums  # as much memory as the chunk that comes now
    loss_M = found.loss_LM[0] if L == 1 else found.loss_LM.sum(0)
    result = Result(loss_M, p.similarity_LP[-1, :M], _hardest(found, directions))
    if not any(needs):
        return result
    row_slopes = {QP: found.qp, QQ: found.qq, PP: found.pp}

    zeros = lambda *shape: p.new(*shape).zero_()  # noqa: E731
    dq_MD, dp_ND = zeros(M, D) if need_q else None, zeros(N, D) if need_p else None
    # what `finish` takes out along each row, of several levels
    along_q, along_p = (None, None)
    if L > 1 and settings.normalize:
        along_q, along_p = zeros(L, M), zeros(L, N)
    if need_q or need_p:
        for block in blocks:
            _gradients(
                p, block, row_slopes, column_slopes, found.slope_LP, dq_MD, dp_ND, along_q, along_p
            )
    d_own = None
    if own_HD is not None and need_own:
        d_own = own_HD.new_zeros(own_HD.shape, dtype=gradient_dtype(own_HD.dtype))
    if own is not None and (need_q or need_own):
        lse_LH, soft_LH, flat_LH = (None if x is None else x[:, own.owner_H] for x in found.qp[:3])
        g_LH = soft_LH * (own.hard_LH - lse_LH).exp()  # d total / d logit
        if flat_LH is not None:
            g_LH = g_LH - flat_LH
        products.own_gradients(
            p.q_MD, own_HD, p.inverse_q, own.inverse_LH, relations.own_offsets,
            g_LH * torch_number(p.scale), g_LH * own.logit_LH, dq_MD, d_own, p.dims,
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
    d_scale = found.d_scale_LM.sum() if need_scale else None
    return result._replace(dq_MD=outs[0], dp_ND=outs[1], d_own_HD=d_own, d_scale=d_scale)


def _statistics(
    p: Problem, block: Block, want: tuple[bool, bool], in_tiles: bool
) -> dict[str, Partials]:
    """Of a block's directions, each in parts: of its chunks, or of its tiles where they may be (no
    other block needs the memory, and a column is merged once) and there is one chunk alone."""
    L, N, tiles, hard = len(p.dims), len(block.b), p.tiles, block.hardness is not None
    if block.row_direction is None and block.column_direction is None:
        return {}
    of_row = 4 * (2 + want[0] + 2 * want[1] + hard) * L
    row_bytes = of_row * triton.cdiv(N, tiles.BLOCK_N) + of_row * N // tiles.BLOCK_M
    chunks = chunks_of(block.rows, N, row_bytes, p.settings.workspace_bytes, tiles.BLOCK_M)
    sums, row_parts = {}, []
    columns = _partials(p, len(chunks), N, want) if block.column_direction else None
    for at, part in enumerate(chunks):
        R = part.stop - part.start
        of_rows = of_columns = None
        if block.row_direction:
            of_rows = _partials(p, triton.cdiv(N, tiles.BLOCK_N), R, want, hard)
        if block.column_direction:
            of_columns = _partials(p, triton.cdiv(R, tiles.BLOCK_M), N, want)
        _launch_statistics(p, block, part, of_rows, of_columns)
        if in_tiles and len(chunks) == 1:
            row_parts, columns = [of_rows], of_columns
            break
        if of_rows is not None:
            row_parts.append(slopes.reduce(of_rows, _partials(p, 1, R, want, hard)))
        if of_columns is not None:
            slopes.reduce(of_columns, columns, at)
    if block.row_direction:
        sums[block.row_direction] = row_parts[0] if len(row_parts) == 1 else Partials(*(
            None if x[0] is None else torch.cat(x, 2) for x in zip(*row_parts, strict=True)
        ))  # fmt: skip
    if block.column_direction:
        sums[block.column_direction] = columns
    return sums


class Own(NamedTuple):
    """Own negatives: their logits, and the statistics of each query over its own."""

    owner_H: Tensor
    inverse_LH: Tensor | None
    logit_LH: Tensor
    hard_LH: Tensor  # with hardness
    sums: Partials


def _own(p: Problem, own_HD: Tensor) -> Own:
    owner_H = expand(p.relations.own_offsets.diff(), len(own_HD))
    inverse_LH, _, similarity_LH = rows.prepare(
        own_HD, p.q_MD, None, owner_H, p.dims, p.settings.normalize
    )
    s_LH = hard_LH = similarity_LH * torch_number(p.scale)
    L, M = len(p.dims), len(p.q_MD)
    zeros_LM = s_LH.new_zeros(L, M)
    at_LH = owner_H.expand(L, -1)
    top_LM, hardest_LM = (zeros_LM - torch.inf).scatter_reduce(1, at_LH, s_LH, "amax"), None
    if chosen := p.settings.hardness[0]:
        by = 1 + chosen / torch_number(p.scale)
        hard_LH, top_LM, hardest_LM = s_LH * by, top_LM * by, top_LM
    floor_LM = top_LM.masked_fill(top_LM == -torch.inf, 0)
    e_LH = (hard_LH - floor_LM[:, owner_H]).exp()
    sums = (e_LH, e_LH * s_LH, s_LH, torch.ones_like(s_LH))
    sums = [top_LM, *(_add_at(zeros_LM.clone(), owner_H, x) for x in sums), hardest_LM]
    sums = Partials(*(x if x is None else x[:, None] for x in sums))
    return Own(owner_H, inverse_LH, s_LH, hard_LH, sums)


def _add_at(out_LR: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The same for each level."""
    for out_R, of_level in zip(out_LR, values, strict=True):
        add_rows(out_R, index, of_level)
    return out_LR


def _gradients(
    p: Problem, block: Block, row_slopes: dict[str, Slopes], column_slopes: Slopes | None,
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
    row_bytes = L * padded(N) * dtype.itemsize
    chunks = chunks_of(block.rows, N, row_bytes, settings.workspace_bytes, tiles.BLOCK_M)
    out = p.new(L, chunks[0].stop, padded(N), dtype=dtype)
    for part in chunks:
        R = part.stop - part.start
        along = (None, None)
        if along_q is not None:
            along = _along(p, block, R)
        G = out[:, :R]
        of_rows = row_slopes.get(block.row_direction)
        _launch_gradients(
            p, block, part, G, along=along,
            row_slopes=of_rows and _part_of_slopes(of_rows, part),
            column_slopes=column_slopes if block.column_direction else None,
            label_slope_LR=slope_LP[:, part] if scored else None,
        )  # fmt: skip
        if scored and p.pairs is not None:
            _scatter_pairs(p, G, slope_LP, part)
        index = None if block.index is None else block.index[part]
        a_RD = block.a[part] if index is None else block.a[index]
        first = 0
        for level, last in enumerate(p.dims):  # dims first:last are in every prefix from `level` on
            dims = slice(first, last)
            g_RN, first = G[level, :, :N], last
            if d_a is not None:
                b_ND = block.b[:, dims].to(dtype)
                if index is None:
                    product(g_RN, b_ND, d_a[part, dims], True)
                else:
                    d_rows = p.new(R, last - dims.start)
                    product(g_RN, b_ND, d_rows, False)
                    add_rows(d_a[:, dims], index, d_rows)
            if d_b is not None:
                product(g_RN, a_RD[:, dims].to(dtype), d_b[:, dims], True, transpose=True)
        if along_q is not None:
            along_b += along[1].sum(1)
            if index is None:
                along_a[:, part] += along[0].sum(1)
            else:
                _add_at(along_a, index, along[0].sum(1))
    if along_q is not None and scored and p.pairs is not None:
        more = slice(M, None)
        gs_LK = (slope_LP * p.similarity_LP * torch_number(p.scale))[:, more]
        _add_at(along_q, p.pairs.rows_P[more], gs_LK)
        _add_at(along_p, p.pairs.columns_P[more], gs_LK)


def _part_of_slopes(slopes: Slopes, part: slice) -> Slopes:
    return Slopes(*(None if x is None else x[:, part] for x in slopes[:3]), slopes.stride)


def _scatter_pairs(p: Problem, G_LRN: Tensor, slope_LP: Tensor, part: slice) -> None:
    """Write the gradients of further positives into a chunk; the labels' are there already."""
    more = slice(len(p.q_MD), None)
    rows_K, columns_K = p.pairs.rows_P[more], p.pairs.columns_P[more]
    value_LK = slope_LP[:, more] * torch_number(p.scale)
    if p.inverse_q is not None:
        value_LK = value_LK * p.inverse_q[:, rows_K] * p.inverse_p[:, columns_K]
    value_LK = value_LK.flip(0).cumsum(0).flip(0).contiguous()  # of this and all longer prefixes
    (L, R, _), K = G_LRN.shape, len(rows_K)
    if K:
        scores._scatter_kernel[(triton.cdiv(K, 128), L)](
            G_LRN, rows_K, columns_K, value_LK, part.start, R, K, G_LRN.stride(1), G_LRN.stride(0),
            128, **FUSION,
        )  # fmt: skip
