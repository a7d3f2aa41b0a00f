"""Texts -> micro-batches that fit a token budget, laid end to end: no token is padding.

n texts to place; S texts of a micro-batch, T tokens of all of them, L the length of the longest.
"""

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from rankpo_fast.data.moving import Movable
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError

# Tokens of a micro-batch where nobody says how many. On one core, 4 layers of 256 dims took 386,
# 380, 388, 422 and 420 us a token at 1,024, 2,048 ... 16,384 of them: caches are small.
DEFAULT_BUDGET = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True, eq=False)
class MicroBatch(Movable):
    """S texts end to end; text i is input_ids[0, offsets[i] : offsets[i + 1]], none is empty."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in every text
    offsets: Tensor  # [S + 1] int32
    lengths: tuple[int, ...]  # the S lengths again, on the host


def plan_packed(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split texts of `lengths` [n] into index tensors [S] whose lengths sum to <= max_tokens.

    Best fit, longest first: every text goes where the least room is left behind it. So a group
    holds its texts longest first, and the first group holds the longest of all.

    Raises:
        InputError: a text alone is longer than max_tokens.
    """
    order = _longest_first(lengths, max_tokens)
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for text, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            rooms.append((max_tokens, len(groups)))
            groups.append([])
        room, group = rooms.pop(place)
        groups[group].append(text)
        bisect.insort(rooms, (room - length, group))
    return [torch.tensor(group) for group in groups]


def plan_padded(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split texts of `lengths` [n] into index tensors [S] with S * L <= max_tokens.

    Texts of like length go together, the longest first.

    Raises:
        InputError: a text alone is longer than max_tokens.
    """
    order = _longest_first(lengths, max_tokens)
    groups = []
    while len(order) > 0:
        first, order = order.tensor_split([max_tokens // int(lengths[order[0]])])
        groups.append(first)
    return groups


def default_budget(lengths: Tensor, device: str) -> int:
    """Tokens of a micro-batch that suit a kind of device; the longest text fits in any case."""
    return max(DEFAULT_BUDGET[device], int(lengths.max()) if len(lengths) else 0)


def check_budget(lengths: Tensor, max_tokens: int | None) -> None:
    """InputError if a text alone is longer than max_tokens; None suits all."""
    if max_tokens is not None and len(lengths) > 0 and (longest := int(lengths.max())) > max_tokens:
        raise InputError(
            f"--max_tokens_per_micro_batch is {max_tokens}, but the longest text has {longest} "
            f"tokens: give {longest} or more, or a smaller --max_passage_length (or "
            "--max_query_length)"
        )


def _longest_first(lengths: Tensor, max_tokens: int) -> Tensor:
    assert len(lengths) == 0 or int(lengths.min()) > 0, "a text without tokens"
    check_budget(lengths, max_tokens)
    return lengths.argsort(descending=True, stable=True)


def one_token(table: TokenTable) -> MicroBatch:
    """The least that goes through an encoder: the first token of a table's first text."""
    return pack(TokenTable(table[0][:1], torch.tensor([0, 1]), truncated=0), torch.tensor([0]))


def pack(table: TokenTable, text_ids: Tensor) -> MicroBatch:
    """The texts `text_ids` [S] of the table, in that order, end to end."""
    starts = table.offsets[text_ids]  # [S]
    lengths = table.offsets[text_ids + 1] - starts  # [S]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    positions = torch.arange(total) - offsets[:-1].repeat_interleave(lengths, output_size=total)
    ids = table.ids[starts.repeat_interleave(lengths, output_size=total) + positions]
    return MicroBatch(
        input_ids=ids[None].to(torch.int64),
        position_ids=positions[None],
        offsets=offsets.to(torch.int32),
        lengths=tuple(lengths.tolist()),
    )


def pad(batch: MicroBatch, pad_token_id: int, padding_side: str = "right") -> tuple[Tensor, Tensor]:
    """Input ids and attention mask, [S, L] int64 both, on the batch's device."""
    assert padding_side in ("left", "right"), padding_side
    longest = max(batch.lengths)
    starts, ends = batch.offsets[:-1, None], batch.offsets[1:, None]  # [S, 1]
    places = torch.arange(longest, device=batch.offsets.device)  # [L]
    tokens = starts + places if padding_side == "right" else ends - longest + places  # [S, L]
    mask = (tokens >= starts) & (tokens < ends)
    input_ids = batch.input_ids[0, tokens.clamp(min=0, max=batch.input_ids.shape[1] - 1)]
    return input_ids.masked_fill(~mask, pad_token_id), mask.to(torch.int64)
