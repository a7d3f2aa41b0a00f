"""Texts -> a table of token ids.

n texts are tokenised once, their T ids packed end to end in one tensor, so that all lengths are
known before training.
"""

import hashlib
import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.cache import cached
from rankpo_fast.data.files import disk_errors
from rankpo_fast.errors import InputError
from rankpo_fast.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLICE = 1024  # texts given to the tokenizer at once: enough for its threads, little to hold
CHARACTERS = 2**19  # the same; a tokenizer takes some 200 bytes for each, whatever it cuts
MOST_PER_TOKEN = 16  # characters that a token has on average, at most; those of words have 4
ONLY_IDS = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The token ids of n texts; text i is ids[offsets[i] : offsets[i + 1]]."""

    ids: Tensor  # [T] int32
    offsets: Tensor  # [n + 1] int64
    truncated: int  # how many of the texts were cut

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """The ids [length] of one text."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def head(self, count: int) -> "TokenTable":
        """Its first `count` texts."""
        return TokenTable(
            self.ids[: self.offsets[count]], self.offsets[: count + 1], self.truncated
        )

    def part(self, start: int, stop: int) -> "TokenTable":
        """Its texts from `start` to before `stop`; how many of these were cut is not known."""
        offsets = self.offsets[start : stop + 1]
        return TokenTable(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0], 0)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, [n] int64."""
        return self.offsets.diff()


def joined(*tables: TokenTable) -> tuple[TokenTable, list[Tensor]]:
    """One table of the distinct texts of all, and for each table the rows [n] of its texts in it.

    Texts are the same when their ids are: cut at the limit, or with and without a prefix.
    """
    row_of: dict[bytes, int] = {}
    rows = []
    for table in tables:
        ids, offsets = table.ids.numpy(), table.offsets.tolist()
        keys = (ids[a:b].tobytes() for a, b in itertools.pairwise(offsets))
        rows.append(
            torch.tensor([row_of.setdefault(k, len(row_of)) for k in keys], dtype=torch.int64)
        )
    lengths = [len(key) // 4 for key in row_of]
    table = TokenTable(
        ids=torch.from_numpy(np.frombuffer(bytearray(b"".join(row_of)), np.int32)),
        offsets=torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0),
        truncated=sum(table.truncated for table in tables),
    )
    return table, rows


def first_of_each(rows: dict[str, int]) -> list[str]:
    """Of texts and their rows in a joined table the first text of each row."""
    texts: dict[int, str] = {}
    for text, row in rows.items():
        texts.setdefault(row, text)
    return [texts[row] for row in range(len(texts))]


def tokenize(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    prefix: str = "",
    cache_dir: str | Path | None = None,
) -> TokenTable:
    """Give `prefix + text` to the tokenizer, cut to `max_length` tokens as it does that itself.

    So special tokens at the end survive, and other libraries see the same ids. With `cache_dir`
    the table is kept there and found again for the same texts, tokenizer, length and prefix.

    Raises:
        InputError: no room for text beside the special tokens and the prefix, or a text without
            any token.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise InputError(
            f"a maximum length of {max_length} tokens leaves no room for text: the tokenizer adds "
            f"{special} special tokens"
        )
    if prefix:  # a space at its end may become part of the text's first token
        taken = len(tokenizer([prefix.rstrip()], truncation=False, **ONLY_IDS)["input_ids"][0])
        if taken >= max_length:
            raise InputError(
                f"a maximum length of {max_length} tokens leaves no room for text: the prefix "
                f"{prefix!r} takes {taken}, special tokens included"
            )

    def make() -> dict[str, Tensor]:
        table = _tokenize(texts, tokenizer, max_length, prefix)
        truncated = torch.tensor(table.truncated)
        return {"ids": table.ids, "offsets": table.offsets, "truncated": truncated}

    def fits(kept: dict[str, Tensor]) -> bool:
        return _is_table(kept, len(texts), max_length, max(tokenizer.get_vocab().values()))

    find_key = partial(_cache_key, texts, tokenizer, max_length, prefix)
    kept = cached(cache_dir, "tokens", find_key, make, fits)
    return TokenTable(kept["ids"], kept["offsets"], int(kept["truncated"]))


def _is_table(kept: dict[str, Tensor], texts: int, max_length: int, last_id: int) -> bool:
    """Whether the tensors can be the table of so many texts: with others, a model would read memory
    that is not its own."""
    ids, offsets, cut = (kept.get(name) for name in ("ids", "offsets", "truncated"))
    if ids is None or offsets is None or cut is None or len(kept) != 3:
        return False
    kinds = [(ids.dtype, ids.ndim), (offsets.dtype, tuple(offsets.shape)), (cut.dtype, cut.ndim)]
    if kinds != [(torch.int32, 1), (torch.int64, (texts + 1,)), (torch.int64, 0)]:
        return False
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or not 0 <= int(cut) <= texts:
        return False
    lengths, empty = offsets.diff(), texts == 0
    in_limits = empty or 0 < int(lengths.min()) <= int(lengths.max()) <= max_length
    return in_limits and (empty or 0 <= int(ids.min()) <= int(ids.max()) <= last_id)


def _tokenize(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, prefix: str
) -> TokenTable:
    ids, truncated = [np.empty(0, np.int32)], 0
    lengths: list[int] = []
    limit = max(CHARACTERS, MOST_PER_TOKEN * max_length)
    _warn_of_long(texts, limit, max_length)
    kept = slice(-limit, None) if tokenizer.truncation_side == "left" else slice(limit)
    with progress("tokenising", len(texts), "text") as advance:
        for places in _slices(texts):
            part = [prefix + texts[i][kept] for i in places]
            part_ids, part_truncated = _encode(part, tokenizer, max_length)
            for number, tokens in zip(places, part_ids, strict=True):
                if not tokens:
                    raise InputError(f"the tokenizer makes no token of the text {texts[number]!r}")
            lengths += map(len, part_ids)
            ids.append(np.fromiter(chain.from_iterable(part_ids), np.int32))
            truncated += part_truncated
            advance(len(part))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenTable(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets), truncated)


def _slices(texts: Sequence[str]) -> Iterator[range]:
    """Places of texts, a few at a time, that together are not long; one alone may be."""
    start = characters = 0
    for end, text in enumerate(texts):
        if end > start and (end - start == SLICE or characters + len(text) > CHARACTERS):
            yield range(start, end)
            start, characters = end, 0
        characters += len(text)
    if texts:
        yield range(start, len(texts))


def _warn_of_long(texts: Sequence[str], limit: int, max_length: int) -> None:
    long = [text for text in texts if len(text) > limit]
    if long:
        warnings.warn(
            f"{len(long):,} of {len(texts):,} texts have more than {limit:,} characters, the first "
            f"{len(long[0]):,} ({long[0][:40]!r}...): they are cut there, before the tokenizer "
            f"cuts to {max_length:,} tokens",
            stacklevel=4,
        )


def _encode(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[list[int]], int]:
    """The ids of each text, and how many texts were cut."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, **ONLY_IDS)
    ids = encoded["input_ids"]
    if encoded.encodings is not None:
        return ids, sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    # A tokenizer written in Python keeps nothing of what it cut: ask it again for the full ones.
    full = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) == max_length]
    whole = tokenizer(full, truncation=False, **ONLY_IDS)["input_ids"] if full else []
    return ids, sum(len(tokens) > max_length for tokens in whole)


# --- what a table follows from ---


def _cache_key(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, prefix: str
) -> str:
    digest = hashlib.sha256(f"{max_length} {len(texts)} ".encode())
    _add_tokenizer(digest, tokenizer)
    for text in chain([prefix], texts):
        _add(digest, text.encode())
    return digest.hexdigest()


def _add_tokenizer(digest: "hashlib._Hash", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Hash all that the tokenizer would save, and the versions that read it."""
    import tokenizers
    import transformers

    _add(digest, f"{transformers.__version__} {tokenizers.__version__}".encode())
    with tempfile.TemporaryDirectory() as directory, disk_errors(Path(directory)):
        tokenizer.save_pretrained(directory)
        for path in sorted(Path(directory).rglob("*")):
            if path.name == "tokenizer.json":  # holds what the last call asked for: not its nature
                saved = json.loads(path.read_bytes())
                saved["truncation"] = saved["padding"] = None
                _add(digest, json.dumps(saved).encode())
            elif path.is_file():
                _add(digest, path.read_bytes())


def _add(digest: "hashlib._Hash", data: bytes) -> None:
    """Length first, so that no two sequences of parts hash alike."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
