"""Feed-forward modules over chunks of tokens, each computed again for the backward pass.

    out[chunk] = W_down act(W_up x[chunk])      of W_up x, [chunk, I], one chunk's lives at once

They see each token by itself, so what comes out is the same but for how products of other sizes
round. Weights' gradients are sums over chunks. T tokens, D dims, I of what lies within.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankpo_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Methods that transformers' layers call with [B, L, D], a token seen by itself; they go first.
METHODS = ("feed_forward_chunk", "ff_chunk")
# Else the forward of a module that has two such children, the first and the last product of it.
CHILDREN = (
    ("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("c_fc", "c_proj"),
    ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip


class Chunked:
    """In the place of a method of `module` that takes states [B, L, D] to [B, L, D]."""

    def __init__(self, module: nn.Module, name: str, tokens: int):
        self._module, self._name, self._tokens = module, name, tokens
        self._own = vars(module).get(name)  # Liger puts its own there too
        self._method = getattr(module, name)
        setattr(module, name, self)

    def __call__(self, *states: Tensor) -> Tensor:
        parts = [x.flatten(0, 1)[None].split(self._tokens, dim=1) for x in states]  # [1, chunk, D]
        run: Any = self._method
        if torch.is_grad_enabled():
            run = self._again
        outputs = torch.cat([run(*part) for part in zip(*parts, strict=True)], dim=1)
        return outputs.view(*states[0].shape[:2], -1)

    def _again(self, *states: Tensor) -> Tensor:
        return checkpoint(self._method, *states, use_reentrant=False)

    def undo(self) -> None:
        if self._own is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._own)


def chunk_feed_forward(backbone: "PreTrainedModel", tokens: int) -> list[Chunked]:
    """Let all feed-forward modules take so many tokens at once.

    Raises:
        InputError: it has none that is known here.
    """
    found: list[tuple[nn.Module, str]] = []
    within: set[nn.Module] = set()  # one that is found
    for module in backbone.modules():  # an outer one before those in it
        method = None if module in within else _method(module)
        if method is not None:
            found.append((module, method))
            within.update(module.modules())
    if not found:
        pairs = ", ".join(f"{first} and {last}" for first, last in CHILDREN)
        raise InputError(
            f"--mlp_chunk {tokens}: no feed-forward module is recognised in "
            f"{backbone.config.model_type}: none has {' or '.join(METHODS)}, or the layers {pairs}",
            "mlp_chunk",
        )
    return [Chunked(module, method, tokens) for module, method in found]


def _method(module: nn.Module) -> str | None:
    for name in METHODS:
        if callable(getattr(module, name, None)):
            return name
    children = dict(module.named_children())
    if any("attn" in name or "attention" in name for name in children):
        return None  # a whole layer, as OPT's: its tokens see each other
    return "forward" if any({*pair} <= {*children} for pair in CHILDREN) else None
