"""What a model directory says about turning text into a vector: read from it, written to it.

Ours       rankpo_fast.json: the fields of EncoderSettings
Theirs     the four files of sentence-transformers: modules.json (which steps, in which folders),
           1_Pooling/config.json, sentence_bert_config.json (max_seq_length) and
           config_sentence_transformers.json (prompts)
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankpo_fast.config import PAPER_MAX_PASSAGE_LENGTH, PAPER_MAX_QUERY_LENGTH
from rankpo_fast.errors import InputError

SETTINGS_FILE = "rankpo_fast.json"
STEPS_WE_TAKE = {"Transformer", "Pooling", "Normalize", "Dropout"}

# Our name of a pooling; its name in sentence-transformers; the key that switched it on before 6.
POOLINGS = [
    ("cls", "cls", "pooling_mode_cls_token"),
    ("mean", "mean", "pooling_mode_mean_tokens"),
    ("last", "lasttoken", "pooling_mode_lasttoken"),
]
PROMPTS = [("query", "query_prefix"), ("passage", "passage_prefix"), ("document", "passage_prefix")]
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


def backbone_folder(directory: Path) -> Path:
    """Where config.json, weights and tokenizer lie: `directory`, or what modules.json names."""
    for module in _modules(directory):
        if _step(module) == "Transformer":
            return _inside(directory, module)
    return directory


def read_settings(directory: Path, *, any_pooling: bool) -> dict[str, Any]:
    """The fields of EncoderSettings as `directory` gives them, or else the paper.

    Our own file goes first. The pooling is left out where no file names it.

    Args:
        any_pooling: the caller decides the pooling, so one that we do not have is no fault.

    Raises:
        InputError: a file cannot be read, or asks for steps that we do not take.
    """
    if (directory / SETTINGS_FILE).is_file():
        return _read_ours(directory / SETTINGS_FILE)
    settings: dict[str, Any] = {"query_prefix": "", "passage_prefix": ""}
    for module in _modules(directory):
        if _step(module) == "Pooling" and not any_pooling:
            settings["pooling"] = _read_pooling(_inside(directory, module) / "config.json")
        elif _step(module) not in STEPS_WE_TAKE and not any_pooling:
            raise InputError(
                f"{directory}/modules.json: the step {module['type']} is not one of ours; "
                f"give --pooling last, mean or cls to train without it"
            )
    prompts = _read_json(directory / "config_sentence_transformers.json").get("prompts") or {}
    for prompt, name in PROMPTS:
        if isinstance(prompts.get(prompt), str):
            settings[name] = prompts[prompt]
    limit = _length_limit(directory)
    settings["max_query_length"] = min(limit, PAPER_MAX_QUERY_LENGTH)
    settings["max_passage_length"] = min(limit, PAPER_MAX_PASSAGE_LENGTH)
    return settings


def write_settings(directory: Path, settings: EncoderSettings, dim: int) -> None:
    """Write our file and the four of sentence-transformers, for vectors of `dim` dims.

    They have one length limit for both kinds of text: the larger of ours.
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
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
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
    settings = _read_json(path)
    kinds = {field.name: field.type for field in fields(EncoderSettings)}
    poolings = [ours for ours, _, _ in POOLINGS]
    given = {name: type(value) for name, value in settings.items()}
    if given != kinds or settings["pooling"] not in poolings:
        wanted = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items())
        raise InputError(f"{path}: must hold {wanted}, with pooling one of "
                         f"{', '.join(poolings)}; got {settings}")  # fmt: skip
    return settings


def _read_pooling(path: Path) -> str:
    config = _read_json(path)
    modes = config.get("pooling_mode")
    if modes is None:
        keys = [key for key in config if key.startswith("pooling_mode_") and config[key]]
        known = {key: ours for ours, _, key in POOLINGS}
        modes = keys or ["pooling_mode_mean_tokens"]
    else:
        known = {theirs: ours for ours, theirs, _ in POOLINGS}
        modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in known or not config.get("include_prompt", True):
        raise InputError(
            f"{path}: this pooling is not one of ours; give --pooling last, mean or cls instead"
        )
    return known[modes[0]]


def _length_limit(directory: Path) -> float:
    """Tokens that sentence-transformers keeps; from version 6 on its tokenizer says so."""
    folder = backbone_folder(directory)
    limit = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    if limit is None and _modules(directory):
        limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    return limit if isinstance(limit, int) else math.inf


def _modules(directory: Path) -> list[dict]:
    modules = _read_json(directory / "modules.json", default=[])
    for module in modules:
        if not isinstance(module, dict) or not {"type", "path"} <= module.keys():
            raise InputError(f"{directory}/modules.json: no type and path in {module!r}")
    return modules


def _step(module: dict) -> str:
    return module["type"].rpartition(".")[2]


def _inside(directory: Path, module: dict) -> Path:
    path = Path(module["path"])
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{directory}/modules.json: {path} lies outside the directory")
    return directory / path


def _read_json(path: Path, default: Any = None) -> Any:
    """What the file holds, which must be like `default`, or that if it is missing; {} if None."""
    default = {} if default is None else default
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(content, type(default)):
        raise InputError(f"{path}: must hold a JSON {type(default).__name__}")
    return content
