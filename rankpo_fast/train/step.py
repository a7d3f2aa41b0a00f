"""One optimizer step.

    for each batch:  vectors through the gradient cache -> loss and gradients -> backward
    one step of the optimizer, clipped and checked on the device

n distinct texts of a batch, D dims.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import MicroBatch
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import OutOfMemory, Ranks
from rankpo_fast.train.cache import CachedVectors, random_states, set_random_states
from rankpo_fast.train.engine import ALONE, Engine
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.meters import release
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.prefetch import PackedBatch, Prefetcher
from rankpo_fast.train.task import LossOutput, scatter_sum


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """Of one optimizer step; the device may still be computing them.

    Who asks for loss, grad_norm or batch_metrics waits for this step, for nothing after it.
    """

    numbers: Tensor  # the gradient's norm, losses and metrics of the batches; on the host
    arrived: torch.cuda.Event | None  # after which `numbers` hold
    names: list[list[str]]  # of each batch's metrics
    batches: list[PackedBatch]
    learning_rate: float
    began: float  # by perf_counter
    notes: list[str]  # what was done to make it fit into memory, if that ran out

    def check_finite(self, step: int) -> None:
        """FloatingPointError if loss or norm is not; the weights are as before the step."""
        if not all(map(math.isfinite, [*self._values.losses, self.grad_norm])):
            raise FloatingPointError(self._complaint(step))

    @property
    def loss(self) -> float:
        """All batches', weighted."""
        pairs = zip(self.batches, self._values.losses, strict=True)
        return sum(batch.weight * loss for batch, loss in pairs)

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self._values.grad_norm

    @property
    def batch_metrics(self) -> list[dict[str, float]]:
        """Of each batch."""
        return self._values.metrics

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    @property
    def queries(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)

    @cached_property
    def _values(self) -> "_Values":
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = iter(self.numbers.tolist())
        return _Values(
            grad_norm=next(numbers),
            losses=[next(numbers) for _ in self.batches],
            metrics=[{name: next(numbers) for name in names} for names in self.names],
        )

    def _complaint(self, step: int) -> str:
        pairs = zip(self.batches, self._values.losses, strict=True)
        guilty = [batch for batch, loss in pairs if not math.isfinite(loss)]
        rows: dict[str, set[int]] = {}  # by the flag that gave them
        for batch in guilty or self.batches:
            rows.setdefault(batch.task.flag, set()).update(row + 1 for row in batch.rows)
        named = (
            f". Rows of {flag} in it, counted from 1: {', '.join(map(str, sorted(numbers)))}"
            for flag, numbers in rows.items()
        )
        return (
            f"step {step}: loss {self.loss}, gradient norm {self.grad_norm}; stopped before the "
            f"update{''.join(named)}"
        )


@dataclass(frozen=True)
class _Values:
    grad_norm: float
    losses: list[float]
    metrics: list[dict[str, float]]


def train_step(
    encoder: Encoder,
    steps: Prefetcher,
    optimizer: Optimizer,
    rate: float,
    max_grad_norm: float,
    memory: Memory,
    ranks: Ranks,
    engine: Engine = ALONE,
    pull: Callable[[], Tensor] | None = None,
) -> StepMetrics:
    """Take the next of `steps`; nothing waits for the device, unless the optimizer does.

    Out of memory, on whatever rank, the step is done again with less of it: the batches, their loss
    and the random numbers are the same. Where a pass is one of all ranks it cannot be, nor after
    the last backward pass has begun.

    Args:
        rate: the learning rate.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        pull: adds to the gradients of all ranks, and tells its part of the loss.

    Raises:
        InputError: memory does not suffice for the longest text, or runs out where the step cannot
            be done again; the weights are as before.
        RankLost: another rank is gone.
    """
    began, random = perf_counter(), random_states(encoder.device)
    notes: list[str] = []
    with record_function("data"):
        batches = next(steps)
    while True:
        try:
            engine.begin()
            with ranks.in_step():
                losses, metrics, learnt = add_gradients(encoder, batches, memory, ranks, engine)
            break
        except OutOfMemory as error:
            here = error.here  # and its traceback, with all that it holds, is gone
        optimizer.zero_grad()
        release(encoder.device)
        notes += _shrink(memory, batches, ranks, here)
        set_random_states(random, encoder.device)
        batches = steps.repacked()
    with ranks.in_step():
        losses, metrics = ranks.total(losses, metrics, learnt)
    if pull is not None:
        metrics[0]["elastic"] = pull()
    with record_function("optimizer"):
        norm = optimizer.update(losses, rate, max_grad_norm)
    values = [norm, *losses, *(value for of_batch in metrics for value in of_batch.values())]
    numbers, arrived = _to_host(torch.stack([value.to(norm.dtype) for value in values]))
    names = [list(of_batch) for of_batch in metrics]
    return StepMetrics(numbers, arrived, names, batches, rate, began, notes)


def _shrink(memory: Memory, batches: list[PackedBatch], ranks: Ranks, here: bool) -> list[str]:
    """Less of it for the ranks that ran out, of tokens for all; says what, of every rank."""
    note = memory.shrink([batch.micro_batches for batch in batches]) if here else None
    told = ranks.objects((note, memory.max_tokens))
    memory.max_tokens = min(tokens for _, tokens in told)
    if ranks.size > 1:
        return [f"{note} (rank {rank})" for rank, (note, _) in enumerate(told) if note is not None]
    return [note for note, _ in told]


def add_gradients(
    encoder: Encoder, batches: list[PackedBatch], memory: Memory, ranks: Ranks, engine: Engine
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[nn.Parameter]]:
    """Add the gradient of all batches, after `engine.begin`, to that of the parameters.

    Returns:
        losses and metrics, 0-dim, of this rank's share; and what losses learn beside the encoder's
        weights, whose gradients are of that share too.

    Raises:
        OutOfMemory: on all ranks, none of which waits in a collective then.
    """
    losses, metrics, learnt = [], [], dict[nn.Parameter, None]()
    # No rank can take back a pass that is one of all.
    again = nullcontext if ranks.lockstep else ranks.together
    for number, batch in enumerate(batches, 1):
        with again():
            with record_function("data"):
                batch = to_device(batch, encoder.device)
                kept = memory.kept(batch.micro_batches)
                micro_batches, kept = _as_many(batch, kept, ranks, last=number == len(batches))
            with record_function("forward"):
                cached = CachedVectors(encoder, micro_batches, kept=kept)
                vectors = cached.vectors[batch.order]
        vectors = ranks.gathered(vectors, batch.counts)  # [n, D]
        with again(), record_function("loss"):
            result = batch.task.loss(
                vectors[batch.query_places], vectors[batch.passage_places], batch.own
            )
            gradient = scatter_sum(
                len(vectors),
                (batch.query_places, result.d_queries),
                (batch.passage_places, result.d_passages),
            ) * (batch.weight * batch.loss_share)
            for parameter, grad in result.others:
                learnt[parameter] = None
                grad = (grad * (batch.weight * batch.loss_share)).to(parameter.dtype)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            losses.append(result.loss * batch.loss_share)
            metrics.append(_own_metrics(batch, result))
        gradient = ranks.owned(gradient, batch.counts)
        gradient = scatter_sum(len(cached.vectors), (batch.order, gradient))
        passes = cached.passes(gradient)
        for_all = number == len(batches) and ranks.size > 1  # the last pass
        with again(), record_function("backward"):
            for pair in islice(passes, len(micro_batches) - for_all):
                engine.backward(*pair, last=False)
        with record_function("backward"):
            for pair in passes:
                engine.backward(*pair, last=True)
    return losses, metrics, list(learnt)


def _as_many(
    batch: PackedBatch, kept: int, ranks: Ranks, *, last: bool
) -> tuple[list[MicroBatch], int]:
    """The batch's micro-batches, and how many graphs are kept; both fit what other ranks wait for:
    as many on all where passes are theirs too, and one for the step's last backward pass. Empty
    ones come after the others; their vectors have no gradient."""
    own = batch.micro_batches
    most, again = len(own), len(own) - kept
    if ranks.lockstep:
        most, again = ranks.highest([most, again])
    elif last and ranks.size > 1:
        most = max(most, 1)
    if most == len(own):
        return own, most - again
    assert batch.empty is not None
    return own + [batch.empty] * (most - len(own)), most - again


def _own_metrics(batch: PackedBatch, result: LossOutput) -> dict[str, Tensor]:
    """The rank's part of a batch's metrics; with a prefix its loss too, as the log's is all's."""
    prefix, own = batch.task.prefix, {}
    if prefix:
        loss = result.loss if result.own_loss is None else result.own_loss
        own = {f"{prefix}loss": loss * batch.loss_share}
    return own | {prefix + name: value * batch.row_share for name, value in result.metrics.items()}


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if not numbers.is_cuda:
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
