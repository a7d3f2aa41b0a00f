"""Bytes that live, floating-point operations and traffic of what runs inside, op by op.

Of tensors without storage (fake ones) as of real ones: only shapes are looked at.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rankpo_fast.plan.fusion import Fusion

EMBEDDING = torch.ops.aten.embedding_dense_backward.default
PHASES = "forward", "backward", "embedding"
LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm}  # the products of nn.Linear, both ways


class Op(NamedTuple):
    flops: float
    bytes: float  # read and written
    operands: float = 0.0  # bytes that a product of a linear layer reads


Costs = Counter[Op]  # how many such ops


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        live: bytes of the storages made inside that are still there.
        peaks: the most that it was in each of PHASES. Each grows in layers and tokens as a line,
            for itself: where the last layer computes, with autocast's copies of all weights; where
            the backward begins with that layer, all graphs being there; where it ends at the
            embedding, whose gradient is as large as itself.
        costs: of the ops; `fused_costs`: of those that run where layers are compiled.
        fusion: says which those are.
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
        self.fused_costs: Costs = Counter()
        self.fusion = Fusion()
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
                read = float(sum(map(_bytes, given)))
                op = Op(flops, read + sum(map(_bytes, made)), read if packet in LINEAR else 0.0)
                self.costs[op] += 1
                if not self.fusion.takes(func, given, new):
                    self.fused_costs[op] += 1
        return result

    def enter_phase(self, name: str) -> None:
        self._phase = name
        self.peaks[name] = max(self.peaks[name], self.live)

    def take_costs(self) -> tuple[Costs, Costs]:
        """Those since it was last asked, as they ran and as they run where layers are compiled."""
        costs, fused = self.costs, self.fused_costs
        fused[Op(0.0, self.fusion.take_bytes())] += 1
        self.costs, self.fused_costs = Counter(), Counter()
        return costs, fused

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
        self.fusion.freed(key)


# What fills no memory: where it goes is written by the next op.
UNREAD = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
          torch.ops.aten.empty_strided, torch.ops.aten.detach}  # fmt: skip


def seconds(costs: Costs, of: Callable[[float, float, float], float]) -> float:
    """The sum over the ops, one after the other; `of` is the time of one."""
    return sum(count * of(*op) for op, count in costs.items())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
