"""Adapters (LoRA and its kin): opened with the base that their file names, and merged into it.

So an adapter is encoded with, evaluated and trained on as one whole model; what is saved is whole.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import (
    blaming,
    check_config,
    check_weights,
    find_directory,
    has_weights,
)
from rankpo_fast.model.lora import LENGTHS, NAME, as_trained, changes_nothing
from rankpo_fast.model.modules import backbone_folder, read_json

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of its tensors, before those of the base


@dataclass(frozen=True)
class Adapter:
    """An adapter and where its base lies."""

    folder: Path
    base: str  # as its file names it
    base_directory: Path
    base_folder: Path  # with config.json and weights
    four_bits: torch.dtype | None = None  # of what is not, where it was trained beside such weights

    def check_trained_on(self, config: ModelConfig) -> None:
        """InputError unless the flags of an adapter are those it was made with."""
        own = read_json(self.folder / CONFIG_FILE)
        for name in config.changed():
            if name.startswith("lora_") and name != "lora_rank":
                raise InputError(f"--{name}: {self} is trained on as it was made: leave it out")
        if own.get("peft_type") != "LORA" or own.get("r") != config.lora_rank:
            raise InputError(f"--lora_rank {config.lora_rank}: {self} is {own.get('peft_type')} of "
                             f"rank {own.get('r')}, and is trained on with that")  # fmt: skip
        if bool(self.four_bits) != (config.weights_dtype == "nf4"):
            kind = "of 4 bits: give" if self.four_bits else "that are not of 4 bits: leave out"
            raise InputError(f"--weights_dtype {config.weights_dtype}: {self} was trained beside "
                             f"weights {kind} --weights_dtype nf4")  # fmt: skip

    def put_on(self, backbone: "PreTrainedModel", *, trained: bool = False) -> None:
        """Put it into the backbone's layers, in place; on the meta device its places alone.
        InputError as below, and where it changes nothing."""
        if backbone.device.type == "meta":
            from peft import inject_adapter_in_model

            inject_adapter_in_model(self._config(trained), backbone, adapter_name=NAME)
        else:
            self._opened(backbone, trained=trained)
            self._check_changes(backbone)
        if trained:
            as_trained(backbone)

    def merged_into(self, backbone: "PreTrainedModel") -> "PreTrainedModel":
        """The backbone, whose weights have taken in the adapter's.

        Raises:
            InputError: the adapter is not for this backbone, or cannot be merged.
        """
        opened = self._opened(backbone)
        self._check_changes(backbone)
        merged = opened.merge_and_unload(safe_merge=True)
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
        return merged

    def _config(self, trained: bool) -> "PeftConfig":
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(str(self.folder))
        # A task brings peft's wrapper for its head (CAUSAL_LM: generation): there is none here.
        config.task_type = None
        config.inference_mode = not trained
        return config

    def _opened(self, backbone: "PreTrainedModel", *, trained: bool = False) -> "PeftModel":
        from peft import PeftModel, get_peft_model_state_dict

        path = self.folder / WEIGHTS_FILE
        with blaming(str(path)), safe_open(path, "pt") as file:
            names = {re.sub(rf"({LENGTHS})\.weight$", r"\1", name) for name in file.keys()}  # noqa: SIM118 - no mapping
        # Those of a model with a head have one level more, the backbone's place in it.
        place, mapping = f"{backbone.base_model_prefix}.", None
        if all(name.startswith(PREFIX + place) for name in names):
            names = {PREFIX + name.removeprefix(PREFIX + place) for name in names}
            mapping = {f"^{re.escape(place)}": ""}
        try:
            model = PeftModel.from_pretrained(
                backbone, str(self.folder), config=self._config(trained), key_mapping=mapping,
                is_trainable=trained,
            )  # fmt: skip
            unfit = sorted(names ^ get_peft_model_state_dict(model).keys())
            if not unfit:
                return model
        except RuntimeError as error:  # which torch raises over other shapes
            raise InputError(f"{self} does not fit: {' '.join(str(error).split())}") from error
        raise InputError(f"{self} does not fit: {len(unfit)} tensors are on one side alone: "
                         f"{unfit[0]} ...")  # fmt: skip

    def _check_changes(self, backbone: "PreTrainedModel") -> None:
        if changes_nothing(backbone):
            raise InputError(f"{self} changes nothing: all that it adds is 0")

    def __str__(self) -> str:
        return f"{self.folder}, an adapter of {self.base},"


def find_adapter(folder: Path, flag: str) -> Adapter | None:
    """The adapter in `folder`, None if there is a whole model instead.

    Raises:
        InputError: its base is not there or cannot be used, peft is not installed, or there is a
            whole model beside the adapter.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = read_json(folder / CONFIG_FILE)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    what = f"{flag} {folder}: this is an adapter ({kind}) of {base}"
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / CONFIG_FILE}: base_model_name_or_path must name the model "
                         f"that this is an adapter of, got {base!r}")  # fmt: skip
    if has_weights(folder):
        raise InputError(f"{what}, but also a whole model: move adapter_*, or the whole model's "
                         f"weights, elsewhere")  # fmt: skip
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{what}, but {WEIGHTS_FILE} is not there (other formats can run code "
                         f"and are not read)")  # fmt: skip
    if find_spec("peft") is None:
        raise InputError(f"{what}, which peft opens: pip install 'rankpo-fast[lora]'")
    try:
        base_directory = find_directory(base, "its base", weights=True)
        base_folder = backbone_folder(base_directory)
        check_config(base_folder, "its base")
        check_weights(base_folder, "its base")
    except InputError as error:
        raise InputError(f"{what}, which is needed beside it: {error}") from error
    transformer = folder / "sentence_bert_config.json"
    options = read_json(transformer).get("model_args", {}) if transformer.is_file() else {}
    quantized = options.get("quantization_config", {}).get("load_in_4bit")
    dtype = torch.bfloat16 if options.get("dtype") == "bfloat16" else torch.float32
    four_bits = dtype if quantized else None
    return Adapter(folder, base, base_directory, base_folder, four_bits)
