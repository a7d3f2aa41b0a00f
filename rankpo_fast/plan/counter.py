"""Bytes that live, floating-point operations and traffic of what runs inside, op by op.

Of tensors without storage (fake ones) as of real ones: only shapes are looked at.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

EMBEDDING = torch.ops.aten.embedding_dense_backward.default
Costs = Counter[tuple[float, float]]  # (flops, bytes read and written) of an op -> how many such


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        live: bytes of the storages made inside that are still there.
        peak: the most that it was before the gradient of an embedding was taken.
        peak_after: the most from then on. The two grow in layers and tokens as lines, each for
            itself: the one stands at the last layer, whose graph is whole, the other at the first.
        costs: of the ops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.peak_after = 0
        self.costs: Costs = Counter()
        self._sizes: dict[int, int] = {}
        self._after = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._after |= func is EMBEDDING
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        for tensor in new:
            self._made(tensor.untyped_storage())
        if new or func._schema.is_mutable:
            packet = func._overloadpacket
            flops = 0
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=result)
            if packet not in UNREAD:
                self.costs[flops, sum(map(_bytes, [*given, *made]))] += 1
        return result

    def take_costs(self) -> Costs:
        """Those since it was last asked."""
        costs, self.costs = self.costs, Counter()
        return costs

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.live += size
        if self._after:
            self.peak_after = max(self.peak_after, self.live)
        else:
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


# What fills no memory: where it goes is written by the next op.
UNREAD = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
          torch.ops.aten.empty_strided, torch.ops.aten.detach}  # fmt: skip


def seconds(costs: Costs, of: Callable[[float, float], float]) -> float:
    """The sum over the ops, one after the other; `of` flops and bytes is one op's time."""
    return sum(count * of(flops, bytes) for (flops, bytes), count in costs.items())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
