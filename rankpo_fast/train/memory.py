"""What goes through the encoder at once, and how many graphs are kept: decided by measuring.

Before the first step the longest texts of all go through once, forward and backward. The graph of
a token then has a known size, and a run that would not fit fails now, not hours in.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encoder import Encoder

FREE_SHARE = 0.5  # of the host's free memory that graphs may take: others live there too


class Memory:
    """`max_tokens` of a micro-batch, and the `room` in bytes for graphs that are kept."""

    def __init__(self, max_tokens: int, room: float, graph_bytes: float):
        self.max_tokens, self.room = max_tokens, room
        self.graph_bytes = graph_bytes  # of a token

    @classmethod
    def measure(
        cls, encoder: Encoder, table: TokenTable, max_tokens: int, room: float | None
    ) -> "Memory":
        """Try the longest micro-batch of the table. `room` None: a share of what is free."""
        longest = pack(table, encoder.plan(table.lengths, max_tokens)[0])
        with torch.random.fork_rng(), _Allocations() as allocations:
            vectors = encoder(longest)
            graph = allocations.alive()
        vectors.backward(torch.zeros_like(vectors))
        encoder.zero_grad(set_to_none=True)
        if room is None:
            room = FREE_SHARE * _free_bytes()
        return cls(max_tokens, room, graph / sum(longest.lengths))

    def kept(self, groups: list[MicroBatch]) -> int:
        """Of how many groups, from the last, the graph is kept; that of the last costs nothing."""
        used, kept = 0.0, 0
        for group in reversed(groups):
            used += sum(group.lengths) * self.graph_bytes
            if kept > 0 and used > self.room:
                break
            kept += 1
        return kept


class _Allocations(TorchDispatchMode):
    """The storages made inside, and how much of them is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # neither a view nor written in place
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def _free_bytes() -> int:
    """Of the host, or of the container that the process runs in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * free["MemAvailable"]
