"""Pooling asks the mask alone where a text begins and ends."""

import pytest
import torch

from rankpo_fast.model.pooling import pool

# Two texts, of 3 tokens and of 1, as states [S=2, L=4, D=2]; 9 stands for padding.
RIGHT = [[[1, 2], [3, 4], [5, 9], [9, 9]], [[7, 8], [9, 9], [9, 9], [9, 9]]]
LEFT = [[[9, 9], [1, 2], [3, 4], [5, 9]], [[9, 9], [9, 9], [9, 9], [7, 8]]]
CASES = [
    pytest.param(RIGHT, [[1, 1, 1, 0], [1, 0, 0, 0]], id="padded-right"),
    pytest.param(LEFT, [[0, 1, 1, 1], [0, 0, 0, 1]], id="padded-left"),
]


@pytest.mark.parametrize(("states", "mask"), CASES)
@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [[5, 9], [7, 8]]), ("cls", [[1, 2], [7, 8]]), ("mean", [[3, 5], [7, 8]])],
)
def test_pooled_vector_is_that_of_the_text_alone(states, mask, pooling, expected):
    vectors = pool(torch.tensor(states, dtype=torch.float32), torch.tensor(mask), pooling)
    assert vectors.tolist() == expected


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_nan_in_padding_does_not_reach_the_vector(pooling):
    states = torch.tensor([[[1.0], [float("nan")]]])
    assert pool(states, torch.tensor([[1, 0]]), pooling).tolist() == [[1.0]]


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_vectors_are_fp32_and_the_mean_of_bf16_states_is_summed_in_fp32(pooling):
    states = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    states[0, 0] = 256  # in bf16, 256 + 1 = 256
    vectors = pool(states, torch.ones(1, 4096, dtype=torch.int64), pooling)
    assert vectors.dtype == torch.float32
    assert vectors.item() == {"last": 1, "cls": 256, "mean": (256 + 4095) / 4096}[pooling]
