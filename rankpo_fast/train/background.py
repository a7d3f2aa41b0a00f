"""Checkpoints are written while the training goes on: of a copy in the host's memory, by a thread.

A step waits for the copy alone. One checkpoint is written at a time, and where the host has no room
for a copy a step waits until it is on the disk.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from rankpo_fast.errors import out_of_memory
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.checkpoint import State
from rankpo_fast.train.meters import host_room

Result = TypeVar("Result")


class HostCopy:
    """Of the tensors of a state. Those of a GPU go to pinned memory, which is kept for the next."""

    def __init__(self, ranks: Ranks):
        self._ranks, self._on_gpu = ranks, ranks.device.type == "cuda"
        self._stager = BlockingAsyncStager()
        self._names: set[tuple[str, str]] | None = None  # of the tensors that it has memory for
        self._never = False  # again, since a host has refused

    def of(self, state: State) -> State | None:
        """None where the host of any rank has no room for it. All ranks must call it."""
        names = {(file, name) for file, tensors in state.tensors.items() for name in tensors}
        anew = not self._on_gpu or names != self._names
        if anew:
            self._stager = BlockingAsyncStager(cache_staged_state_dict=self._on_gpu)
        refused = self._never or (anew and _bytes(state) > host_room())
        if self._anywhere(refused):
            return None
        tensors = None
        try:
            tensors = self._stager.stage(state.tensors)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self._never = self._anywhere(tensors is None)
        if self._never or tensors is None:
            self._stager = BlockingAsyncStager()  # which lets go of what the other had
            return None
        self._names = names
        return replace(state, tensors=tensors)

    def _anywhere(self, refused: bool) -> bool:
        """Whether any rank is."""
        [anywhere] = self._ranks.highest([refused])
        return bool(anywhere)


def _bytes(state: State) -> int:
    """Of this rank."""
    return sum(
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        for of_file in state.tensors.values()
        for tensor in of_file.values()
    )


def begun(work: Callable[[], Result]) -> Future[Result]:
    """The work, in a thread of its own, which ends with the program."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
