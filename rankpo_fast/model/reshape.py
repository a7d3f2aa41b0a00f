"""What of a backbone is used and what of it is trained: fewer layers, attention to both sides,
frozen parts."""

from typing import TYPE_CHECKING

from torch import nn

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.layers import outermost_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def reshape(backbone_config: "PreTrainedConfig", config: ModelConfig) -> None:
    """Change a backbone's config as --layers and --bidirectional say, before anything is built.

    InputError: it has fewer layers.
    """
    text = backbone_config.get_text_config()
    if config.layers is not None:
        there = text.num_hidden_layers
        if config.layers > there:
            raise InputError(f"--layers {config.layers}: {config.model_name_or_path} has {there}")
        cut_layers(backbone_config, config.layers)
    if config.bidirectional:
        for part in (backbone_config, text):
            part.is_causal = False  # which transformers makes masks by


def cut_layers(backbone_config: "PreTrainedConfig", layers: int) -> None:
    """The first so many layers of those that the config names."""
    text = backbone_config.get_text_config()
    there, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in list(vars(text).items()):  # a kind of attention or the like for each
        if isinstance(value, list) and len(value) == there:
            setattr(text, name, value[:layers])


def backbone_is_cut(config: ModelConfig | None) -> bool:
    """Whether not all layers of the files are used."""
    return config is not None and config.layers is not None


def check_bidirectional(skeleton: "PreTrainedModel", causal: bool, config: ModelConfig) -> None:
    """InputError unless --bidirectional makes a causal model one that is not."""
    kind = skeleton.config.model_type
    if config.bidirectional and causal:
        raise InputError(f"--bidirectional: {kind} has no attention to both sides in transformers")


def freeze(backbone: nn.Module, config: ModelConfig) -> None:
    """Parameters as --freeze_embeddings and --freeze_layers say; what only other tasks read too.

    InputError: fewer layers, or none is left to train.
    """
    layers = outermost_layers(backbone)
    if config.freeze_layers > len(layers):
        raise InputError(f"--freeze_layers {config.freeze_layers}: there are {len(layers)} layers")
    frozen = layers[: config.freeze_layers]
    if config.freeze_embeddings or config.freeze_layers:
        frozen += [m for m in backbone.modules() if isinstance(m, nn.Embedding)]
        frozen += [m for name, m in backbone.named_children() if name.startswith("embed")]
    for module in frozen:
        module.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if name.startswith("pooler."):  # reads the first token for a task that we do not have
            parameter.requires_grad_(False)
