"""Search is exact, whatever the chunks."""

import pytest
import torch

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
