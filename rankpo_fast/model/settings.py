"""How an encoder reads text: from the files of a model directory, and into those of one of ours.

Ours       rankpo_fast.json: the fields of EncoderSettings
Theirs     the four files of sentence-transformers, which modules.py reads
"""

import json
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankpo_fast.config import PAPER_MAX_PASSAGE_LENGTH, PAPER_MAX_QUERY_LENGTH
from rankpo_fast.errors import InputError
from rankpo_fast.model.modules import MODEL_FILE, POOLINGS, read_json, read_pipeline

SETTINGS_FILE = "rankpo_fast.json"
OTHER_POOLING_KEYS = [
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
]


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder reads text."""

    pooling: str  # last, mean or cls
    query_prefix: str
    passage_prefix: str
    max_query_length: int  # tokens, special ones included
    max_passage_length: int
    lower_case: bool = False  # before tokens are made
    append_eos: bool = False  # where the tokenizer itself ends texts with nothing


def has_settings(directory: Path) -> bool:
    """Whether any file there says how text becomes a vector."""
    return any((directory / name).is_file() for name in (SETTINGS_FILE, "modules.json"))


def read_settings(
    directory: Path, *, any_pooling: bool = False, given: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of EncoderSettings as `directory` gives them, or else the paper.

    Our own file goes first. Pooling and EOS are left out where no file names them.

    Args:
        any_pooling, given: see `read_pipeline`.

    Raises:
        InputError: a file cannot be read, or asks for what we do not do.
    """
    if (directory / SETTINGS_FILE).is_file():
        return _read_ours(directory / SETTINGS_FILE)
    settings, query_length, passage_length = read_pipeline(
        directory, any_pooling=any_pooling, given=given
    )
    settings["max_query_length"] = min(query_length, PAPER_MAX_QUERY_LENGTH)
    settings["max_passage_length"] = min(passage_length, PAPER_MAX_PASSAGE_LENGTH)
    return settings


def write_settings(
    directory: Path,
    settings: EncoderSettings,
    dim: int,
    loading: dict[str, Any] | None = None,
) -> None:
    """Write our file and the four of sentence-transformers, for vectors of `dim` dims.

    Args:
        loading: arguments with which transformers is to load the weights.

    They have one length limit for both kinds of text in every version: the larger of ours.
    """
    pooling = dict.fromkeys([key for _, _, key in POOLINGS] + OTHER_POOLING_KEYS, False)
    pooling |= {key: True for ours, _, key in POOLINGS if ours == settings.pooling}
    # The names of the classes are those every version reads, old and new.
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    contents = {
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{name}",
            }
            for index, (name, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            **pooling,
            "include_prompt": True,
        },
        "sentence_bert_config.json": {
            "max_seq_length": max(settings.max_query_length, settings.max_passage_length),
            "do_lower_case": settings.lower_case,
            **({"model_args": loading} if loading else {}),
        },
        MODEL_FILE: {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        SETTINGS_FILE: asdict(settings),
    }
    for _, path in modules:
        (directory / path).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _read_ours(path: Path) -> dict[str, Any]:
    kinds: dict[str, Any] = {field.name: field.type for field in fields(EncoderSettings)}
    # A file of an earlier version lacks the fields that came later.
    later = {f.name: f.default for f in fields(EncoderSettings) if f.default is not MISSING}
    settings = later | read_json(path)
    poolings = [ours for ours, _, _ in POOLINGS]
    given = {name: type(value) for name, value in settings.items()}
    if given != kinds or settings["pooling"] not in poolings:
        wanted = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items())
        raise InputError(f"{path}: must hold {wanted}, with pooling one of "
                         f"{', '.join(poolings)}; got {settings}")  # fmt: skip
    return settings
