"""The tokenizer of a model: padded on the right, with a padding token, ending texts as asked.

What is changed is changed in the tokenizer itself, so that whoever loads what we save gets the same
token ids.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import MODEL_FLAG, blaming, check_no_code, find_directory
from rankpo_fast.model.modules import backbone_folder, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FLAG = "--tokenizer_name"
PAD_TOKENS = ["<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"]


def load_tokenizer(
    config: EncoderConfig, folder: Path, backbone_config: "PreTrainedConfig"
) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, or that of --tokenizer_name, with a token to pad with."""
    from transformers import AutoTokenizer

    flag = tokenizer_flag(config)
    if config.tokenizer_name is not None:
        folder = backbone_folder(find_directory(config.tokenizer_name, flag, weights=False))
    check_no_code(folder / "tokenizer_config.json", "AutoTokenizer", flag)
    with blaming(f"{flag} {folder}: no tokenizer can be loaded from there"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Positions then start at 0 in every library and for every backbone that loads what we save.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _pad_token(tokenizer, backbone_config, f"{flag} {folder}")
    return tokenizer


def tokenizer_flag(config: EncoderConfig) -> str:
    """The flag that the tokenizer comes by."""
    return MODEL_FLAG if config.tokenizer_name is None else TOKENIZER_FLAG


def add_special_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: list[str]) -> None:
    tokenizer.add_special_tokens(
        {"extra_special_tokens": tokens}, replace_extra_special_tokens=False
    )


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", backbone: "PreTrainedModel", flag: str
) -> None:
    """InputError if the tokenizer, which came by `flag`, has ids that the backbone does not."""
    size, rows = vocabulary_size(tokenizer), embedding_rows(backbone)
    if size > rows:
        raise InputError(f"{flag} {tokenizer.name_or_path}: the tokenizer has {size} tokens, but "
                         f"the model has embeddings for {rows}")  # fmt: skip


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    return max(tokenizer.get_vocab().values()) + 1


def embedding_rows(backbone: "PreTrainedModel") -> int:
    """How many tokens it has embeddings for."""
    return cast(nn.Embedding, backbone.get_input_embeddings()).num_embeddings


def _pad_token(
    tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", source: str
) -> str:
    """A token kept for padding if there is one, else the end of text; the mask hides it anyway."""
    vocabulary = tokenizer.get_vocab()
    by_id: dict[int | None, str] = {index: token for token, index in vocabulary.items()}
    from_config = by_id.get(getattr(config.get_text_config(), "pad_token_id", None))
    candidates = [from_config, *PAD_TOKENS, tokenizer.eos_token, tokenizer.unk_token]
    for token in candidates:
        if token in vocabulary:
            return token
    raise InputError(f"{source}: no token to pad with (no pad, end or unknown)")


# --- lower case, and the end of a text ---


def lower_cased(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer with a first step that makes texts lower-case; itself if it has one.

    As in sentence-transformers, tokens that were added by name are found before that step.
    """
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path}: do_lower_case needs a tokenizer.json, which "
                         f"is not there; --tokenizer_name takes that of another model")  # fmt: skip
    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    steps = [*cast(Iterable, own)] if isinstance(own, Sequence) else [] if own is None else [own]
    if any(isinstance(step, Lowercase) for step in steps):
        return tokenizer
    backend.normalizer = Sequence([Lowercase(), *steps])
    return rebuilt(tokenizer, backend)


def rebuilt(
    tokenizer: "PreTrainedTokenizerBase", backend: "Tokenizer"
) -> "PreTrainedTokenizerBase":
    """The tokenizer with `backend` in the place of its own."""
    from transformers import PreTrainedTokenizerFast

    # Classes of a model family build the steps they are used to and forget those of the file.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        **{name: getattr(tokenizer, name) for name in ("name_or_path", "model_max_length",
                                                       "padding_side", "truncation_side",
                                                       "model_input_names", "chat_template")},
    )  # fmt: skip


def says_append_eos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether tokenizer_config.json wants an EOS. transformers 4 obeyed; 5 leaves all to
    tokenizer.json, which may know nothing of it.

    A BOS that is wanted and not put there is warned of: texts were embedded without it since.
    """
    path = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    config, bos = read_json(path), tokenizer.bos_token_id
    if config.get("add_bos_token") is True and tokenizer("a")["input_ids"][:1] != [bos]:
        warnings.warn(f"{path}: add_bos_token is not obeyed by the tokenizer, here as in "
                      f"transformers 5: texts begin without {tokenizer.bos_token}; tokenizer.json "
                      f"would have to put it there", stacklevel=4)  # fmt: skip
    return config.get("add_eos_token") is True


def append_eos(tokenizer: "PreTrainedTokenizerBase", *, asked: bool) -> None:
    """Let the tokenizer end every text with its EOS, cut ones too; a text that it ends with any
    token of its own stays as it is. Said where the user has not `asked` for it."""
    from tokenizers.processors import Sequence, TemplateProcessing

    bare, ids = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    if ids[-len(bare) :] != bare:
        [end] = list(tokenizer.convert_ids_to_tokens(ids[-1:]))
        if end != tokenizer.eos_token:
            warnings.warn(f"--append_eos: nothing is appended, since the tokenizer ends texts with "
                          f"{end} already", stacklevel=3)  # fmt: skip
        return
    eos = tokenizer.eos_token
    if eos is None or not tokenizer.is_fast:
        lacks = "no EOS token" if eos is None else "no tokenizer.json"
        raise InputError(f"--append_eos true: the tokenizer {tokenizer.name_or_path} has {lacks}; "
                         f"--tokenizer_name takes that of another model")  # fmt: skip
    if not asked:
        warnings.warn(f"{tokenizer.name_or_path}: texts end with {eos}, as files there ask for "
                      f"(add_eos_token); transformers 5 and sentence-transformers leave it out, "
                      f"and so does --append_eos false", stacklevel=3)  # fmt: skip
    backend = tokenizer.backend_tokenizer
    ending = TemplateProcessing(
        single=f"$A {eos}", pair=f"$A $B {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    own = backend.post_processor
    backend.post_processor = ending if own is None else Sequence([own, ending])
