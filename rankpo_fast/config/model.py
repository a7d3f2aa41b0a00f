"""The encoder: how it reads text, and how it is trained."""

import os
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import (
    AutoOrBool,
    Config,
    check_above,
    check_at_least,
    check_names,
    flag,
    require,
)

PAPER_SPECIAL_TOKENS = [
    "<keyword>", "</keyword>", "<title>", "</title>", "<abstract>", "</abstract>", "<sep>",
]  # fmt: skip
COMMIT = re.compile("[0-9a-f]{40}")
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
    revision: str | None = flag(
        "Commit of the model's hub repository, in full, or of the code of a directory.", None
    )
    trust_remote_code: bool = flag(
        "Run the code of the hub repository at --revision, which can do all that you can: read it "
        "first. Code in directories never runs.", False,
    )  # fmt: skip
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
        check_names(self, "model_name_or_path", "tokenizer_name", "revision")
        self._check_revision()
        for name in ("query_prefix", "passage_prefix"):
            _read_newlines(self, name)
        check_at_least(self, 1, "max_query_length", "max_passage_length")

    def _check_revision(self) -> None:
        """A hub name gets it behind an @, so that whoever reads files of it reads those."""
        if self.trust_remote_code and self.revision is None:
            raise InputError("--trust_remote_code needs --revision, the commit whose code you have "
                             "read")  # fmt: skip
        if self.revision is None or self.model_name_or_path is None:
            return
        require(self, "revision", "a commit, 40 digits of 0-9 and a-f",
                COMMIT.fullmatch(self.revision) is not None)  # fmt: skip
        if os.path.isdir(os.path.expanduser(self.model_name_or_path)):
            if not self.trust_remote_code:
                raise InputError(f"--revision is of a hub repository, but {self.model_name_or_path}"
                                 f" is a directory")  # fmt: skip
        elif "@" not in self.model_name_or_path:
            name = f"{self.model_name_or_path}@{self.revision}"
            object.__setattr__(self, "model_name_or_path", name)
        elif not self.model_name_or_path.endswith(f"@{self.revision}"):
            raise InputError(f"--revision {self.revision}: {self.model_name_or_path} names another "
                             f"one")  # fmt: skip


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
    weights_dtype: Literal["fp32", "bf16", "nf4"] = flag(
        "Of the weights while they train. bf16: updates are rounded at random, right on average; "
        "nf4: 4 bits each, which stay as they are, for --lora_rank.", "fp32",
    )  # fmt: skip
    lora_rank: int | None = flag(
        "Train an adapter of this rank instead of the weights (LoRA). [the weights]", None
    )
    lora_alpha: float | None = flag("The adapter counts alpha / rank times. [2 ranks]", None)
    lora_dropout: float = flag("Of what goes into the adapter.", 0.0)
    lora_targets: list[str] = flag(
        "Layers that get an adapter: all-linear, or ends of their names, as q_proj v_proj.",
        ["all-linear"],
    )
    lora_init: Literal["default", "gaussian", "orthogonal"] = flag(
        "How an adapter starts; none changes the model at first, but orthogonal.", "default"
    )
    lora_dora: bool = flag("Train the lengths of weights beside it (DoRA).", False)
    lora_modules_to_save: list[str] = flag(
        "Layers that are trained whole beside the adapter, by the ends of their names.", []
    )
    freeze_embeddings: bool = flag("The embeddings of tokens and positions stay.", False)
    freeze_layers: int = flag("So many of the first layers stay, the embeddings too.", 0)
    layers: int | None = flag("Of the model's layers the first ones, the others go. [all]", None)
    trim_vocabulary: bool = flag("Drop tokens that no text of the run has.", False)
    bidirectional: bool = flag("Tokens of a causal model see those after them too.", False)
    gradient_checkpointing: bool | Literal["auto", "selective"] = flag(
        "Less memory for a third more compute; selective: products are kept, the rest computed "
        "again; auto: the least with which a micro-batch fits.",
        "auto",
    )
    mlp_chunk: int | None = flag(
        "Tokens that go through a feed-forward layer at once, which is computed again for the "
        "backward pass: less memory where texts are long. [all]", None, metavar="TOKENS",
    )  # fmt: skip
    float8: bool = flag("Products in 8 bits, on GPUs that have them (torchao).", False)
    disable_dropout: bool = flag("Every dropout at 0.", False)
    torch_compile: bool | None = flag(
        "Compile the layers: a slow start, then faster steps. [false; --auto: as the plan finds]",
        None, nargs="?", const=True,
    )  # fmt: skip
    use_liger_kernel: bool | None = flag(
        "Liger's kernels in the model. [where installed, on a GPU]", None, nargs="?", const=True
    )

    def check(self) -> None:
        super().check()
        check_names(self, "special_tokens", "lora_targets", "lora_modules_to_save")
        check_at_least(self, 1, "lora_rank", "layers", "mlp_chunk")
        check_at_least(self, 0, "freeze_layers")
        self._check_activations()
        if self.lora_alpha is not None:
            check_above(self, 0, "lora_alpha")
        require(self, "lora_dropout", "in [0, 1)", 0 <= self.lora_dropout < 1)
        self._check_levers()
        given = self.special_tokens
        tokens = [t for g in given for t in (PAPER_SPECIAL_TOKENS if g == "paper" else [g])]
        object.__setattr__(self, "special_tokens", list(dict.fromkeys(tokens)))

    def _check_levers(self) -> None:
        """InputError for two that do not go together, with the reason."""
        given = self.changed()
        of_lora = [name for name in given if name.startswith("lora_") and name != "lora_rank"]
        if self.lora_rank is None and of_lora:
            raise InputError(f"--{of_lora[0]} needs --lora_rank, which switches adapters on")
        excluded = [
            ("lora_rank", "from_scratch", "random weights would never be trained"),
            ("lora_rank", "freeze_layers", "with adapters no weight is trained: leave it out"),
            ("lora_rank", "freeze_embeddings", "with adapters no weight is trained: leave it out"),
            ("lora_rank", "float8", "8-bit products are for weights that are trained"),
            ("from_scratch", "freeze_layers", "random weights would never be trained"),
            ("from_scratch", "freeze_embeddings", "random weights would never be trained"),
        ]
        for one, other, why in excluded:
            if one in given and other in given:
                raise InputError(f"--{one} and --{other} do not go together: {why}")
        if self.weights_dtype == "nf4" and self.lora_rank is None:
            raise InputError(
                "--weights_dtype nf4 needs --lora_rank: weights of 4 bits stay as they are, an "
                "adapter beside them is trained"
            )
        if self.bf16 is False and (self.weights_dtype == "bf16" or self.float8):
            lever = "--float8" if self.float8 else "--weights_dtype bf16"
            raise InputError(f"{lever} needs --bf16 true (or auto): it computes in bf16")

    def _check_activations(self) -> None:
        """InputError for two that take away what the other is there for."""
        selective = self.gradient_checkpointing == "selective"
        if selective and self.mlp_chunk is not None:
            raise InputError("--gradient_checkpointing selective keeps the products that "
                             "--mlp_chunk is there to spare: give --gradient_checkpointing true, "
                             "or no --mlp_chunk")  # fmt: skip
        if self.torch_compile is True and selective:
            raise InputError("--torch_compile: compiled layers do not show the products that "
                             "--gradient_checkpointing selective keeps: give "
                             "--gradient_checkpointing true, or no --torch_compile")  # fmt: skip
        if self.torch_compile is True and self.mlp_chunk is not None:
            raise InputError("--torch_compile and --mlp_chunk exclude each other: layers would be "
                             "compiled for each number of chunks; give one of them")  # fmt: skip
