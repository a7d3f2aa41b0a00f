"""InfoNCE as one softmax per query: every chunk of rows by itself, which needs no other row.

    exact     statistics, pairs, gradients, 2 products a chunk                                 8MND
    stored    statistics that keep exp(s), pairs, gradients of rows that overflowed,
              2 products a chunk                                                               6MND

R rows of a chunk, M queries, N passages, D dims.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.objective import by_pull
from rankpo_kernels.problem import QP, InfoNCEResult, Needs, gradient_dtype
from rankpo_kernels.triton import rows
from rankpo_kernels.triton.blocks import (
    Block,
    add_relative,
    chunks_of,
    largest_inverse,
    padded,
    product,
)
from rankpo_kernels.triton.inputs import Inputs, score_block
from rankpo_kernels.triton.passes import (
    launch_gradients,
    launch_rest,
    launch_statistics,
    output_rows,
    pair_outputs,
    partials,
    settle,
)
from rankpo_kernels.triton.products import Chosen
from rankpo_kernels.triton.rows import Rows, Scale
from rankpo_kernels.triton.scores import Partials
from rankpo_kernels.triton.slopes import PairOutputs, Stored
from rankpo_kernels.triton.tiles import cdiv, multiprocessors


def plain(p: Inputs, weights: Scale, needs: Needs, stored: bool) -> InfoNCEResult:
    M, block = p.M, score_block(p, QP, None)
    with_gradients = needs.q or needs.p
    products = (p.dims[-1], multiprocessors(p.q_MD.device)) if with_gradients else None
    row_bytes, block_m = _row_bytes(p, block, with_gradients), p.row_tiles.BLOCK_M
    chunks = chunks_of(M, p.N, row_bytes, p.workspace_bytes, block_m, products)
    outputs = pair_outputs(p, with_gradients, needs.scale)
    memory = Memory.of(p, chunks[0].stop, needs, stored)
    if memory.relative:
        outputs = outputs._replace(factor_M=p.new(M))
    for part in chunks:
        parts = partials(p, _tiles_n(p), part.stop - part.start, (needs.scale, False),
                         block.hardness is not None)  # fmt: skip
        local = output_rows(outputs, part)
        _settle_chunk(p, block, part, parts, weights, local, memory)
        if memory.G_RN is not None:
            _write_gradients(p, block, part, local, memory)
            _add_products(p, part, local, memory, _chosen(p, part, weights, local))
    return InfoNCEResult(
        outputs.loss_LM[0], p.similarity_LP[0], outputs.hardest_M, memory.dq_MD, memory.dp_out,
        None, None if outputs.d_scale_LM is None else outputs.d_scale_LM.sum(),
    )  # fmt: skip


def _tiles_n(p: Inputs) -> int:
    return cdiv(p.N, p.row_tiles.BLOCK_N)


def _row_bytes(p: Inputs, block: Block, with_gradients: bool) -> int:
    """Of the workspace, that a row takes."""
    statistics = 4 * (3 + (block.hardness is not None)) * _tiles_n(p)
    return statistics + (padded(p.N) * p.q_MD.element_size() if with_gradients else 0)


class Memory(NamedTuple):
    """What chunks of rows fill, one after the other; None where there is no need of it."""

    G_RN: Tensor | None  # stored exponentials, or d total / d dot
    dq_MD: Tensor | None  # in its last form
    dq_RD: Tensor | None  # sums of a chunk in fp32, where dq_MD itself cannot hold them
    dp_out: Tensor | None  # in its last form
    dp_ND: Tensor | None  # sums in fp32, which may be dp_out
    weighted_RD: Tensor | None  # factor * q / |q| of rows that store exponentials
    inverse_top: Tensor | None
    relative: bool  # rows of G are divided by their slopes, or by what exponentials leave out

    @staticmethod
    def of(p: Inputs, R: int, needs: Needs, stored: bool) -> "Memory":
        (M, D), N, dtype = p.q_MD.shape, p.N, p.q_MD.dtype
        products = needs.q or needs.p
        # fp16 keeps rows divided by their slopes, or small gradients of converged rows underflow
        relative = products and (stored or dtype == torch.float16)
        out_dtype = gradient_dtype(dtype)
        in_fp32 = out_dtype == torch.float32  # then sums become results where they are
        dp_out = p.new(N, D, dtype=out_dtype) if needs.p else None
        return Memory(
            p.new(R, padded(N), dtype=dtype) if products else None,
            p.new(M, D, dtype=out_dtype) if needs.q else None,
            p.new(R, D) if needs.q and not in_fp32 else None,
            dp_out,
            dp_out if in_fp32 or not needs.p else p.new(N, D),
            p.new(R, D, dtype=dtype) if stored else None,
            largest_inverse(p.inverse_p, p.p_ND) if relative else None,
            relative,
        )


def _query_rows(p: Inputs, part: slice) -> tuple[Tensor, Tensor | None]:
    """(q of a chunk, inverse norms [1, R])."""
    return p.q_MD[part], None if p.inverse_q is None else p.inverse_q[:, part]


def _settle_chunk(
    p: Inputs, block: Block, part: slice, parts: Partials, weights: Scale, local: PairOutputs,
    memory: Memory,
) -> None:  # fmt: skip
    """Statistics of a chunk, and what the pairs make of them."""
    keep: dict[str, Any] = {}
    beside = None
    if memory.weighted_RD is not None:
        assert memory.G_RN is not None and memory.inverse_top is not None
        G_RN, top = memory.G_RN[: part.stop - part.start], memory.inverse_top
        keep = {"positive_R": p.similarity_LP[0, part], "inverse_top": top, "stored": G_RN}
        q_RD, inverse_q = _query_rows(p, part)
        of_q, of_p = (None if x is None else x[0] for x in (inverse_q, p.inverse_p))
        stride_q, stride_qd = q_RD.stride()
        beside = Stored(
            G_RN, G_RN.stride(0), memory.weighted_RD, q_RD, stride_q, stride_qd, of_q, of_p, top
        )
    launch_statistics(p, block, part, parts, None, **keep)
    of_rows = weights if weights.at is None else Scale(0.0, weights.at[part])
    settle(p, {QP: parts}, None, of_rows, local, beside, part)


def _write_gradients(
    p: Inputs, block: Block, part: slice, local: PairOutputs, memory: Memory
) -> None:
    """d total / d dot of a chunk; of stored exponentials, of those rows alone that overflowed."""
    assert memory.G_RN is not None
    G_RN, of_rows = memory.G_RN[: part.stop - part.start], local.qp
    labels_LR = local.slope_LP
    if memory.weighted_RD is not None:
        assert labels_LR is not None and memory.inverse_top is not None
        launch_rest(p, block, part, G_RN, of_rows, labels_LR, inverse_top=memory.inverse_top)
    else:
        launch_gradients(
            p, block, part, G_RN[None], row_slopes=of_rows, label_slope_LR=labels_LR,
            inverse_top=memory.inverse_top,
        )  # fmt: skip


def _chosen(p: Inputs, part: slice, weights: Scale, local: PairOutputs) -> Chosen | None:
    """The rows that are not filtered away."""
    if not p.settings.gradient_filter:
        return None
    weights_R = weights.value if weights.at is None else weights.at[part]
    return Chosen(*by_pull(local.loss_LM[0], weights_R, p.settings.gradient_filter))


def _add_products(
    p: Inputs, part: slice, local: PairOutputs, memory: Memory, chosen: Chosen | None
) -> None:
    """dq of a chunk, and its part of dp."""
    R, N, first = part.stop - part.start, p.N, part.start == 0
    assert memory.G_RN is not None
    G_RN, (q_RD, inverse_q) = memory.G_RN[:R, :N], _query_rows(p, part)
    ready = []
    if memory.dq_MD is not None:
        dq_RD = memory.dq_MD[part] if memory.dq_RD is None else memory.dq_RD[:R]
        product(G_RN, p.p_ND, dq_RD, False, chosen=chosen, precision=p.tiles.PRECISION)
        ready.append(Rows.of(dq_RD, q_RD, inverse_q, local.factor_M, None, memory.dq_MD[part]))
    if memory.dp_ND is not None and memory.relative and memory.weighted_RD is None:
        assert local.factor_M is not None
        inverse_R = None if inverse_q is None else inverse_q[0]
        add_relative(G_RN, q_RD, local.factor_M, inverse_R, memory.dp_ND, first, chosen)
    elif memory.dp_ND is not None:
        left_RD = q_RD if memory.weighted_RD is None else memory.weighted_RD[:R]
        product(
            G_RN, left_RD, memory.dp_ND, not first, transpose=True, chosen=chosen,
            precision=p.tiles.PRECISION,
        )  # fmt: skip
    last = part.stop == p.M
    if memory.dp_ND is not None and memory.dp_out is not None and last:
        ready.append(Rows.of(memory.dp_ND, p.p_ND, p.inverse_p, None, None, memory.dp_out))
    rows.finish(ready, p.dims, memory.inverse_top, p.scale)
