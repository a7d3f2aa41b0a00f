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

from rankpo_fast.ranks import Ranks
from rankpo_fast.train.checkpoint import State
from rankpo_fast.train.meters import host_room

Result = TypeVar("Result")


class HostCopy:
    """Of the tensors of a state. Those of a GPU go to pinned memory, which is kept for the next."""

    def __init__(self, ranks: Ranks):
        self._ranks, self._on_gpu = ranks, ranks.device.type == "cuda"
        self._stager = BlockingAsyncStager(cache_staged_state_dict=self._on_gpu)
        self._has_room = False  # for ever

    def fits(self, state: State) -> bool:
        """Whether the hosts of all ranks have room for it, all of which must ask."""
        if not self._has_room:
            size = sum(
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
                for of_file in state.tensors.values()
                for tensor in of_file.values()
            )
            [short] = self._ranks.highest([size > host_room()])
            if short:
                return False
            self._has_room = self._on_gpu
        return True

    def of(self, state: State) -> State:
        return replace(state, tensors=self._stager.stage(state.tensors))


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
