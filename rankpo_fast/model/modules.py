"""What a directory of sentence-transformers asks for: honoured with equal vectors, or named.

modules.json                       which modules in which folders: we have Transformer, Pooling,
                                   Normalize and Dropout, in this order
sentence_bert_config.json          of Transformer: length limits, lower-casing
1_Pooling/config.json              how tokens become a vector
config_sentence_transformers.json  prompts, and how vectors are compared

Layouts of versions 2 to 6 are read. A Normalize may be missing: cosines are the same without.
"""

import json
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankpo_fast.errors import InputError

LIBRARY = "sentence_transformers."
OURS = ("Transformer", "Pooling", "Normalize", "Dropout")
MODEL_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILES = [
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]

# Our name of a pooling; its name in sentence-transformers; the key that switched it on before 6.
POOLINGS = [
    ("cls", "cls", "pooling_mode_cls_token"),
    ("mean", "mean", "pooling_mode_mean_tokens"),
    ("last", "lasttoken", "pooling_mode_lasttoken"),
]
# A sum over sqrt(tokens) points where the mean points, and only directions are compared.
SAME_DIRECTION = ("mean", "mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens")
# The first that is there. Their version 6 goes by the same list, but with a document "" of its own.
PASSAGE_PROMPTS = ("document", "passage", "corpus")

# Of each file: keys that are read or change no vector, and what others must hold to change none.
FREE_KEYS = {
    "transformer": {
        "max_seq_length", "do_lower_case", "query_length", "document_length", "unpad_inputs",
    },
    "pooling": {
        "word_embedding_dimension", "embedding_dimension", "pooling_mode",
        "pooling_mode_max_tokens", "pooling_mode_weightedmean_tokens",
        *(key for *_, key in (*POOLINGS, SAME_DIRECTION)),
    },
    "normalize": set(),
    "model": {"__version__", "prompts", "default_prompt_name", "similarity_fn_name"},
}  # fmt: skip
HARMLESS = {
    "transformer": {
        "transformer_task": lambda value: value == "feature-extraction",
        "modality_config": lambda value: _plain_text(**value),
        "module_output_name": lambda value: value == "token_embeddings",
        "processing_kwargs": lambda value: not {"text", "common"} & value.keys(),
        "query_expansion": lambda value: False,
        "tokenizer_name_or_path": lambda value: False,
        "backend": lambda value: value == "torch",
    },
    "pooling": {"include_prompt": lambda value: value is True},
    "normalize": {
        key: lambda value: value == "sentence_embedding"
        for key in ("module_input_name", "module_output_name")
    },
    "model": {
        "model_type": lambda value: value == "SentenceTransformer",
        "truncate_dim": lambda value: False,
    },
}
ARGUMENTS = {  # of transformers' own loading, under their names of old and new versions
    ("model_args", "model_kwargs"): {"attn_implementation", "device_map", "dtype", "torch_dtype"},
    ("config_args", "config_kwargs"): {"attn_implementation", "use_cache"},
    ("tokenizer_args", "processor_kwargs"): {"padding_side", "use_fast"},
}


def _none_but(free: set[str]) -> Callable[[Any], bool]:
    return lambda value: value.keys() <= free | {"trust_remote_code"}


HARMLESS["transformer"] |= {
    key: _none_but(free) for keys, free in ARGUMENTS.items() for key in keys
}


@dataclass(frozen=True)
class Module:
    """One entry of modules.json."""

    type: str  # as written: the path of a class
    folder: Path

    @property
    def kind(self) -> str | None:
        """Its class, if it is of the library and not somebody's own code."""
        return self.type.rpartition(".")[2] if self.type.startswith(LIBRARY) else None


def backbone_folder(directory: Path) -> Path:
    """Where config.json, weights and tokenizer lie: `directory`, or what modules.json names.

    InputError where the first module is none that has them.
    """
    modules = read_modules(directory)
    if modules and modules[0].kind != "Transformer":
        raise InputError(
            f"{directory}/modules.json: the first module is {modules[0].type}, but only "
            f"sentence-transformers' Transformer is trained and encoded with here: give the "
            f"directory of such a model, or of a plain transformers one"
        )
    return modules[0].folder if modules else directory


def read_pipeline(
    directory: Path, *, any_pooling: bool, given: Collection[str]
) -> tuple[dict[str, Any], float, float]:
    """What the files say: fields of EncoderSettings, and the most tokens of a query and a passage.

    Args:
        any_pooling: the caller decides the pooling and takes the backbone alone; what else the
            files ask for is then left out, with a warning that names it.
        given: fields that the caller sets, so that prompts have no say in them.

    Raises:
        InputError: a file cannot be read, or asks for what we do not do.
    """
    modules = read_modules(directory)
    unlike = _unlike_ours(directory, modules)
    settings = _prompts(directory, given)
    folder = backbone_folder(directory)
    path, transformer = _transformer_config(folder)
    unlike += _check_keys(path, transformer, "transformer")
    for module in modules:
        path = module.folder / "config.json"
        if module.kind == "Normalize":
            unlike += _check_keys(path, read_json(path), "normalize")
        elif module.kind == "Dropout":
            warnings.warn(f"{path.parent}: the dropout of vectors is left out in training (it "
                          f"changes none that is encoded)", stacklevel=3)  # fmt: skip
        elif module.kind == "Pooling":
            pooling, faults = _read_pooling(path)
            unlike += faults
            if pooling is not None:
                settings["pooling"] = pooling
    if unlike and not any_pooling:
        raise InputError(f"{'; '.join(unlike)}: not done here, so vectors would differ; --pooling "
                         f"last, mean or cls takes the backbone without it")  # fmt: skip
    if unlike:
        warnings.warn(f"--pooling: left out of the model: {'; '.join(unlike)}", stacklevel=2)
    settings["lower_case"] = bool(transformer.get("do_lower_case"))
    limit = _length_limit(folder, transformer, bool(modules))
    query, passage = (transformer.get(key) or limit for key in ("query_length", "document_length"))
    return settings, query, passage


def read_modules(directory: Path) -> list[Module]:
    """The entries of modules.json, none if it is missing; InputError for what leaves the place."""
    modules = []
    for entry in read_json(directory / "modules.json", default=[]):
        given = entry if isinstance(entry, dict) else {}
        kind, text = given.get("type"), given.get("path")
        if not isinstance(kind, str) or not isinstance(text, str):
            raise InputError(f"{directory}/modules.json: no type and path in {entry!r}")
        path = Path(text)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{directory}/modules.json: {path} lies outside the directory")
        modules.append(Module(kind, directory / path))
    return modules


def read_json(path: Path, default: Any = None) -> Any:
    """What the file holds, which must be like `default`, or that if it is missing; {} if None."""
    default = {} if default is None else default
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(content, type(default)):
        raise InputError(f"{path}: must hold a JSON {type(default).__name__}")
    return content


# --- what is like ours, and what is not ---


def _unlike_ours(directory: Path, modules: list[Module]) -> list[str]:
    """What no choice of settings here does, each by file and key or module."""
    path = directory / "modules.json"
    unlike = [f"{path}: the module {m.type}" for m in modules if m.kind not in OURS]
    kinds = [m.kind for m in modules if m.kind in OURS]
    rest = {"Normalize", "Dropout"}
    if modules and (kinds[1:2] not in ([], ["Pooling"]) or not rest.issuperset(kinds[2:])):
        unlike.append(f"{path}: the order {', '.join(kinds)}")
    path = directory / MODEL_FILE
    config = read_json(path)
    unlike += _check_keys(path, config, "model")
    similarity = config.get("similarity_fn_name")
    same = (None, "cosine", "dot") if "Normalize" in kinds else (None, "cosine")
    if similarity not in same:  # the product of normalised vectors is their cosine
        unlike.append(f"{path}: similarity_fn_name {similarity!r} (here it is the cosine)")
    return unlike


def _check_keys(path: Path, config: dict[str, Any], kind: str) -> list[str]:
    """Keys that make other vectors than ours would be, and unknown ones, which may.

    The library opens no Transformer and no Pooling with an unknown key, and elsewhere ignores it:
    there a warning tells.
    """
    unlike, unknown = [], []
    for key, value in config.items():
        if value in (None, {}) or key in FREE_KEYS[kind]:
            continue
        if key not in HARMLESS[kind]:
            unknown.append(key)
            continue
        try:
            harmless = HARMLESS[kind][key](value)
        except (AttributeError, KeyError, TypeError):  # not of that key's kind
            harmless = False
        if not harmless:
            unlike.append(f"{path}: {key} {value!r}")
    if unknown and kind in ("transformer", "pooling"):
        unlike.append(f"{path}: {len(unknown)} unknown keys ({', '.join(unknown)})")
    elif unknown:
        warnings.warn(f"{path}: not used, for want of knowing what they mean: {len(unknown)} keys "
                      f"({', '.join(unknown)})", stacklevel=4)  # fmt: skip
    return unlike


def _plain_text(text: dict[str, Any], message: Any = None, **others: Any) -> bool:
    """Whether texts go as they are, not through a chat template, to the last states."""
    output = text["method_output_name"]
    return message is None and text["method"] == "forward" and output == "last_hidden_state"


def _read_pooling(path: Path) -> tuple[str | None, list[str]]:
    """Our name of the pooling, or why it is none of ours."""
    if not path.is_file():
        return None, [f"{path}: modules.json names it, but it is not there"]
    config = read_json(path)
    unlike = _check_keys(path, config, "pooling")
    rows = [*POOLINGS, SAME_DIRECTION]
    modes = config.get("pooling_mode")
    if modes is None:
        on = [key for key in config if key.startswith("pooling_mode_") and config[key]]
        known = {key: ours for ours, _, key in rows}
        modes = on or ["pooling_mode_mean_tokens"]
    else:
        known = {theirs: ours for ours, theirs, _ in rows}
        modes = [modes] if isinstance(modes, str) else modes
    one = isinstance(modes, list) and len(modes) == 1 and isinstance(modes[0], str)
    if not one or modes[0] not in known:
        return None, [*unlike, f"{path}: the pooling {modes}"]
    return known[modes[0]], unlike


# --- prompts and lengths ---


def _prompts(directory: Path, given: Collection[str]) -> dict[str, Any]:
    """The prefixes of queries and passages, from the prompts of these names."""
    path = directory / MODEL_FILE
    config = read_json(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    named = isinstance(prompts, dict)
    if not named or not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"{path}: prompts must be texts by name, got {prompts!r}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise InputError(f"{path}: default_prompt_name {default!r} is none of the prompts "
                         f"({', '.join(prompts) or 'there are none'})")  # fmt: skip
    passage = next((name for name in PASSAGE_PROMPTS if name in prompts), None)
    taken = {"query": "query_prefix", passage: "passage_prefix"}
    settings = {field: prompts.get(name) or "" for name, field in taken.items()}
    if prompts.get(passage) and passage != "document" and "passage_prefix" not in given:
        warnings.warn(
            f"{path}: {prompts[passage]!r} is put before passages, being the prompt {passage!r}; "
            f"sentence-transformers, which looks for 'document', puts nothing there, and so does "
            f"--passage_prefix ''", stacklevel=4,
        )  # fmt: skip
    decided = {"query_prefix", "passage_prefix"} <= {*given}
    if default and prompts[default] and not any(settings.values()) and not decided:
        raise InputError(
            f"{path}: the default prompt {default!r} ({prompts[default]!r}) is for neither queries "
            f"nor passages: say with --query_prefix and --passage_prefix what goes before them"
        )
    left = [name for name, text in prompts.items() if text and name not in taken]
    if left:
        warnings.warn(f"{path}: {len(left)} prompts of other tasks are not used "
                      f"({', '.join(left)}); --query_prefix and --passage_prefix take any text",
                      stacklevel=3)  # fmt: skip
    return settings


def _transformer_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that says how the Transformer reads texts, under any of its names."""
    paths = [folder / name for name in TRANSFORMER_FILES]
    path = next((path for path in paths if path.is_file()), paths[0])
    config = read_json(path)
    for key in ("max_seq_length", "query_length", "document_length"):
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{path}: {key} must be a number of tokens, got {value!r}")
    lower = config.get("do_lower_case")
    if lower is not None and type(lower) is not bool:
        raise InputError(f"{path}: do_lower_case must be true or false, got {lower!r}")
    return path, config


def _length_limit(folder: Path, transformer: dict[str, Any], theirs: bool) -> float:
    """Tokens that the library keeps; from version 6 on its tokenizer says so."""
    limit = transformer.get("max_seq_length")
    if limit is None and theirs:
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return limit if isinstance(limit, int) else math.inf
