"""What is done to a backbone's layers for training, whatever the model: checkpointed, compiled,
their feed-forward modules given fewer tokens at once, what they keep moved to the host."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rankpo_fast.model.feed_forward import Chunked, chunk_feed_forward
from rankpo_fast.model.offload import Offload
from rankpo_fast.model.selective import contexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether a layer keeps what goes into it alone, and is computed again for the backward pass;
# selective: its products too, and only the rest is computed again.
Checkpointing = bool | Literal["selective"]
WAYS: tuple[Checkpointing, ...] = (False, "selective", True)  # each takes less memory, more time


class Layers:
    """Those of a backbone. The methods change it in place, and no parameter's name.

    Attributes:
        checkpointed: how, if at all; it changes no bit of the gradient.
        mlp_chunk: tokens that go through a feed-forward module at once; None: all.
    """

    def __init__(self, backbone: "PreTrainedModel"):
        self._backbone = backbone
        self._compiled: list[nn.Module] = []
        self._chunked: list[Chunked] = []
        self._offload: Offload | None = None
        self.checkpointed: Checkpointing = False
        self.mlp_chunk: int | None = None

    @property
    def can_checkpoint(self) -> bool:
        return self._backbone.supports_gradient_checkpointing

    @property
    def compiled(self) -> bool:
        return bool(self._compiled)

    def why_not_selective(self) -> str | None:
        """Why checkpointing cannot be selective here, where it can be at all; None if it can."""
        if self._compiled:
            return "compiled layers do not show their products"
        if self.mlp_chunk is not None:
            return "it keeps the products that --mlp_chunk is there to spare"
        code = sys.modules[type(self._backbone).__module__]
        rotary = getattr(code, "apply_rotary_pos_emb", None)
        if getattr(rotary, "__module__", "").startswith("liger_kernel"):
            # torch does not see it: from a product that is kept, positions would be turned twice.
            return "Liger's rotary positions are written over products (--use_liger_kernel false)"
        return None

    def checkpoint(self, kind: Checkpointing = True) -> None:
        """From now on, or (False) no longer. ValueError: selective where it cannot be."""
        if kind == "selective" and (reason := self.why_not_selective()) is not None:
            raise ValueError(f"checkpointing cannot be selective: {reason}")
        if kind:
            selective = {"context_fn": contexts} if kind == "selective" else {}
            self._change("enable", {"use_reentrant": False} | selective)
        elif self.checkpointed:
            self._change("disable")
        self.checkpointed = kind
        if self._compiled:
            self.compile()

    def _change(self, how: str, *arguments: Any) -> None:
        older = getattr(
            self._backbone, f"gradient_checkpointing_{how}"
        )  # in the first versions of 5
        getattr(self._backbone, f"activation_checkpointing_{how}", older)(*arguments)

    def chunk(self, tokens: int | None) -> None:
        """Let feed-forward modules take so many tokens at once, and compute them again for the
        backward pass; None: as they were. InputError: there are none that are known."""
        for chunked in self._chunked:
            chunked.undo()
        self._chunked, self.mlp_chunk = [], None
        if tokens is not None:
            self._chunked = chunk_feed_forward(self._backbone, tokens)
            self.mlp_chunk = tokens

    def offload(self, device: torch.device | None) -> None:
        """Move what checkpointed layers keep from `device` to the host; None: no longer."""
        self._offload = None if device is None else Offload(device)

    @property
    def host_bytes(self) -> int:
        """That what was moved takes there now."""
        return 0 if self._offload is None else self._offload.host_bytes

    @property
    def offloaded(self) -> bool:
        return self._offload is not None

    def offloading(self) -> AbstractContextManager[None]:
        """Around a forward pass."""
        return nullcontext() if self._offload is None else self._offload.forward()

    def compile(self) -> None:
        """What `parts` names, each by itself."""
        self.uncompile()
        self._compiled = self.parts()
        for part in self._compiled:
            part.compile(dynamic=True)

    def parts(self) -> list[nn.Module]:
        """What would be compiled. Each layer: they share one build, and between them nothing is
        gained.

        Of checkpointed layers the parts: where something in a layer cannot be compiled (attention
        on the CPU), the compiler gives up a checkpointed one as a whole, and only where there are
        gradients, so that dropout would not be drawn again as it was.
        """
        layers = outermost_layers(self._backbone) or [self._backbone]
        if self.checkpointed:
            return [part for layer in layers for part in layer.children()]
        return layers

    def uncompile(self) -> None:
        for module in self._compiled:
            module._compiled_call_impl = None  # what nn.Module.compile set; it has no way back
        self._compiled = []


def outermost_layers(backbone: nn.Module) -> list[nn.Module]:
    """Those of the backbone's lists of modules that lie in no other."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    return [layer for module in lists if id(module) not in inner for layer in module]
