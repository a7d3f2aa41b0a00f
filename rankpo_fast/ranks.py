"""Data-parallel training: the processes that torchrun starts take one step together.

    texts of the batch      dealt out by cost; a rank encodes its own      all-gather  [n, D]
    rows of the batch       a slice each, scored against all passages      sum by owner [n, D]
    parameters' gradients   of the own texts, over the whole step          train/engine.py

Every rank knows all rows as numbers (node.py), so each makes the same batch by itself and no
text travels.

Rank 0 writes, others no more than their parts of sharded weights. Out of memory on one, all do the
step again, unless ranks wait for it in the midst of a pass: then the run ends. What ends a rank
ends all: torchrun stops the others, which wait in a collective whose connection closes. n texts, D
dims.
"""

import atexit
import dataclasses
import heapq
import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from rankpo_fast.config import ComputeConfig
from rankpo_fast.errors import InputError, RankLost, out_of_memory
from rankpo_fast.heartbeat import Heartbeat
from rankpo_fast.ops.ranks import gather_rows, sum_rows

STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# With rank 0, which may evaluate for long: who dies or falls silent is not waited for.
PATIENCE = timedelta(days=7)
LONGEST_SLICE = 0.01  # seconds of a wait

Metrics = dict[str, Tensor]


class OutOfMemory(Exception):
    """Of the device of a rank, which all ranks raise."""

    def __init__(self, here: bool):
        super().__init__(here)
        self.here = here  # whether it was this rank's


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those that work together; without groups it is alone."""

    device: torch.device
    group: dist.ProcessGroup | None = None  # moves what lies on the devices
    hosts: dist.ProcessGroup | None = None  # moves what hosts must know; waits for no GPU
    # Whether weights lie in parts, so that a pass through the encoder is one of all ranks.
    lockstep: bool = False
    reader: int = 0  # the rank that reads for this one, and for all others of its node
    heart: Heartbeat | None = None  # tells of ranks that are silent

    @classmethod
    @contextmanager
    def joined(cls, compute: ComputeConfig) -> Iterator["Ranks"]:
        """Those that WORLD_SIZE tells of, or a group of torch's that is there.

        Raises:
            InputError: torchrun did not start this process, or there is no GPU for this rank.
        """
        there = dist.is_initialized()
        size = dist.get_world_size() if there else int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            device = compute.torch_device()
            if device.index is not None:  # kernels and events are the current device's
                torch.cuda.set_device(device)
            yield cls(device)
            return
        device = own_device(compute)
        if not there:
            if missing := [name for name in STARTED_BY_TORCHRUN if name not in os.environ]:
                raise InputError(
                    f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start with torchrun"
                )
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)  # the next training needs it once more
        ranks = cls(device, dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE))
        try:
            with heart_of(ranks, compute.rank_timeout) as heart:
                ranks = dataclasses.replace(ranks, heart=heart)
                # They meet: else rank 0 may be gone, and its store, before others have the group.
                reader = _reader(ranks.rank, ranks.objects((_node(), os.getpid())))
                yield dataclasses.replace(ranks, reader=reader)
        except BaseException:  # the process may end, and must not wait for others then
            atexit.unregister(dist.destroy_process_group)
            raise

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def reads(self) -> bool:
        """Whether it is the one of its node that reads."""
        return self.rank == self.reader

    def beside(self) -> "Ranks":
        """The same, talking among themselves in a thread beside this one. All must call it."""
        if self.hosts is None:
            return self
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return dataclasses.replace(self, hosts=group)

    def say(self, text: str) -> None:
        if self.first:
            print(text, file=sys.stderr, flush=True)

    # --- who waits for whom ---

    def meet(self) -> None:
        """Wait for all; RankLost where one is gone."""
        self.highest([0])

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Rank 0 does it before the others: it fills caches, and says once what is wrong for all.
        Then those that read for other nodes, then the rest.

        Nobody goes on before all have done it. An InputError of the first, or of one that reads, is
        one of all: the others have it as a copy, whose `copied` is True.
        """
        turn = 0 if self.first else 1 if self.reads else 2
        for _ in range(turn):
            self._raise_if_told()
        try:
            yield
        except InputError as error:
            if turn < 2:
                self.objects((str(error), error.name))
            raise
        for _ in range(turn, 2):
            self._raise_if_told()
        self.meet()

    def _raise_if_told(self) -> None:
        told = [report for report in self.objects(None) if report is not None]
        if told:
            error = InputError(*told[0])
            error.copied = True
            raise error

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The greatest number of any rank in each place; raises RankLost like `meet`."""
        if self.hosts is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with self.talking():
            maximum = dist.ReduceOp.MAX
            self._wait_for(dist.all_reduce(tensor, maximum, group=self.hosts, async_op=True))
        return tensor.tolist()

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks; raises RankLost like `meet`."""
        if self.hosts is None:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        size = torch.tensor([len(own)])
        with self.talking():
            self._wait_for(dist.all_gather(sizes, size, group=self.hosts, async_op=True))
            longest = int(max(sizes))
            own = torch.cat([own, own.new_zeros(longest - len(own))])
            told = [torch.empty_like(own) for _ in sizes]
            self._wait_for(dist.all_gather(told, own, group=self.hosts, async_op=True))
        return [
            pickle.loads(value.numpy().data[:size]) for value, size in zip(told, sizes, strict=True)
        ]

    def send_to_first(self, rows: Tensor) -> None:
        """From the host's memory; raises RankLost like `meet`."""
        with self.talking():
            dist.send(rows.contiguous(), 0, group=self.hosts)

    def received(self, rank: int, shape: tuple[int, ...]) -> Tensor:
        """The fp32 rows that a rank sends to this one, the first; raises RankLost like `meet`."""
        rows = torch.empty(shape, dtype=torch.float32)
        with self.talking():
            dist.recv(rows, rank, group=self.hosts)
        return rows

    def _wait_for(self, work: dist.Work | None) -> None:
        """In slices, between which signals are heard; RankLost where a rank has fallen silent."""
        assert work is not None  # this rank is of the group
        began = time.monotonic()
        while not work.is_completed():
            if self.heart is not None:
                self.heart.check()
            time.sleep(min(max((time.monotonic() - began) / 10, 2e-5), LONGEST_SLICE))
        work.wait()

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Inside, what breaks a collective of the hosts is a RankLost."""
        try:
            with record_function("communication"):
                yield
        except RankLost:
            raise
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} stops, since another is gone ({error})") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside, without a collective, has been done on all ranks afterwards.

        Raises:
            OutOfMemory: on all, where one ran out of memory: none waits for what it cannot give.
        """
        failed = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = True
            # What it holds is needed again. On Python 3.12 its traceback would hold it, through
            # this frame, whose caller has the error.
            error.__traceback__ = None
        [anywhere] = self.highest([failed])
        if anywhere:
            raise OutOfMemory(failed)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What is done inside has collectives of the devices, so that no rank can do it again.

        Raises:
            InputError: out of memory on this rank; the others then hear that it is gone.
            RankLost: another is gone.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self.group is None:
                raise
            if not out_of_memory(error):
                if not _of_connection(error):
                    raise
                raise RankLost(
                    f"rank {self.rank} stops, since another is gone ({error})"
                ) from error
            raise InputError(
                f"out of memory on rank {self.rank} in a pass for which the others wait, so that "
                f"the step cannot be done again with less; --resume goes on from the last "
                f"checkpoint: give it a smaller --activation_memory_gb or "
                f"--gradient_checkpointing true, or train anew with a smaller "
                f"--max_tokens_per_micro_batch"
            ) from error

    # --- a step ---

    def connect(self) -> None:
        """Use every collective of a step once: NCCL takes a GPU's memory for each at its first."""
        if self.group is None:
            return
        ones = torch.ones(self.size, device=self.device)
        counts = [1] * self.size
        self.owned(self.gathered(ones[:1], counts), counts)
        dist.all_reduce(ones, group=self.group)
        if self.lockstep:
            dist.reduce_scatter_tensor(torch.empty_like(ones[:1]), ones, group=self.group)

    def rows(self, count: int) -> slice:
        """The rank's part of so many rows; it may be empty."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gathered(self, vectors: Tensor, counts: list[int]) -> Tensor:
        """Vectors [n, D] of all ranks, `counts` of each."""
        if self.group is None:
            return vectors
        with record_function("communication"):
            return gather_rows(vectors, counts, self.group)

    def owned(self, gradient: Tensor, counts: list[int]) -> Tensor:
        """What all ranks have [n, D] for this rank's vectors, summed."""
        if self.group is None:
            return gradient
        with record_function("communication"):
            return sum_rows(gradient, counts, self.group)

    def total(
        self, losses: list[Tensor], metrics: list[Metrics], parameters: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Metrics]]:
        """Losses and metrics summed over ranks, and in place the gradients of these parameters,
        which are small and no engine's."""
        if self.group is None:
            return losses, metrics
        values = [*losses, *(value for of_batch in metrics for value in of_batch.values())]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        dtype = max((t.dtype for t in (*values, *gradients)), key=lambda dtype: dtype.itemsize)
        flat = [tensor.detach().to(dtype).flatten() for tensor in (*values, *gradients)]
        sizes = [tensor.numel() for tensor in flat]
        with record_function("communication"):
            numbers = torch.cat(flat)
            dist.all_reduce(numbers, group=self.group)
        totals = iter(numbers.split(sizes))
        losses = [next(totals).view(()) for _ in losses]
        metrics = [{name: next(totals).view(()) for name in of_batch} for of_batch in metrics]
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))
        return losses, metrics


ALONE = Ranks(torch.device("cpu"))


def heart_of(ranks: Ranks, timeout: int) -> AbstractContextManager[Heartbeat | None]:
    """That of a rank, unless the others may be silent for ever."""
    return Heartbeat(ranks.rank, ranks.size, timeout) if timeout else nullcontext()


def deal(costs: Tensor, hands: int) -> list[Tensor]:
    """Which of the texts of `costs` [n] go to each hand: the dearest first, to who has least."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    heap = [(0.0, hand) for hand in range(hands)]
    order = costs.argsort(descending=True, stable=True)
    for text, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        so_far, hand = heap[0]
        dealt[hand].append(text)
        heapq.heapreplace(heap, (so_far + cost, hand))
    return [torch.tensor(texts, dtype=torch.int64) for texts in dealt]


def _node() -> tuple[str, ...]:
    """What the processes of one running system that see each other have in common."""
    boot, seen = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    return (
        socket.gethostname(),
        boot.read_text() if boot.exists() else "",
        os.readlink(seen) if os.path.lexists(seen) else "",
    )


def _reader(rank: int, places: list[tuple[tuple[str, ...], int]]) -> int:
    """The first rank of this one's node, if what it has open can be opened here; else itself.

    Args:
        places: the node and process of each rank.
    """
    nodes = [node for node, _ in places]
    first = nodes.index(nodes[rank])
    return first if os.access(f"/proc/{places[first][1]}/fd", os.R_OK | os.X_OK) else rank


def _of_connection(error: Exception) -> bool:
    """Whether torch.distributed raised it, of which gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def own_device(compute: ComputeConfig) -> torch.device:
    """The GPU of LOCAL_RANK, which becomes the current one, or the CPU."""
    device = compute.torch_device()
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise InputError(f"--device {device}: each rank needs a GPU of its own, give cuda or auto")
    number = os.environ.get("LOCAL_RANK", "0")
    device = dataclasses.replace(compute, device=f"cuda:{number}").torch_device()
    torch.cuda.set_device(device)
    return device
