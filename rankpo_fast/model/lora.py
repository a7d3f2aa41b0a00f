"""Adapters to train beside frozen weights: LoRA, DoRA, and both on weights of 4 bits.

    y = W x + alpha / rank * B (A x)        A [rank, in] and B [out, rank] are trained, W is not
    y = m / |W + dW| (W + dW) x             DoRA: the length m [out] of each row of W is trained too

peft puts them into the backbone's layers in place. What is saved is the whole model, with W + dW
for W, and in adapter/ the adapter alone.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.extras import require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankpo_fast.model.adapter import Adapter

FOLDER = "adapter"  # of the adapter alone, in a model's directory
LENGTHS = "lora_magnitude_vector"  # peft's name of DoRA's m
NAME = "default"  # peft's, of the adapter in use
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NOT_FOR_ADAPTERS = "pooler"  # a layer for a task that we do not have


@dataclass(frozen=True)
class Lora:
    """Of an encoder whose adapter is trained.

    Attributes:
        base: what the adapter is for: a name on the Hub, or a directory. None: no directory holds
            that model, so that the adapter alone would be of no use.
        four_bits: the dtype of what is not, where the base's matrices are; else None.
    """

    base: str | None
    four_bits: torch.dtype | None

    @classmethod
    def of(
        cls, config: ModelConfig, adapter: "Adapter | None", folder: Path, dtype: torch.dtype
    ) -> "Lora | None":
        """None where no adapter is trained. InputError where the one in the directory, which is to
        be trained on, was made otherwise than the flags say.

        Args:
            folder: of the base's config.json and weights.
            dtype: in which they are loaded.
        """
        if config.lora_rank is None:
            return None
        if adapter is not None:
            adapter.check_trained_on(config)
        named = adapter.base if adapter is not None else config.model_name_or_path
        here = Path(named).expanduser().exists()
        base = str(folder.resolve()) if here else named
        changed = {"layers", "bidirectional", "trim_vocabulary"} & config.changed().keys()
        four_bits = dtype if config.weights_dtype == "nf4" else None
        return cls(None if changed else base, four_bits)


def add_lora(backbone: "PreTrainedModel", config: ModelConfig) -> None:
    """Freeze the backbone and put adapters into the layers that --lora_targets names.

    InputError: no layer has such a name, or peft is not installed.
    """
    require_extra("--lora_rank", "lora")
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(backbone, config.lora_targets)
    for wanted in config.lora_modules_to_save:
        if not any(_ends(name, wanted) for name, _ in backbone.named_modules()):
            raise InputError(f"--lora_modules_to_save {wanted}: no layer has a name that ends so; "
                             f"there are {', '.join(_ending_names(backbone))}")  # fmt: skip
    rank = config.lora_rank
    assert rank is not None, "which decides whether there is an adapter"
    has_pooler = any(_of_pooler(name) for name, _ in backbone.named_modules())
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?{NOT_FOR_ADAPTERS}\..*" if has_pooler else None,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        use_dora=config.lora_dora,
        modules_to_save=config.lora_modules_to_save or None,
    )
    try:
        inject_adapter_in_model(settings, backbone, adapter_name=NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"--lora_targets {' '.join(config.lora_targets)}: {error}") from error
    as_trained(backbone)


def four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers loads a backbone with so that its layers' matrices have 4 bits a value, on
    `device`, all else in `dtype`, in which products are computed. InputError: not installed."""
    require_extra("--weights_dtype nf4", "lowbit", "lora")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **FOUR_BITS)
    return {"dtype": dtype, "quantization_config": settings, "device_map": {"": device}}


def model_args(lora: Lora) -> dict[str, Any]:
    """What sentence-transformers loads the base with, so that it is the one of the training."""
    if lora.four_bits is None:
        return {}
    dtype = str(lora.four_bits).removeprefix("torch.")
    return {"quantization_config": {**FOUR_BITS, "bnb_4bit_compute_dtype": dtype}, "dtype": dtype}


def keep_four_bits(backbone: nn.Module) -> None:
    """On a CPU with bf16 bitsandbytes would pack weights anew, their scales in bf16, as soon as one
    is read without gradients: not those any more that training reads, and not of every shape."""
    four_bits: list[Any] = [module for module in backbone.modules() if _is_four_bits(module)]
    for layer in four_bits:
        layer.support_avx512bf16_for_cpu = False


def as_trained(backbone: nn.Module) -> None:
    """What of a backbone with adapters is trained, in fp32; under autocast it takes states as they
    come, where peft would make a copy in its own dtype."""
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for _, layer in _adapted(backbone):
        layer.cast_input_dtype_enabled = False


def whole_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """The state that the backbone would have with W + dW for W, under the names without adapters:
    what has none as it lies in memory, the others in fp32."""
    from_adapters: dict[str, Tensor] = {}
    hidden: set[str] = set()  # places whose own names are peft's and bitsandbytes'
    for name, layer in _adapted(backbone):
        own = layer.get_base_layer()
        from_adapters |= {f"{name}.{k}": p for k, p in own.named_parameters() if k != "weight"}
        from_adapters[f"{name}.weight"] = _merged(layer)
        hidden.add(f"{name}.")
    for name, module in backbone.named_modules():
        if not f"{name}.".startswith(tuple(hidden)) and _is_four_bits(module):
            from_adapters |= {f"{name}.{k}": p for k, p in module.named_parameters()}
            from_adapters[f"{name}.weight"] = _dense(module)
            hidden.add(f"{name}.")
        if hasattr(module, "modules_to_save"):
            trained = module.modules_to_save[NAME].state_dict()
            from_adapters |= {f"{name}.{k}": tensor for k, tensor in trained.items()}
            hidden.add(f"{name}.")
    plain = {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if not name.startswith(tuple(hidden))
    }
    return plain | {name: tensor.detach() for name, tensor in from_adapters.items()}


def has_other_layers(backbone: nn.Module) -> bool:
    """Whether layers are not as transformers makes them: adapted, or of 4 bits."""
    return any(True for _ in _adapted(backbone)) or any(map(_is_four_bits, backbone.modules()))


def plain_skeleton(backbone: "PreTrainedModel") -> "PreTrainedModel":
    """A backbone of the same shape on the meta device, without adapters and with whole weights."""
    config = copy.deepcopy(backbone.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(backbone)._from_config(config, dtype=torch.float32)


def save_adapter(backbone: "PreTrainedModel", directory: Path, lora: Lora) -> None:
    """Write the adapter alone, as peft, transformers and sentence-transformers load it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    settings = copy.deepcopy(backbone.peft_config[NAME])
    settings.base_model_name_or_path, settings.inference_mode = lora.base, True
    settings.save_pretrained(str(directory))
    tensors = get_peft_model_state_dict(backbone, adapter_name=NAME, save_embedding_layers=False)
    tensors = {
        f"base_model.model.{name.removeprefix('base_model.model.')}": tensor.contiguous().cpu()
        for name, tensor in tensors.items()
    }
    # By their older name, which peft gives them, transformers does not find DoRA's lengths.
    tensors = {
        f"{name}.weight" if name.endswith(LENGTHS) else name: t for name, t in tensors.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def changes_nothing(backbone: nn.Module) -> bool:
    """Whether there are adapters, all of which leave the weights as they are."""
    layers = [layer for _, layer in _adapted(backbone)]
    whole = any(hasattr(module, "modules_to_save") for module in backbone.modules())
    return bool(layers) and not whole and not any(map(_differs, layers))


def _differs(layer: Any) -> bool:
    changed = bool(layer.lora_B[NAME].weight.any()) if NAME in layer.lora_B else True
    return changed or bool(layer.lora_magnitude_vector)


def _adapted(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers that have an adapter."""
    for name, module in backbone.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """W + dW of a layer, fp32; the layer is left as it is, bit by bit."""
    weight = _dense(layer.get_base_layer()).float()
    whole = weight + layer.get_delta_weight(NAME).float()
    if layer.lora_magnitude_vector:
        length = layer.lora_magnitude_vector[NAME].weight.float()  # [out]
        whole *= (length / whole.norm(dim=1))[:, None]
    return whole


def _is_four_bits(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _dense(layer: Any) -> Tensor:
    """Its weight, of 4 bits too: as the layer reads them."""
    if not _is_four_bits(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _targets(backbone: "PreTrainedModel", wanted: list[str]) -> list[str]:
    """Names of layers, as peft compares them with the ends of all names."""
    from transformers.pytorch_utils import Conv1D

    names = {
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _of_pooler(name)
    }
    if wanted == ["all-linear"]:
        return sorted({name.rpartition(".")[2] for name in names})
    for one in wanted:
        if not any(_ends(name, one) for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise InputError(f"--lora_targets {one}: no layer of matrices has a name that ends so; "
                             f"there are {there}")  # fmt: skip
    return wanted


def _of_pooler(name: str) -> bool:
    return NOT_FOR_ADAPTERS in name.split(".")[:-1]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _ending_names(backbone: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, _ in backbone.named_modules() if name})
