"""Bytes that live, floating-point operations and traffic of what runs inside, op by op.

Of tensors without storage (fake ones) as of real ones: only shapes are looked at.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

EMBEDDING = torch.ops.aten.embedding_dense_backward.default
PHASES = "forward", "backward", "embedding"
Costs = Counter[tuple[float, float]]  # (flops, bytes read and written) of an op -> how many such


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        live: bytes of the storages made inside that are still there.
        peaks: the most that it was in each of PHASES. Each grows in layers and tokens as a line,
            for itself: where the last layer computes, with autocast's copies of all weights; where
            the backward begins with that layer, all graphs being there; where it ends at the
            embedding, whose gradient is as large as itself.
        costs: of the ops.
    """

    def __init__(self, flops: Mapping[Any, Callable[..., float]] | None = None):
        """
        Args:
            flops: of ops that torch's registry lacks, from their arguments by name.
        """
        super().__init__()
        self._flops = flops or {}
        self.live = 0
        self.peaks = dict.fromkeys(PHASES, 0)
        self.costs: Costs = Counter()
        self._sizes: dict[int, int] = {}
        self._phase = PHASES[0]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is EMBEDDING:
            self.enter_phase(PHASES[2])
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        for tensor in new:
            self._made(tensor.untyped_storage())
        if new or func._schema.is_mutable:
            packet = func._overloadpacket
            flops = 0.0
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=result)
            elif packet in self._flops:
                names = [argument.name for argument in func._schema.arguments]
                flops = self._flops[packet](**dict(zip(names, args, strict=False)), **kwargs)
            if packet not in UNREAD:
                self.costs[flops, sum(map(_bytes, [*given, *made]))] += 1
        return result

    def enter_phase(self, name: str) -> None:
        self._phase = name
        self.peaks[name] = max(self.peaks[name], self.live)

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
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live)
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
