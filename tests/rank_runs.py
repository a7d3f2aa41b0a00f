"""What tests have ranks do that train together; every function runs on each of them."""

import contextlib
import math
import signal
from unittest import mock

import stages
import torch
import torch.distributed as dist
from torch import nn

from rankpo_fast.train import contrastive, step
from rankpo_fast.train.log import MetricsLog


class Steps:
    """A context manager: optimizer steps as plain gradient descent, in which rounding stays what it
    is, where AdamW divides by it; what they got, and what travelled for each."""

    def __init__(self):
        self.gradients: list[dict[int, torch.Tensor]] = []  # by number of the parameter
        self.losses: list[list[float]] = []
        self.messages: list[dict[str, int]] = []

    def __enter__(self):
        self._counts = {"all_reduce": 0, "all_to_all_single": 0}
        self._patches = contextlib.ExitStack()
        put = self._patches.enter_context
        put(mock.patch.object(step, "update", self._update))
        for name in self._counts:
            put(mock.patch.object(dist, name, self._counted(name, getattr(dist, name))))
        return self

    def __exit__(self, *error):
        self._patches.close()

    def _counted(self, name, collective):
        def counted(*args, group, **kwargs):
            self._counts[name] += group is dist.group.WORLD  # not what only hosts tell each other
            return collective(*args, group=group, **kwargs)

        return counted

    def _update(self, optimizer, losses, rate, max_norm):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        self.gradients.append(gradients)
        self.losses.append([loss.item() for loss in losses])
        self.messages.append(dict(self._counts))
        with torch.no_grad():
            for i, gradient in gradients.items():
                parameters[i] -= 1e-3 * gradient
        optimizer.zero_grad(set_to_none=True)
        return nn.utils.get_total_norm(list(gradients.values()))


def descend(stage, **flags):
    """(gradients, losses, messages so far) of every step."""
    with Steps() as steps:
        stages.run(stage, **flags)
    return steps.gradients, steps.losses, steps.messages


def train(stage, seed=0, stop=None, **flags):
    """The exit code. `stop`: SIGTERM comes to the last rank in that step."""
    torch.manual_seed(seed + dist.get_rank())
    say = MetricsLog.step

    def said(self, done, *args):
        say(self, done, *args)
        if done == stop and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(MetricsLog, "step", said):
        try:
            stages.run(stage, **flags)
        except SystemExit as end:
            return end.code
    return 0


def train_with_nan(bad_rank, **flags):
    """One rank has it in its part of the loss."""
    compute = contrastive.info_nce_loss_and_grads

    def loss(*args, **kwargs):
        loss, *others = compute(*args, **kwargs)
        return loss * (math.nan if dist.get_rank() == bad_rank else 1), *others

    with mock.patch.object(contrastive, "info_nce_loss_and_grads", loss):
        stages.run("contrastive", **flags)
