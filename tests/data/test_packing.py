"""Micro-batches hold every text once, keep the budget, and waste next to nothing of it."""

import pytest
import torch

from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import pack, pad, plan_packed, plan_padded
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError

PLANS = [plan_packed, plan_padded]


def mixed_lengths(n):
    """Short queries and long passages, as a skewed corpus has them: 5 to 512 tokens."""
    shares = torch.rand(n, generator=torch.Generator().manual_seed(0))
    return (5 + 508 * shares**2).long()


def make_table(texts):
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    return TokenTable(torch.tensor(sum(texts, []), dtype=torch.int32), offsets, truncated=0)


def taken(plan, lengths, group):
    """Tokens of the budget that the group takes up."""
    own = lengths[group]
    return int(own.sum()) if plan is plan_packed else len(group) * int(own.max())


# --- plans ---


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("n", "max_tokens"),
    [
        pytest.param(1, 512, id="one-text"),
        pytest.param(1000, 512, id="budget-of-the-longest"),
        pytest.param(1000, 4096, id="many-to-a-batch"),
        pytest.param(1000, 10**9, id="all-in-one"),
        pytest.param(0, 512, id="none"),
    ],
)
def test_every_text_is_in_one_group_and_no_group_is_over_budget(plan, n, max_tokens):
    lengths = mixed_lengths(n)
    groups = plan(lengths, max_tokens)
    assert sorted(i for group in groups for i in group.tolist()) == list(range(n))
    assert all(taken(plan, lengths, group) <= max_tokens for group in groups)


@pytest.mark.parametrize("plan", PLANS)
def test_the_longest_text_comes_first_and_groups_fall_in_length(plan):
    lengths = mixed_lengths(1000)
    groups = plan(lengths, 4096)
    assert lengths[groups[0][0]] == lengths.max()
    assert all((lengths[group].diff() <= 0).all() for group in groups)


@pytest.mark.parametrize("max_tokens", [4096, 16384])
def test_packing_wastes_under_2_percent(max_tokens):
    lengths = mixed_lengths(3000)
    groups = plan_packed(lengths, max_tokens)
    assert len(groups) * max_tokens < 1.02 * int(lengths.sum()) + max_tokens  # the last is a rest


def test_best_fit_leaves_the_least_room():
    lengths = torch.tensor([3, 10, 4, 9, 3])
    assert [group.tolist() for group in plan_packed(lengths, 13)] == [[1, 0], [3, 2], [4]]


def test_padded_groups_are_full_and_of_like_length():
    lengths = torch.tensor([3, 10, 4, 9, 3])
    assert [group.tolist() for group in plan_padded(lengths, 20)] == [[1, 3], [2, 0, 4]]
    lengths = torch.randint(1, 513, (2000,), generator=torch.Generator().manual_seed(0))
    padded = sum(taken(plan_padded, lengths, group) for group in plan_padded(lengths, 8192))
    assert padded < 1.03 * int(lengths.sum())


@pytest.mark.parametrize("plan", PLANS)
def test_text_longer_than_the_budget_is_refused_with_flag_and_value(plan):
    with pytest.raises(InputError, match="--max_tokens_per_micro_batch is 9, .* 10 tokens"):
        plan(torch.tensor([3, 10]), 9)


# --- packs ---

TABLE = make_table([[5], [6, 7], [8, 9, 10]])


def test_a_pack_holds_the_texts_in_the_order_given_and_may_repeat_them():
    batch = pack(TABLE, torch.tensor([2, 0, 1, 0]))
    assert batch.input_ids.tolist() == [[8, 9, 10, 5, 6, 7, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0]]
    assert batch.offsets.tolist() == [0, 3, 4, 6, 7]
    assert batch.lengths == (3, 1, 2, 1)
    assert (batch.input_ids.dtype, batch.offsets.dtype) == (torch.int64, torch.int32)


def test_a_pack_goes_to_a_device_whole():
    there = to_device(pack(TABLE, torch.tensor([1, 2])), torch.device("meta"))
    tensors = (there.input_ids, there.position_ids, there.offsets)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert there.lengths == (2, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_what_the_tokenizer_gives(side, tiny_tokenizer):
    texts = ["a nurse", "x", "the nurse in Lyon cares for patients"]
    tiny_tokenizer.padding_side = side
    try:
        expected = tiny_tokenizer(texts, padding=True, return_tensors="pt")
    finally:
        tiny_tokenizer.padding_side = "right"
    batch = pack(make_table(tiny_tokenizer(texts)["input_ids"]), torch.arange(3))
    input_ids, mask = pad(batch, tiny_tokenizer.pad_token_id, side)
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    assert input_ids.dtype == mask.dtype == torch.int64


def test_pad_token_may_be_any_id():
    input_ids, mask = pad(pack(TABLE, torch.tensor([0, 1, 0])), 6)
    assert input_ids.tolist() == [[5, 6], [6, 7], [5, 6]]
    assert mask.tolist() == [[1, 0], [1, 1], [1, 0]]
