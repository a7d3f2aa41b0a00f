"""Text -> vector: a transformers backbone, its tokenizer, and the settings that join them.

S sequences, L padded length, D dims, n texts.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import MicroBatch, pack, pad, plan_padded
from rankpo_fast.data.tokens import TokenTable, tokenize
from rankpo_fast.model.pooling import pool
from rankpo_fast.model.settings import EncoderSettings, write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(nn.Module):
    """Backbone, pooling and tokenizer. Made by `load_encoder`; its vectors are not normalised.

    The weights are fp32; with `bf16` the forward pass computes in bf16 by autocast.
    """

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
        self._takes_positions = _takes_positions(backbone)

    @property
    def dim(self) -> int:
        """Dims of a vector."""
        return self.backbone.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, batch: MicroBatch) -> Tensor:
        """Vectors [S, D] fp32, not normalised."""
        input_ids, attention_mask = pad(to_device(batch, self.device), self.tokenizer.pad_token_id)
        positions = {}
        if self._takes_positions:
            positions["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **positions)
        return pool(output.last_hidden_state, attention_mask, self.settings.pooling)

    def plan(self, lengths: Tensor, max_tokens: int) -> list[Tensor]:
        """Split texts of `lengths` [n] into groups that go through the backbone at once."""
        return plan_padded(lengths, max_tokens)

    def embed(
        self, table: TokenTable, text_ids: Tensor | None = None, *, max_tokens: int
    ) -> Tensor:
        """Vectors [n, D] fp32 in the order asked for, with their graph if grad is enabled.

        Args:
            table: tokenised texts.
            text_ids: [n] which of them; None for all.
            max_tokens: tokens, padding included, that go through the backbone at once.

        Raises:
            InputError: a text alone has more than max_tokens tokens.
        """
        if text_ids is None:
            text_ids = torch.arange(len(table))
        if len(text_ids) == 0:
            return torch.zeros(0, self.dim, dtype=torch.float32, device=self.device)
        batches = self.plan(table.lengths[text_ids], max_tokens)
        vectors = torch.cat([self(pack(table, text_ids[batch])) for batch in batches])
        order = torch.cat(batches).argsort().to(vectors.device)
        return vectors[order]

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

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load_encoder`, transformers and sentence-transformers load.

        OSError (no space, no permission) passes through; other files there are left alone.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(directory)
        if self.tokenizer.is_fast:  # else the limit of the last call would be saved as its own
            self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.save_pretrained(directory)
        write_settings(directory, self.settings, self.dim)


def position_padding(backbone: nn.Module) -> int | None:
    """The padding row of the table of positions; RoBERTa's family has one and counts on from it."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            return module.padding_idx
    return None


def _takes_positions(backbone: nn.Module) -> bool:
    """Whether to say where each token stands; backbones with a padding row see that themselves."""
    takes = "position_ids" in inspect.signature(backbone.forward).parameters
    return takes and position_padding(backbone) is None
