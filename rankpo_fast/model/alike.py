"""Whether the weights of models mean the same: their configs, tokenizers and poolings.

Differences that change no vector, or that only training reads, are let pass.
"""

import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.errors import InputError
from rankpo_fast.model.backbone_config import load_config
from rankpo_fast.model.directories import blaming, check_no_code, has_tokenizer
from rankpo_fast.model.settings import has_settings, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = tuple[str, Path, Path]  # as given, its directory, and that of config.json in it
READING = ("pooling", "lower_case", "append_eos")  # fields of EncoderSettings
# Of config.json: where it came from, what training or generating reads, the heads of other tasks,
# and how a decoder sees (as trained with --bidirectional: that of the tuned model counts).
FREE = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "is_causal", "tie_word_embeddings", "initializer_range", "id2label", "label2id",
    "problem_type", "task_specific_params", "pretraining_tp", "gradient_checkpointing",
    "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation",
    "quantization_config",
}  # fmt: skip


def check_alike(places: list[Place]) -> None:
    """InputError where one differs from the first in what its weights mean, naming that."""
    first, *others = places
    for place in others:
        if place[1] != first[1]:
            _check_configs(first, place)
            _check_tokenizers(first, place)
            _check_reading(first, place)


def _check_configs(first: Place, other: Place) -> None:
    ours, theirs = (_decisive(folder) for _, _, folder in (first, other))
    for key in sorted(ours.keys() | theirs.keys(), key=lambda key: (key != "model_type", key)):
        if ours.get(key) != theirs.get(key):
            raise InputError(_differ(first, other, f"{key} of config.json", ours.get(key),
                                     theirs.get(key)))  # fmt: skip


def _decisive(folder: Path) -> dict[str, Any]:
    config = load_config(folder).to_dict()
    free = {key for key in config if key in FREE or "drop" in key or key.endswith("token_id")}
    return {key: value for key, value in config.items() if key not in free}


def _check_tokenizers(first: Place, other: Place) -> None:
    for given, _, folder in (first, other):
        if not has_tokenizer(folder):
            raise InputError(f"{given}: no tokenizer there, so that what its weights are of is not "
                             f"known")  # fmt: skip
    ours, theirs = (_tokenizer(place) for place in (first, other))
    vocabularies = [_by_id(tokenizer) for tokenizer in (ours, theirs)]
    for number, (one, two) in enumerate(zip_longest(*vocabularies)):
        if one != two:
            raise InputError(_differ(first, other, f"token {number}", one, two))
    for part in ("model", "pre_tokenizer"):
        if _part(ours, part) != _part(theirs, part):
            raise InputError(f"{first[0]} and {other[0]} differ in their tokenizers ({part} of "
                             f"tokenizer.json)")  # fmt: skip


def _tokenizer(place: Place) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    given, _, folder = place
    check_no_code(folder / "tokenizer_config.json", "AutoTokenizer", given)
    with blaming(f"{given}: no tokenizer can be loaded from there"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _by_id(tokenizer: "PreTrainedTokenizerBase") -> list[str | None]:
    tokens: list[str | None] = [None] * (1 + max(tokenizer.get_vocab().values()))
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
    return tokens


def _part(tokenizer: "PreTrainedTokenizerBase", name: str) -> Any:
    """Of how texts are cut; None where that is not told."""
    return json.loads(tokenizer.backend_tokenizer.to_str())[name] if tokenizer.is_fast else None


def _check_reading(first: Place, other: Place) -> None:
    if not all(has_settings(directory) for _, directory, _ in (first, other)):
        return
    ours, theirs = (read_settings(directory) for _, directory, _ in (first, other))
    for key in READING:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise InputError(_differ(first, other, key, ours[key], theirs[key]))


def _differ(first: Place, other: Place, what: str, ours: Any, theirs: Any) -> str:
    return f"models differ in {what}: {ours!r} in {first[0]}, {theirs!r} in {other[0]}"
