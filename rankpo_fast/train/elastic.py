"""Elastic weights: each is pulled to where it started, the harder the more it counts.

    loss of a step += elastic_weight / 2 * sum over weights of f (w - w0)^2
    f = 1 (L2-SP, Li et al. 2018), or a diagonal Fisher of stage 1 (EWC, Kirkpatrick et al. 2017):
    f ~ mean over batches of (gradient of a batch's mean loss)^2, scaled to a mean of 1

Where stage 1 has converged the mean gradient of its rows is 0, and the square of a batch's is their
Fisher but for a factor, which the scale takes out. The pull is added to the gradients once a step,
after the last backward pass and before they are clipped: whatever made them. w0 takes the weights'
own bytes once more, f 4 bytes a weight, both where the weights are.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from rankpo_fast.config import RetentionConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.precision import zero_gradient
from rankpo_fast.progress import progress
from rankpo_fast.ranks import OutOfMemory, Ranks
from rankpo_fast.train.engine import Engine
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.prefetch import pack_step
from rankpo_fast.train.retention import RetainedTask
from rankpo_fast.train.step import add_gradients
from rankpo_fast.train.task import TrainingTask


class Elastic:
    """Made before the first step, of weights as they start; takes its memory at once."""

    def __init__(self, encoder: Encoder, config: RetentionConfig):
        self._weight, self._batches = config.elastic_weight, config.elastic_fisher_batches
        trained = [p for p in encoder.backbone.parameters() if p.requires_grad]
        self._starts = {p: p.detach().clone() for p in trained}
        self._fisher: dict[nn.Parameter, Tensor] = {}
        if self._batches:
            self._fisher = {p: zero_gradient(p) for p in trained}

    def __str__(self) -> str:
        tensors = [*self._starts.values(), *self._fisher.values()]
        size = sum(x.nbytes for x in tensors) / 2**20
        how = f"Fisher of {self._batches:,} batches of --replay_data" if self._batches else "L2-SP"
        return f"{self._weight:g} / 2 * squared distance from the start ({how}), {size:,.1f} MiB"

    def weigh(
        self, task: TrainingTask, encoder: Encoder, optimizer: Optimizer, memory: Memory,
        ranks: Ranks, engine: Engine,
    ) -> None:  # fmt: skip
        """Measure which weights count in the task's loss, without dropout. All ranks must call it.

        InputError: out of memory, or no gradient at all.
        """
        if not self._batches:
            return
        if isinstance(task, RetainedTask):
            task = task.task
        pack = partial(pack_step, [replace(task, weight=1.0)], encoder, ranks)
        training = encoder.training
        encoder.eval()
        try:
            with progress("Fisher" if ranks.first else None, self._batches, "batch") as advance:
                for number in range(self._batches):
                    engine.begin()
                    batches = pack(range(number, number + 1), memory.max_tokens)
                    with ranks.in_step():
                        add_gradients(encoder, batches, memory, ranks, engine)
                    for parameter, fisher in self._fisher.items():
                        if parameter.grad is not None:
                            fisher.addcmul_(parameter.grad, parameter.grad)
                    optimizer.zero_grad()
                    advance(1)
        except OutOfMemory as error:
            raise InputError(
                "out of memory in a batch of --elastic_fisher_batches: give a smaller "
                "--max_tokens_per_micro_batch"
            ) from error
        finally:
            encoder.train(training)
        total = torch.stack([fisher.double().sum() for fisher in self._fisher.values()]).sum()
        mean = total.item() / sum(fisher.numel() for fisher in self._fisher.values())
        if not 0 < mean < float("inf"):
            raise InputError(
                f"--elastic_fisher_batches: the squared gradients of --replay_data have a mean of "
                f"{mean}, by which weights cannot be weighed"
            )
        for fisher in self._fisher.values():
            fisher.div_(mean)

    @torch.no_grad()
    def pull(self) -> Tensor:
        """Add to the gradients of all ranks, on each the same; returns the loss's part, 0-dim. A
        parameter without a gradient has not moved."""
        parts = []
        for parameter, start in self._starts.items():
            if parameter.grad is None:
                continue
            away = parameter.detach().to(parameter.grad.dtype) - start
            pull = away * self._fisher[parameter] if self._fisher else away
            parts.append((pull * away).sum())
            parameter.grad.add_(pull, alpha=self._weight)
        return self._weight / 2 * torch.stack(parts).sum()
