"""Negatives across ranks: what each rank gets is what one process with all rows gives."""

import pytest
import torch
from problems import GRID
from rank_cases import compare, processes

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    with processes(request.param, tmp_path_factory.mktemp("ranks")) as ask:
        yield ask


def worst(answers) -> float:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return max(max(errors) for errors in answers)


@pytest.mark.parametrize("name", GRID)
def test_every_option_equals_one_process(ranks, name):
    sizes = "uneven" if ranks.size == 4 else "even"
    assert worst(ranks(compare, name, sizes, torch.float64, "mean")) < 1e-12


RINGS = ["plain", "not-cosine", "ids", "excluded", "smoothing", "dims", "one-short-prefix"]


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_gives_the_same(ranks, name):
    sizes = "empty" if ranks.size == 4 else "uneven"
    assert worst(ranks(compare, name, sizes, torch.float64, "mean", exchange="ring")) < 1e-12
