"""Text -> vector: a transformers backbone, its tokenizer, and the settings that join them.

S texts of a micro-batch, T tokens of all of them, L of the longest; D dims, n texts of a table.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rankpo_fast.data.files import disk_errors, hash_tensors, open_to_umask
from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import (
    MicroBatch,
    default_budget,
    pack,
    pad,
    plan_packed,
    plan_padded,
)
from rankpo_fast.data.tokens import TokenTable, tokenize
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import Kernel, packed_arguments, register
from rankpo_fast.model.layers import Layers
from rankpo_fast.model.lora import (
    FOLDER,
    Lora,
    has_other_layers,
    model_args,
    plain_skeleton,
    save_adapter,
    whole_weights,
)
from rankpo_fast.model.pooling import pool
from rankpo_fast.model.settings import EncoderSettings, write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(nn.Module):
    """Backbone, pooling and tokenizer. Made by `load_encoder`; its vectors are not normalised.

    The weights are fp32, or as --weights_dtype says; with `bf16` the forward pass computes in bf16
    by autocast.

    Attributes:
        packed: whether texts go through the backbone end to end, without padding.
        attention: what computes its attention, by the name that --attn_implementation has for it.
        save_dtype: of the floating-point weights that `save` writes.
        log_scale: log(1 / temperature) while a training learns it, else None; `save` leaves it out.
        layers: the backbone's, to be checkpointed or compiled.
        lora: of an adapter in training, else None.
        name: of the model it was loaded from.
        trimmed: what --trim_vocabulary has left of its tokens, in words; empty: all.
        waiting: what of its loading waits for `on_device`, if anything.
        origins: the directories it was loaded from, its own before that of an adapter's base; none
            for one that was made otherwise.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: EncoderSettings,
        *,
        bf16: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.bf16 = bf16
        self.save_dtype = torch.float32
        self.layers = Layers(backbone)
        self.name = "an encoder in memory"
        self.trimmed = ""
        self.waiting: Callable[[], None] | None = None
        self.origins: list[Path] = []
        self.lora: Lora | None = None
        self.register_parameter("log_scale", None)
        self.packed = False
        self.attention = self._own_attention = backbone.config._attn_implementation
        self._first_position = first_position(backbone)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | Path, **settings: Any) -> "Encoder":
        """Load an encoder to encode, search, mine and evaluate with, or to go on training.

        Args:
            model_name_or_path: on the Hugging Face hub, or a directory.
            settings: fields of `rankpo_fast.config.EncoderConfig`, `pooling="mean"` say, and
                `device`, by default "auto".

        Raises:
            InputError: there is no such model, or the settings do not go with it.
        """
        from rankpo_fast.config import ComputeConfig, EncoderConfig
        from rankpo_fast.model.load import load_encoder
        from rankpo_fast.settings import gathered

        compute = {"device": settings.pop("device", "auto")}
        own = {"model_name_or_path": model_name_or_path, **settings}
        [config] = gathered("Encoder.from_pretrained", [EncoderConfig], [], own)
        return load_encoder(config, device=ComputeConfig(**compute).torch_device())

    def use_kernel(self, kernel: Kernel | None) -> None:
        """Pack texts and let `kernel` attend; None: pad them, for the backbone's own attention.

        ImportError, OSError: what the kernel is installed from does not load.
        """
        name = self._own_attention if kernel is None else register(kernel)
        self.backbone.set_attn_implementation(name)
        self.packed = kernel is not None
        self.attention = name if kernel is None else kernel.name

    def on_device(self) -> None:
        """Its weights are where they compute: finish its loading, which tries it out.

        InputError: packed texts get other states, or its layers cannot be as asked for.
        """
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting()

    @property
    def dim(self) -> int:
        """Dims of a vector."""
        return self.backbone.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, batch: MicroBatch) -> Tensor:
        """Vectors [S, D] fp32 of the texts, not normalised; the batch may be on another device."""
        batch = to_device(batch, self.device)
        return pool(self.states(batch), batch.offsets, self.settings.pooling)

    def states(self, batch: MicroBatch) -> Tensor:
        """The backbone's last states of all tokens of a batch on its device, [T, D]."""
        forward = self._packed_states if self.packed else self._padded_states
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast, self.layers.offloading():
            return forward(batch)

    def _packed_states(self, batch: MicroBatch) -> Tensor:
        output = self.backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids + self._first_position,
            attention_mask=None,
            use_cache=False,
            **packed_arguments(batch),
        )
        return output.last_hidden_state[0]

    def _padded_states(self, batch: MicroBatch) -> Tensor:
        input_ids, mask = pad(batch, self.tokenizer.pad_token_id)
        output = self.backbone(input_ids=input_ids, attention_mask=mask)
        texts = torch.arange(len(batch.lengths), device=self.device)
        tokens = batch.input_ids.shape[1]  # known here, so that nobody has to ask the device
        rows = texts.repeat_interleave(batch.offsets.diff(), output_size=tokens)  # [T]
        places = rows * input_ids.shape[1] + batch.position_ids[0]
        return output.last_hidden_state.flatten(0, 1).index_select(0, places)

    def plan(self, lengths: Tensor, max_tokens: int | None) -> list[Tensor]:
        """Texts of `lengths` [n] -> the texts [S] of each micro-batch of at most max_tokens.

        The longest text is in the first. Padding counts where there is any. None: as many tokens
        as suit the device, or the longest text if that is more.

        Raises:
            InputError: a text alone has more than max_tokens tokens.
        """
        if max_tokens is None:
            max_tokens = default_budget(lengths, self.device.type)
        return (plan_packed if self.packed else plan_padded)(lengths, max_tokens)

    def embed(
        self, table: TokenTable, text_ids: Tensor | None = None, *, max_tokens: int | None
    ) -> Tensor:
        """Vectors [n, D] fp32 in the order asked for, with their graph if grad is enabled.

        Args:
            table: tokenised texts.
            text_ids: [n] which of them; None for all.
            max_tokens: tokens, padding included, that go through the backbone at once; None: as
                many as suit the device, or the longest text if that is more.

        Raises:
            InputError: a text alone has more than max_tokens tokens.
        """
        if text_ids is None:
            text_ids = torch.arange(len(table))
        if len(text_ids) == 0:
            return torch.zeros(0, self.dim, dtype=torch.float32, device=self.device)
        groups = self.plan(table.lengths[text_ids], max_tokens)
        vectors = torch.cat([self(pack(table, text_ids[group])) for group in groups])
        order = torch.cat(groups).argsort().to(vectors.device)
        return vectors[order]

    def encode(
        self,
        texts: str | Sequence[str],
        role: Literal["query", "passage"] = "passage",
        *,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Vectors of length 1, for search: [n, D] fp32 on the CPU, [D] of a single text.

        Args:
            texts: n of them. An empty one has a vector of zeros.
            role: decides prefix and length limit.
            max_tokens: tokens, padding included, that go through the backbone at once; None: as
                many as suit the device.
            progress: show a bar.

        Raises:
            InputError: a text is none, or alone has more than max_tokens tokens.
            NotFiniteVectors: the vector of a text holds NaN or inf.
        """
        from rankpo_fast.model.encode import encode_texts

        if isinstance(texts, str):
            return self.encode([texts], role, max_tokens=max_tokens, progress=progress)[0]
        texts = list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{number}] must be text, got {text!r:.60}", "texts")
        roles = {"query": self.tokenize_queries, "passage": self.tokenize_passages}
        if role not in roles:
            raise InputError(f"role must be query or passage, got {role!r}", "role")
        vectors = torch.zeros(len(texts), self.dim)
        full = [number for number, text in enumerate(texts) if text.strip()]
        if full:
            own = [texts[i] for i in full]
            vectors[full] = encode_texts(
                self, roles[role](own), max_tokens=max_tokens, texts=own,
                progress="encoding" if progress else None,
            )  # fmt: skip
        return vectors

    def tokenize_queries(
        self, texts: Sequence[str], cache_dir: str | Path | None = None
    ) -> TokenTable:
        """Prefix, tokenise and cut queries as the settings say."""
        return tokenize(
            texts,
            self.tokenizer,
            self.settings.max_query_length,
            prefix=self.settings.query_prefix,
            cache_dir=cache_dir,
        )

    def tokenize_passages(
        self, texts: Sequence[str], cache_dir: str | Path | None = None
    ) -> TokenTable:
        """Prefix, tokenise and cut passages as the settings say."""
        return tokenize(
            texts,
            self.tokenizer,
            self.settings.max_passage_length,
            prefix=self.settings.passage_prefix,
            cache_dir=cache_dir,
        )

    def digest(self) -> str:
        """Hex digits that differ where vectors may: of the weights, the settings and the precision,
        not of the tokenizer."""
        digest = hashlib.sha256(f"{self.settings} bf16={self.bf16}".encode())
        hash_tensors(digest, self.backbone.state_dict().items())
        return digest.hexdigest()[:16]

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load_encoder`, transformers and sentence-transformers load; of an
        adapter in training the whole model, and the adapter alone in adapter/, which they load too.

        In bf16 or fp16 (`save_dtype`) weights are rounded: vectors of what is loaded again differ
        from those of this encoder by that, 2^-9 or 2^-12 of each weight.

        OSError (no space, no permission) passes through; other files there are left alone.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with disk_errors(directory):
            save_backbone(self.backbone, directory, self.save_dtype)
            self._save_reading(directory)
            if self.lora is not None and self.lora.base is not None:
                adapter = directory / FOLDER
                save_adapter(self.backbone, adapter, self.lora)
                self._save_reading(adapter, model_args(self.lora))
                open_to_umask(adapter)

    def _save_reading(self, directory: Path, loading: dict[str, Any] | None = None) -> None:
        """The tokenizer, and what tells others how text becomes a vector."""
        if self.tokenizer.is_fast:  # else what the last call asked for would be saved as its own
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(directory)
        write_settings(directory, self.settings, self.dim, loading)


def save_backbone(backbone: "PreTrainedModel", directory: Path, dtype: torch.dtype) -> None:
    """Write config.json, which names the dtype, and the weights rounded to it.

    Where fp16 cannot hold a weight all stay fp32, with a warning.
    """
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in whole_weights(backbone).items()
    }
    if dtype == torch.float16 and not all(w.isfinite().all() for w in weights.values()):
        warnings.warn(
            "--save_dtype float16 cannot hold the weights: saved in float32", stacklevel=3
        )
        return save_backbone(backbone, directory, torch.float32)
    plain = plain_skeleton(backbone) if has_other_layers(backbone) else backbone
    plain.save_pretrained(directory, state_dict=weights)
    config = copy.deepcopy(plain.config)
    config.dtype = dtype
    config.save_pretrained(directory)
    open_to_umask(directory)


def first_position(backbone: nn.Module) -> int:
    """The number of a text's first position: RoBERTa's family counts on from a padding row."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
