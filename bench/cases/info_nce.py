"""Does InfoNCE without the score matrix cost more than the three GEMMs that any form of it needs?

Floor: S = QP', dQ = S P, dP = S'Q at the same shapes, 6MND flops, which no exact method goes below.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.measure import Case, relative_error
from rankpo_fast import info_nce_loss
from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.objective import Relations, Settings

SCALE = 50.0  # temperature 0.02
SHAPES = {  # (M, N, D)
    "cpu": [(8192, 8192, 1024), (4096, 24576, 384)],
    "cuda": [(4096, 4096, 1024), (16384, 16384, 1024), (16384, 16384, 4096), (32768, 32768, 384)],
}
QUICK = {"cpu": [(2048, 2048, 384)], "cuda": [(4096, 4096, 1024)]}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# fp32: rounding of the logits, twice for gradients; bf16: where gradients are stored in it.
GATE = {"cpu": 2 * (2e-6 + 8 * 2**-24 * SCALE), "cuda": 8e-3}


def draw(M: int, N: int, D: int, device: str):
    """Embeddings early in a training: positives about as similar as the hardest negatives."""
    q, p = torch.randn(M, D, device=device), torch.randn(N, D, device=device)
    labels = torch.arange(M, device=device) * (N // M)
    p[labels] += 0.1 * q
    dtype = DTYPE[device]
    return q.to(dtype).requires_grad_(), p.to(dtype).requires_grad_(), labels


def contenders(q, p, labels):
    """Everything that gives (loss, dq, dp), by name."""

    def run(loss_of):
        def forward_backward():
            loss = loss_of()
            return loss.detach(), *torch.autograd.grad(loss, (q, p))

        return forward_backward

    def unit(x):
        return F.normalize(x, dim=1)

    ids_M, ids_N = torch.arange(len(q), device=q.device), torch.arange(len(p), device=p.device)
    runs = {
        "rankpo-fast": run(lambda: info_nce_loss(q, p, labels, scale=SCALE)),
        "rankpo-fast, id masks": run(
            lambda: info_nce_loss(q, p, labels, scale=SCALE, query_ids=ids_M, passage_ids=ids_N)
        ),
        "torch cross_entropy": run(lambda: F.cross_entropy(SCALE * (unit(q) @ unit(p).T), labels)),
    }
    if hasattr(F, "linear_cross_entropy"):
        runs["torch linear_cross_entropy"] = run(
            lambda: F.linear_cross_entropy(SCALE * unit(q), unit(p), labels)
        )
    return runs


def gemms(q, p):
    """The floor, into buffers that exist."""
    q, p = q.detach(), p.detach()
    scores = q.new_empty(len(q), len(p))
    dq, dp = torch.empty_like(q), torch.empty_like(p)

    def run():
        torch.mm(q, p.T, out=scores)
        torch.mm(scores, p, out=dq)
        torch.mm(scores.T, q, out=dp)
        return ()

    return run


def errors(D: int, device: str) -> dict[str, float]:
    """Each contender against the fp64 definition, at the same D and a size where that is quick."""
    q, p, labels = draw(512, 1024, D, device)
    exact_q, exact_p = (x.detach().double().requires_grad_() for x in (q, p))
    settings = Settings(normalize=True, workspace_bytes=0)
    loss = info_nce_definition(exact_q, exact_p, SCALE, Relations(labels), settings).mean()
    exact = (loss.detach(), *torch.autograd.grad(loss, (exact_q, exact_p)))
    return {name: relative_error(run(), exact) for name, run in contenders(q, p, labels).items()}


def cases(device: str, quick: bool) -> Iterator[Case]:
    for M, N, D in (QUICK if quick else SHAPES)[device]:
        q, p, labels = draw(M, N, D, device)
        yield Case(
            name=f"info_nce {M}x{N}x{D} {str(DTYPE[device]).removeprefix('torch.')}",
            question=__doc__.splitlines()[0],
            shape={"M": M, "N": N, "D": D},
            device=device,
            contenders={"three GEMMs": gemms(q, p)} | contenders(q, p, labels),
            floor="three GEMMs",
            keep_bytes=(q.numel() + p.numel()) * q.element_size(),
            errors=errors(D, device),
            gate=GATE[device],
        )
