"""Others' InfoNCE, as a user would call it: loss(q [M, D], p [N, D], labels [M]) at temperature
1 / SCALE, embeddings normalised inside. Those made for a language model's head take queries as its
inputs and passages as its weight, and both directions as two losses.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import NeedsGPU

SCALE = 50.0
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # (inputs [M, D], weight [N, D], labels [M])


def cross_entropy(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
    s = SCALE * (F.normalize(q, dim=1) @ F.normalize(p, dim=1).T)
    loss = F.cross_entropy(s, labels)
    return (loss + F.cross_entropy(s.T[labels], _rows(q))) / 2 if symmetric else loss


@functools.cache
def _compiled() -> Callable:
    return torch.compile(cross_entropy, dynamic=True)  # a compilation a shape would take minutes


def compiled(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
    return _compiled()(q, p, labels, symmetric=symmetric)


def of_head(head: Head) -> Callable[..., Tensor]:
    def loss(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
        q, p = F.normalize(q, dim=1), F.normalize(p, dim=1)
        one_way = head(SCALE * q, p, labels)
        return (one_way + head(SCALE * p[labels], q, _rows(q))) / 2 if symmetric else one_way

    return loss


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, labels)  # torch >= 2.13


def linear_cross_entropy_in_chunks(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, labels, options=options)


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    _on_a_card(x)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, labels)


def cut_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    _on_a_card(x)
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels)


def _on_a_card(x: Tensor) -> None:
    if x.device.type == "cpu":
        raise NeedsGPU


def _rows(q: Tensor) -> Tensor:
    return torch.arange(len(q), device=q.device)


PEERS: dict[str, Callable[..., Tensor]] = {
    "torch cross_entropy": cross_entropy,
    "torch.compile": compiled,
    "torch linear_cross_entropy": of_head(linear_cross_entropy),
    "torch linear_cross_entropy, chunked": of_head(linear_cross_entropy_in_chunks),
    "liger-kernel": of_head(liger),
    "cut-cross-entropy": of_head(cut_cross_entropy),
}
