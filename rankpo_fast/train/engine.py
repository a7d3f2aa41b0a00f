"""Where weights, gradients and optimizer lie when several ranks train: torch's engines do it.

    --shard   weights        gradients, optimizer    by                 what travels in a step
    none      whole          whole                   DDP                gradients, once
    grad      whole in a     parts                   FSDP2, weights     weights once, gradients in
              step, parts                            kept in a step     every backward pass
    full      parts          parts                   FSDP2              weights in every forward and
                                                                        backward pass, gradients too

A gradient cache has many backward passes a step. Whole gradients are summed over ranks in the last
one, bucket by bucket while it goes on. Parts are summed in each: to keep whole ones until the last
would take the memory that sharding is to save; with k passes k - 1 sums more travel, behind the
computing where a pass has tokens enough.

What each rank computes is its share of the step's gradient (`PackedBatch.loss_share`), so engines
sum and do not average. What is ours stays: texts dealt by cost, vectors gathered once, the
gradients of passages brought home.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.data.packing import MicroBatch
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import outermost_layers
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.meters import Agreed, Meter, release


class Engine:
    """One process: everything is here, and gradients are what autograd adds up."""

    def begin(self) -> None:
        """Before the first gradient of a step, whose parameters have none."""

    def backward(self, vectors: Tensor, gradient: Tensor, *, last: bool) -> None:
        """Of the vectors [S, D] of a micro-batch, given their gradient [S, D].

        Args:
            last: whether it is the step's last; afterwards gradients are those of all ranks.
        """
        vectors.backward(gradient)

    def settle(self) -> None:
        """After passes that no last backward has followed: parameters are those to be saved."""

    def meter(self, meter: Meter) -> Meter:
        """What of a meter holds for all ranks, where their passes are one."""
        return meter

    @contextmanager
    def whole(self, encoder: Encoder) -> Iterator[None]:
        """Inside, the first rank's encoder has all its weights, on the host where they are in
        parts elsewhere: to be saved. All ranks must call it."""
        yield


ALONE = Engine()


def check_shard(training: TrainingConfig, model: ModelConfig, ranks: Ranks, *, lent: bool) -> None:
    """InputError where --shard, or weights as they are stored, cannot be on so many ranks.

    Args:
        lent: whether the encoder is the caller's, who wants it back whole.
    """
    given = f"--shard {training.shard}"
    if ranks.size > 1 and model.weights_dtype == "bf16" and model.lora_rank is None:
        raise InputError("--weights_dtype bf16: torch's engines for several ranks would sum its "
                         "gradients in bf16; give --shard full, which takes 16 bytes a parameter "
                         "of all ranks together, or --lora_rank")  # fmt: skip
    if training.shard == "none":
        return
    if ranks.size == 1:
        raise InputError(f"{given} is for several processes, and this is one: start with torchrun, "
                         f"or leave it out")  # fmt: skip
    if training.optim != "adamw":
        raise InputError(f"{given} goes with --optim adamw, not {training.optim}, whose states "
                         f"cannot lie in parts; --shard none takes it")  # fmt: skip
    if "optimizer" in training.offload:
        raise InputError(f"{given} and --offload optimizer do not go together: give one")
    if lent:
        raise InputError(f"{given} leaves an Encoder in parts: give the model by its name")


def engine_of(encoder: Encoder, ranks: Ranks, shard: str, micro_batch: MicroBatch) -> Engine:
    """The engine of --shard, once all ranks have the first one's weights. All must call it, before
    there is an optimizer: parameters may become other ones.

    Weights that are no floating-point numbers (4 bits) stay whole on every rank.

    Args:
        micro_batch: goes through the encoder, so that what is set up once is there before memory is
            measured. Random numbers go on as if nothing had been drawn.
    """
    if ranks.size == 1:
        return ALONE
    if shard == "none":
        return Replicated(encoder, ranks, micro_batch)
    return Sharded(encoder, ranks, shard, micro_batch)


class Replicated(Engine):
    """torch's DistributedDataParallel, told of the last backward pass alone.

    It sums gradients in a backward pass that comes after its own forward, so its forward is no more
    than the vectors of the step's last micro-batch. It is given the parameters that a pass was seen
    to use: else it would have to look for them, and the host to wait, in every step. Its buckets
    are the gradients' memory, so that none is there twice.
    """

    def __init__(self, encoder: Encoder, ranks: Ranks, micro_batch: MicroBatch):
        self._views: dict[nn.Parameter, Tensor] = {}
        _broadcast(encoder.backbone, ranks)
        _pass_nothing(ALONE, encoder, micro_batch)
        used = [p for p in encoder.backbone.parameters() if p.grad is not None]
        encoder.zero_grad(set_to_none=True)
        self._reducer = DistributedDataParallel(
            _Vectors(used),
            process_group=ranks.group,
            gradient_as_bucket_view=True,
            init_sync=False,
        )
        self._reducer.register_comm_hook(ranks.group, _sum_bucket)
        for _ in range(2):  # the second has buckets in the order of the first's gradients
            encoder.zero_grad(set_to_none=True)
            _pass_nothing(self, encoder, micro_batch)
        self._views = {p: p.grad for p in used if p.grad is not None}
        encoder.zero_grad(set_to_none=True)

    def begin(self) -> None:
        if self._views:
            torch._foreach_zero_(list(self._views.values()))
        for parameter, view in self._views.items():
            parameter.grad = view

    def backward(self, vectors: Tensor, gradient: Tensor, *, last: bool) -> None:
        if last:
            vectors = self._reducer(vectors)
        vectors.backward(gradient)
        if last:
            self._reducer._check_reducer_finalized()  # RuntimeError: a parameter took no part


class Sharded(Engine):
    """FSDP2: a layer's weights are whole while it computes; parts of its gradients are summed after
    each of its backward passes. Forward and backward passes are those of all ranks, so every rank
    must do as many, in the same order.

    Weights come to the devices module by module, each cut into its parts before the next: the first
    rank has them on its host, others need have none (`load_encoder`'s meta device).
    """

    def __init__(self, encoder: Encoder, ranks: Ranks, shard: str, micro_batch: MicroBatch):
        self._ranks, self._keeps_weights = ranks, shard == "grad"
        self._root = encoder.backbone
        assert ranks.group is not None
        arrival = _Arrival(self._root, ranks)
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
        embeddings = [m for m in [self._root.get_input_embeddings()] if isinstance(m, nn.Embedding)]
        for module in [*embeddings, *outermost_layers(self._root), self._root]:
            arrival.of(module)
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=shard == "full",
                # Sums of bf16 gradients are fp32's; others are those of the weights' dtype.
                mp_policy=MixedPrecisionPolicy(reduce_dtype=_reduced_in(module)),
                ignored_params={p for p in module.parameters() if not p.is_floating_point()},
            )
        for sharded in self._modules():
            sharded.set_gradient_divide_factor(1.0)  # a sum, and no product with 1 in it
            sharded.set_force_sum_reduction_for_comms(True)
            # An embedding's gradient needs no weights.
            sharded.set_unshard_in_backward(not isinstance(sharded, nn.Embedding))
        encoder.on_device()
        self.settle()
        _pass_nothing(self, encoder, micro_batch)
        encoder.zero_grad(set_to_none=True)
        release(ranks.device)

    def backward(self, vectors: Tensor, gradient: Tensor, *, last: bool) -> None:
        # Weights kept in a step are given up after its last pass, before they change.
        cast(FSDPModule, self._root).set_reshard_after_backward(last or not self._keeps_weights)
        vectors.backward(gradient)

    def settle(self) -> None:
        for sharded in self._modules():
            sharded.reshard()

    def meter(self, meter: Meter) -> Meter:
        return Agreed(meter, self._ranks)

    @contextmanager
    def whole(self, encoder: Encoder) -> Iterator[None]:
        self.settle()
        parts: list[tuple[nn.Module, str, Any]] = []
        for module in self._root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    parts.append((module, name, parameter))
        wholes: dict[Any, nn.Parameter] = {}  # one each of those that several modules share
        for _, _, part in parts:
            if part not in wholes:
                tensor = part.detach().full_tensor()
                if self._ranks.first:
                    wholes[part] = nn.Parameter(tensor.cpu(), requires_grad=part.requires_grad)
        try:
            for module, name, part in parts:
                if self._ranks.first:
                    module._parameters[name] = wholes[part]
            yield
        finally:
            for module, name, part in parts:
                module._parameters[name] = part

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]


class _Arrival:
    """The first rank's weights and buffers, which come to the device of every rank."""

    def __init__(self, root: nn.Module, ranks: Ranks):
        self._ranks = ranks
        self._names = {module: name for name, module in root.named_modules()}
        self._there: set[str] = set()
        own = {
            f"{name}.{key}": (tensor.shape, tensor.dtype)
            for module, name in self._names.items()
            for key, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        self._of_first, *_ = ranks.objects(own if ranks.first else None)
        if {n: shape for n, (shape, _) in own.items()} != {
            n: shape for n, (shape, _) in self._of_first.items()
        }:
            raise RuntimeError(f"rank {ranks.rank} has built another model than the first")

    def of(self, module: nn.Module) -> None:
        """Those of a module that have not come yet, whole."""
        come: dict[Tensor, Tensor] = {}  # one each of those that several modules share
        for inside in module.modules():
            kinds: list[dict[str, Any]] = [inside._parameters, inside._buffers]
            for tensors in kinds:
                for key, tensor in tensors.items():
                    name = f"{self._names[inside]}.{key}"
                    if tensor is not None and name not in self._there:
                        self._there.add(name)
                        if tensor not in come:
                            come[tensor] = self._come(name, tensor)
                        tensors[key] = come[tensor]

    @torch.no_grad()
    def _come(self, name: str, tensor: Tensor) -> Tensor:
        _, dtype = self._of_first[name]
        if not tensor.is_floating_point() and tensor.device == self._ranks.device:
            come = tensor  # 4-bit weights, which are more than their numbers
        else:
            come = torch.empty_like(tensor, dtype=dtype, device=self._ranks.device)
            if self._ranks.first:
                come.copy_(tensor)
            if isinstance(tensor, nn.Parameter):
                come = nn.Parameter(come, requires_grad=tensor.requires_grad)
        dist.broadcast(come.detach(), 0, group=self._ranks.group)
        return come


class _Vectors(nn.Module):
    """The vectors as they are, and the parameters that made them."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__()
        self.used = nn.ParameterList(parameters)

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors.view_as(vectors)


def _broadcast(module: nn.Module, ranks: Ranks) -> None:
    """The first rank's weights and buffers to all."""
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0, group=ranks.group)


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _pass_nothing(engine: Engine, encoder: Encoder, micro_batch: MicroBatch) -> None:
    gpus = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        engine.begin()
        vectors = encoder(micro_batch)
        engine.backward(vectors, torch.zeros_like(vectors), last=True)


def _reduced_in(module: nn.Module) -> torch.dtype | None:
    own = (p for p in module.parameters() if not isinstance(p, DTensor))
    half = any(p.dtype == torch.bfloat16 and p.requires_grad for p in own)
    return torch.float32 if half else None
