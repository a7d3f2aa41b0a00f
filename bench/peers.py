"""Others' InfoNCE, as a user would call it: loss(q [M, D], p [N, D], labels [M]), the mean over
queries at temperature 1 / SCALE, embeddings normalised inside. M queries, N passages, D dims.

Those made for a language model's head take queries as its inputs and passages as its weight. With
`symmetric` the mean of that and of the same for each positive against all queries, of which they
know nothing: two losses. A peer that is not installed raises ModuleNotFoundError, one that needs a
GPU NeedsGPU and one that does not take these inputs Unfit, all before anything is launched.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .measure import NeedsGPU, Unfit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

SCALE = 50.0  # temperature 0.02
HALVES = (torch.bfloat16, torch.float16)
Peer = Callable[..., Tensor]  # (q, p, labels, *, symmetric)
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # (inputs [M, D], weight [N, D], labels [M])


def cross_entropy(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
    """Logits in the embeddings' dtype."""
    s = SCALE * (F.normalize(q, dim=1) @ F.normalize(p, dim=1).T)
    loss = F.cross_entropy(s, labels)
    if not symmetric:
        return loss
    of_positives = s.T if len(p) == len(q) else s.T[labels]
    return (loss + F.cross_entropy(of_positives, _rows(q))) / 2


@functools.cache
def _compiled() -> Peer:
    # Dtypes, directions, gradients or not: from the ninth kind on it would be eager, unsaid.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(cross_entropy, dynamic=True)  # a compilation a shape would take minutes


def compiled(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
    return _compiled()(q, p, labels, symmetric=symmetric)


def of_head(head: Head) -> Peer:
    def loss(q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool) -> Tensor:
        q, p = F.normalize(q, dim=1), F.normalize(p, dim=1)
        one_way = head(SCALE * q, p, labels)
        return (one_way + head(SCALE * p[labels], q, _rows(q))) / 2 if symmetric else one_way

    return loss


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, *, chunked: bool) -> Tensor:
    """Logits in the inputs' dtype, all at once, or in chunks of as many rows as torch thinks best,
    which then makes gradients in the forward pass."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ModuleNotFoundError(name="torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(x, weight, labels, options=options)


def liger(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Chunks of about M D logits in the inputs' dtype, gradients in the forward pass: the weight's
    only beside the inputs', and summed over chunks in its dtype unless `accum_dtype` is another."""
    _on_a_gpu(x)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, labels, **options)


def cut_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Logits in fp32 that no memory holds, but products of the positive's in the inputs' dtype, in
    which both gradients are summed over tiles too. Tiles of dS below `filter_eps` are left out, by
    default eps / 32 of that dtype."""
    _on_a_gpu(x)
    _halves(x)
    if max(x.numel(), weight.numel()) >= 2**31:
        raise Unfit("2**31 numbers or more, which its 32-bit offsets do not reach")
    from cut_cross_entropy import linear_cross_entropy as loss

    return loss(x, weight, labels, **options)


def cut_cross_entropy_compiled(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What it offers where its kernels do not run: torch.compile of a product in the inputs' dtype
    and of cross entropy in fp32."""
    from cut_cross_entropy import linear_cross_entropy as loss

    return loss(x, weight, labels, impl="torch_compile")


def inf_cl(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Inputs are made fp32 and multiplied as tf32. In a process group its passages go round."""
    _on_a_gpu(x)
    dims = x.shape[1]
    # Its heads are powers of two from 16 on; what is read beyond the last query may be NaN.
    if dims % 16:
        raise Unfit(f"D={dims}, which is no multiple of 16")
    if len(x) % 64:
        raise Unfit(f"M={len(x)}, which is no multiple of 64")
    from inf_cl import cal_inf_loss

    return cal_inf_loss(x, weight, labels, head_dim=min(256, dims & -dims))


def quack(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Chunks of 4,096 rows of logits in the inputs' dtype, gradients in the forward pass."""
    _on_a_gpu(x)
    _halves(x)
    if torch.cuda.get_device_capability(x.device) < (9, 0):
        raise Unfit("a GPU before Hopper")
    if sizes := [size for size in (*x.shape, len(weight)) if size % 8]:
        raise Unfit(f"a size of {sizes[0]}, which is no multiple of 8")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, labels)


def sentence_transformers(
    q: Tensor, p: Tensor, labels: Tensor, *, symmetric: bool, cached: bool
) -> Tensor:
    """Its in-batch loss of columns; labels are those of passages in groups of N // M, the positive
    first. Cached, in chunks of 32 queries, each of which makes its gradients at once."""
    if len(p) % len(q):
        raise Unfit(f"{len(p)} passages for {len(q)} queries")
    from sentence_transformers.sentence_transformer import losses

    options: dict[str, Any] = {"scale": SCALE}
    if symmetric:
        both = ("query_to_doc", "doc_to_query")
        options |= {"directions": both, "partition_mode": "per_direction"}
    columns = [q, *p.reshape(len(q), -1, p.shape[1]).unbind(1)]
    # The losses are given embeddings, and no labels.
    model, no_labels = cast("SentenceTransformer", nn.Sequential(nn.Identity())), cast(Tensor, None)
    if not cached:
        plain = losses.MultipleNegativesRankingLoss(model, **options)
        return plain.compute_loss_from_embeddings(columns, no_labels)
    loss = losses.CachedMultipleNegativesRankingLoss(model, **options)
    if not torch.is_grad_enabled():
        return loss.calculate_loss([[x] for x in columns])
    return _AtOnce.apply(loss, *columns)


class _AtOnce(torch.autograd.Function):
    """A loss whose gradients are there when it is: what its trainer does with hooks."""

    @staticmethod
    def forward(ctx: Any, loss: "CachedMultipleNegativesRankingLoss", *columns: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in columns]
        with torch.enable_grad():
            value = loss.calculate_loss([[x] for x in leaves], with_backward=True)
        ctx.save_for_backward(*(x.grad for x in leaves))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad * d_value for grad in ctx.saved_tensors)


def _on_a_gpu(x: Tensor) -> None:
    if x.device.type == "cpu":
        raise NeedsGPU


def _halves(x: Tensor) -> None:
    if x.dtype not in HALVES:
        raise Unfit(str(x.dtype).removeprefix("torch."))


def _rows(q: Tensor) -> Tensor:
    return torch.arange(len(q), device=q.device)


# Those that compile before their first run.
COMPILED = frozenset({"torch.compile", "cut-cross-entropy, torch_compile"})
_of = functools.partial
PEERS: dict[str, Peer] = {
    "torch cross_entropy": cross_entropy,
    "torch.compile": compiled,
    "torch linear_cross_entropy": of_head(_of(linear_cross_entropy, chunked=False)),
    "torch linear_cross_entropy, chunked": of_head(_of(linear_cross_entropy, chunked=True)),
    "liger-kernel": of_head(liger),
    "liger-kernel, fp32 sums": of_head(_of(liger, accum_dtype=torch.float32)),
    "cut-cross-entropy": of_head(cut_cross_entropy),
    "cut-cross-entropy, unfiltered": of_head(_of(cut_cross_entropy, filter_eps=None)),
    "cut-cross-entropy, torch_compile": of_head(cut_cross_entropy_compiled),
    "inf-cl": of_head(inf_cl),
    "quack-kernels": of_head(quack),
    "sentence-transformers": _of(sentence_transformers, cached=False),
    "sentence-transformers, cached": _of(sentence_transformers, cached=True),
}
