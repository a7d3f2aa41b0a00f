"""The vocabulary trimmed to the tokens that the texts of a run have, for a smaller embedding.

V tokens before, K after, D dims: the embedding [V, D] becomes embedding[old] with `old` [K].

Exactly those texts keep exactly their tokens, since whatever their tokenisation passes through is
kept too, and tokens that are gone offer no way that was not there before:
* BPE: merges only join what becomes part of a token of the text, so with each token all that merges
  make it of. Of the merges that a text offers, the one that goes first is then still there.
* WordPiece takes the longest token that fits, which is kept, and none becomes longer.
* Unigram takes the likeliest sequence, which is kept, and none becomes likelier. The price of an
  unknown character follows from the rarest token, so that one is kept.
Single characters and bytes are always kept: other texts get more tokens, not unknown ones.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import blaming
from rankpo_fast.model.encoder import Encoder, first_position
from rankpo_fast.model.texts import check_lengths
from rankpo_fast.model.tokenizer import embedding_rows, rebuilt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLAG = "--trim_vocabulary"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
COMPARED = 1024  # texts of each role, before and after: a tokenizer's class may have its own ways

Json = dict[str, Any]
Token = tuple[str, int]  # and its id


@dataclass(frozen=True)
class Trimmed:
    """What is left of a vocabulary."""

    kept: int  # tokens
    of: int
    parameters: int  # fewer

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.of:,} tokens are kept, the model has {self.parameters:,} "
            f"parameters less; texts that are not of this run get more tokens"
        )


def trim_vocabulary(
    encoder: Encoder,
    queries: Sequence[str],
    passages: Sequence[str],
    cache_dir: str | Path | None = None,
) -> Trimmed:
    """Leave the encoder, in place, no more tokens than these texts and the tokenizer itself need.

    Their vectors stay the same, in bits. What is kept follows from texts, settings and tokenizer
    alone, not from the order of the texts.

    Raises:
        InputError: a tokenizer or a model of which not every part that has a row or an id for each
            token is known.
    """
    check_lengths(encoder)
    backbone, tokenizer = encoder.backbone, encoder.tokenizer
    rows = embedding_rows(backbone)
    _check_tables(backbone, rows)
    saved = _read(tokenizer)
    tables = [
        encoder.tokenize_queries(queries, cache_dir),
        encoder.tokenize_passages(passages, cache_dir),
    ]
    # RoBERTa's family counts positions on from the padding token's id, which must stay what it is.
    first = first_position(backbone)
    named = {*tokenizer.all_special_ids, *_config_ids(backbone), *range(first)}
    smaller, old = trimmed_json(saved, _found(tables, rows), named)
    if old[:first] != [*range(first)]:
        raise InputError(f"{FLAG}: this model counts positions from the id of its padding token, "
                         f"{first - 1}, which would change")  # fmt: skip
    encoder.tokenizer = _tokenizer(tokenizer, smaller)
    _keep_rows(backbone, old)
    _compare(encoder, queries, passages, tables, old)
    width = cast(nn.Embedding, backbone.get_input_embeddings()).embedding_dim
    return Trimmed(len(old), rows, (rows - len(old)) * width)


def _found(tables: Sequence[TokenTable], rows: int) -> set[int]:
    """The ids in the tables."""
    counts = torch.zeros(rows, dtype=torch.int64)
    for table in tables:
        counts += torch.bincount(table.ids, minlength=rows)
    return {*counts.nonzero().flatten().tolist()}


def trimmed_json(
    saved: Json, found: Collection[int], named: Collection[int]
) -> tuple[Json, list[int]]:
    """A tokenizer.json with fewer tokens.

    Args:
        found: ids that the texts have, which keep their tokens.
        named: ids that are kept beside them.

    Returns:
        It, and the earlier id of each of its K tokens.
    """
    model = saved["model"]
    added: list[Token] = [(token["content"], token["id"]) for token in saved["added_tokens"]]
    vocabulary = _vocabulary(model)
    needed_ids = {*found, *named, *(id for _, id in added), *_ids(saved["post_processor"])}
    if saved["padding"] is not None:
        needed_ids.add(saved["padding"]["pad_id"])
    needed = {token for token, id in vocabulary if id in needed_ids}
    kept = KINDS[model["type"]](model, needed)
    if model["type"] == "WordPiece" and model["vocab"].get(model["unk_token"]) in found:
        _check_unknown(model, kept - {token for token, _ in added})
    tokens = sorted((id, token) for token, id in vocabulary if token in kept)
    # Ids of the model's own tokens have no gaps; those that it does not know come behind them.
    known = {token for token, _ in vocabulary}
    behind = sorted(id for token, id in added if token not in known)
    old = [*(id for id, _ in tokens), *behind]
    new = {id: place for place, id in enumerate(old)}
    return {
        **saved,
        "model": _model(model, tokens, new),
        "added_tokens": [{**token, "id": new[token["id"]]} for token in saved["added_tokens"]],
        "post_processor": _with_ids(saved["post_processor"], new.__getitem__),
        "padding": saved["padding"]
        and {**saved["padding"], "pad_id": new[saved["padding"]["pad_id"]]},
    }, old


# --- which tokens: the tokenizer's model and the tokens that are needed -> those to keep ---


def _bpe(model: Json, needed: set[str]) -> set[str]:
    prefix, suffix = _affixes(model)
    single = {
        token
        for token in model["vocab"]
        if len(token.removeprefix(prefix).removesuffix(suffix)) == 1 or BYTE.fullmatch(token)
    }
    kept = needed | single | _unknown(model)
    made_of: dict[str, list[tuple[str, str]]] = {}
    for left, right in model["merges"]:
        made_of.setdefault(_joined(left, right, prefix), []).append((left, right))
    waiting = [*kept]
    while waiting:
        for part in {part for parts in made_of.get(waiting.pop(), ()) for part in parts} - kept:
            kept.add(part)
            waiting.append(part)
    return kept


def _word_piece(model: Json, needed: set[str]) -> set[str]:
    prefix = model["continuing_subword_prefix"]
    single = {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1}
    return needed | single | _unknown(model)


def _check_unknown(model: Json, kept: set[str]) -> None:
    """InputError where a word of the texts that is unknown might not stay so.

    It is unknown since a character of it fits nowhere. A token that holds one which is no token by
    itself could let a shorter beginning pass over it.
    """
    prefix, unknown = model["continuing_subword_prefix"], model["unk_token"]
    for token in sorted(kept - {unknown}):
        inside = token.removeprefix(prefix)
        first = "" if inside == token else prefix
        single = [first + inside[:1], *(prefix + character for character in inside[1:])]
        if not kept.issuperset(single):
            raise InputError(f"{FLAG}: texts have unknown words, and not every character of the "
                             f"token {token!r} is a token by itself")  # fmt: skip


def _unigram(model: Json, needed: set[str]) -> set[str]:
    if model["unk_id"] is None:
        raise InputError(f"{FLAG}: the tokenizer has no unknown token, which other texts may need")
    pieces = model["vocab"]
    rarest, _ = min(pieces, key=lambda piece: piece[1])
    unknown, _ = pieces[model["unk_id"]]
    single = {token for token, _ in pieces if len(token) == 1 or BYTE.fullmatch(token)}
    return needed | single | {rarest, unknown}


def _word_level(model: Json, needed: set[str]) -> set[str]:
    return needed | _unknown(model)


def _unknown(model: Json) -> set[str]:
    """Its unknown token, where it is one."""
    return {model["unk_token"]} & model["vocab"].keys()


KINDS: dict[str, Callable[[Json, set[str]], set[str]]] = {
    "BPE": _bpe,
    "WordPiece": _word_piece,
    "Unigram": _unigram,
    "WordLevel": _word_level,
}


def _vocabulary(model: Json) -> list[Token]:
    """Tokens and their ids."""
    if model["type"] == "Unigram":
        return [(token, id) for id, (token, _) in enumerate(model["vocab"])]
    return [*model["vocab"].items()]


def _model(model: Json, tokens: list[tuple[int, str]], new: dict[int, int]) -> Json:
    """The tokenizer's model with these tokens alone."""
    if model["type"] == "Unigram":
        pieces = [model["vocab"][id] for id, _ in tokens]
        return {**model, "vocab": pieces, "unk_id": new[model["unk_id"]]}
    vocabulary = {token: new[id] for id, token in tokens}
    if model["type"] != "BPE":
        return {**model, "vocab": vocabulary}
    prefix, _ = _affixes(model)
    merges = [
        [left, right]
        for left, right in model["merges"]
        if {left, right, _joined(left, right, prefix)} <= vocabulary.keys()
    ]
    return {**model, "vocab": vocabulary, "merges": merges}


def _affixes(model: Json) -> tuple[str, str]:
    return model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""


def _joined(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


# --- the tokenizer ---


def _read(tokenizer: "PreTrainedTokenizerBase") -> Json:
    """Its tokenizer.json. InputError for one that is not known."""
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise InputError(f"{FLAG}: the tokenizer {name} has no tokenizer.json; --tokenizer_name "
                         f"takes that of another model")  # fmt: skip
    with blaming(f"{FLAG}: the tokenizer {name} cannot be written"):
        saved = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = saved["model"]["type"]
    if kind not in KINDS:
        raise InputError(f"{FLAG}: the tokenizer {name} is a {kind}, which cannot be trimmed; "
                         f"{', '.join(KINDS)} can")  # fmt: skip
    if saved["model"].get("dropout"):
        raise InputError(f"{FLAG}: the tokenizer {name} leaves merges out at random (dropout in "
                         f"its tokenizer.json), so no text has its tokens for sure")  # fmt: skip
    return saved


def _with_ids(processor: Json | None, new: Callable[[int], int]) -> Json | None:
    """A post-processor with another id in the place of each."""
    if processor is None:
        return None
    match processor["type"]:
        case "Sequence":
            steps = [_with_ids(step, new) for step in processor["processors"]]
            return {**processor, "processors": steps}
        case "TemplateProcessing":
            tokens = processor["special_tokens"].items()
            special = {name: {**t, "ids": [new(id) for id in t["ids"]]} for name, t in tokens}
            return {**processor, "special_tokens": special}
        case "BertProcessing" | "RobertaProcessing":
            ends = {name: [processor[name][0], new(processor[name][1])] for name in ("sep", "cls")}
            return {**processor, **ends}
        case "ByteLevel":
            return processor
        case kind:
            raise InputError(f"{FLAG}: the tokenizer's post-processor {kind} is not known")


def _ids(processor: Json | None) -> set[int]:
    """Those in a post-processor."""
    ids: set[int] = set()

    def seen(id: int) -> int:
        ids.add(id)
        return id

    _with_ids(processor, seen)
    return ids


def _tokenizer(tokenizer: "PreTrainedTokenizerBase", saved: Json) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer

    return rebuilt(tokenizer, Tokenizer.from_str(json.dumps(saved)))


# --- the model ---


def _check_tables(backbone: "PreTrainedModel", rows: int) -> None:
    """InputError where more than its first embedding has a row for each token."""
    own = backbone.get_input_embeddings()
    if not isinstance(own, nn.Embedding):
        raise InputError(f"{FLAG}: this model looks tokens up in a {type(own).__name__}, not in an "
                         f"embedding")  # fmt: skip
    more = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and module is not own and "position" not in name
        and module.num_embeddings == rows
    ]  # fmt: skip
    head = cast(Any, backbone.get_output_embeddings())
    if head is not None and head.weight is not own.weight:
        more.append("its output head")
    if more:
        raise InputError(f"{FLAG}: the model has more tables with a row for each token: "
                         f"{', '.join(more)}")  # fmt: skip


def _id_settings(backbone: "PreTrainedModel") -> list[tuple[Any, str, list[int]]]:
    """Config, name and ids of each setting that names tokens."""
    config = backbone.config
    found = []
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                found.append((part, name, value if isinstance(value, list) else [value]))
    return found


def _config_ids(backbone: "PreTrainedModel") -> list[int]:
    return [id for *_, ids in _id_settings(backbone) for id in ids]


def _keep_rows(backbone: "PreTrainedModel", old: list[int]) -> None:
    """The rows [K, D] of the tokens that are kept, and their new ids in the config."""
    new = {id: place for place, id in enumerate(old)}
    embedding = cast(nn.Embedding, backbone.get_input_embeddings())
    weight = embedding.weight
    rows = weight.detach()[torch.tensor(old, device=weight.device)]
    embedding.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    embedding.num_embeddings = len(old)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new.get(embedding.padding_idx)
    for config, name, ids in _id_settings(backbone):
        places = [new[id] for id in ids if id in new]
        was_list = isinstance(getattr(config, name), list)
        # An id that is no token's has meant nothing, and would now lie outside or mean another.
        setattr(config, name, places if was_list else places[0] if places else None)
    backbone.config.get_text_config().vocab_size = len(old)


def _compare(
    encoder: Encoder,
    queries: Sequence[str],
    passages: Sequence[str],
    tables: Sequence[TokenTable],
    old: list[int],
) -> None:
    """InputError unless the first texts have the tokens that they had."""
    earlier = torch.tensor(old, dtype=torch.int32)
    roles = [(queries, encoder.tokenize_queries), (passages, encoder.tokenize_passages)]
    for (texts, tokenize), table in zip(roles, tables, strict=True):
        now, was = tokenize(texts[:COMPARED]), table.head(min(COMPARED, len(table)))
        if not (now.offsets.equal(was.offsets) and earlier[now.ids].equal(was.ids)):
            raise InputError(f"{FLAG}: the tokenizer {encoder.tokenizer.name_or_path} does more "
                             f"than its tokenizer.json says: texts get other tokens")  # fmt: skip
