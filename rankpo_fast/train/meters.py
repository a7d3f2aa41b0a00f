"""How much memory a device has free, and what a piece of work takes of it.

A GPU's allocator keeps count. On the host nobody does, so there the tensors that are made are
watched, and what is free is the least that the machine and the groups around this process leave.
"""

import gc
import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankpo_fast.ranks import Ranks

HOST_SHARE = 0.5  # of what is free that a run may take: others live there too
GPU_SHARE = 0.9  # the rest is lost between blocks of unlike sizes
NO_LIMIT = 1 << 60  # bytes; version 1 of control groups writes one of these for none


class Meter(AbstractContextManager, Protocol):
    """Inside: `held`, bytes taken since it was entered and not given back; `peak` of that, ever."""

    warns: bool  # whether asking for too much raises torch.OutOfMemoryError

    def held(self) -> int: ...

    def peak(self) -> int: ...

    def free(self) -> float:
        """Bytes that may still be taken."""


def meter_of(device: torch.device) -> Meter:
    return Gpu(device) if device.type == "cuda" else Host()


class Gpu(Meter):
    warns = True

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> "Gpu":
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free(self) -> float:
        on_gpu, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return GPU_SHARE * (on_gpu + reserved - torch.cuda.memory_allocated(self._device))


class Host(Meter):
    """Its peak is what was held whenever somebody asked."""

    warns = False

    def __enter__(self) -> "Host":
        self._peak = 0
        self._watch = _Allocations()
        # What the compiler meets first while it is watched, it never compiles.
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.__exit__(*exception)
        self._eager.__exit__(*exception)

    def held(self) -> int:
        held = self._watch.alive()
        self._peak = max(self._peak, held)
        return held

    def peak(self) -> int:
        return self._peak

    def free(self) -> float:
        return host_room()


class Agreed(Meter):
    """What another meter says on the rank where it is worst, the same on all: they must ask
    together. Nobody may run out there, since the others would wait for it."""

    warns = False

    def __init__(self, meter: Meter, ranks: Ranks):
        self._meter, self._ranks = meter, ranks
        self.counts_backward = meter.warns  # whether `peak` is known without asking

    def __enter__(self) -> "Agreed":
        self._meter.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._meter.__exit__(*exception)

    def held(self) -> int:
        return self._most(self._meter.held())

    def peak(self) -> int:
        return self._most(self._meter.peak())

    def free(self) -> float:
        return -self._most(-int(self._meter.free()))

    def _most(self, number: int) -> int:
        [most] = self._ranks.highest([number])
        return most


class _Allocations(TorchDispatchMode):
    """The storages made inside, and how much of them is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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


def release(device: torch.device) -> None:
    """After running out: give back what only circles of references hold, and unused blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- the host ---


def host_room(*, shared: bool = True) -> float:
    """Bytes that a process may take of what is free on the host; `shared`: as other ranks there."""
    takers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if shared else 1
    return HOST_SHARE * host_free_bytes() / takers


def host_free_bytes(root: Path = Path("/")) -> int:
    """Of the machine, or of the smallest control group (a container's) that the process is in."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # macOS does not tell what is free of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = 1024 * _numbers(meminfo)["MemAvailable:"]
    return max(0, min([machine, *_free_in_groups(root), *_free_in_limits(root)]))


def _free_in_limits(root: Path) -> list[int]:
    """Of the limits of the process (ulimit -v, ulimit -d) that are set."""
    free = []
    status = root / "proc/self/status"
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(limit)
        for line in status.read_text().splitlines() if status.exists() else []:
            if most != resource.RLIM_INFINITY and line.startswith(name):
                free.append(most - 1024 * int(line.split()[1]))
    return free


# Of versions 1 and 2: where the groups of memory are, and the names of three files.
_GROUPS = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("", "memory.max", "memory.current", "inactive_file"),
}


def _free_in_groups(root: Path) -> list[int]:
    """Of each group with a limit that the process is in, directly or not."""
    free = []
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & _GROUPS.keys():
            folder, limit, usage, cached = _GROUPS[controller]
            top = root / "sys/fs/cgroup" / folder
            group = top / path.lstrip("/")
            # Inside a container the path may be the host's, and only the top is there.
            for level in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
                if not (level / limit).exists() or not (level / usage).exists():
                    continue
                most = (level / limit).read_text().strip()
                if most != "max" and int(most) < NO_LIMIT:
                    used = int((level / usage).read_text())
                    used -= _numbers(level / "memory.stat").get(cached, 0)  # dropped when needed
                    free.append(int(most) - used)
    return free


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: int(number) for name, number, *_ in map(str.split, lines)}
