"""InfoNCE with every option: statistics of all blocks first, since a column, or a joint softmax,
knows its sum only then; then what the pairs make of them, and gradients of every block.  8MND a
block

R rows of a chunk, M queries, N passages, P positive pairs, H own negatives, D dims, L prefixes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.problem import PP, PQ, QP, QQ, InfoNCEResult, Needs, gradient_dtype
from rankpo_kernels.relations import Pairs, expand
from rankpo_kernels.triton import gradients, products, rows
from rankpo_kernels.triton.blocks import Block, add_rows, chunks_of, padded, product, torch_number
from rankpo_kernels.triton.inputs import Inputs, passage_block, query_block, score_block
from rankpo_kernels.triton.kept import Kept
from rankpo_kernels.triton.passes import (
    along_parts,
    folded_slopes,
    hardest,
    launch_gradients,
    pair_outputs,
    settle,
    statistics,
)
from rankpo_kernels.triton.rows import Rows, Scale
from rankpo_kernels.triton.scores import Partials, Slopes
from rankpo_kernels.triton.slopes import PairOutputs
from rankpo_kernels.triton.tiles import FUSION, cdiv, multiprocessors


def general(
    p: Inputs, own_HD: Tensor | None, weights: Scale, needs: Needs, keep: bool = False
) -> InfoNCEResult:  # fmt: skip
    """`keep`: the exponentials of the one block."""
    directions, blocks = p.settings.directions, _blocks(p)
    want = (needs.scale, p.settings.label_smoothing > 0)
    sums: dict[str, Partials] = {}
    kept = Kept.of(p) if keep else None
    for block in blocks:
        if kept is not None:
            sums |= kept.statistics(p, block, want)
        else:
            sums |= statistics(p, block, want, len(blocks) == 1 and p.pairs is None)
    own = None if own_HD is None or QP not in directions else OwnNegatives.of(p, own_HD)
    outputs = pair_outputs(p, any(needs), needs.scale)
    column_slopes = settle(p, sums, own and own.sums, weights, outputs)
    del sums  # as much memory as the chunk that comes now
    loss_M = outputs.loss_LM[0] if len(p.dims) == 1 else outputs.loss_LM.sum(0)
    positive_M = p.similarity_LP[-1, : p.M]
    result = InfoNCEResult(loss_M, positive_M, hardest(outputs, directions))
    if not any(needs):
        return result
    grads = Gradients.zeros(p, needs)
    for block in blocks:
        _add_block(p, block, outputs, column_slopes, grads, kept)
    d_own_HD = None
    if own_HD is not None and needs.own:
        d_own_HD = own_HD.new_zeros(own_HD.shape, dtype=gradient_dtype(own_HD.dtype))
    if own_HD is not None and own is not None:
        _add_own(p, own_HD, own, outputs.qp, grads, d_own_HD)
    dq_MD, dp_ND = _finished(p, grads)
    d_scale = None if outputs.d_scale_LM is None else outputs.d_scale_LM.sum()
    return result._replace(dq_MD=dq_MD, dp_ND=dp_ND, d_own_HD=d_own_HD, d_scale=d_scale)


def _blocks(p: Inputs) -> list[Block]:
    """The blocks that the directions read."""
    directions = p.settings.directions
    blocks = [score_block(p, *(d if d in directions else None for d in (QP, PQ)))]
    if QQ in directions:
        blocks.append(query_block(p))
    if PP in directions:
        blocks.append(passage_block(p))
    return blocks


class OwnNegatives(NamedTuple):
    """Negatives of one query each: their logits, and the statistics of each query over its own."""

    owner_H: Tensor
    inverse_LH: Tensor | None
    logit_LH: Tensor
    hard_LH: Tensor  # with hardness
    sums: Partials

    @staticmethod
    def of(p: Inputs, own_HD: Tensor) -> "OwnNegatives":
        assert p.relations.own_offsets is not None
        owner_H = expand(p.relations.own_offsets.diff(), len(own_HD))
        inverse_LH, _, similarity_LH = rows.prepare(
            own_HD, p.q_MD, None, owner_H, p.dims, p.settings.normalize
        )
        s_LH = hard_LH = similarity_LH * torch_number(p.scale)
        L, M = len(p.dims), p.M
        zeros_LM = s_LH.new_zeros(L, M)
        at_LH = owner_H.expand(L, -1)
        top_LM, hardest_LM = (zeros_LM - torch.inf).scatter_reduce(1, at_LH, s_LH, "amax"), None
        chosen, _ = p.settings.hardness
        if chosen:
            by = 1 + chosen / torch_number(p.scale)
            hard_LH, top_LM, hardest_LM = s_LH * by, top_LM * by, top_LM
        floor_LM = top_LM.masked_fill(top_LM == -torch.inf, 0)
        e_LH = (hard_LH - floor_LM[:, owner_H]).exp()
        terms = (e_LH, e_LH * s_LH, s_LH, torch.ones_like(s_LH))
        sums = [top_LM, *(_add_at(zeros_LM.clone(), owner_H, x) for x in terms), hardest_LM]
        parts = Partials._make(x if x is None else x[:, None] for x in sums)
        return OwnNegatives(owner_H, inverse_LH, s_LH, hard_LH, parts)


def _add_at(out_LR: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The same for each level."""
    for out_R, of_level in zip(out_LR, values, strict=True):
        add_rows(out_R, index, of_level)
    return out_LR


class Gradients(NamedTuple):
    """Sums that the blocks add to, in fp32; None where no gradient was asked for."""

    dq_MD: Tensor | None
    dp_ND: Tensor | None
    along_q: Tensor | None  # what `finish` takes out along each row, of several levels
    along_p: Tensor | None

    @staticmethod
    def zeros(p: Inputs, needs: Needs) -> "Gradients":
        (M, D), N, L = p.q_MD.shape, p.N, len(p.dims)
        zeros = lambda *shape: p.new(*shape).zero_()  # noqa: E731
        along = L > 1 and p.settings.normalize
        return Gradients(
            zeros(M, D) if needs.q else None, zeros(N, D) if needs.p else None,
            zeros(L, M) if along else None, zeros(L, N) if along else None,
        )  # fmt: skip

    def sides(self, block: Block) -> tuple[Tensor | None, ...]:
        """(d a, d b, along a, along b) of a block."""
        queries, passages = (self.dq_MD, self.along_q), (self.dp_ND, self.along_p)
        d_a, along_a = passages if block.row_direction == PP else queries
        d_b, along_b = queries if block.row_direction == QQ else passages
        return d_a, d_b, along_a, along_b


def _add_block(
    p: Inputs, block: Block, outputs: PairOutputs, column_slopes: Slopes | None, grads: Gradients,
    kept: Kept | None,
) -> None:  # fmt: skip
    """A block's gradients, and what is along the rows."""
    d_a, d_b, along_a, along_b = grads.sides(block)
    if d_a is None and d_b is None:
        return
    if kept is not None and column_slopes is not None and outputs.slope_LP is not None:
        G_MN = kept.gradients(p, block, outputs.qp, column_slopes, outputs.slope_LP[0])
        _add_products(p, block, slice(0, len(G_MN)), G_MN[None], d_a, d_b)
        return
    L, N = len(p.dims), len(block.b)
    scored = block.row_direction not in (QQ, PP)  # queries against passages
    slopes: dict[str | None, Slopes] = {QP: outputs.qp, QQ: outputs.qq, PP: outputs.pp}
    row_slopes, slope_LP = slopes.get(block.row_direction), outputs.slope_LP
    assert slope_LP is not None  # with gradients
    # Without one bound of both rows and columns, fp16 could overflow: its gradients stay fp32.
    dtype = torch.float32 if p.q_MD.dtype == torch.float16 else p.q_MD.dtype
    row_bytes = L * padded(N) * dtype.itemsize
    products = (p.dims[-1], multiprocessors(block.b.device))
    chunks = chunks_of(block.rows, N, row_bytes, p.workspace_bytes, p.tiles.BLOCK_M, products)
    out = p.new(L, chunks[0].stop, padded(N), dtype=dtype)
    if not block.column_direction:
        column_slopes = None
    folded = folded_slopes(p, block, row_slopes, column_slopes)
    for part in chunks:
        R = part.stop - part.start
        G_LRN = out[:, :R]
        along = None if along_a is None else along_parts(p, block, R)
        launch_gradients(
            p, block, part, G_LRN, along=along or (None, None),
            row_slopes=row_slopes and _part_of_slopes(row_slopes, part),
            column_slopes=column_slopes, folded=folded,
            label_slope_LR=slope_LP[:, part] if scored else None,
        )  # fmt: skip
        if scored and p.pairs is not None:
            _scatter_pairs(p, p.pairs, G_LRN, slope_LP, part)
        _add_products(p, block, part, G_LRN[:, :, :N], d_a, d_b)
        if along is not None and along_a is not None and along_b is not None:
            of_rows, of_columns = along
            along_b += of_columns.sum(1)
            if block.index is None:
                along_a[:, part] += of_rows.sum(1)
            else:
                _add_at(along_a, block.index[part], of_rows.sum(1))
    if along_a is not None and along_b is not None and scored and p.pairs is not None:
        more = slice(p.M, None)
        gs_LK = (slope_LP * p.similarity_LP * torch_number(p.scale))[:, more]
        _add_at(along_a, p.pairs.rows_P[more], gs_LK)
        _add_at(along_b, p.pairs.columns_P[more], gs_LK)


def _add_products(
    p: Inputs, block: Block, part: slice, G_LRN: Tensor, d_a: Tensor | None, d_b: Tensor | None
) -> None:
    """d a += G b and d b += G' a, of a chunk of rows."""
    index = None if block.index is None else block.index[part]
    a_RD = (block.a[part] if index is None else block.a[index]).to(G_LRN.dtype)
    first, precision = 0, p.tiles.PRECISION
    for level, last in enumerate(p.dims):  # dims first:last are in every prefix from `level` on
        dims = slice(first, last)
        g_RN, first = G_LRN[level], last
        if d_a is not None:
            b_ND = block.b[:, dims].to(G_LRN.dtype)
            if index is None:
                product(g_RN, b_ND, d_a[part, dims], True, precision=precision)
            else:
                d_rows = p.new(len(a_RD), last - dims.start)
                product(g_RN, b_ND, d_rows, False, precision=precision)
                add_rows(d_a[:, dims], index, d_rows)
        if d_b is not None:
            product(g_RN, a_RD[:, dims], d_b[:, dims], True, transpose=True, precision=precision)


def _part_of_slopes(slopes: Slopes, part: slice) -> Slopes:

    def pick(x: Any) -> Any:
        return None if x is None else x[:, part]

    return slopes._replace(lse=pick(slopes.lse), soft=pick(slopes.soft), flat=pick(slopes.flat))


def _scatter_pairs(p: Inputs, pairs: Pairs, G_LRN: Tensor, slope_LP: Tensor, part: slice) -> None:
    """Write the gradients of further positives into a chunk; the labels' are there already."""
    more = slice(p.M, None)
    rows_K, columns_K = pairs.rows_P[more], pairs.columns_P[more]
    value_LK = slope_LP[:, more] * torch_number(p.scale)
    if p.inverse_q is not None and p.inverse_p is not None:
        value_LK = value_LK * p.inverse_q[:, rows_K] * p.inverse_p[:, columns_K]
    value_LK = value_LK.flip(0).cumsum(0).flip(0).contiguous()  # of this and all longer prefixes
    (L, R, _), K = G_LRN.shape, len(rows_K)
    if K:
        gradients.scatter_kernel[(cdiv(K, 128), L)](
            G_LRN, rows_K, columns_K, value_LK, part.start, R, K, G_LRN.stride(1), G_LRN.stride(0),
            128, **FUSION,
        )  # fmt: skip


def _add_own(
    p: Inputs, own_HD: Tensor, own: OwnNegatives, slopes: Slopes, grads: Gradients,
    d_own_HD: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of own negatives and of their queries."""
    if grads.dq_MD is None and d_own_HD is None:
        return
    owner_H, offsets = own.owner_H, p.relations.own_offsets
    assert offsets is not None
    g_LH = slopes.soft[:, owner_H] * (own.hard_LH - slopes.lse[:, owner_H]).exp()
    if slopes.flat is not None:
        g_LH = g_LH - slopes.flat[:, owner_H]  # d total / d logit
    products.own_gradients(
        p.q_MD, own_HD, p.inverse_q, own.inverse_LH, offsets,
        g_LH * torch_number(p.scale), g_LH * own.logit_LH, grads.dq_MD, d_own_HD, p.dims,
    )  # fmt: skip
    if grads.along_q is not None:
        _add_at(grads.along_q, owner_H, g_LH * own.logit_LH)


def _finished(p: Inputs, grads: Gradients) -> list[Tensor | None]:
    """Those of queries and passages in their last form, past the last prefix 0."""
    outs: list[Tensor | None] = []
    ready = []
    for x, grad, inverse, along in (
        (p.q_MD, grads.dq_MD, p.inverse_q, grads.along_q),
        (p.p_ND, grads.dp_ND, p.inverse_p, grads.along_p),
    ):
        out = None
        if grad is not None:
            new = torch.zeros_like if p.dims[-1] < x.shape[1] else torch.empty_like
            out = new(grad, dtype=gradient_dtype(x.dtype))
            ready.append(Rows.of(grad, x, inverse, None, along, out))
        outs.append(out)
    rows.finish(ready, p.dims)
    return outs
