"""Do losses of every pair of a batch cost more than the GEMMs that any form of them needs?

Lower bound: S = QP', dQ = S P, dP = S'Q at the same shapes, 6MND flops. In-batch RankPO without and
with a reference, whose scores are a fourth GEMM, and SigLIP's loss. M queries, N passages, D dims.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast import in_batch_rankpo_loss, siglip_loss

from ..measure import Case, Run
from ..questions import OURS, Shape
from . import loss
from .loss import draw, loss_question

FORMS = {"in_batch_rankpo": 3, "in_batch_rankpo with a reference": 4, "siglip": 3}  # GEMMs
# x is 20 times a similarity
GATE = {torch.float32: 2 * (2e-6 + 8 * 2**-24 * 20), torch.bfloat16: 8e-3, torch.float16: 2e-3}
FOR_ERRORS = 1024
SHAPES = {
    "cpu": {
        "quick": [(1024, 1024, 384)],
        "default": [(2048, 2048, 384)],
        "full": [(2048, 2048, 384), (8192, 8192, 1024)],
    },
    "cuda": {
        "quick": [(4096, 4096, 1024)],
        "default": [(16384, 16384, 1024), (4096, 4096, 1024)],
        "full": [(16384, 16384, 1024), (4096, 4096, 1024), (65536, 65536, 1024)],
    },
}


def plain(form: str, q: Tensor, p: Tensor, labels: Tensor, reference: tuple) -> Tensor:
    """What one would write without us."""

    def scores(q: Tensor, p: Tensor) -> Tensor:
        return F.normalize(q, dim=1) @ F.normalize(p, dim=1).T

    s = scores(q, p)
    if form == "siglip":
        z = torch.full_like(s, -1).scatter_(1, labels[:, None], 1)
        return -F.logsigmoid(z * (10 * s - 10)).sum() / len(q)
    advantage = s.gather(1, labels[:, None]) - s
    if reference:
        r = scores(*reference)
        advantage = advantage - (r.gather(1, labels[:, None]) - r)
    pairs = -F.logsigmoid(20 * advantage)
    return pairs.scatter(1, labels[:, None], 0).sum() / (len(q) * (len(p) - 1))


def ours(form: str, q: Tensor, p: Tensor, labels: Tensor, reference: tuple) -> Tensor:
    if form == "siglip":
        return siglip_loss(q, p, labels)
    names = ("reference_queries", "reference_passages")
    return in_batch_rankpo_loss(q, p, labels, **dict(zip(names, reference, strict=False)))


IMPLEMENTATIONS: dict[str, Callable] = {OURS: ours, "torch": plain}


def implementations(form: str, q: Tensor, p: Tensor, labels: Tensor) -> dict[str, Run]:
    """Everything that gives (loss, dq, dp), by name; the reference is the model itself, turned."""
    reference = (q.detach().flip(1), p.detach()) if "reference" in form else ()
    return {
        name: loss.forward_backward(functools.partial(of, form, q, p, labels, reference), [q, p])
        for name, of in IMPLEMENTATIONS.items()
    }


def errors(form: str, D: int, device: str, dtype: torch.dtype, **state: bool) -> loss.Errors:
    """Against plain torch in fp64."""
    q, p, labels = draw(FOR_ERRORS, FOR_ERRORS, D, device, dtype, **state)
    exact_q, exact_p = loss.exact([q, p])
    truth = implementations(form, exact_q, exact_p, labels)["torch"]()
    return loss.Errors(implementations(form, q, p, labels), lambda _: truth)


def case(form: str, shape: Shape, device: str) -> Case:
    M, N, D, dtype = shape["M"], shape["N"], shape["D"], loss.dtype_of(shape)
    fresh, converged = (errors(form, D, device, dtype, converged=c) for c in (False, True))
    q, p, labels = draw(M, N, D, device, dtype)
    return loss.beside_gemms(
        FORMS[form], q, p, [q, p], implementations(form, q, p, labels), errors=fresh,
        converged=converged, gate=GATE[dtype],
    )  # fmt: skip


QUESTIONS = [
    loss_question(
        form, __doc__.splitlines()[0], "MND", SHAPES, functools.partial(case, form), IMPLEMENTATIONS
    )
    for form in FORMS
]
