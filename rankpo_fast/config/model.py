"""The encoder: how it reads text, and how it is trained."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from rankpo_fast.fields import AutoOrBool, Config, check_at_least, check_names, flag

PAPER_SPECIAL_TOKENS = [
    "<keyword>", "</keyword>", "<title>", "</title>", "<abstract>", "</abstract>", "<sep>",
]  # fmt: skip
PAPER_MAX_QUERY_LENGTH = 1280  # tokens
PAPER_MAX_PASSAGE_LENGTH = 4096


def _read_newlines(config: Any, name: str) -> None:
    """Backslash and n, which quotes of shells and YAML keep as they are, become a line's end."""
    value = getattr(config, name)
    if value is not None and "\\n" in value:
        object.__setattr__(config, name, value.replace("\\n", "\n"))
        warnings.warn(f"--{name}: backslash and n in it are read as a newline", stacklevel=4)


@dataclass(frozen=True)
class EncoderConfig(Config):
    """Which encoder, and how it reads text; enough to evaluate, encode or mine with it."""

    _argument_group_name = "model"

    model_name_or_path: str = flag("Hub name or directory of the model.")
    tokenizer_name: str | None = flag("Tokenizer, if not the model's.", None)
    pooling: Literal["auto", "last", "mean", "cls"] = flag(
        "auto: as the model directory says, else last (causal models) or mean.", "auto"
    )
    attn_implementation: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen_attn",
        "sdpa", "eager",
    ] = flag("auto: the fastest here, which the start names; eager pads.", "auto")  # fmt: skip
    packing: bool = flag("Texts end to end, none padded; false: padded to similar lengths.", True)
    query_prefix: str | None = flag("Goes before every query. [as the model says]", None)
    passage_prefix: str | None = flag("Goes before every passage. [as the model says]", None)
    max_query_length: int | None = flag(
        "Tokens kept of a query. [as the model says, else 1280]", None
    )
    max_passage_length: int | None = flag(
        "Tokens kept of a passage. [as the model says, else 4096]", None
    )
    append_eos: bool | None = flag(
        "Texts end with the tokenizer's end of text. [as the model says]", None,
        nargs="?", const=True,
    )  # fmt: skip
    bf16: AutoOrBool = flag(
        "Autocast: vectors good to two digits; auto: where it is faster than fp32.", False
    )

    def check(self) -> None:
        check_names(self, "model_name_or_path", "tokenizer_name")
        for name in ("query_prefix", "passage_prefix"):
            _read_newlines(self, name)
        check_at_least(self, 1, "max_query_length", "max_passage_length")


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder to train. `special_tokens=["paper"]` becomes the paper's list."""

    bf16: AutoOrBool = flag(
        "Autocast, weights and losses stay fp32; auto: where it is faster, on a CPU as measured.",
        "auto",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "Of the saved weights; checkpoints stay fp32. auto: as the model had them.", "auto"
    )
    from_scratch: bool = flag("Random weights: only config and tokenizer are read.", False)
    special_tokens: list[str] = flag("Added to the tokenizer; paper: the paper's own.", [])
    gradient_checkpointing: AutoOrBool = flag(
        "Less memory for a third more compute; auto: where a micro-batch does not fit without.",
        "auto",
    )
    disable_dropout: bool = flag("Every dropout at 0.", False)
    torch_compile: bool = flag("Compile the layers: a slow start, then faster steps.", False)
    use_liger_kernel: bool | None = flag(
        "Liger's kernels in the model. [where installed, on a GPU]", None, nargs="?", const=True
    )

    def check(self) -> None:
        super().check()
        check_names(self, "special_tokens")
        given = self.special_tokens
        tokens = [t for g in given for t in (PAPER_SPECIAL_TOKENS if g == "paper" else [g])]
        object.__setattr__(self, "special_tokens", list(dict.fromkeys(tokens)))
