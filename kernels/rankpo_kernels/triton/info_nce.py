"""InfoNCE on a GPU: which kernels run, in which order, on which chunk of rows.

    few launches    prepare | statistics, pairs, columns, gradients | products that finish   8MND
    plain, exact    prepare | statistics, pairs, gradients, 2 products a chunk | finish      8MND
    plain, stored   prepare | statistics that keep exp(s), pairs, gradients of rows that
                    overflowed, 2 products a chunk | finish                                  6MND
    general         prepare | statistics of every block | pairs, columns |
                    gradients and products of every block | finish                      8MND a block
    kept            prepare | statistics of both directions that keep exp(s), pairs, columns, turn,
                    gradients of rows that overflowed | 2 products | finish                  6MND

plain is one softmax per query (`problem.is_plain`). Nothing waits for the device, and all but the
rarer options' list-making torch calls are kernels of `rows`, `scores`, `slopes`, `products` and
cuBLAS. A chunk holds R rows of gradients [R, N] in the inputs' dtype; products accumulate in fp32.

M queries, N passages, H own negatives, D dims.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rankpo_kernels.problem import (
    PP,
    PQ,
    QP,
    QQ,
    InfoNCEProblem,
    InfoNCEResult,
    Needs,
    gradient_dtype,
    is_plain,
)
from rankpo_kernels.triton import products
from rankpo_kernels.triton.blocks import addressable, as_number, padded
from rankpo_kernels.triton.info_nce_general import general
from rankpo_kernels.triton.info_nce_plain import plain
from rankpo_kernels.triton.inputs import Inputs, in_range_of_fp8, score_block
from rankpo_kernels.triton.kept import against_workspace
from rankpo_kernels.triton.passes import (
    along_parts,
    hardest,
    launch_gradients,
    pair_outputs,
    settle,
    statistics,
)
from rankpo_kernels.triton.products import Product, Totals
from rankpo_kernels.triton.rows import Scale
from rankpo_kernels.triton.streamed import streams
from rankpo_kernels.triton.tiles import (
    SLIM,
    WIDE,
    Tiles,
    against_few_launches,
    against_keeping,
    against_storing,
    cdiv,
    score_tiles,
    streamed_tiles,
)


def info_nce(
    problem: InfoNCEProblem, weights_M: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
    *, tiles: Tiles | None = None, streamed: Tiles | None = None, stored: bool | None = None,
    few: bool | None = None, kept: bool | None = None,
) -> InfoNCEResult:  # fmt: skip
    """Losses and gradients as `chunked.info_nce`; `tiles`, `streamed`, `stored`, `few` (launches)
    and `kept` override the tables."""
    needed = Needs() if weights_M is None else Needs(*needs)
    if not len(problem.q_MD):
        return _nothing(problem, needed)
    problem = _addressable(problem)
    factor_M = factor_N = None
    if problem.settings.precision == "fp8":
        few = False  # that finish gradients by their scores, of which the products know more digits
        (q_MD, factor_M), (p_ND, factor_N) = map(in_range_of_fp8, (problem.q_MD, problem.p_ND))
        problem = problem._replace(q_MD=q_MD, p_ND=p_ND)
    result = _launched(
        problem, weights_M, needed, tiles=tiles, streamed=streamed, stored=stored, few=few,
        kept=kept,
    )  # fmt: skip
    for grad, factor in ((result.dq_MD, factor_M), (result.dp_ND, factor_N)):
        if grad is not None and factor is not None:
            grad *= factor[:, None]
    return result


def _launched(
    problem: InfoNCEProblem, weights_M: Tensor | None, needed: Needs, *, tiles: Tiles | None,
    streamed: Tiles | None, stored: bool | None, few: bool | None, kept: bool | None,
) -> InfoNCEResult:  # fmt: skip
    """In the form that the tables choose, or overrides."""
    q_MD, p_ND, own_HD, _, relations, settings = problem
    (M, D), N = q_MD.shape, len(p_ND)
    weights = Scale(1.0, None)  # of all rows, or [M]
    if weights_M is not None:
        on_device = weights_M.dim() or weights_M.device.type != "cpu"
        weights = as_number(weights_M.expand(len(q_MD)).contiguous() if on_device else weights_M)
    one_softmax, products_needed = is_plain(relations, settings), needed.q or needed.p
    in_fp8 = settings.precision == "fp8"
    if stored is None:
        stored = not against_storing(q_MD.dtype, M, D, N)
    stored = stored and one_softmax and products_needed and q_MD.dtype == torch.bfloat16
    if few is None:
        few = not against_few_launches(q_MD.dtype, M, D, N)
    few = few and not stored and products_needed
    if tiles is None:
        tiles = score_tiles(q_MD.dtype, relations, settings)
        if not few and streams(q_MD, p_ND) and (not in_fp8 or D % 16 == 0):
            streamed = streamed or streamed_tiles(q_MD.dtype, D, relations, settings)
    asked = kept
    if kept is None:
        kept = not against_keeping(q_MD.dtype, D, relations, settings)
    kept = kept and products_needed and not few
    if kept and needed.scale and tiles is WIDE:
        tiles = SLIM  # whose sums have registers left for the moments
    if in_fp8:  # as many bytes of a row at once
        tiles = replace(tiles, BLOCK_K=2 * tiles.BLOCK_K)
        streamed = streamed and replace(streamed, BLOCK_K=2 * streamed.BLOCK_K)
    p = Inputs.of(problem, tiles, streamed)
    if few and _is_one_chunk(p):
        return _in_few_launches(p, weights, needed)
    if one_softmax:
        return plain(p, weights, needed, stored)
    if kept and (why := against_workspace(p, needed.scale)):
        if asked:
            raise ValueError(f"kept=True: {why}; kept=None takes 8MND there")
        kept = False
    return general(p, own_HD, weights, needed, kept)


def _addressable(problem: InfoNCEProblem) -> InfoNCEProblem:
    """Kernels read integers one beside the other, and count dims in 32 bits."""
    own_HD = problem.own_HD
    return problem._replace(
        q_MD=addressable(problem.q_MD),
        p_ND=addressable(problem.p_ND),
        own_HD=None if own_HD is None else addressable(own_HD),
        relations=problem.relations.with_integers(Tensor.contiguous).with_guide(addressable),
    )


def _nothing(problem: InfoNCEProblem, needs: Needs) -> InfoNCEResult:
    """Of no queries."""
    leaves, row = (problem.q_MD, problem.p_ND, problem.own_HD), problem.q_MD.new_empty(0).float()
    dq_MD, dp_ND, d_own_HD = (
        torch.zeros_like(x, dtype=gradient_dtype(x.dtype)) if need and x is not None else None
        for x, need in zip(leaves, needs, strict=False)
    )
    return InfoNCEResult(row, row, row, dq_MD, dp_ND, d_own_HD, row.new_zeros(()))


def _is_one_chunk(p: Inputs) -> bool:
    """One block of scores, whose gradients fit the workspace and are all there is: no prefixes,
    filter, further positives or own negatives."""
    settings, relations, (M, D), N = p.settings, p.relations, p.q_MD.shape, p.N
    parts = M * cdiv(N, p.tiles.BLOCK_N) + N * cdiv(M, p.tiles.BLOCK_M)
    return (
        p.dims == (D,)
        and not settings.gradient_filter
        and not {QQ, PP} & set(settings.directions)
        and relations.positive_offsets is None
        and relations.own_offsets is None
        and M * padded(N) * p.q_MD.element_size() + 6 * 4 * parts <= p.workspace_bytes
    )


def _in_few_launches(p: Inputs, weights: Scale, needs: Needs) -> InfoNCEResult:
    """All rows at once: where launches cost what flops do."""
    M, N, directions = p.M, p.N, p.settings.directions
    block = score_block(p, *(d if d in directions else None for d in (QP, PQ)))
    sums = statistics(p, block, (needs.scale, p.settings.label_smoothing > 0), True)
    outputs = pair_outputs(p, True, needs.scale)
    column_slopes = settle(p, sums, None, weights, outputs)
    del sums
    along = along_parts(p, block, M) if p.inverse_q is not None else (None, None)
    G_MN = p.new(M, padded(N), dtype=p.q_MD.dtype)
    launch_gradients(
        p, block, slice(0, M), G_MN[None], row_slopes=outputs.qp if QP in directions else None,
        column_slopes=column_slopes, label_slope_LR=outputs.slope_LP, along=along,
    )  # fmt: skip
    new = lambda x, need: p.new(*x.shape, dtype=gradient_dtype(x.dtype)) if need else None  # noqa: E731
    dq_MD, dp_ND = new(p.q_MD, needs.q), new(p.p_ND, needs.p)
    total, d_scale = p.new(), p.new() if needs.scale else None
    products.finished(
        G_MN,
        Product.of(G_MN, p.q_MD, p.p_ND, p.inverse_q, along[0], dq_MD, transpose=False),
        Product.of(G_MN, p.p_ND, p.q_MD, p.inverse_p, along[1], dp_ND, transpose=True),
        Totals(
            outputs.loss_LM,
            weights,
            M,
            total,
            outputs.d_scale_LM,
            outputs.d_scale_stride,
            d_scale,
        ),
    )
    return InfoNCEResult(
        outputs.loss_LM[0], p.similarity_LP[0], hardest(outputs, directions), dq_MD, dp_ND, None,
        d_scale, total,
    )  # fmt: skip
