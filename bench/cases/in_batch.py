"""Do losses of every pair of a batch cost more than the GEMMs that any form of them needs?

Floor: S = QP', dQ = S P, dP = S'Q at the same shapes, 6MND flops. In-batch RankPO without and with
a reference, whose scores are a fourth GEMM, and SigLIP's loss. M queries, N passages, D dims.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.info_nce import DTYPE, draw
from bench.measure import Case, relative_error
from rankpo_fast import in_batch_rankpo_loss, siglip_loss

SHAPES = {"cpu": [(8192, 8192, 1024)], "cuda": [(16384, 16384, 1024), (4096, 4096, 1024)]}
QUICK = {"cpu": [(2048, 2048, 384)], "cuda": [(4096, 4096, 1024)]}
GATE = {"cpu": 2 * (2e-6 + 8 * 2**-24 * 20), "cuda": 8e-3}  # x is 20 times a similarity
FORMS = {"in_batch_rankpo": 3, "in_batch_rankpo with a reference": 4, "siglip": 3}  # GEMMs


def plain(form: str, q: Tensor, p: Tensor, labels: Tensor, reference: tuple) -> Tensor:
    """What one would write without us."""

    def scores(q, p):
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


def contenders(form: str, q: Tensor, p: Tensor, labels: Tensor) -> dict[str, Callable]:
    """Everything that gives (loss, dq, dp), by name; the reference is the model itself, turned."""
    reference = (q.detach().flip(1), p.detach()) if "reference" in form else ()

    def run(loss_of):
        def forward_backward():
            loss = loss_of(form, q, p, labels, reference)
            return loss.detach(), *torch.autograd.grad(loss, (q, p))

        return forward_backward

    return {"rankpo-fast": run(ours), "torch": run(plain)}


def gemms(count: int, q: Tensor, p: Tensor) -> Callable:
    """The floor, into buffers that exist."""
    q, p = q.detach(), p.detach()
    scores = q.new_empty(len(q), len(p))
    dq, dp = torch.empty_like(q), torch.empty_like(p)

    def run():
        for _ in range(count - 2):
            torch.mm(q, p.T, out=scores)
        torch.mm(scores, p, out=dq)
        torch.mm(scores.T, q, out=dp)
        return ()

    return run


def errors(form: str, D: int, device: str) -> dict[str, float]:
    q, p, labels = draw(1024, 1024, D, device)
    exact = contenders(form, q.detach().double().requires_grad_(),
                       p.detach().double().requires_grad_(), labels)["torch"]()  # fmt: skip
    runs = contenders(form, q, p, labels)
    return {name: relative_error(run(), exact) for name, run in runs.items()}


def cases(device: str, quick: bool) -> Iterator[Case]:
    for M, N, D in (QUICK if quick else SHAPES)[device]:
        for form, count in FORMS.items():
            q, p, labels = draw(M, N, D, device)
            floor = f"{count} GEMMs"
            yield Case(
                name=f"{form} {M}x{N}x{D} {str(DTYPE[device]).removeprefix('torch.')}",
                question=__doc__.splitlines()[0],
                shape={"M": M, "N": N, "D": D},
                device=device,
                contenders={floor: gemms(count, q, p)} | contenders(form, q, p, labels),
                floor=floor,
                keep_bytes=(q.numel() + p.numel()) * q.element_size(),
                errors=errors(form, D, device),
                gate=GATE[device],
                peers=frozenset(["torch"]),
            )
