"""How a model reads text: what the flags say, else its directory, else the paper."""

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import first_position
from rankpo_fast.model.settings import EncoderSettings, read_settings
from rankpo_fast.model.tokenizer import says_append_eos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_settings(
    config: EncoderConfig,
    directory: Path,
    skeleton: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> EncoderSettings:
    """What the flags say, else the model directory, else the paper."""
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {"append_eos": says_append_eos(tokenizer)} | read_settings(
        directory,
        any_pooling=config.pooling != "auto",
        given=[name for name, flag in flags.items() if flag is not None],
    )
    if config.pooling == "auto":
        flags["pooling"] = None
        if "pooling" not in settings:
            settings["pooling"] = _guess_pooling(config, directory, skeleton)
    names = {field.name for field in dataclasses.fields(EncoderSettings)}
    settings |= {n: flag for n, flag in flags.items() if n in names and flag is not None}
    limit, short = positions_of(skeleton), _positions_of_short_texts(skeleton)
    for name in ("max_query_length", "max_passage_length"):
        if flags[name] is not None and flags[name] > limit:
            raise InputError(f"--{name} {flags[name]} is more than the {limit} positions of "
                             f"{config.model_name_or_path}")  # fmt: skip
        settings[name] = min(settings[name], limit)
        if settings[name] > short:
            raise InputError(f"--{name} {settings[name]:.0f}: {config.model_name_or_path} turns "
                             f"positions otherwise for all texts of a batch once one has more "
                             f"than {short} tokens; give {short} or less")  # fmt: skip
    return EncoderSettings(**settings)


def _guess_pooling(config: EncoderConfig, directory: Path, skeleton: "PreTrainedModel") -> str:
    causal = is_causal(skeleton)
    why = "no file there names the pooling"
    if (directory / "1_Pooling/config.json").is_file():
        why = "1_Pooling/config.json is not read, since no modules.json names it"
    guess, kind = ("last", "causal") if causal else ("mean", "bidirectional")
    warnings.warn(f"{MODEL_FLAG} {config.model_name_or_path}: {why}; taken for this {kind} "
                  f"model: {guess} (--pooling says so for sure)",
                  stacklevel=4)  # fmt: skip
    return guess


def is_causal(backbone: "PreTrainedModel") -> bool:
    """Whether tokens see only those before them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(backbone.config, "is_causal", None) is False:  # switches a decoder to both sides
        return False
    flags = {getattr(module, "is_causal", None) for module in backbone.modules()} - {None}
    if flags:
        return True in flags
    kind = type(backbone.config)  # older architectures carry no flag
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def positions_of(backbone: "PreTrainedModel") -> float:
    """How many tokens a text may have; infinity where the config names no number."""
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 0:
        return float("inf")
    return positions - first_position(backbone)


def _positions_of_short_texts(backbone: "PreTrainedModel") -> float:
    """Tokens up to which "longrope" counts positions in one way: beyond, a text's vector would
    depend on how long its neighbours are. Infinity for all others."""
    config = backbone.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return float("inf")
    own: Any = getattr(config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or own
