"""The gradient cache: a batch of any size through an encoder that has room for a part of it.

    x_i = encoder(micro-batch i)       without a graph, but for the last ones, whose graphs fit
    loss, dx = loss of all x           in one piece: all negatives
    backward from dx_i, i descending   through the graph that was kept, or one made again

As in GradCache (Gao et al. 2021, arXiv 2101.06983), whose graphs are all made again. Which are kept
changes no bit of the gradient: sums are taken in the same order, and dropout is drawn again as it
was. n texts in all, D dims.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from rankpo_fast.data.packing import MicroBatch
from rankpo_fast.model.encoder import Encoder


class CachedVectors:
    """`vectors` [n, D] of micro-batches, one after the other; `backward` once, from theirs.

    Args:
        encoder: takes a micro-batch of S texts to vectors [S, D].
        kept: of how many micro-batches, counted from the last, the graph is kept. Memory holds
            those graphs, or one, whichever is more.
    """

    def __init__(self, encoder: Encoder, micro_batches: Sequence[MicroBatch], *, kept: int):
        self._encoder, self._micro_batches = encoder, micro_batches
        self._states: list[RandomStates] = []  # of the generators, before each without a graph
        parts = []
        for number, micro_batch in enumerate(micro_batches):
            keep = number >= len(micro_batches) - kept
            if not keep:
                self._states.append(random_states(micro_batch.input_ids.device))
            with torch.set_grad_enabled(keep):
                parts.append(encoder(micro_batch))
        self._graphs = parts[len(self._states) :]
        if not parts:  # a rank for which there are no texts
            parts = [torch.zeros(0, encoder.dim, device=encoder.device)]
        self.vectors = torch.cat([part.detach() for part in parts])

    def backward(self, gradient: Tensor) -> None:
        """Add to the parameters' gradients, given that [n, D] of the vectors."""
        for vectors, part in self.passes(gradient):
            vectors.backward(part)

    def passes(self, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same one by one, for the caller: vectors [S, D] with their graph, their gradient."""
        parts = gradient.split([len(micro_batch.lengths) for micro_batch in self._micro_batches])
        for micro_batch, part in zip(reversed(self._micro_batches), reversed(parts), strict=True):
            yield (self._graphs.pop() if self._graphs else self._again(micro_batch)), part

    def _again(self, micro_batch: MicroBatch) -> Tensor:
        device = micro_batch.input_ids.device
        with record_function("forward again"), _replayed(self._states.pop(), device):
            return self._encoder(micro_batch)


class RandomStates(NamedTuple):
    """Of the generators that dropout on a device draws from."""

    host: Tensor
    gpu: Tensor | None


def random_states(device: torch.device) -> RandomStates:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomStates(torch.get_rng_state(), on_gpu)


def set_random_states(states: RandomStates, device: torch.device) -> None:
    torch.set_rng_state(states.host)
    if states.gpu is not None:
        torch.cuda.set_rng_state(states.gpu, device)


@contextmanager
def _replayed(states: RandomStates, device: torch.device) -> Iterator[None]:
    """Random numbers as they were at `states`; afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_random_states(states, device)
        yield
