"""AdamW over the encoder's parameters, and the learning rate as a pure function of the step.

rate(step) = peak * (step + 1) / W                             while step < W, the warm-up steps,
             peak * {1, 1 - x, (1 + cos(pi x)) / 2}            then: constant, linear, cosine,
with x = (step - W) / (total - W) in [0, 1).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError

FACTOR = "rate_factor"  # of a group whose learning rate is that many times the others'


class AdamW(torch.optim.AdamW):
    """Fused, with the two attributes through which torch's GradScaler steers fused optimizers."""

    found_inf: Tensor  # 0-dim; 1: a step changes nothing
    grad_scale: Tensor | None  # a step divides gradients by it


def adamw(
    model: nn.Module, config: TrainingConfig, rates: Mapping[str, float] | None = None
) -> AdamW:
    """Fused AdamW; vectors and scalars (biases, norms) are not decayed.

    Args:
        rates: peak rates of parameters, by name, that do not have the config's.

    Its states are there from the start: whoever then looks how much memory is free counts them in,
    and no first step runs out of it half way through the parameters.

    Raises:
        InputError: every parameter is frozen.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("nothing to train: every parameter of the model is frozen")
    own = {model.get_parameter(name): rate for name, rate in (rates or {}).items()}
    usual = [p for p in trained if p not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in usual if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in usual if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups += [
        {"params": [p], "weight_decay": 0.0, FACTOR: rate / config.learning_rate}
        for p, rate in own.items()
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    device = trained[0].device
    optimizer.found_inf = torch.ones((), device=device)  # so that nothing else changes
    optimizer.step()
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The rate of optimizer step `step`, counted from 0."""
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    x = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    course = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    return config.learning_rate * course[config.lr_scheduler_type]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all together, 0-dim; of those that lie in parts on several ranks (DTensors) the whole."""
    parts = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not parts:
        return nn.utils.get_total_norm(gradients)
    norms = [cast(DTensor, nn.utils.get_total_norm(parts)).full_tensor()]
    if whole := [gradient for gradient in gradients if not isinstance(gradient, DTensor)]:
        norms.append(nn.utils.get_total_norm(whole).to(norms[0]))
    return torch.linalg.vector_norm(torch.stack(norms))


def update(optimizer: AdamW, losses: list[Tensor], rate: float, max_norm: float) -> Tensor:
    """One step; returns the norm of the gradients, 0-dim, before they are scaled to `max_norm` (0:
    left as they are).

    The host is not asked: clipping is a scale that the step applies as it reads the gradients, and
    from the first loss or norm on that is not finite no step changes anything.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    bad = ~torch.stack([*losses, norm]).isfinite().all()
    optimizer.found_inf = torch.maximum(optimizer.found_inf, bad.float())
    optimizer.grad_scale = None
    if max_norm > 0:  # in fp32, which the fused step wants whatever the weights are
        optimizer.grad_scale = (norm.float() / max_norm).clamp(min=1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
