"""Passages ranked for a query: similarities, loss and gradients by one kernel, a query a program.

The formulas are those of `chunked.rankpo`. A tile [BLOCK_K, BLOCK_D] holds the passages of
the query; where it has all dims, rows stay in registers between the sums and the gradients, else
they are read once more, from L2. Bound by memory: the embeddings in, their gradients out.

B queries, K passages of each, D dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankpo_kernels.problem import RankPOProblem, RankPOResult, RankPOSettings
from rankpo_kernels.triton.rows import TINY, absent
from rankpo_kernels.triton.slopes import sigmoid, softplus
from rankpo_kernels.triton.tiles import FUSION

MOST_PASSAGES = 64  # K x K comparisons fit registers up to here


@dataclass(frozen=True)
class Tile:
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int


def tile(K: int, D: int) -> Tile:
    """16 numbers a thread; a long pair has 32, which keeps it in registers, and a large group 8
    beside its comparisons."""
    block_k, block_d = triton.next_power_of_2(K), triton.next_power_of_2(D)
    if K > 2:
        return Tile(block_k, min(block_d, 2048 // block_k), 4 if K <= 32 else 8)
    block_d = min(block_d, 16384 // block_k)
    return Tile(block_k, block_d, max(1, min(16, block_k * block_d // 512)))


class Rule(NamedTuple):
    """The numbers of the settings."""

    beta: float
    temperature: float
    gamma_beta_ratio: float
    label_smoothing: float
    sft_weight: float
    rankpo_weight: float

    @staticmethod
    def of(settings: RankPOSettings) -> "Rule":
        return Rule(*[float(getattr(settings, name)) for name in Rule._fields])


class Passages(NamedTuple):
    """[B, K, D], or [B, D] for one, and where their gradients go; None for what is not there."""

    x: Tensor
    stride_b: int
    stride_k: int
    stride_d: int
    out: Tensor | None  # contiguous

    @staticmethod
    def of(x: Tensor, out: Tensor | None) -> "Passages":
        stride_b, *between, stride_d = x.stride()
        return Passages(x, stride_b, between[0] if between else 0, stride_d, out)


@triton.jit
def _load(passages, row, offs_k, offs_d, mask_kd):
    x_kd = row * passages.stride_b + offs_k.to(tl.int64)[:, None] * passages.stride_k
    x_kd += offs_d.to(tl.int64)[None, :] * passages.stride_d
    return tl.load(passages.x + x_kd, mask=mask_kd, other=0.0).to(tl.float32)


@triton.jit
def _rows(q_ptr, stride_q, stride_qd, first, second, row, offs_k, live_k, offs_d, D):
    """q [BLOCK_D] and the passages [BLOCK_K, BLOCK_D]; zero where there is none."""
    mask_d = offs_d < D
    q = q_ptr + row * stride_q + offs_d.to(tl.int64) * stride_qd
    q = tl.load(q, mask=mask_d, other=0.0).to(tl.float32)
    mask_kd = live_k[:, None] & mask_d[None, :]
    if second.x is None:
        return q, _load(first, row, offs_k, offs_d, mask_kd)
    else:  # a passage a tensor: what is masked is 0
        p = _load(first, row, offs_k, offs_d, mask_kd & (offs_k == 0)[:, None])
        return q, p + _load(second, row, offs_k * 0, offs_d, mask_kd & (offs_k == 1)[:, None])


@triton.jit
def _store(passages, row, K, value_kd, offs_k, offs_d, mask_kd, D):
    if passages.out is not None:
        to_kd = (row * K + offs_k)[:, None] * D + offs_d[None, :]
        tl.store(passages.out + to_kd, value_kd.to(passages.out.dtype.element_ty), mask=mask_kd)


@triton.jit
def _divisor(top):
    return tl.where(top > TINY, top, 1.0)


@triton.jit
def _add(sums, q, p, NORMALIZE: tl.constexpr):
    """Sums of products of rows divided by their largest elements so far, beside which squares stay
    in range."""
    top_q, top_k, square_q, square_k, dot_k = sums
    if NORMALIZE:
        before_q, before_k = top_q, top_k
        top_q = tl.maximum(top_q, tl.max(tl.abs(q), 0))
        top_k = tl.maximum(top_k, tl.max(tl.abs(p), 1))
        by_q, by_k = _divisor(top_q), _divisor(top_k)
        fade_q, fade_k = before_q / by_q, before_k / by_k
        q, p = q / by_q, p / by_k[:, None]
        square_q = square_q * fade_q * fade_q + tl.sum(q * q, 0)
        square_k = square_k * fade_k * fade_k + tl.sum(p * p, 1)
        dot_k = dot_k * fade_q * fade_k
    dot_k += tl.sum(q[None, :] * p, 1)
    return top_q, top_k, square_q, square_k, dot_k


@triton.jit
def _inverse(square):
    """1 / sqrt; 0 for a zero vector. NaN == 0 is false, and NaN must stay."""
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)))


@triton.jit
def _pairwise(s_k, ref_k, above_kk, rule, HINGE: tl.constexpr):
    """Mean over pairs [winner, loser], and its derivatives."""
    advantage = s_k[:, None] - s_k[None, :]
    over = advantage - (ref_k[:, None] - ref_k[None, :])
    x = rule.beta * (over / rule.temperature - rule.gamma_beta_ratio)
    if HINGE:
        loss = tl.where(x >= 1, 0.0, 1 - x)  # NaN stays NaN
        slope = tl.where(x >= 1, 0.0, -1.0)
    else:
        loss = softplus(-x) + rule.label_smoothing * x
        slope = rule.label_smoothing - sigmoid(-x)
    loss = tl.where(rule.rankpo_weight == 0, 0.0, rule.rankpo_weight * loss)
    slope = rule.rankpo_weight * rule.beta / rule.temperature * slope
    x = advantage / rule.temperature
    loss += tl.where(rule.sft_weight == 0, 0.0, rule.sft_weight * softplus(-x))
    slope -= rule.sft_weight / rule.temperature * sigmoid(-x)
    loss, slope = tl.where(above_kk, loss, 0.0), tl.where(above_kk, slope, 0.0)
    pairs = tl.maximum(tl.sum(tl.sum(above_kk.to(tl.float32), 1), 0), 1.0)
    return tl.sum(tl.sum(loss, 1), 0) / pairs, (tl.sum(slope, 1) - tl.sum(slope, 0)) / pairs


@triton.jit
def _plackett_luce(s_k, ref_k, above_kk, rule):
    scale = rule.beta / rule.temperature
    r_k = scale * (s_k - ref_k)
    lower_kk = tl.where(above_kk, r_k[None, :], -float("inf"))
    counts_k = tl.max(above_kk.to(tl.int32), 1) > 0
    top_k = tl.max(lower_kk, 1)
    top_k = tl.where(top_k == -float("inf"), 0.0, top_k)
    e_kk = tl.exp(lower_kk - top_k[:, None])  # 0 where not lower
    total_k = tl.where(counts_k, tl.sum(e_kk, 1), 1.0)
    gap_k = top_k + tl.log(total_k) - r_k
    pull_k = tl.where(counts_k, sigmoid(gap_k), 0.0)
    loss = tl.sum(tl.where(counts_k, softplus(gap_k), 0.0), 0)
    return loss, scale * (tl.sum((pull_k / total_k)[:, None] * e_kk, 0) - pull_k)


@triton.jit
def rankpo_kernel(
    q_ptr, first, second, grades_ptr, reference_ptr, weights_ptr,
    loss_ptr, similarity_ptr, dq_ptr,
    stride_q, stride_qd, D, K, C, rule,
    NORMALIZE: tl.constexpr, HINGE: tl.constexpr, LISTWISE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_k, offs_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    live_k = offs_k < K
    grade_k = -offs_k.to(tl.float32)  # the first is preferred
    if grades_ptr is not None:
        grade_k = tl.load(grades_ptr + row * K + offs_k, mask=live_k, other=0.0)
        live_k = live_k & (grade_k == grade_k)
    above_kk = live_k[:, None] & live_k[None, :] & (grade_k[:, None] > grade_k[None, :])
    ref_k = tl.zeros([BLOCK_K], tl.float32)
    if reference_ptr is not None:
        ref_k = tl.load(reference_ptr + row * C + offs_k, mask=live_k & (offs_k < C), other=0.0)

    zeros_k = tl.zeros([BLOCK_K], tl.float32)
    zero = tl.sum(zeros_k, 0)
    sums = (zero, zeros_k, zero, zeros_k, zeros_k)
    if WHOLE:
        q, p = _rows(q_ptr, stride_q, stride_qd, first, second, row, offs_k, live_k, offs_d, D)
        sums = _add(sums, q, p, NORMALIZE)
    else:
        for start in range(0, D, BLOCK_D):
            x, y = _rows(
                q_ptr, stride_q, stride_qd, first, second, row, offs_k, live_k, start + offs_d, D
            )
            sums = _add(sums, x, y, NORMALIZE)
    top_q, top_k, square_q, square_k, s_k = sums
    top_q, top_k = _divisor(top_q), _divisor(top_k)
    inverse_q, inverse_k = zero + 1.0, zeros_k + 1.0  # of what is left of the norms beside the tops
    if NORMALIZE:
        inverse_q, inverse_k = _inverse(square_q), _inverse(square_k)
        s_k = s_k * inverse_q * inverse_k
    if LISTWISE:
        loss, slope_k = _plackett_luce(s_k, ref_k, above_kk, rule)
    else:
        loss, slope_k = _pairwise(s_k, ref_k, above_kk, rule, HINGE)
    tl.store(loss_ptr + row, loss)
    tl.store(similarity_ptr + row * K + offs_k, s_k, mask=offs_k < K)
    if weights_ptr is not None:
        slope_k = slope_k * tl.load(weights_ptr + row)
        along_k = slope_k * s_k if NORMALIZE else zeros_k
        for start in range(0, D, BLOCK_D):
            offs = start + offs_d
            if WHOLE:
                x, y = q, p
            else:
                x, y = _rows(
                    q_ptr, stride_q, stride_qd, first, second, row, offs_k, live_k, offs, D
                )
            x, y = x / top_q * inverse_q, y / top_k[:, None] * inverse_k[:, None]
            mask_d = offs < D
            if dq_ptr is not None:
                dq = tl.sum(slope_k[:, None] * y, 0) - tl.sum(along_k, 0) * x
                dq = dq * inverse_q / top_q
                tl.store(dq_ptr + row * D + offs, dq.to(dq_ptr.dtype.element_ty), mask=mask_d)
            dp = slope_k[:, None] * x[None, :] - along_k[:, None] * y
            dp = dp * inverse_k[:, None] / top_k[:, None]
            mask_kd = (offs_k < K)[:, None] & mask_d[None, :]
            if second.x is None:
                _store(first, row, K, dp, offs_k, offs, mask_kd, D)
            else:
                at_k = offs_k * 0
                _store(first, row, 1, dp, at_k, offs, mask_kd & (offs_k == 0)[:, None], D)
                _store(second, row, 1, dp, at_k, offs, mask_kd & (offs_k == 1)[:, None], D)


def rankpo(
    problem: RankPOProblem, weights_B: Tensor | None = None, needs: Sequence[bool] = (),
    *, shape: Tile | None = None,
) -> RankPOResult:  # fmt: skip
    """As `chunked.rankpo`; passages are one tensor, or two of one passage each, and of
    MOST_PASSAGES at most. `shape` overrides the table."""
    new = partial(torch.empty_like, memory_format=torch.contiguous_format)
    problem, weights_B, result = problem.prepared(weights_B, needs, new)
    q_BD, passages, grades_BK, reference_BC, settings = problem
    (B, D), K = q_BD.shape, problem.K
    assert len(passages) == 1 or [x.dim() for x in passages] == [2, 2]
    if not B:
        return result
    shape = shape or tile(K, D)
    dq, *dps = result.grads
    sides = [Passages.of(x, dx) for x, dx in zip(passages, dps, strict=True)]
    rankpo_kernel[(B,)](
        q_BD, *sides, *[absent(Passages)] * (2 - len(sides)), grades_BK, reference_BC, weights_B,
        result.loss_B, result.similarity_BK, dq,
        *q_BD.stride(), D, K, 0 if reference_BC is None else reference_BC.shape[1],
        Rule.of(settings), bool(settings.normalize), settings.hinge, bool(settings.listwise),
        D <= shape.BLOCK_D, shape.BLOCK_K, shape.BLOCK_D,
        num_warps=shape.num_warps, **FUSION,
    )  # fmt: skip
    return result
