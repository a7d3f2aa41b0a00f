"""Does InfoNCE without the score matrix cost more than the GEMMs that any form of it needs?

Lower bound: S = QP', dQ = S P, dP = S'Q at the same shapes, 6MND flops, which no exact method goes
below, for one direction or both; for the loss alone 2MND. (A column knows its sum only when all
rows are through: whoever keeps no scores makes them twice, 8MND.) M queries, N passages, D dims.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast import info_nce_loss
from rankpo_kernels.problem import PQ, QP

from ..measure import Case, Run
from ..peers import PEERS, SCALE
from ..questions import OURS, Shape
from . import loss
from .loss import GATE, loss_question

OWN = 8  # hard negatives of a query alone
MOST = {"cpu": 1024, "cuda": 16384}  # rows over which errors are taken: fp64 is slow
DIMS = [1024, 384, 2048, 4096]
SYMMETRIC = {"directions": (QP, PQ), "partition": "per_direction"}


class Inputs(NamedTuple):
    q: Tensor  # [M, D]
    p: Tensor  # [N, D]
    labels: Tensor  # [M]
    own: Tensor | None = None  # [M, OWN, D]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.p, self.own) if x is not None]

    def exact(self) -> "Inputs":
        q, p, *own = loss.exact(self.leaves)
        return Inputs(q, p, self.labels, *own)


Plain = Callable[[Inputs], Tensor]


def similarities(x: Inputs, dims: int | None = None) -> Tensor:
    return F.normalize(x.q[:, :dims], dim=1) @ F.normalize(x.p[:, :dims], dim=1).T


def own_negatives(x: Inputs) -> Tensor:
    assert x.own is not None
    own = torch.einsum("md,mkd->mk", F.normalize(x.q, dim=1), F.normalize(x.own, dim=2))
    return F.cross_entropy(SCALE * torch.cat([similarities(x), own], dim=1), x.labels)


def matryoshka_dims(D: int) -> list[int]:
    return [D // 4, D // 2, D]


def matryoshka(x: Inputs) -> Tensor:
    dims = matryoshka_dims(x.q.shape[1])
    losses = (F.cross_entropy(SCALE * similarities(x, d), x.labels) for d in dims)
    return cast(Tensor, sum(losses))


def masks(x: Inputs) -> dict[str, Any]:
    """Texts come twice, and each query has an exclusion. (A margin would leave out of random data
    what rounding decides: two dtypes would be two losses.)"""
    queries, passages = (torch.arange(len(y), device=y.device) for y in (x.q, x.p))
    offsets = torch.arange(len(x.q) + 1, device=x.q.device)
    return {
        "query_ids": queries // 2,
        "passage_ids": passages // 2,
        "excluded": (offsets, x.labels.flip(0)),
    }


def masked(x: Inputs) -> Tensor:
    """What one would write without us: M x N masks."""
    s, ids = similarities(x), masks(x)["passage_ids"]
    rows = torch.arange(len(x.q), device=x.q.device)
    out = torch.zeros_like(s, dtype=torch.bool)
    twin = (rows ^ 1).clamp(max=len(rows) - 1)  # the query with the same text
    for texts in (ids[x.labels], ids[x.labels.flip(0)]):  # that are no negatives of a query
        out |= (ids == texts[:, None]) | (ids == texts[twin, None])
    out[rows, x.labels] = False
    return F.cross_entropy((SCALE * s).masked_fill(out, -torch.inf), x.labels)


@dataclass(frozen=True)
class Form:
    """A question about InfoNCE: the options of ours, and the same in plain torch; without `plain`
    the peers answer."""

    name: str
    asks: str
    gemms: int  # of 2MND, the lower bound
    options: Callable[[Inputs], dict[str, Any]] = lambda x: {}
    plain: Plain | None = None
    symmetric: bool = False
    backward: bool = True
    own: bool = False

    def draw(
        self, M: int, N: int, D: int, device: str, dtype: torch.dtype, **state: bool
    ) -> Inputs:
        q, p, labels = loss.draw(M, N, D, device, dtype, **state)
        if not self.own:
            return Inputs(q, p, labels)
        own = F.normalize(torch.randn(M, OWN, D, device=device), dim=2)
        return Inputs(q, p, labels, own.to(dtype).requires_grad_())

    @property
    def implementations(self) -> list[str]:
        return [OURS, *(PEERS if self.plain is None else ["torch"])]

    def runs(self, x: Inputs) -> dict[str, Run]:
        """Everything that gives (loss, gradients), or the loss alone, by name."""
        plain = self.plain
        losses: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: info_nce_loss(
                x.q, x.p, x.labels, own_negatives=x.own, scale=SCALE, **self.options(x)
            )
        }
        if plain is not None:
            losses["torch"] = functools.partial(plain, x)
        else:
            for name, peer in PEERS.items():
                losses[name] = functools.partial(peer, x.q, x.p, x.labels, symmetric=self.symmetric)
        if not self.backward:
            return {name: loss.forward(of) for name, of in losses.items()}
        return {name: loss.forward_backward(of, x.leaves) for name, of in losses.items()}


PLAIN = Form("info_nce", __doc__.splitlines()[0], 3)
FORMS = [
    PLAIN,
    Form(
        "info_nce symmetric", "What does the other direction cost, which shares its scores?", 3,
        lambda x: SYMMETRIC, symmetric=True,
    ),
    Form("info_nce forward", "What does the loss alone cost?", 1, backward=False),
    Form(
        "info_nce symmetric forward", "What do the losses of both directions cost alone?", 1,
        lambda x: SYMMETRIC, symmetric=True, backward=False,
    ),
    Form(
        "info_nce masked", "What do masks of equal texts and of listed pairs cost?", 3, masks,
        masked,
    ),
    Form(
        "info_nce hard negatives", f"What do {OWN} hard negatives of each query alone cost?", 3,
        plain=own_negatives, own=True,
    ),
    Form(
        "info_nce matryoshka", "Do three prefixes cost more than one product?", 3,
        lambda x: {"matryoshka_dims": matryoshka_dims(x.q.shape[1])}, matryoshka,
    ),
]  # fmt: skip


def errors(
    form: Form, M: int, N: int, D: int, device: str, dtype: torch.dtype, converged: bool
) -> loss.Errors:
    """Of each implementation against ours in fp64, which the tests hold to the definition."""
    x = form.draw(M, N, D, device, dtype, converged=converged)
    truth = form.runs(x.exact())[OURS]()
    return loss.Errors(form.runs(x), lambda _: truth)


def case(form: Form, shape: Shape, device: str) -> Case:
    M, N, D, dtype = shape["M"], shape["N"], shape["D"], loss.dtype_of(shape)
    rows = min(M, MOST[device])
    fresh, converged = (
        errors(form, rows, rows * N // M, D, device, dtype, state) for state in (False, True)
    )
    x = form.draw(M, N, D, device, dtype)
    return loss.beside_gemms(
        form.gemms, x.q, x.p, x.leaves, form.runs(x), backward=form.backward, errors=fresh,
        converged=converged, gate=GATE[dtype],
    )  # fmt: skip


CPU: dict[str, Sequence[tuple]] = {
    "quick": [(1024, 1024, 384)],
    "default": [(2048, 2048, 384)],
    "full": [(2048, 2048, 384), (8192, 8192, 1024)],
}
CPU_PLAIN = CPU | {
    "default": [(512, 512, 384), (2048, 2048, 384), (4096, 4096, 768)],
    "full": [
        (512, 512, 384), (2048, 2048, 384), (4096, 4096, 768), (8192, 8192, 1024),
        (4096, 24576, 384), (2048, 2048, 384, "bfloat16"),
    ],
}  # fmt: skip
LARGE = [(size, size, D) for size in (16384, 4096) for D in DIMS]
DTYPES = [(16384, 16384, 1024, dtype) for dtype in ("float16", "float32")]
CUDA: dict[str, Sequence[tuple]] = {
    "quick": [(4096, 4096, 1024)],
    "default": LARGE,
    "full": [*LARGE, *DTYPES, *((size, size, D) for size in (32768, 65536) for D in DIMS)],
}
QUESTIONS = [
    loss_question(
        form.name, form.asks, "MND", {"cpu": CPU_PLAIN if form is PLAIN else CPU, "cuda": CUDA},
        functools.partial(case, form), form.implementations,
    )
    for form in FORMS
]  # fmt: skip
