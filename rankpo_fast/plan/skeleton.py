"""A model directory -> the encoder with its levers, of any number of layers, without storage.

Its tensors are fake ones: shapes and dtypes, on the CPU by name. Whatever runs on them in the same
`FakeTensorMode` takes milliseconds and no memory.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rankpo_fast.config import PAPER_MAX_PASSAGE_LENGTH, PAPER_MAX_QUERY_LENGTH, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import Kernel, why_not_packed
from rankpo_fast.model.backbone_config import Code, load_config
from rankpo_fast.model.directories import MODEL_FLAG, blaming, check_config, find_directory
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import drop_nothing
from rankpo_fast.model.lora import add_lora
from rankpo_fast.model.modules import backbone_folder
from rankpo_fast.model.precision import sum_in_fp32, zero_gradient
from rankpo_fast.model.reading import is_causal, positions_of
from rankpo_fast.model.reshape import check_bidirectional, cut_layers, freeze, reshape
from rankpo_fast.model.settings import EncoderSettings, has_settings, read_settings
from rankpo_fast.model.tokenizer import embedding_rows
from rankpo_fast.plan.standins import quantise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PAPER_LENGTHS = {
    "max_query_length": PAPER_MAX_QUERY_LENGTH,
    "max_passage_length": PAPER_MAX_PASSAGE_LENGTH,
}


@dataclass(frozen=True)
class Shape:
    """What a model directory says, of which everything is built."""

    config: "PreTrainedConfig"
    pooling: str
    max_query_length: int
    max_passage_length: int
    layers: int
    period: int  # after so many layers their kinds begin again

    @property
    def dim(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def longest(self) -> int:
        return max(self.max_query_length, self.max_passage_length)


def read_shape(model: ModelConfig) -> Shape:
    """Of a directory in which config.json suffices.

    Raises:
        InputError: it is not there, or texts of the model are not packed, which alone is counted.
    """
    name = model.model_name_or_path
    directory = find_directory(name, MODEL_FLAG, weights=False)
    folder = backbone_folder(directory)
    check_config(folder, MODEL_FLAG)
    config = load_config(folder, Code.of(model))
    if model.disable_dropout:
        drop_nothing(config)
    reshape(config, model)
    layers = config.get_text_config().num_hidden_layers
    if model.freeze_layers > layers:
        raise InputError(f"--freeze_layers {model.freeze_layers}: there are {layers} layers")
    skeleton = _backbone(config, 1, torch.float32, name)
    check_bidirectional(skeleton, is_causal(skeleton), model)
    for reason in (why_not_packed(skeleton), _why_not_counted(model)):
        if reason is not None:
            raise InputError(f"{MODEL_FLAG} {name}: a plan counts packed texts, and these are "
                             f"padded: {reason}")  # fmt: skip
    found: dict[str, Any] = dict(PAPER_LENGTHS)
    if has_settings(directory):
        given = [key for key in PAPER_LENGTHS if getattr(model, key) is not None]
        found |= read_settings(directory, any_pooling=model.pooling != "auto", given=given)
    pooling: str = model.pooling
    if pooling == "auto":
        pooling = found.get("pooling") or ("last" if is_causal(skeleton) else "mean")
    limit = positions_of(skeleton)
    lengths = {key: getattr(model, key) or int(min(found[key], limit)) for key in PAPER_LENGTHS}
    for key, length in lengths.items():
        if length > limit:
            raise InputError(f"--{key} {length} is more than the {limit} positions of {name}")
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return Shape(config, pooling, **lengths, layers=layers, period=_period(kinds, layers))


def _why_not_counted(model: ModelConfig) -> str | None:
    if model.attn_implementation == "eager":
        return "--attn_implementation eager"
    return None if model.packing else "--packing false"


def _period(kinds: list[str], layers: int) -> int:
    """1 where all layers are of one kind; all of them where nothing repeats."""
    for period in range(1, layers):
        if all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return layers


def build(shape: Shape, model: ModelConfig, layers: int, kernel: Kernel, *, bf16: bool) -> Encoder:
    """The encoder of the first `layers` layers as `model` wants it trained, gradients included.

    In a `FakeTensorMode`: the modules are built on the meta device, as adapters cannot be put into
    fake ones, and tensors on that have no autocast.
    """
    with unset_fake_temporarily():
        backbone = _adapted(shape, model, layers)
    _fake(backbone)
    settings = EncoderSettings(
        shape.pooling, "", "", shape.max_query_length, shape.max_passage_length
    )
    no_tokenizer: Any = None
    encoder = Encoder(backbone, no_tokenizer, settings, bf16=bf16)
    encoder.use_kernel(kernel)
    kind: Any = model.gradient_checkpointing
    if kind not in (False, "auto"):
        encoder.layers.checkpoint(kind)
    if model.mlp_chunk is not None:
        encoder.layers.chunk(model.mlp_chunk)
    encoder.train()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    if not trained:
        raise InputError("nothing to train: every parameter of the model is frozen")
    sum_in_fp32(trained)
    for parameter in trained:
        parameter.grad = zero_gradient(parameter)
    return encoder


def _adapted(shape: Shape, model: ModelConfig, layers: int) -> "PreTrainedModel":
    """The backbone on the meta device: weights in their dtype, frozen or not, with adapters."""
    whole = torch.float32 if model.weights_dtype == "fp32" else torch.bfloat16
    backbone = _backbone(shape.config, layers, whole, model.model_name_or_path)
    if model.special_tokens:  # at most so many rows more: how many are spare a tokenizer knows
        rows = embedding_rows(backbone) + len(model.special_tokens)
        backbone.resize_token_embeddings(rows, mean_resizing=False)
    if model.weights_dtype == "nf4":
        quantise(backbone)
    if model.lora_rank is not None:
        add_lora(backbone, model)
    freeze(backbone, model)
    return backbone


def _backbone(
    config: "PreTrainedConfig", layers: int, dtype: torch.dtype, name: str
) -> "PreTrainedModel":
    from transformers import AutoModel

    config = copy.deepcopy(config)
    cut_layers(config, layers)
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    with blaming(f"{MODEL_FLAG} {name}"), torch.device("meta"):
        return AutoModel.from_config(
            config, dtype=dtype, trust_remote_code=False,
            attn_implementation="eager" if softcap else None,
        )  # fmt: skip


def _fake(backbone: nn.Module) -> None:
    """Its meta tensors become fake ones on the CPU, in place."""
    made: dict[torch.Tensor, Any] = {}  # those that several modules share stay one
    for module in backbone.modules():
        for places in (module._parameters, module._buffers):
            for name, tensor in places.items():
                if tensor is not None and tensor not in made:
                    made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
                if tensor is not None:
                    places[name] = made[tensor]


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name came with an adapter."""
    return "lora_" in name or "modules_to_save" in name
