"""Optimizers over an encoder's parameters, and the learning rate as a pure function of the step.

rate(step) = peak * (step + 1) / W                             while step < W, the warm-up steps,
             peak * {1, 1 - x, (1 + cos(pi x)) / 2}            then: constant, linear, cosine,
with x = (step - W) / (total - W) in [0, 1).

They are torch's, torchao's and bitsandbytes'; here stand what they are made with, how an update is
clipped and checked, and what of them a checkpoint holds. bf16 weights have fp32 gradients, in which
the many backward passes of a step are summed, and their updates are rounded at random: to nearest,
one below 2^-9 of a weight would be lost each time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.extras import require_extra
from rankpo_fast.model.precision import ROUND_AT_RANDOM, sum_in_fp32, zero_gradient

FACTOR = "rate_factor"  # of a group whose learning rate is that many times the others'
Groups = list[dict[str, Any]]


class Optimizer:
    """One of torch's interface, or several that share the parameters.

    On the host (`hosts`) it has an fp32 copy of each parameter, which alone it changes: gradients
    go there once a step, clipped, and weights come back.

    Attributes:
        waits: whether the host waits for the norm of each step's gradient. An optimizer that can be
            told on the device to leave the weights needs no wait.
    """

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        *,
        seed: int = 0,
        hosts: Mapping[Tensor, Tensor] | None = None,
    ):
        """
        Args:
            parts: their states are made here, all zeros: whoever then looks how much memory is free
                counts them in, and no first step runs out of it half way through the parameters.
            seed: of the rounding of bf16 weights, on every rank the same.
            hosts: parameters of the model -> their copies, of which `parts` are; None: no copies.
        """
        self.parts, self._seed, self._hosts = list(parts), seed, dict(hosts or {})
        fused = all(isinstance(part, torch.optim.AdamW) for part in parts)
        self.waits = not fused or bool(self._hosts)
        self.updates = 0  # asked for so far; the next one's random numbers follow from it
        self._broken = torch.zeros((), device=self.parameters[0].device)  # 1: change nothing more
        self._make_states()

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def parameters(self) -> list[Tensor]:
        """Of the model."""
        own = [p for group in self.param_groups for p in group["params"]]
        return list(self._hosts) if self._hosts else own

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def update(self, losses: list[Tensor], rate: float, max_norm: float) -> Tensor:
        """One step; returns the norm of the gradients, 0-dim, before they are scaled to `max_norm`
        (0: left as they are). They are gone afterwards.

        From the first loss or norm on that is not finite no step changes anything. Unless `waits`,
        the host is not asked: clipping is a scale that the step applies as it reads the gradients.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        bad = ~torch.stack([*losses, norm]).isfinite().all()
        self._broken = torch.maximum(self._broken, bad.to(self._broken))
        # In fp32, which the fused step wants whatever the weights are.
        divisor = (norm.float() / max_norm).clamp(min=1.0) if max_norm > 0 else None
        self._set_rate(rate)
        if not self.waits:
            self._step(self._broken, divisor)
        elif not self._broken:  # here the host waits
            if divisor is not None:
                torch._foreach_div_(gradients, divisor.to(gradients[0].dtype))
            with self._on_hosts():
                self._step(self._broken, None)
        self.updates += 1
        self.zero_grad()
        return norm

    @contextmanager
    def _on_hosts(self) -> Iterator[None]:
        """Inside the copies have the gradients; afterwards the parameters have their values."""
        for parameter, host in self._hosts.items():
            host.grad = None
            if parameter.grad is not None:
                host.grad = torch.empty_like(host, pin_memory=parameter.is_cuda)
                host.grad.copy_(parameter.grad, non_blocking=True)
                parameter.grad = None  # its memory is the next one's once it has been read
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        yield
        with torch.no_grad():
            for parameter, host in self._hosts.items():
                parameter.copy_(host, non_blocking=True)
                host.grad = None

    def _step(self, broken: Tensor, divisor: Tensor | None) -> None:
        # Only those draw random numbers for whose norm the host waits.
        rounding = _seeded([self._seed, self.updates], broken.device)
        with rounding if self.waits else nullcontext():
            for part in self.parts:
                if not self.waits:  # as torch's GradScaler steers fused optimizers
                    part.found_inf, part.grad_scale = broken, divisor  # type: ignore[attr-defined]
                with _as_it_stands(part, broken.device):
                    part.step()

    def _set_rate(self, rate: float) -> None:
        for group in self.param_groups:
            own = rate * group.get(FACTOR, 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own)
            else:
                group["lr"] = own

    def _make_states(self) -> None:
        own = list(self._hosts.values()) or self.parameters
        for parameter in own:
            parameter.grad = zero_gradient(parameter)
        self._set_rate(0.0)  # of a zero gradient: no weight and no moment changes
        self._step(torch.ones_like(self._broken), None)
        for part in self.parts:
            for state in part.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].zero_()
                elif "step" in state:
                    state["step"] = 0
        for parameter in own:
            parameter.grad = None

    # --- for checkpoints ---

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of its state by name, as they lie in memory; numbers as tensors."""
        own = self._hosts.get(parameter, parameter)
        state: dict[str, Any] = {}
        for part in self.parts:
            state |= part.state.get(own, {})
        if own is not parameter and own.dtype != parameter.dtype and state:
            state["weight"] = own.detach()  # which the parameter holds rounded
        plain: dict[str, Tensor] = {}
        for name, value in state.items():
            if not isinstance(value, Tensor):
                plain[name] = torch.tensor(value)
            elif hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
                inner, _ = value.__tensor_flatten__()
                plain |= {f"{name}.{one}": getattr(value, one) for one in inner}
            else:
                plain[name] = value
        return plain

    @torch.no_grad()
    def restore(self, states: Mapping[Tensor, Mapping[str, Tensor]], updates: int) -> None:
        """Put the state of each parameter, as `state_of` gave it, back in place; the next update is
        the one after `updates` of them."""
        for parameter, tensors in states.items():
            there = self.state_of(parameter)
            own = self._hosts.get(parameter, parameter)
            if own is not parameter:
                own.copy_(parameter)
            for name, tensor in tensors.items():
                there[name].copy_(tensor)
            for part in self.parts:
                for name, value in part.state.get(own, {}).items():
                    if not isinstance(value, Tensor):
                        part.state[own][name] = type(value)(tensors[name].item())
        self.updates = updates


@dataclass(frozen=True)
class Choice:
    """One of --optim: how it is made, and what it is."""

    make: Callable[[Groups, TrainingConfig, bool], list[torch.optim.Optimizer]]
    extra: str | None = None


def make_optimizer(
    model: nn.Module, config: TrainingConfig, rates: Mapping[str, float] | None = None
) -> Optimizer:
    """The one that --optim names; vectors and scalars (biases, norms) are not decayed.

    Args:
        rates: peak rates of parameters, by name, that do not have the config's.

    Raises:
        InputError: every parameter is frozen, the optimizer is not for these weights, or what it is
            taken from is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("nothing to train: every parameter of the model is frozen")
    on_host = "optimizer" in config.offload
    if on_host:
        _check_offload(config, trained[0].device)
    choice, bf16 = CHOICES[config.optim], any(p.dtype == torch.bfloat16 for p in trained)
    bf16 = bf16 and not on_host  # where weights are fp32
    if bf16 and config.optim not in ROUND_AT_RANDOM:
        able = ", ".join(ROUND_AT_RANDOM)
        raise InputError(f"--optim {config.optim}: it would round the updates of --weights_dtype "
                         f"bf16 to nearest, and lose those below 2^-9 of a weight; give one of "
                         f"{able}, or --weights_dtype fp32")  # fmt: skip
    if extra := choice.extra or ("lowbit" if bf16 else None):
        require_extra(f"--optim {config.optim}", extra)
    sum_in_fp32(trained)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    own = {model.get_parameter(name): rate for name, rate in (rates or {}).items()}
    usual = [p for p in trained if p not in own]
    matrices = [p for p in usual if p.ndim >= 2]
    groups: Groups = [
        {"params": [p for p in matrices if id(p) not in embeddings],
         "weight_decay": config.weight_decay, "matrices": True},
        {"params": [p for p in matrices if id(p) in embeddings],
         "weight_decay": config.weight_decay},
        {"params": [p for p in usual if p.ndim < 2], "weight_decay": 0.0},
    ]  # fmt: skip
    groups += [
        {"params": [p], "weight_decay": 0.0, FACTOR: rate / config.learning_rate}
        for p, rate in own.items()
    ]
    groups = [group for group in groups if group["params"]]
    hosts = on_the_host(groups) if on_host else None
    return Optimizer(choice.make(groups, config, bf16), seed=config.seed, hosts=hosts)


def on_the_host(groups: Groups) -> dict[Tensor, Tensor]:
    """Put fp32 copies in the place of the groups' parameters; parameter -> its copy."""
    hosts: dict[Tensor, Tensor] = {}
    for group in groups:
        for parameter in group["params"]:
            copy = torch.empty(parameter.shape, dtype=torch.float32, pin_memory=parameter.is_cuda)
            hosts[parameter] = copy.copy_(parameter.detach())
        group["params"] = [hosts[parameter] for parameter in group["params"]]
    return hosts


def _check_offload(config: TrainingConfig, device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(
            f"--offload optimizer: the device is {device}, so it is on the host already"
        )
    if config.optim != "adamw":
        raise InputError(f"--offload optimizer is for --optim adamw, which is fast on a host, not "
                         f"for {config.optim}")  # fmt: skip


def describe_optimizer(optimizer: Optimizer, config: TrainingConfig) -> str:
    """Its name, the bytes of its states, and what it costs beside them."""
    states = [t for p in optimizer.parameters for t in optimizer.state_of(p).values()]
    count = sum(p.numel() for p in optimizer.parameters)
    text = f"{config.optim}, {sum(t.nbytes for t in states) / count:.3g} bytes a parameter"
    if "optimizer" in config.offload:
        text += " on the host, fp32 weights beside them; gradients go there, weights come back"
    if optimizer.waits:
        text += "; the host waits for the gradient's norm once a step"
    return text


# --- which there are ---


def _adam_settings(config: TrainingConfig) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}


def _adamw(groups: Groups, config: TrainingConfig, bf16: bool) -> list[torch.optim.Optimizer]:
    """torch's, fused; of bf16 weights torchao's, whose moments are fp32 here: in bf16 the second
    one, which changes by 1 / 1000 a step, would stand still."""
    if not bf16:
        return [torch.optim.AdamW(groups, fused=True, **_adam_settings(config))]
    from torchao.optim import _AdamW

    class AdamW(_AdamW):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return torch.zeros_like(p, dtype=torch.float32)

    return [AdamW(groups, bf16_stochastic_round=True, **_adam_settings(config))]


def _of_torchao(name: str) -> Callable[..., list[torch.optim.Optimizer]]:
    def make(groups: Groups, config: TrainingConfig, bf16: bool) -> list[torch.optim.Optimizer]:
        import torchao.optim

        kind = getattr(torchao.optim, name)
        return [kind(groups, bf16_stochastic_round=bf16, **_adam_settings(config))]

    return make


def _paged(groups: Groups, config: TrainingConfig, bf16: bool) -> list[torch.optim.Optimizer]:
    import bitsandbytes

    return [bitsandbytes.optim.PagedAdamW8bit(groups, **_adam_settings(config))]


def _muon(groups: Groups, config: TrainingConfig, bf16: bool) -> list[torch.optim.Optimizer]:
    """Muon of the matrices, with steps as long as AdamW's, which does the rest."""
    matrices = [group for group in groups if group.pop("matrices", False)]
    others = [group for group in groups if not any(group is one for one in matrices)]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(matrices, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
        )
    return [*parts, *(_adamw(others, config, bf16) if others else [])]


CHOICES = {
    "adamw": Choice(_adamw),
    "adamw_8bit": Choice(_of_torchao("AdamW8bit"), "lowbit"),
    "adamw_4bit": Choice(_of_torchao("AdamW4bit"), "lowbit"),
    "adamw_fp8": Choice(_of_torchao("AdamWFp8"), "lowbit"),
    "paged_adamw_8bit": Choice(_paged, "lowbit"),
    "muon": Choice(_muon),
}


@contextmanager
def _seeded(seeds: Sequence[int], device: torch.device) -> Iterator[None]:
    """Random numbers inside follow from `seeds`; afterwards as if none had been drawn. Ranks, whose
    generators differ, round replicated weights alike, and so does a run that goes on."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(hash(tuple(seeds)) % 2**63)
        yield


def _as_it_stands(part: torch.optim.Optimizer, device: torch.device) -> Any:
    """torchao compiles its step: on a GPU one kernel a shape, on the host a minute of a compiler
    for each, so there it runs as it is written."""
    compiled = any(kind.__module__.startswith("torchao") for kind in type(part).__mro__)
    if compiled and device.type == "cpu":
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


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
