"""What goes through the encoder at once, and how many graphs are kept: decided by measuring.

Before the first step the longest texts of all go through, forward and backward. What a token takes
is then known, and a run that would not fit fails now, not hours in. On the host, where nobody says
in time that there is no more, a few hundred tokens go through and the rest is reckoned. Where a
step runs out of memory all the same, it is done again with less: first of the graphs, then of the
tokens at once.

Whether layers are checkpointed is decided here too. A token costs 3 forward passes, one of them for
the forward and two for the backward; if its graph is not kept (cache.py), 4. With its layers
checkpointed it costs 4 whether the graph is kept or not. So checkpointing is slower as soon as one
micro-batch of a good size fits without it, however few further graphs do.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rankpo_fast.data.packing import MicroBatch, default_budget, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import Layers
from rankpo_fast.train.meters import Meter, meter_of, release
from rankpo_fast.train.optim import zero_gradient
from rankpo_kernels.workspace import most_workspace

# More at once makes no kernel faster, and a state of 32,768 dims, wider than any here, has its
# elements still counted in 31 bits.
MOST_TOKENS = 65536
GOOD_TOKENS = 1024  # at once: a CPU is as fast as with more, a GPU of any size has enough to do
HOST_TRIAL = 512  # tokens


@dataclass
class Memory:
    """The budget as it stands."""

    max_tokens: int  # of a micro-batch
    room: float  # bytes for graphs that are kept
    graph_bytes: float  # of a token's graph
    longest: int = 1  # tokens of the longest text, below which no budget can go
    layers: Layers | None = None  # to checkpoint where nothing else is left to shrink
    checkpointed: str | None = None  # why layers are, where nobody asked for it

    @classmethod
    def measure(
        cls, encoder: Encoder, table: TokenTable, max_tokens: int | None, room: float | None
    ) -> "Memory":
        """Try the longest texts; random numbers go on as if nothing had been drawn.

        Args:
            max_tokens: to try, or the next smaller number that fits. None: on a GPU the number
                for which one micro-batch takes half of what is free, or less, by doubling; on the
                host what is fast there.
            room: for graphs; None: what one micro-batch leaves of what is free.

        Raises:
            InputError: not even the longest text fits.
        """
        meter, longest = meter_of(encoder.device), int(table.lengths.max())
        with _gradients(encoder):
            if meter.warns:
                trial = _largest(
                    encoder, table, meter, max_tokens or longest, longest, grow=max_tokens is None
                )
            else:
                trial = _reckoned(encoder, table, meter, max_tokens, longest)
                if trial.graph > (free := _free(meter, encoder.device)):
                    warnings.warn(_scarce(trial, free), stacklevel=2)
            if room is None:
                room = max(0.0, _free(meter, encoder.device) - (trial.peak - trial.graph))
        return cls(trial.max_tokens, room, trial.graph / trial.tokens, longest)

    def summary(self) -> str:
        token, room = self.graph_bytes / 2**10, self.room / 2**30
        why = f"; layers are checkpointed: {self.checkpointed}" if self.checkpointed else ""
        return (
            f"micro-batches of up to {self.max_tokens:,} tokens, {token:,.0f} KiB each; graphs of "
            f"{room:.3g} GiB are kept, what is beyond is computed twice{why}"
        )

    def kept(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Of how many, from the last, the graph is kept; that of the last costs nothing."""
        used, kept = 0.0, 0
        for micro_batch in reversed(micro_batches):
            used += sum(micro_batch.lengths) * self.graph_bytes
            if kept > 0 and used > self.room:
                break
            kept += 1
        return kept

    def shrink(self, batches: Sequence[Sequence[MicroBatch]]) -> str:
        """Less for a step of these batches, which ran out of memory; says what.

        Raises:
            InputError: nothing is left to shrink.
        """
        kept = max(map(self.kept, batches))
        if kept > 1:
            tokens = max(sum(sum(g.lengths) for g in b[-self.kept(b) :]) for b in batches)
            self.room = tokens * self.graph_bytes / 2
            fewer = max(map(self.kept, batches))
            return f"the graphs of {fewer} micro-batches kept at once, not {kept}"
        if self.max_tokens == self.longest and self.layers is not None:
            self.layers.checkpoint()
            self.layers = None
            return "layers checkpointed from now on"
        if self.max_tokens == self.longest:
            raise _too_little(self.longest)
        was, largest = self.max_tokens, max(sum(group.lengths) for b in batches for group in b)
        self.max_tokens = max(self.longest, min(was, largest) // 2)
        return f"at most {self.max_tokens:,} tokens in a micro-batch, not {was:,}"


def why_checkpointed(encoder: Encoder, table: TokenTable, max_tokens: int | None) -> str | None:
    """Why the layers of an encoder are to be checkpointed for these texts; None: they need not be.

    Args:
        max_tokens: of a micro-batch that has to fit; None: any of a good size will do.
    """
    meter, longest = meter_of(encoder.device), int(table.lengths.max())
    tokens = max_tokens or max(longest, GOOD_TOKENS)
    with _gradients(encoder):
        if meter.warns:
            fits = _try(encoder, table, tokens, meter) is not None
            release(encoder.device)
            return None if fits else f"{tokens:,} tokens at once do not fit without"
        graph = _reckoned(encoder, table, meter, tokens, longest).graph
    free = _free(meter, encoder.device)
    if graph <= free:
        return None
    return (
        f"{tokens:,} tokens at once would take {graph / 2**30:.3g} GiB without, of "
        f"{free / 2**30:.3g} GiB"
    )


def _free(meter: Meter, device: torch.device) -> float:
    """Bytes for graphs: what the loss does not take."""
    return max(0.0, meter.free() - most_workspace(device))


@contextmanager
def _gradients(encoder: Encoder) -> Iterator[None]:
    """Those of the parameters are there, as they are most of the time in a step."""
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = zero_gradient(parameter)
    try:
        yield
    finally:
        encoder.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Trial:
    max_tokens: int  # that were allowed
    tokens: int  # that there were
    graph: int  # bytes
    peak: int


def _largest(
    encoder: Encoder, table: TokenTable, meter: Meter, tokens: int, longest: int, *, grow: bool
) -> _Trial:
    """The largest that fits, from `tokens` on, where need be downwards to the longest text."""
    best = None
    while True:
        trial = _try(encoder, table, tokens, meter)
        if trial is not None:
            best = trial
            # Twice the tokens take at most twice the memory: half of what is free.
            if not grow or 2 * tokens > MOST_TOKENS or 4 * trial.peak > meter.free():
                return best
            tokens *= 2
        else:
            release(encoder.device)
            if best is not None:
                return best
            if tokens == longest:
                raise _too_little(longest)
            tokens = max(longest, 3 * tokens // 4)


def _reckoned(
    encoder: Encoder, table: TokenTable, meter: Meter, max_tokens: int | None, longest: int
) -> _Trial:
    """What max_tokens would take, from what few do; None: as many as are fast on the host, or half
    as often as it takes for them to fit. What is small enough is tried as it is."""
    if max_tokens is not None and max_tokens <= HOST_TRIAL:
        return _largest(encoder, table, meter, max_tokens, longest, grow=False)
    few = _of_longest(encoder, table, meter, HOST_TRIAL)
    per_token = few.graph / few.tokens
    if longest > HOST_TRIAL:  # where attention keeps its weights, a token takes more in a long text
        fewer = _of_longest(encoder, table, meter, HOST_TRIAL // 2)
        slope = (per_token - fewer.graph / fewer.tokens) / (few.tokens - fewer.tokens)
        per_token += max(0.0, slope) * (longest - few.tokens)
    budget = max_tokens or default_budget(table.lengths, "cpu")
    while True:
        tokens = min(budget, int(table.lengths.sum()))
        graph = int(tokens * per_token)
        fits = graph <= _free(meter, encoder.device)
        if fits or max_tokens is not None or budget // 2 < max(longest, GOOD_TOKENS):
            return _Trial(budget, tokens, graph, graph)
        budget //= 2


def _of_longest(encoder: Encoder, table: TokenTable, meter: Meter, tokens: int) -> _Trial:
    """So many tokens, or fewer where they do not fit: of the longest texts, or the longest cut."""
    longest = int(table.lengths.max())
    if longest > tokens:
        longest, ids = tokens, table[int(table.lengths.argmax())][:tokens]
        table = TokenTable(ids, torch.tensor([0, tokens]), truncated=1)
    return _largest(encoder, table, meter, tokens, longest, grow=False)


def _try(encoder: Encoder, table: TokenTable, max_tokens: int, meter: Meter) -> _Trial | None:
    """The longest texts that fit into max_tokens; None if they do not fit into memory."""
    order = table.lengths.argsort(descending=True, stable=True)
    fit = max(1, int((table.lengths[order].cumsum(0) <= max_tokens).sum()))
    first = encoder.plan(table.lengths[order[:fit]], max_tokens)[0]
    batch = pack(table, order[first])
    gpus = [encoder.device] if encoder.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), meter:
            vectors = encoder(batch)
            graph = meter.held()
            if meter.warns:  # else nobody would say what the backward takes, nor that it fails
                vectors.backward(torch.zeros_like(vectors))
            return _Trial(max_tokens, sum(batch.lengths), graph, meter.peak())
    except torch.OutOfMemoryError:
        return None


def _scarce(trial: _Trial, free: float) -> str:
    return (
        f"{trial.tokens:,} tokens at once take about {trial.graph / 2**30:.3g} GiB, and "
        f"{free / 2**30:.3g} GiB may be taken: where that is too much the system ends the run; "
        f"--gradient_checkpointing true, a smaller --max_tokens_per_micro_batch or shorter texts "
        f"take less"
    )


def _too_little(longest: int) -> InputError:
    return InputError(
        f"out of memory with {longest:,} tokens, the longest text, alone in a micro-batch: give "
        f"--gradient_checkpointing true, a --max_passage_length (or --max_query_length) below "
        f"{longest}, --bf16 true, or a smaller model; another program on the device may be the "
        f"reason too"
    )
