"""The ways in which ours makes a loss and its gradients, launched by themselves below ops and
autograd; and what they must equal: the losses of rows in a few words of plain torch, in fp64.

M queries, N passages, B pairs, D dims.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.ops.rankpo import margin_loss
from rankpo_kernels.objective import softplus
from rankpo_kernels.problem import (
    InBatchProblem,
    InBatchSettings,
    RankPOProblem,
    RankPOSettings,
)
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.in_batch import in_batch
from rankpo_kernels.triton.rankpo import rankpo

from ..cases import in_batch as in_batch_cases
from ..cases import info_nce as info_nce_cases
from ..cases import loss
from ..cases import rankpo as rankpo_cases
from ..launch import SYMMETRIC, launch, workspace
from ..peers import SCALE

BETA_BY_TEMPERATURE = 20.0  # of in-batch RankPO, by the authors' defaults
ROWS = 2048  # of a chunk of the truth's scores in fp64


class Batch(NamedTuple):
    """What a pipeline reads: queries and passages with labels, or queries, chosen and rejected."""

    leaves: list[Tensor]
    labels: Tensor

    def chunks(self) -> list[slice]:
        rows = len(self.leaves[0])
        return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]


RowsLoss = Callable[[list[Tensor], Tensor, slice], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """`run` gives the losses [M] and gradients of their mean; `rows_loss` the losses of some rows
    from unit vectors."""

    name: str
    run: Callable[[Batch], Sequence[Tensor]]
    rows_loss: RowsLoss
    gemms: int  # of 2MND: the lower bound; 0 is a copy of what is read and written
    gates: dict[torch.dtype, float]  # of gradients by their dtype; of losses that of fp32
    backward: bool = True
    small: bool = False  # a large batch takes another pipeline

    @property
    def pairwise(self) -> bool:
        return not self.gemms

    def draw(
        self, M: int, N: int, D: int, device: str, dtype: torch.dtype, converged: bool = False
    ) -> Batch:
        if self.pairwise:
            leaves = rankpo_cases.draw(M, D, device, dtype, converged=converged)
            return Batch([x.detach() for x in leaves], torch.arange(0))
        q, p, labels = loss.draw(M, N, D, device, dtype, converged=converged)
        return Batch([q.detach(), p.detach()], labels)

    def of_nothing(self, M: int, N: int, D: int, dtype: torch.dtype) -> Batch:
        """Tensors without memory, by which kernels are specialised."""
        rows = (M, M, M) if self.pairwise else (M, N)
        leaves = [torch.empty(n, D, dtype=dtype, device="meta") for n in rows]
        return Batch(leaves, torch.empty(M, dtype=torch.int64, device="meta"))


# --- ours ---


def _info_nce(batch: Batch, **how: Any) -> Sequence[Tensor]:
    q, p = batch.leaves
    result = launch(q, p, batch.labels, **how)
    return [x for x in (result.loss_M, result.dq_MD, result.dp_ND) if x is not None]


def _in_fp32(batch: Batch, **how: Any) -> Sequence[Tensor]:
    """The same numbers in fp32."""
    return _info_nce(batch._replace(leaves=[x.float() for x in batch.leaves]), **how)


def _in_batch(batch: Batch) -> Sequence[Tensor]:
    (q, p), N = batch.leaves, len(batch.leaves[1])
    settings = InBatchSettings(workspace_bytes=workspace(q, "cuda"))
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (BETA_BY_TEMPERATURE, 0.0))
    problem = InBatchProblem(q, p, scale, bias, Relations(batch.labels), settings)
    weights = q.new_full((len(q),), 1 / (len(q) * (N - 1)), dtype=torch.float32)
    result = in_batch(problem, None, weights, (True, True, False, False))
    assert result.dq_MD is not None and result.dp_ND is not None
    return result.loss_M / (N - 1), result.dq_MD, result.dp_ND


def _pairwise(batch: Batch) -> Sequence[Tensor]:
    q, *passages = batch.leaves
    problem = RankPOProblem(q, passages, None, None, RankPOSettings())
    weights = q.new_full((len(q),), 1 / len(q), dtype=torch.float32)
    result = rankpo(problem, weights, (True,) * 3)
    return result.loss_B, *[x for x in result.grads if x is not None]


# --- what they must equal ---


def _one_way(q: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    s = SCALE * q @ p.T
    positive = s.gather(1, labels[:, None])
    negatives = s.scatter(1, labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return softplus(negatives - positive)[:, 0]


def info_nce_rows(units: list[Tensor], labels: Tensor, rows: slice) -> Tensor:
    q, p = units
    return _one_way(q[rows], p, labels[rows])


def both_ways_rows(units: list[Tensor], labels: Tensor, rows: slice) -> Tensor:
    q, p = units
    itself = torch.arange(len(q), device=q.device)
    back = _one_way(p[labels[rows]], q, itself[rows])
    return (info_nce_rows(units, labels, rows) + back) / 2


def in_batch_rows(units: list[Tensor], labels: Tensor, rows: slice) -> Tensor:
    q, p = units
    s, own = q[rows] @ p.T, labels[rows, None]
    pairs = -F.logsigmoid(BETA_BY_TEMPERATURE * (s.gather(1, own) - s))
    return pairs.scatter(1, own, 0.0).sum(1) / (len(p) - 1)


def pairwise_rows(units: list[Tensor], labels: Tensor, rows: slice) -> Tensor:
    q, chosen, rejected = (x[rows] for x in units)
    return margin_loss((q * chosen).sum(1) - (q * rejected).sum(1))


def truth(pipeline: Pipeline, batch: Batch) -> list[Tensor]:
    """Losses [M] and gradients of their mean, of the same numbers in fp64, a chunk of scores at a
    time."""
    leaves = loss.exact(batch.leaves)
    units = [F.normalize(x, dim=1) for x in leaves]
    cut = [x.detach().requires_grad_() for x in units]
    losses = []
    for rows in batch.chunks():
        rows_loss = pipeline.rows_loss(cut, batch.labels, rows)
        if pipeline.backward:
            (rows_loss.sum() / len(leaves[0])).backward()
        losses.append(rows_loss.detach())
    if not pipeline.backward:
        return [torch.cat(losses)]
    grads = torch.autograd.grad(units, leaves, [x.grad for x in cut])
    return [torch.cat(losses), *grads]


_of = functools.partial
_INFO_NCE: dict[str, Any] = {
    "rows_loss": info_nce_rows, "gemms": 3, "gates": info_nce_cases.GATE
}  # fmt: skip
_IN_FP32 = dict.fromkeys(info_nce_cases.GATE, info_nce_cases.GATE[torch.float32])
PIPELINES = [
    Pipeline("stored", _of(_info_nce, stored=True), **_INFO_NCE),
    Pipeline("exact", _of(_info_nce, stored=False, few=False), **_INFO_NCE),
    Pipeline(
        "both directions, kept", _of(_info_nce, options=SYMMETRIC, few=False, kept=True),
        **_INFO_NCE | {"rows_loss": both_ways_rows},
    ),
    Pipeline(
        "both directions", _of(_info_nce, options=SYMMETRIC, few=False, kept=False),
        **_INFO_NCE | {"rows_loss": both_ways_rows},
    ),
    Pipeline(
        "forward", _of(_info_nce, grads=False), **_INFO_NCE | {"gemms": 1}, backward=False
    ),
    Pipeline("in-batch RankPO", _in_batch, in_batch_rows, 3, in_batch_cases.GATE),
    Pipeline("pairwise RankPO", _pairwise, pairwise_rows, 0, rankpo_cases.GATE),
    Pipeline("few launches", _of(_info_nce, stored=False, few=True), **_INFO_NCE, small=True),
    Pipeline(
        "few launches, both directions", _of(_info_nce, options=SYMMETRIC, few=True),
        **_INFO_NCE | {"rows_loss": both_ways_rows}, small=True,
    ),
    Pipeline(
        "fp32 by tf32x3", _of(_in_fp32, options={"precision": "tf32x3"}),
        **_INFO_NCE | {"gates": _IN_FP32},
    ),
]  # fmt: skip
