"""AdamW over the encoder's parameters, and the learning rate as a pure function of the step.

rate(step) = peak * (step + 1) / W                             while step < W, the warm-up steps,
             peak * {1, 1 - x, (1 + cos(pi x)) / 2}            then: constant, linear, cosine,
with x = (step - W) / (total - W) in [0, 1).
"""

import math

import torch
from torch import Tensor, nn

from rankpo_fast.config import TrainingConfig


def adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW; vectors and scalars (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The rate of optimizer step `step`, counted from 0."""
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    x = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    course = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    return config.learning_rate * course[config.lr_scheduler_type]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to `max_norm` (0: leave them); returns the norm they had, 0-dim."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
