"""Search is exact, whatever the chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankpo_fast.errors import InputError
from rankpo_fast.retrieval.search import search


@pytest.mark.parametrize(
    ("m", "n", "k", "chunk"),
    [
        pytest.param(7, 50, 5, 100, id="one-chunk"),
        pytest.param(7, 50, 5, 3, id="chunks-smaller-than-k"),
        pytest.param(6, 48, 5, 6, id="chunks-that-divide"),
        pytest.param(7, 4, 10, 3, id="more-asked-than-there-are"),
        pytest.param(1, 1, 1, 1, id="one-of-each"),
    ],
)
def test_search_finds_what_sorting_all_scores_finds(m, n, k, chunk):
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (torch.randn(rows, 8, generator=generator) for rows in (m, n))
    expected = (queries @ corpus.T).sort(dim=1, descending=True)
    scores, indices = search(queries, corpus, k, chunk=chunk)
    assert torch.equal(indices, expected.indices[:, :k])
    torch.testing.assert_close(scores, expected.values[:, :k])


@pytest.mark.parametrize("order", ["random", "better-and-better", "worse-and-worse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_chunks_of_many_equal_scores_are_ranked_as_a_stable_sort_ranks_them(order, dtype):
    """Whole numbers, which every dtype sums without rounding."""
    generator = torch.Generator().manual_seed(1)
    queries, corpus = (torch.randint(-3, 4, (rows, 5), generator=generator).to(dtype)
                       for rows in (9, 700))  # fmt: skip
    if order != "random":
        corpus = corpus[(corpus @ queries[0]).argsort(descending=order == "worse-and-worse")]
    expected = (queries @ corpus.T).float().sort(dim=1, descending=True, stable=True)
    for k in (1, 7, 40, 650):
        for chunk in (8, 33, 256, 4096):
            scores, indices = search(queries, corpus, k, chunk=chunk)
            assert torch.equal(indices, expected.indices[:, :k])
            assert torch.equal(scores, expected.values[:, :k])


def test_no_more_than_a_chunk_of_scores_is_held():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for x in tree_leaves(made):
                if torch.is_tensor(x) and x.data_ptr() not in given:
                    self.largest = max(self.largest, x.numel())
            return made

    queries, corpus = torch.randn(200, 4), torch.randn(900, 4)
    given = {x.data_ptr() for tensor in (queries, corpus) for x in tensor.split(100)}
    with Sizes() as sizes:
        search(queries, corpus, 3, chunk=100)
    assert 100 * 100 <= sizes.largest <= 100 * (100 + 2 * 3)


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_equal_scores_are_in_the_order_of_their_rows(chunk):
    """Also where the last place asked for is one of them, and where 0 is -0."""
    scores = torch.tensor([0.5, -0.0, 1.0, 0.0, 0.5, -1.0, 0.5, -1.0])
    corpus = torch.stack([scores, torch.zeros(8)], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    found, indices = search(query, corpus, 8, chunk=chunk)
    assert indices.tolist() == [[2, 0, 4, 6, 1, 3, 5, 7]]
    assert found.tolist() == [[1, 0.5, 0.5, 0.5, 0, 0, -1, -1]]
    assert search(query, corpus, 3, chunk=chunk)[1].tolist() == [[2, 0, 4]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_never_ranked(broken):
    good, bad = torch.ones(4, 2), torch.ones(4, 2)
    bad[3, 1] = broken
    for queries, corpus in [(good, bad), (bad, good)]:
        with pytest.raises(InputError, match="must be finite"):
            search(queries, corpus, 1)
