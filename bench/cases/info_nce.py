"""Does InfoNCE without the score matrix cost more than the GEMMs that any form of it needs?

Floor: S = QP', dQ = S P, dP = S'Q at the same shapes, 6MND flops, which no exact method goes below;
for both directions at once 8MND, since a column knows its sum only when all rows are through; for
the loss alone 2MND. M queries, N passages, D dims.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Case, noting, relative_error
from rankpo_fast import info_nce_loss
from rankpo_kernels.objective import DIRECTIONS

SCALE = 50.0  # temperature 0.02
CPU_SHAPES = [(8192, 8192, 1024), (4096, 24576, 384)]  # (M, N, D)
DIMS = [384, 1024, 2048, 4096]
SIZES = [16384, 4096, 32768, 65536]  # what matters most comes first: time may run out
LARGEST = 16384  # at which errors are taken: fp64 is slow, and of the same kernels
FIRST = 32  # cases of the first two sizes, before those that other questions have
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# fp32: rounding of the logits, twice for gradients; bf16: where gradients are stored in it.
GATE = {"cpu": 2 * (2e-6 + 8 * 2**-24 * SCALE), "cuda": 8e-3}


class Form(NamedTuple):
    name: str
    symmetric: bool
    backward: bool
    gemms: int  # of 2MND

    @property
    def floor(self) -> str:
        return f"{self.gemms} GEMM{'s' * (self.gemms > 1)}"


PLAIN = Form("info_nce", False, True, 3)
FORMS = [
    PLAIN,
    Form("info_nce both ways", True, True, 4),
    Form("info_nce forward", False, False, 1),
    Form("info_nce both ways, forward", True, False, 1),
]


def draw(M: int, N: int, D: int, device: str):
    """Embeddings early in a training: positives about as similar as the hardest negatives."""
    q, p = torch.randn(M, D, device=device), torch.randn(N, D, device=device)
    labels = torch.arange(M, device=device) * (N // M)
    p[labels] += 0.1 * q
    dtype = DTYPE[device]
    return q.to(dtype).requires_grad_(), p.to(dtype).requires_grad_(), labels


def cross_entropy(q: Tensor, p: Tensor, labels: Tensor, symmetric: bool) -> Tensor:
    s = SCALE * (F.normalize(q, dim=1) @ F.normalize(p, dim=1).T)
    loss = F.cross_entropy(s, labels)
    return (loss + F.cross_entropy(s.T, labels)) / 2 if symmetric else loss


@functools.cache
def compiled() -> Callable:
    return torch.compile(cross_entropy, dynamic=True)  # a compilation a shape would take minutes


def linear_losses(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Peers made for a language model's head that are installed: loss(inputs, weight, labels)."""
    losses = {}
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        losses["torch linear_cross_entropy"] = F.linear_cross_entropy
        if device == "cuda":
            chunked = {"options": torch.nn.LinearCrossEntropyOptions()}
            losses["the same in chunks"] = functools.partial(F.linear_cross_entropy, **chunked)
    if device == "cpu":
        return losses
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        losses["liger-kernel"] = liger_fused_linear_cross_entropy
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        losses["cut-cross-entropy"] = linear_cross_entropy
    except ImportError:
        pass
    return losses


def losses(form: Form, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """loss(q, p, labels) of everyone, by name; ours begin with rankpo-fast."""
    options = {"scale": SCALE}
    if form.symmetric:
        options |= {"directions": DIRECTIONS[:2], "partition": "per_direction"}

    def masked(q, p, labels):
        """Another loss than the others': texts come twice, each query has an exclusion and a
        chosen negative, and what is closer than the positive is left out."""
        ids = [torch.arange(len(x), device=x.device) for x in (q, p)]
        masks = {"query_ids": ids[0] // 2, "passage_ids": ids[1] // 2, "curated": ids[1] % len(q)}
        masks |= {"excluded": (torch.arange(len(q) + 1, device=q.device), labels.flip(0))}
        return info_nce_loss(q, p, labels, false_negative_margin=0.0, **masks, **options)

    def of_units(loss):
        def both(q, p, labels):
            q, p = F.normalize(q, dim=1), F.normalize(p, dim=1)
            one_way = loss(SCALE * q, p, labels)
            return (one_way + loss(SCALE * p, q, labels)) / 2 if form.symmetric else one_way

        return both

    made = {"rankpo-fast": functools.partial(info_nce_loss, **options)}
    if form == PLAIN:
        made["rankpo-fast, every mask"] = masked
    made["torch cross_entropy"] = functools.partial(cross_entropy, symmetric=form.symmetric)
    if device == "cuda":
        made["torch.compile"] = lambda *x: compiled()(*x, symmetric=form.symmetric)
    return made | {name: of_units(loss) for name, loss in linear_losses(device).items()}


def contenders(form: Form, q: Tensor, p: Tensor, labels: Tensor) -> dict[str, Callable]:
    """Everything that gives (loss, dq, dp), or the loss alone, by name."""

    def run(loss_of):
        def forward_backward():
            loss = loss_of(q, p, labels)
            return loss.detach(), *torch.autograd.grad(loss, (q, p))

        def forward():
            with torch.no_grad():
                return (loss_of(q, p, labels),)

        return forward_backward if form.backward else forward

    return {name: run(loss_of) for name, loss_of in losses(form, q.device.type).items()}


def gemms(form: Form, q: Tensor, p: Tensor) -> Callable:
    """The floor, into buffers that exist."""
    q, p = q.detach(), p.detach()
    scores = q.new_empty(len(q), len(p))
    dq, dp = torch.empty_like(q), torch.empty_like(p)

    def run():
        torch.mm(q, p.T, out=scores)
        if form.gemms == 4:
            torch.mm(q, p.T, out=scores)
        if form.backward:
            torch.mm(scores, p, out=dq)
            torch.mm(scores.T, q, out=dp)
        return ()

    return run


@functools.cache  # larger shapes of a form share them
def errors(form: Form, M: int, N: int, D: int, device: str) -> dict[str, float]:
    """Of each contender against fp64, whose chunks of torch the tests hold to the definition."""
    q, p, labels = draw(M, N, D, device)
    exact_q, exact_p = (x.detach().double().requires_grad_() for x in (q, p))
    exact_runs = contenders(form, exact_q, exact_p, labels)
    exact = {name: run() for name, run in exact_runs.items() if name.startswith("rankpo-fast")}
    found, notes = {}, {}
    for name, run in contenders(form, q, p, labels).items():
        with noting(name, notes):
            found[name] = relative_error(run(), exact.get(name, exact["rankpo-fast"]))
    return dict.fromkeys(notes, math.nan) | found


def shapes(device: str, quick: bool) -> Iterator[tuple[Form, int, int, int]]:
    if device == "cpu":
        yield from ((PLAIN, *shape) for shape in ([(2048, 2048, 384)] if quick else CPU_SHAPES))
        return
    for size in [4096] if quick else SIZES:
        for form in FORMS:
            yield from ((form, size, size, D) for D in ([1024] if quick else DIMS))


def cases(device: str, quick: bool) -> Iterator[Case]:
    for form, M, N, D in shapes(device, quick):
        most = LARGEST if device == "cuda" else 1024
        error = errors(form, min(M, most), min(N, most), D, device)
        q, p, labels = draw(M, N, D, device)
        runs = contenders(form, q, p, labels)
        yield Case(
            name=f"{form.name} {M}x{N}x{D} {str(DTYPE[device]).removeprefix('torch.')}",
            question=__doc__.splitlines()[0],
            shape={"M": M, "N": N, "D": D},
            device=device,
            contenders={form.floor: gemms(form, q, p)} | runs,
            floor=form.floor,
            keep_bytes=(q.numel() + p.numel()) * q.element_size() if form.backward else 0,
            errors=error,
            gate=GATE[device],
            peers=frozenset(name for name in runs if not name.startswith("rankpo-fast")),
        )
