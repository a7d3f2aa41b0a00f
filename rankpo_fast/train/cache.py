"""The gradient cache: a batch of any size through an encoder that has room for a part of it.

    x_g = encoder(group g)             without a graph, but for the last groups, whose graphs fit
    loss, dx = loss of all x           in one piece: all negatives
    backward from dx_g, g descending   through the graph that was kept, or one made again

As in GradCache (Gao et al. 2021, arXiv 2101.06983), whose graphs are all made again. Which are kept
changes no bit of the gradient: sums are taken in the same order, and dropout is drawn again as it
was. n texts in all groups, D dims.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankpo_fast.data.packing import MicroBatch


class CachedVectors:
    """`vectors` [n, D] of the groups, one group after the other; `backward` once, from theirs.

    Args:
        encoder: takes a micro-batch of S texts to vectors [S, D].
        kept: of how many groups, counted from the last, the graph is kept. Memory holds those
            graphs, or one, whichever is more.
    """

    def __init__(self, encoder: nn.Module, groups: Sequence[MicroBatch], *, kept: int):
        self._encoder, self._groups = encoder, groups
        self._states: list[list[Tensor]] = []  # of the generators, before each group without graph
        parts = []
        for number, group in enumerate(groups):
            keep = number >= len(groups) - kept
            if not keep:
                self._states.append(_random_states(group))
            with torch.set_grad_enabled(keep):
                parts.append(encoder(group))
        self._graphs = parts[len(self._states) :]
        self.vectors = torch.cat([part.detach() for part in parts])

    def backward(self, gradient: Tensor) -> None:
        """Add to the parameters' gradients, given that [n, D] of the vectors."""
        parts = gradient.split([len(group.lengths) for group in self._groups])
        for group, part in zip(reversed(self._groups), reversed(parts), strict=True):
            vectors = self._graphs.pop() if self._graphs else self._again(group)
            vectors.backward(part)

    def _again(self, group: MicroBatch) -> Tensor:
        with _replayed(self._states.pop(), group):
            return self._encoder(group)


def _random_states(group: MicroBatch) -> list[Tensor]:
    device = group.input_ids.device
    on_card = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_card]


@contextmanager
def _replayed(states: list[Tensor], group: MicroBatch) -> Iterator[None]:
    """Random numbers as they were at `states`; afterwards as if nothing had been drawn."""
    device = group.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
