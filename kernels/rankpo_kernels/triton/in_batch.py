"""Losses that are sums over pairs (`chunked.in_batch` has the formulas) on a GPU.

    fp32, bf16    prepare | tiles, settle, 2 products a chunk of rows | finish                  6MND
    fp16          prepare | tiles, settle, tiles, settle, 2 products a chunk | finish           8MND

A tile of scores becomes its gradients in one pass, and leaves sums of its rows; `settle` adds them
up and writes the element of each label, whose slope is the others' with the other sign. fp16 takes
two passes: a row is stored divided by its slopes, whose sum the first pass finds, so that neither
small gradients of converged rows underflow nor the label's element, a sum of N, overflows.

M queries, N passages, D dims; R rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_kernels.problem import (
    HINGE,
    SIGLIP,
    InBatchProblem,
    InBatchResult,
    InBatchSettings,
    gradient_dtype,
)
from rankpo_kernels.relations import Known
from rankpo_kernels.triton import rows
from rankpo_kernels.triton.blocks import (
    Block,
    Guide,
    add_relative,
    addressable,
    as_number,
    chunks_of,
    largest_inverse,
    padded,
    product,
)
from rankpo_kernels.triton.pairs import (
    BLOCK_P,
    BLOCK_R,
    Numbers,
    Outcome,
    Sums,
    settle_kernel,
    tiles_kernel,
)
from rankpo_kernels.triton.rows import Rows, Scale
from rankpo_kernels.triton.scores import Masks
from rankpo_kernels.triton.tiles import FUSION, Tiles, cdiv, multiprocessors, pair_tiles


def in_batch(
    problem: InBatchProblem, known: Known | None, weights_M: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4, *, tiles: Tiles | None = None,
) -> InBatchResult:  # fmt: skip
    """Row sums and gradients as `chunked.in_batch`; `tiles` overrides the table."""
    q_MD, p_ND = addressable(problem.q_MD), addressable(problem.p_ND)
    problem = problem._replace(q_MD=q_MD, p_ND=p_ND)
    settings, (M, D), N, dtype = problem.settings, q_MD.shape, len(p_ND), q_MD.dtype
    need_q, need_p, need_scale, need_bias = needs if weights_M is not None else (False,) * 4
    products_needed = need_q or need_p
    relative = products_needed and dtype == torch.float16
    block, positive_M, reference_M = _block(problem, known)
    inverse_q, inverse_p = block.inverse_a, block.inverse_b
    if tiles is None:
        more = settings.sft_weight > 0 or need_scale
        tiles = pair_tiles(dtype, settings, reference_M is not None, more)
    kernels = ChunkKernels.of(problem, block, tiles, weights_M)

    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q_MD.device)  # noqa: E731,E501
    wanted = (True,) * 4 + (need_scale, need_bias, relative, relative)
    outcome = Outcome._make(new(M) if want else None for want in wanted)
    dq_MD = new(M, D, dtype=gradient_dtype(dtype)) if need_q else None
    dp_out = new(N, D, dtype=gradient_dtype(dtype)) if need_p else None
    if dp_out is not None and not M:
        dp_out.zero_()
    row_bytes = 24 * kernels.tiles_n + (padded(N) * q_MD.element_size() if products_needed else 0)
    workspace = settings.workspace(q_MD.device)
    fill = (D, multiprocessors(q_MD.device)) if products_needed else None
    chunks = chunks_of(M, N, row_bytes, workspace, tiles.BLOCK_M, fill) if M else []
    R0 = chunks[0].stop if chunks else 0
    dq_RD, dp_ND = new(R0, D) if need_q else None, new(N, D) if need_p else None
    out_RN = new(R0, padded(N), dtype=dtype) if products_needed else None
    top = largest_inverse(inverse_p, p_ND) if relative else None
    for part in chunks:
        R, first = part.stop - part.start, part.start == 0
        local = Outcome._make(None if x is None else x[part] for x in outcome)
        reference_R = None if reference_M is None else reference_M[part]
        sums = Sums.empty(kernels.tiles_n, R, need_scale, q_MD.device)
        for look in range(1 + relative):
            kernels.tiles_and_settle(
                part, sums, local, positive_M[part], reference_R, top,
                None if out_RN is None or look != relative else out_RN[:R], again=look > 0,
            )  # fmt: skip
        ready = []
        out = None if out_RN is None else out_RN[:R, :N]
        q_RD, inverse = q_MD[part], None if inverse_q is None else inverse_q[:, part]
        if dq_MD is not None and dq_RD is not None and out is not None:
            product(out, p_ND, dq_RD[:R], False, precision=tiles.PRECISION)
            ready.append(Rows.of(dq_RD[:R], q_RD, inverse, local.factor_R, None, dq_MD[part]))
        if dp_ND is not None and out is not None and relative:
            assert local.factor_R is not None
            inverse_R = None if inverse is None else inverse[0]
            add_relative(out, q_RD, local.factor_R, inverse_R, dp_ND, first)
        elif dp_ND is not None and out is not None:
            product(out, q_RD, dp_ND, not first, transpose=True, precision=tiles.PRECISION)
        if dp_ND is not None and dp_out is not None and part.stop == M:
            ready.append(Rows.of(dp_ND, p_ND, inverse_p, None, None, dp_out))
        rows.finish(ready, (D,), top, Scale(1.0, None))
    return InBatchResult(
        outcome.loss_R, positive_M, outcome.hardest_R, outcome.wins_R, outcome.total_R, dq_MD,
        dp_out, *(None if x is None else x.sum() for x in (outcome.d_scale_R, outcome.d_bias_R)),
    )  # fmt: skip


class ChunkKernels(NamedTuple):
    """The two kernels with what is the same for every chunk."""

    block: Block
    tiles: Tiles
    numbers: Numbers
    settings: InBatchSettings
    weights_M: Tensor | None

    @staticmethod
    def of(
        problem: InBatchProblem, block: Block, tiles: Tiles, weights_M: Tensor | None
    ) -> "ChunkKernels":
        settings = problem.settings
        numbers = Numbers(
            as_number(problem.scale), as_number(problem.bias), settings.label_smoothing or None,
            settings.rankpo_weight, settings.sft_weight, settings.sft_scale,
        )  # fmt: skip
        return ChunkKernels(block, tiles, numbers, settings, weights_M)

    @property
    def tiles_n(self) -> int:
        return cdiv(len(self.block.b), self.tiles.BLOCK_N)

    def tiles_and_settle(
        self, part: slice, sums: Sums, outcome: Outcome, positive_R: Tensor,
        reference_R: Tensor | None, top: Tensor | None, out: Tensor | None, *, again: bool,
    ) -> None:  # fmt: skip
        """One pass over a chunk's scores; `again`: with what the first pass found."""
        block, tiles, settings = self.block, self.tiles, self.settings
        a, b, *references, masks = block.chunk(part)
        R, siglip = part.stop - part.start, settings.kind == SIGLIP
        weights_R = None if self.weights_M is None else self.weights_M[part]
        sizes = (R, len(block.b), 0 if out is None else out.stride(0))
        tiles_kernel[(cdiv(R, tiles.BLOCK_M) * self.tiles_n,)](
            a, b, *references, masks, sums, positive_R, reference_R, weights_R,
            outcome.by_R if again else None, top, out, self.numbers, *sizes,
            HINGE=settings.kind == HINGE, SIGLIP=siglip, SFT=settings.sft_weight > 0,
            DIMS=(block.a.shape[1],), REFERENCE_DIMS=block.guide_dims,
            **tiles.arguments,
        )  # fmt: skip
        settle_kernel[(cdiv(R, BLOCK_R),)](
            sums, outcome, masks.label_R, positive_R, weights_R,
            None if block.inverse_a is None else block.inverse_a[0, part],
            None if block.inverse_b is None else block.inverse_b[0],
            top, out, self.numbers, self.tiles_n, *sizes, siglip, BLOCK_R, BLOCK_P, **FUSION,
        )  # fmt: skip


def _block(problem: InBatchProblem, known: Known | None) -> tuple[Block, Tensor, Tensor | None]:
    """The scores, and the similarities of labels under the model and the reference."""
    q_MD, p_ND, normalize = problem.q_MD, problem.p_ND, problem.settings.normalize
    labels_M = problem.relations.labels_M.contiguous()
    inverse_q, inverse_p, (positive_M,) = rows.prepare(
        q_MD, p_ND, None, labels_M, (q_MD.shape[1],), normalize
    )
    guide, reference_M = None, None
    if problem.relations.guide is not None:
        gq, gp = map(addressable, problem.relations.guide)
        inverse_gq, inverse_gp, (reference_M,) = rows.prepare(
            gq, gp, None, labels_M, (gq.shape[1],), normalize
        )
        guide = Guide(gq, inverse_gq, gp, inverse_gp)
    masks = Masks.of(labels_M, known, None, None, None)
    block = Block(q_MD, inverse_q, None, p_ND, inverse_p, guide, masks, 0, None, None)
    return block, positive_M, reference_M
