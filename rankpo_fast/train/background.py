"""Checkpoints are written while the training goes on: of a copy in the host's memory, by a thread.

A step waits for the copy alone. One checkpoint is written at a time, and where the host has no room
for a copy a step waits until it is on the disk.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from rankpo_fast.data.moving import pinned_bytes
from rankpo_fast.errors import out_of_memory
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.checkpoint import State
from rankpo_fast.train.meters import host_room

Result = TypeVar("Result")


class HostCopy:
    """Of the tensors of a state. Its memory is kept for the next: a GPU's is pinned, which takes
    long to get, and a host's allocator keeps what is freed (train/allocator.py)."""

    def __init__(self, ranks: Ranks):
        self._ranks, self._on_gpu = ranks, ranks.device.type == "cuda"
        self._stager = BlockingAsyncStager(cache_staged_state_dict=self._on_gpu)
        self.refused = False  # by a host, which is not asked again
        self._fits = False

    def of(self, state: State) -> State | None:
        """None where the host of any rank has no room for it. All ranks must call it."""
        if not self._fits:
            short = _bytes(state, self._on_gpu) > host_room(shared=state.in_parts)
            self.refused = self._anywhere(self.refused or short)
        if self.refused:
            return None
        tensors = None
        try:
            tensors = self._stager.stage(state.tensors)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self.refused = self._anywhere(tensors is None)
        if self.refused or tensors is None:
            # No copy comes here any more: the host has a use for what one, or a part of it, took.
            self._stager.state_dict_cache = tensors = None
            if self._on_gpu:
                torch._C._host_emptyCache()
            return None
        self._fits = True
        return replace(state, tensors=tensors)

    def _anywhere(self, refused: bool) -> bool:
        """Whether any rank is."""
        [anywhere] = self._ranks.highest([refused])
        return bool(anywhere)


def _bytes(state: State, pinned: bool) -> int:
    """That this rank takes of the host until the state is on the disk, at most."""
    files = []
    for tensors in state.tensors.values():
        own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
        files.append(sum(pinned_bytes(t) if pinned else t.nbytes for t in own))
    # torch.distributed.checkpoint makes each file in memory.
    return sum(files) + (max(files) if state.in_parts else 0)


def begun(work: Callable[[], Result], device: torch.device) -> Future[Result]:
    """The work, in a thread of its own, which ends with the program; on that GPU, if it is one."""
    future: Future[Result] = Future()
    number: int | None = None
    if device.type == "cuda":  # without a number it is the current one, of which a thread has none
        number = torch.cuda.current_device() if device.index is None else device.index

    def run() -> None:
        try:
            if number is not None:
                torch.cuda.set_device(number)
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def ended(work: Callable[[], Result]) -> Future[Result]:
    """The work, which is done when this returns."""
    future: Future[Result] = Future()
    future.set_result(work())
    return future
