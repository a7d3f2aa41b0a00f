"""What compiled layers would read and write: counted from the ops of layers that are not.

In each module that is compiled, products, attention and whatever else is no elementwise op, sum or
copy run as they are. Of the others those with as many products before them, on the longest way from
the module's inputs, are taken as one kernel: it reads once what was made outside of it, and writes
once what is needed outside of it. What the compiler computes again instead of keeping it, and what
it sews onto a product, would be less; that it splits such a kernel, more.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Kernel(NamedTuple):
    region: object | None
    level: int  # products before it
    fused: bool


aten = torch.ops.aten
FUSED = {aten.sum, aten.mean, aten.var_mean, aten.amax, aten._softmax, aten._softmax_backward_data,
         aten.native_layer_norm, aten.native_layer_norm_backward, aten.native_dropout,
         aten.native_dropout_backward, aten._to_copy, aten.clone, aten.cat, aten.copy_, aten.fill_,
         aten.zeros, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros,
         aten.select_backward, aten.slice_backward}  # fmt: skip


class Fusion:
    """Bytes of the fused kernels, while regions are entered.

    Attributes:
        region: of what runs now; None: it is not compiled.
    """

    def __init__(self) -> None:
        self.region: object | None = None
        self._bytes = 0
        self._kernels: dict[int, Kernel] = {}  # that made a storage
        self._unseen: dict[int, int] = {}  # bytes of storages that no other kernel has seen yet
        self._read: dict[int, Counter[Kernel]] = {}  # bytes of a storage, by each kernel

    def takes(self, func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
        """Whether an op is one of a fused kernel; it is counted then."""
        level = max((self._level(x) for x in given), default=0)
        kernel = Kernel(self.region, level, fused=True)
        fused = self.region is not None and _can_be(func)
        if fused and func._schema.is_mutable:  # of what the kernel alone knows
            fused = self._kernels.get(_key(given[0])) == kernel
        if not fused:
            kernel = Kernel(self.region, level + 1, fused=False)
        for tensor in given:
            key = _key(tensor)
            if fused and self._kernels.get(key) == kernel:
                continue
            self._bytes += self._unseen.pop(key, 0)
            if fused:
                read = self._read.setdefault(key, Counter())
                left = tensor.untyped_storage().nbytes() - read[kernel]
                more = min(tensor.numel() * tensor.element_size(), left)
                read[kernel] += more
                self._bytes += more
        for tensor in made:
            key = _key(tensor)
            self._kernels[key] = kernel
            if fused:
                self._unseen[key] = tensor.untyped_storage().nbytes()
        return fused

    def take_bytes(self) -> int:
        """Those since it was last asked; what is still there is needed later."""
        taken = self._bytes + sum(self._unseen.values())
        self._bytes, self._unseen = 0, {}
        return taken

    def freed(self, key: int) -> None:
        for known in (self._kernels, self._unseen, self._read):
            known.pop(key, None)

    def _level(self, tensor: Tensor) -> int:
        maker = self._kernels.get(_key(tensor))
        return maker.level if maker is not None and maker.region is self.region else 0

    @contextmanager
    def of(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, each call of one of them is a region, and so is its backward pass."""
        calls: list[tuple[object | None, object]] = []  # (the region before, the call)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = object()
            calls.append((self.region, call))
            self.region = object()
            for tensor in _differentiable((args, kwargs)):
                tensor.register_hook(self._changed(call, None))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.region, call = calls.pop()
            for tensor in _differentiable(output):
                tensor.register_hook(self._changed(None, call))

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
        # Also where checkpointing ends a call as soon as it has computed what it needs.
        handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _changed(self, old: object | None, new: object | None) -> Callable[[Tensor], None]:
        """A hook that enters the region `new`, or leaves `old` if the next one has not begun."""

        def hook(_: Tensor) -> None:
            if old is None or self.region is old:
                self.region = new

        return hook


def _can_be(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or func._overloadpacket in FUSED


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _differentiable(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
