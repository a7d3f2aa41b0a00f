"""What checkpointed layers keep, on the host from the forward pass until the backward needs it.

    forward    x of layer n  -> pinned memory of the host       while layers n + 1, n + 2 compute
    backward   x of layer n  -> GPU                             while layer n + 1 computes

Copies go over two streams of their own; no thread waits. A GPU block is given back to the allocator
only when the stream that computes has been told to wait for the copy out of it, so that whoever is
given the block next writes after the copy. (`record_stream`, the other way, frees a block once the
copy has run: the host, which is far ahead of the GPU, would find none free and take new ones.)
torch's own `save_on_cpu` copies in the stream that computes, which waits for it.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rankpo_fast.data.moving import pinned_bytes

LEAST = 1 << 20  # bytes; a copy of less takes longer to start than to run
BEHIND = 2  # layers whose copies may be under way: one that is late holds nobody up


class Away:
    """A tensor that has left: on the host, and for a while still, or again, on the device."""

    def __init__(self, tensor: Tensor, host: Tensor, gone: Any, before: "Away | None"):
        self.tensor: Tensor | None = tensor
        self.host, self.gone, self.back = host, gone, None  # events: after the copies out and in
        self._before = weakref.ref(before) if before is not None else None

    @property
    def before(self) -> "Away | None":
        """The one that left before it, and is needed after it."""
        return None if self._before is None else self._before()

    def __del__(self) -> None:
        # A graph that is dropped half way: nobody may be given a block that a copy still writes to.
        if self.back is not None:
            self.back.wait()


class Offload:
    """Of one device's tensors; `with offload.forward():` around a forward pass."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._out, self._in = self._streams.Stream(device), self._streams.Stream(device)
        self._leaving: deque[weakref.ref[Away]] = deque()
        self._alive: weakref.WeakSet[Away] = weakref.WeakSet()
        self._last: weakref.ref[Away] | None = None

    @property
    def host_bytes(self) -> int:
        """That tensors of graphs which are kept take on the host now."""
        size = pinned_bytes if self._device.type == "cuda" else lambda tensor: tensor.nbytes
        return sum(size(away.host) for away in self._alive)

    @contextmanager
    def forward(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | Away:
        # Weights, and views of them, are not copied: they stay on the device in any case. Nor is
        # what no layer has computed (masks, positions, token ids), which layers share.
        computed = tensor.grad_fn is not None and tensor.is_floating_point()
        if not computed or not tensor.is_contiguous() or tensor.nbytes < LEAST:
            return tensor
        while len(self._leaving) >= BEHIND:
            self._let_go(self._leaving.popleft()())
        pinned = self._device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        self._out.wait_stream(self._streams.current_stream(self._device))  # which computes it
        with self._streams.stream(self._out):
            host.copy_(tensor.detach(), non_blocking=True)
        before = None if self._last is None else self._last()
        away = Away(tensor.detach(), host, self._now(self._out), before)
        self._leaving.append(weakref.ref(away))
        self._alive.add(away)
        self._last = weakref.ref(away)
        return away

    def _let_go(self, away: Away | None) -> None:
        """Its block may be used for something else. None: it went with its graph."""
        if away is not None and away.tensor is not None and away.back is None:
            away.gone.wait()
            away.tensor = None

    def _unpack(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        tensor, copied = kept.tensor, kept.back or kept.gone
        assert tensor is not None, "just fetched"
        kept.tensor = kept.back = None
        copied.wait()
        if kept.before is not None:
            self._fetch(kept.before)
        return tensor

    def _fetch(self, away: Away) -> None:
        """Begin the copy in, unless it is on the device still."""
        if away.tensor is not None:
            return
        away.tensor = torch.empty_like(away.host, device=self._device)
        # Whatever was in that block has been computed with by then, and the host has all of it.
        self._in.wait_stream(self._streams.current_stream(self._device))
        self._in.wait_event(away.gone)
        with self._streams.stream(self._in):
            away.tensor.copy_(away.host, non_blocking=True)
        away.back = self._now(self._in)

    def _now(self, stream: Any) -> Any:
        event = self._streams.Event()
        event.record(stream)
        return event
