"""What goes through the encoder at once, and how many graphs are kept: decided by measuring.

Before the first step the longest texts of all go through, forward and backward. What a token takes
is then known, and a run that would not fit fails now, not hours in. On the host, where nobody says
in time that there is no more, a few hundred tokens go through and the rest is reckoned. Where a
step runs out of memory all the same, it is done again with less: first of the graphs, then of the
tokens at once.

How layers are checkpointed is decided here too. A token costs 3 forward passes, one of them for
the forward and two for the backward; if its graph is not kept (cache.py), 4. With its layers
checkpointed it costs one more, with their products kept (selective.py) little more. So
checkpointing is slower as soon as one micro-batch of a good size fits without it, however few
further graphs do: of none, selective and full the first is taken with which one fits.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rankpo_fast.data.packing import MicroBatch, default_budget, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError, out_of_memory
from rankpo_fast.model.check import lies_in_parts, selective_is_exact
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import Checkpointing
from rankpo_fast.model.precision import zero_gradient
from rankpo_fast.train.engine import ALONE, Engine
from rankpo_fast.train.meters import Agreed, Meter, host_room, meter_of, release
from rankpo_kernels.workspace import most_workspace

# More at once makes no kernel faster, and a state of 32,768 dims, wider than any here, has its
# elements still counted in 31 bits.
MOST_TOKENS = 65536
GOOD_TOKENS = 1024  # at once: a CPU is as fast as with more, a GPU of any size has enough to do
HOST_TRIAL, LEAST_TRIAL = 512, 16  # tokens


@dataclass
class Memory:
    """The budget as it stands."""

    max_tokens: int  # of a micro-batch
    room: float  # bytes for graphs that are kept
    graph_bytes: float  # of a token's graph
    longest: int = 1  # tokens of the longest text, below which no budget can go
    host_bytes: float = 0.0  # of a token, on the host: --offload activations
    host_room: float = math.inf
    checkpointing: str = ""  # how layers are, and why
    # Checkpoints more of them, where nothing else is left to shrink; None: there is no more.
    checkpoint_more: Callable[[], Checkpointing | None] | None = None

    @classmethod
    def measure(
        cls,
        encoder: Encoder,
        table: TokenTable,
        max_tokens: int | None,
        room: float | None,
        engine: Engine = ALONE,
    ) -> "Memory":
        """Try the longest texts; random numbers go on as if nothing had been drawn.

        Args:
            max_tokens: to try, or the next smaller number that fits. None: on a GPU the number
                for which one micro-batch takes half of what is free, or less, by doubling; on the
                host what is fast there.
            room: for graphs; None: what one micro-batch leaves of what is free.
            engine: where a pass is one of all ranks, nothing is tried that may not fit: little is,
                and the rest reckoned. All must call it then.

        Raises:
            InputError: not even the longest text fits.
        """
        meter, longest = engine.meter(meter_of(encoder.device)), int(table.lengths.max())
        with _as_in_a_step(encoder, engine):
            if isinstance(meter, Agreed):
                trial = _in_lockstep(encoder, table, meter, max_tokens, longest)
            elif meter.warns:
                trial = _largest(
                    encoder, table, meter, max_tokens or longest, longest, grow=max_tokens is None
                )
            else:
                trial = _reckoned(encoder, table, meter, max_tokens, longest)
                if trial.graph > (free := _free(meter, encoder.device)):
                    warnings.warn(_scarce(trial, free), stacklevel=2)
            if room is None:
                room = max(0.0, _free(meter, encoder.device) - (trial.peak - trial.graph))
        per_token, on_host = trial.graph / trial.tokens, trial.host / trial.tokens
        on_hosts = host_room() if on_host else math.inf
        return cls(trial.max_tokens, room, per_token, longest, on_host, on_hosts)

    def summary(self) -> str:
        token, room = self.graph_bytes / 2**10, self.room / 2**30
        parts = [
            f"micro-batches of up to {self.max_tokens:,} tokens, {token:,.0f} KiB each",
            f"graphs of {room:.3g} GiB are kept, what is beyond is computed twice",
        ]
        if self.host_bytes:
            host = self.host_room / 2**30
            parts.append(f"a further {self.host_bytes / 2**10:,.0f} KiB of each lie on the host, "
                         f"up to {host:.3g} GiB")  # fmt: skip
        return "; ".join([*parts, self.checkpointing] if self.checkpointing else parts)

    def kept(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Of how many, from the last, the graph is kept; that of the last costs nothing."""
        tokens, kept = 0, 0
        for micro_batch in reversed(micro_batches):
            tokens += sum(micro_batch.lengths)
            fits = tokens * self.graph_bytes <= self.room
            if kept > 0 and not (fits and tokens * self.host_bytes <= self.host_room):
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
        if self.max_tokens == self.longest:
            way = None if self.checkpoint_more is None else self.checkpoint_more()
            if way is not None:
                how = " selectively" if way == "selective" else ""
                return f"layers checkpointed{how} from now on"
            raise _too_little(self.longest)
        was, largest = self.max_tokens, max(sum(group.lengths) for b in batches for group in b)
        self.max_tokens = max(self.longest, min(was, largest) // 2)
        return f"at most {self.max_tokens:,} tokens in a micro-batch, not {was:,}"


class Choice(NamedTuple):
    """How layers are checkpointed."""

    way: Checkpointing
    reason: str

    def __str__(self) -> str:
        how = "checkpointed" if self.way is True else "checkpointed selectively"
        return f"layers are {how if self.way else 'not checkpointed'}: {self.reason}"


def least_checkpointing(
    encoder: Encoder, table: TokenTable, max_tokens: int | None, engine: Engine = ALONE
) -> Choice:
    """The first possible way in which these texts fit, else the last; the layers are left in it.

    Args:
        max_tokens: of a micro-batch that has to fit; None: any of a good size will do.
    """
    layers = encoder.layers
    if layers.offloaded:
        layers.checkpoint(True)
        return Choice(True, "--offload activations moves what goes into them")
    layers.checkpoint(False)
    if not layers.can_checkpoint:
        return Choice(False, f"{encoder.backbone.config.model_type} does not have it")
    tokens = max_tokens or max(int(table.lengths.max()), GOOD_TOKENS)
    reasons = []
    while layers.checkpointed is not True:
        reason = why_too_large(encoder, table, max_tokens, engine)
        if reason is None:
            break
        reasons.append("nor selectively" if layers.checkpointed else reason)
        checkpoint_more(encoder)
    said = ", ".join(reasons) or f"{tokens:,} tokens at once fit without"
    return Choice(layers.checkpointed, said)


def checkpoint_more(encoder: Encoder) -> Checkpointing | None:
    """Checkpoint its layers in the next way that takes less memory; None: there is none."""
    layers = encoder.layers
    if layers.checkpointed is True or not layers.can_checkpoint:
        return None
    way: Checkpointing = True
    parts = lies_in_parts(encoder)
    # Of weights in parts there is no gradient of one rank by which to see whether it is exact.
    if not parts and not layers.checkpointed and layers.why_not_selective() is None:
        try:
            way = "selective" if selective_is_exact(encoder) else True
        except (RuntimeError, MemoryError) as error:  # with a few tokens: no text would fit
            if not out_of_memory(error):
                raise
            release(encoder.device)
    layers.checkpoint(way)
    return way


def why_too_large(
    encoder: Encoder, table: TokenTable, max_tokens: int | None, engine: Engine = ALONE
) -> str | None:
    """Why these texts do not fit with the encoder's layers as they are; None: they do.

    Args:
        max_tokens: of a micro-batch that has to fit; None: any of a good size will do.
        engine: as in `Memory.measure`.
    """
    meter, longest = engine.meter(meter_of(encoder.device)), int(table.lengths.max())
    tokens = max_tokens or max(longest, GOOD_TOKENS)
    with _as_in_a_step(encoder, engine):
        if isinstance(meter, Agreed):
            fixed, _, peak = _slopes(encoder, table, meter, longest)
            taken, free = fixed + tokens * peak, _free(meter, encoder.device)
            return None if taken <= free else _would_take(tokens, taken, free)
        if meter.warns:
            fits = _try(encoder, table, tokens, meter) is not None
            release(encoder.device)
            return None if fits else f"{tokens:,} tokens at once do not fit without"
        graph = _reckoned(encoder, table, meter, tokens, longest).graph
    free = _free(meter, encoder.device)
    if graph <= free:
        return None
    return _would_take(tokens, graph, free)


def _would_take(tokens: int, taken: float, free: float) -> str:
    return (
        f"{tokens:,} tokens at once would take {taken / 2**30:.3g} GiB without, of "
        f"{free / 2**30:.3g} GiB"
    )


def _free(meter: Meter, device: torch.device) -> float:
    """Bytes for graphs: what the loss does not take."""
    return max(0.0, meter.free() - most_workspace(device))


@contextmanager
def _as_in_a_step(encoder: Encoder, engine: Engine) -> Iterator[None]:
    """In train mode, without which layers are not checkpointed and nothing is dropped; gradients of
    the parameters are there, as they are most of the time in a step."""
    training = encoder.training
    encoder.train()
    engine.begin()
    for parameter in encoder.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = zero_gradient(parameter)
    try:
        yield
    finally:
        engine.settle()
        encoder.zero_grad(set_to_none=True)
        encoder.train(training)


@dataclass(frozen=True)
class _Trial:
    max_tokens: int  # that were allowed
    tokens: int  # that there were
    graph: int  # bytes
    peak: int
    host: int = 0  # bytes of the graph that lie there instead


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
    fixed = _fixed(few, _of_longest(encoder, table, meter, LEAST_TRIAL))
    per_token = (few.graph - fixed) / few.tokens
    if longest > HOST_TRIAL:  # where attention keeps its weights, a token takes more in a long text
        fewer = _of_longest(encoder, table, meter, HOST_TRIAL // 2)
        slope = (per_token - (fewer.graph - fixed) / fewer.tokens) / (few.tokens - fewer.tokens)
        per_token += max(0.0, slope) * (longest - few.tokens)
    budget = max_tokens or default_budget(table.lengths, "cpu")
    while True:
        tokens = min(budget, int(table.lengths.sum()))
        graph = int(fixed + tokens * per_token)
        fits = graph <= _free(meter, encoder.device)
        if fits or max_tokens is not None or budget // 2 < max(longest, GOOD_TOKENS):
            return _Trial(budget, tokens, graph, graph)
        budget //= 2


def _fixed(few: _Trial, least: _Trial) -> float:
    """Bytes of a graph however many tokens it has: autocast's copies of weights, which only the
    layers keep that are not checkpointed."""
    if few.tokens <= least.tokens:
        return 0.0
    per_token = (few.graph - least.graph) / (few.tokens - least.tokens)
    return max(0.0, least.graph - least.tokens * per_token)


def _in_lockstep(
    encoder: Encoder, table: TokenTable, meter: Agreed, max_tokens: int | None, longest: int
) -> _Trial:
    """What max_tokens would take, from what few do; None: as many as take half of what is free."""
    fixed, graph, peak = _slopes(encoder, table, meter, longest)
    free = _free(meter, encoder.device)
    fit = int((free - fixed) / peak)
    if fit < longest:
        raise _too_little(longest)
    if max_tokens is None and encoder.device.type == "cpu":
        budget = max(longest, min(fit, default_budget(table.lengths, "cpu")))
    elif max_tokens is None:
        budget = max(longest, min(int((free - fixed) / (2 * peak)), MOST_TOKENS))
    else:
        budget = min(max_tokens, fit)
    tokens = min(budget, int(table.lengths.sum()))
    return _Trial(budget, tokens, int(tokens * graph), int(fixed + tokens * peak))


def _slopes(
    encoder: Encoder, table: TokenTable, meter: Meter, longest: int
) -> tuple[float, float, float]:
    """Bytes whatever the tokens, those of a token's graph, and those at the peak per token."""
    few = _of_longest(encoder, table, meter, HOST_TRIAL)
    less = _of_longest(encoder, table, meter, max(1, few.tokens // 2))
    tokens = few.tokens - less.tokens
    if tokens <= 0 or few.graph <= less.graph:
        graph, peak, fixed = few.graph / few.tokens, few.peak / few.tokens, 0.0
    else:
        graph = (few.graph - less.graph) / tokens
        peak = max(graph, (few.peak - less.peak) / tokens)
        fixed = max(0.0, few.peak - few.tokens * peak)
    # Where attention keeps its weights, a token takes more in a long text.
    bend = (few.graph / few.tokens - less.graph / less.tokens) / max(1, tokens)
    more = max(0.0, bend) * max(0, longest - few.tokens)
    return fixed, graph + more, peak + more


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
            graph, host = meter.held(), encoder.layers.host_bytes
            # Else nobody would say what the backward takes, nor that it fails.
            if meter.warns or (isinstance(meter, Agreed) and meter.counts_backward):
                vectors.backward(torch.zeros_like(vectors))
            return _Trial(max_tokens, sum(batch.lengths), graph, meter.peak(), host)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
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
        f"--gradient_checkpointing true and --mlp_chunk 256, a --max_passage_length (or "
        f"--max_query_length) below {longest}, --bf16 true, or a smaller model; another program on "
        f"the device may be the reason too"
    )
