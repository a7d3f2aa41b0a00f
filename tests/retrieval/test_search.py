"""Search is exact, whatever the chunks."""

import pytest
import torch

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


def test_no_more_than_a_chunk_of_scores_is_held(monkeypatch):
    sizes = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: sizes.append(product(a, b).numel()) or product(a, b),
    )
    search(torch.randn(20, 4), torch.randn(90, 4), 3, chunk=10)
    assert max(sizes) == 10 * 10


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
