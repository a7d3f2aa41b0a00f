"""The settings that a plan chooses, and the ways to train from the one that changes least on.

What a user has set, which is what differs from its default, is never chosen otherwise.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.layers import WAYS, Checkpointing
from rankpo_fast.model.precision import ROUND_AT_RANDOM

LORA_RANK = 16  # of an adapter that nobody gave a rank
NOT_FOR_ADAPTERS = (
    "freeze_layers", "freeze_embeddings", "from_scratch", "float8", "trim_vocabulary",
)  # fmt: skip
Method = Literal["full", "lora", "qlora"]


@dataclass(frozen=True)
class Levers:
    """Fields of ModelConfig and TrainingConfig, by their names."""

    weights_dtype: str = "fp32"
    lora_rank: int | None = None
    optim: str = "adamw"
    gradient_checkpointing: Checkpointing = False
    offload: tuple[str, ...] = ()
    torch_compile: bool = False

    @property
    def method(self) -> Method:
        if self.lora_rank is None:
            return "full"
        return "qlora" if self.weights_dtype == "nf4" else "lora"

    @property
    def name(self) -> str:
        """Of the way to train, whatever else is set."""
        if self.lora_rank is not None:
            return f"{'QLoRA' if self.weights_dtype == 'nf4' else 'LoRA'}, {self.optim}"
        return f"all weights in {self.weights_dtype}, {self.optim}"

    def model(self, given: ModelConfig) -> ModelConfig:
        chosen: dict[str, Any] = {
            "weights_dtype": self.weights_dtype,
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            "torch_compile": self.torch_compile,
        }
        return replace(given, **chosen)

    def flags(self) -> dict[str, Any]:
        """Those that a command line has to say, by name."""
        usual = Levers()
        names = ("weights_dtype", "lora_rank", "optim", "offload", "torch_compile")
        changed = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(usual, n)}
        return changed | {"gradient_checkpointing": self.gradient_checkpointing}


def ways(
    model: ModelConfig,
    optim: str,
    offload: tuple[str, ...],
    method: Method | None,
    shard: str,
    processes: int = 1,
) -> list[list[Levers]]:
    """Of each way to train that the settings leave, what else can be chosen in it; the way that
    changes the training least is the first.

    Args:
        optim, offload, shard: of TrainingConfig. What lies in parts takes --optim adamw alone, on
            the GPU.
        method: leave these alone; None: all.
        processes: several train no bf16 weights whole: torch's engines would sum gradients in bf16.

    Raises:
        InputError: the settings leave none.
    """
    rank = model.lora_rank or LORA_RANK
    least_first = [
        Levers("fp32"),
        Levers("fp32", optim="adamw_8bit"),
        Levers("bf16"),
        Levers("bf16", optim="adamw_8bit"),
        Levers("bf16", rank),
        Levers("nf4", rank),
    ]
    if processes > 1:
        least_first = [
            one for one in least_first if one.weights_dtype != "bf16" or one.lora_rank is not None
        ]
    if model.bf16 is False:
        least_first = [one for one in least_first if one.weights_dtype == "fp32"]
    if set(NOT_FOR_ADAPTERS) & model.changed().keys():
        least_first = [one for one in least_first if one.lora_rank is None]
    if optim not in ROUND_AT_RANDOM:
        least_first = [
            one for one in least_first if one.weights_dtype == "fp32" or one.lora_rank is not None
        ]
    if optim != Levers().optim:
        least_first = [replace(one, optim=optim) for one in least_first]
    if shard != "none":
        least_first = [one for one in least_first if one.optim == Levers().optim]
    if model.lora_rank is not None:
        least_first = [one for one in least_first if one.lora_rank is not None]
    if model.weights_dtype != Levers().weights_dtype:
        least_first = [one for one in least_first if one.weights_dtype == model.weights_dtype]
    if method is not None:
        least_first = [one for one in least_first if one.method == method]
    if not least_first:
        given = " ".join(f"--{name}" for name in model.changed() if name != "model_name_or_path")
        asked = f"--method {method}" if method is not None else "no way to train"
        raise InputError(
            f"{asked} does not go with the other flags: {given} --optim {optim} --shard {shard}"
        )
    moves = ["activations", "optimizer"] if shard == "none" else ["activations"]
    alone = processes == 1
    return [_variants(one, model, offload, moves, alone) for one in dict.fromkeys(least_first)]


def _variants(
    way: Levers, model: ModelConfig, offload: tuple[str, ...], moves: list[str], alone: bool
) -> list[Levers]:
    """
    Args:
        moves: what may be moved to the host where nothing was said.
        alone: whether one process trains. Where several do, and beside weights of 4 bits, layers
            are compiled only if that was asked for: nobody has measured whether it helps there.
    """
    kinds: tuple[Any, ...] = WAYS
    if model.gradient_checkpointing != "auto":
        kinds = (model.gradient_checkpointing,)
    elif model.mlp_chunk is not None:  # which selective checkpointing would undo
        kinds = (False, True)
    found = []
    for kind in kinds:
        lists: list[tuple[str, ...]] = [offload]
        if not offload:
            lists += [("activations",)] if kind is True else []
            if way.method == "full" and way.optim == "adamw" and "optimizer" in moves:
                lists += [("optimizer",)]
                lists += [("activations", "optimizer")] if kind is True else []
        compiled = [False, True] if alone and way.weights_dtype != "nf4" else [False]
        if model.torch_compile is not None:
            compiled = [model.torch_compile]
        found += [
            replace(way, gradient_checkpointing=kind, offload=moved, torch_compile=whether)
            for moved in lists if kind is True or "activations" not in moved
            for whether in compiled if not (whether and _not_compiled(kind, model))
        ]  # fmt: skip
    if not found:
        raise InputError("--offload activations moves what checkpointed layers keep: give "
                         "--gradient_checkpointing true")  # fmt: skip
    return found


def _not_compiled(kind: Checkpointing, model: ModelConfig) -> bool:
    """Whether compiled layers would hide what another setting has to see."""
    return kind == "selective" or model.mlp_chunk is not None
