"""A text's vector is made of its own tokens alone."""

import pytest
import torch

from rankpo_fast.model.pooling import pool, pool_padded

STATES = [[1, 2], [3, 4], [5, 9], [7, 8]]  # [T=4, D=2]
OFFSETS = [0, 3, 4]  # two texts, of 3 tokens and of 1
POOLINGS = ["last", "cls", "mean"]


def of(states, offsets, pooling):
    return pool(torch.tensor(states), torch.tensor(offsets, dtype=torch.int32), pooling)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [[5, 9], [7, 8]]), ("cls", [[1, 2], [7, 8]]), ("mean", [[3, 5], [7, 8]])],
)
def test_pooled_vector_is_that_of_the_text_alone(pooling, expected):
    states = [[float(x) for x in row] for row in STATES]
    assert of(states, OFFSETS, pooling).tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_wrong_in_one_text_does_not_reach_another(pooling, value):
    assert of([[1.0], [value], [2.0]], [0, 1, 2, 3], pooling)[::2].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_fp32_and_the_mean_of_bf16_states_is_summed_in_fp32(pooling):
    states = torch.ones(4096, 1, dtype=torch.bfloat16)
    states[0] = 256  # in bf16, 256 + 1 = 256
    vectors = pool(states, torch.tensor([0, 4096], dtype=torch.int32), pooling)
    assert vectors.dtype == torch.float32
    assert vectors.item() == {"last": 1, "cls": 256, "mean": (256 + 4095) / 4096}[pooling]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [0, 0, 1, 1]), ("cls", [1, 0, 0, 1]), ("mean", [1 / 3, 1 / 3, 1 / 3, 1])],
)
def test_gradients_go_to_the_tokens_that_were_pooled(pooling, expected):
    states = torch.zeros(4, 2, requires_grad=True)
    pool(states, torch.tensor(OFFSETS, dtype=torch.int32), pooling).sum().backward()
    torch.testing.assert_close(states.grad, torch.tensor(expected)[:, None].expand(4, 2).float())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_has_no_part_in_a_vector(pooling):
    states = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    texts = [text[m.bool()] for text, m in zip(states, mask, strict=True)]
    expected = [{"last": x[-1], "cls": x[0], "mean": x.mean(0)}[pooling] for x in texts]
    states[0, 2:] = torch.nan
    torch.testing.assert_close(pool_padded(states, mask, pooling), torch.stack(expected))
    assert pool_padded(states.bfloat16(), mask, pooling).dtype == torch.float32
