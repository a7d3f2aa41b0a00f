"""Is the pairwise RankPO loss bound by memory, as three reads and three writes of [B, D] should be?

Floor: copying the three embeddings, the same bytes, into memory that is there. The gradients are
fresh memory, whose pages the system has to find on the CPU: "copy, fresh memory" pays for that too.
"""

from collections.abc import Iterator

import torch

from bench.measure import Case, relative_error
from rankpo_fast import rankpo_loss
from rankpo_fast.ops.rankpo import margin_loss, pair_similarities_definition

SHAPES = {"cpu": [(8192, 2048), (1024, 384)], "cuda": [(8192, 2048), (65536, 1024)]}  # (B, D)
QUICK = {"cpu": [(1024, 384)], "cuda": [(8192, 2048)]}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
GATE = {"cpu": 1e-5, "cuda": 8e-3}


def draw(B: int, D: int, device: str):
    q, c, r = torch.randn(3, B, D, device=device)
    return [x.to(DTYPE[device]).requires_grad_() for x in (q, q + c, q + r)]


def definition(q, c, r):
    chosen, rejected = pair_similarities_definition(q, c, r)
    return margin_loss(chosen - rejected).mean()


def contenders(tensors):
    """Everything that gives (loss, dq, dc, dr), by name."""

    def run(loss_of):
        def forward_backward():
            loss = loss_of(*tensors)
            return loss.detach(), *torch.autograd.grad(loss, tensors)

        return forward_backward

    return {"rankpo-fast": run(rankpo_loss), "torch": run(definition)}


def copies(tensors):
    """The floors: into memory that exists, and into memory that does not."""
    sources = [x.detach() for x in tensors]
    targets = [torch.empty_like(x) for x in sources]

    def into_existing():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return ()

    return {"copy": into_existing, "copy, fresh memory": lambda: [x.clone() for x in sources]}


def errors(D: int, device: str) -> dict[str, float]:
    tensors = draw(256, D, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    loss = definition(*exact)
    truth = (loss.detach(), *torch.autograd.grad(loss, exact))
    return {name: relative_error(run(), truth) for name, run in contenders(tensors).items()}


def cases(device: str, quick: bool) -> Iterator[Case]:
    for B, D in (QUICK if quick else SHAPES)[device]:
        tensors = draw(B, D, device)
        yield Case(
            name=f"rankpo {B}x{D} {str(DTYPE[device]).removeprefix('torch.')}",
            question=__doc__.splitlines()[0],
            shape={"B": B, "D": D},
            device=device,
            contenders=copies(tensors) | contenders(tensors),
            floor="copy",
            keep_bytes=sum(x.numel() * x.element_size() for x in tensors),
            errors=errors(D, device),
            gate=GATE[device],
        )
