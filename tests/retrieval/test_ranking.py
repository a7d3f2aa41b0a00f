"""Rankings are those of all documents sorted, whatever texts they share and whoever is left out."""

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast.retrieval.ranking import BELOW_ALL, Ranking, rank_documents, write_run

# Documents of five texts: 1, 4 and 6 share one, 2 and 5 have none.
TEXT_OF = [3, 0, None, 1, 0, None, 0, 4, 2]
OWN = [4, None, 2, 7]


def vectors(rows):
    generator = torch.Generator().manual_seed(rows)
    return F.normalize(torch.randn(rows, 8, generator=generator), dim=1)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 9, 100])
def test_documents_are_ranked_as_by_sorting_them_all(k):
    """Up to more than there are; a shared, an empty and a single one are left out."""
    queries, texts = vectors(len(OWN)), vectors(5)
    scores = queries @ texts.T
    rankings = rank_documents(queries, texts, TEXT_OF, OWN, k)
    for query, (ranking, own) in enumerate(zip(rankings, OWN, strict=True)):
        score = [BELOW_ALL if text is None else scores[query, text].item() for text in TEXT_OF]
        best = sorted(range(len(TEXT_OF)), key=lambda document: -score[document])  # stable
        best = [document for document in best if document != own][:k]
        assert ranking.documents == best
        assert ranking.scores == pytest.approx([score[document] for document in best])


def test_none_is_left_out_where_none_is_named():
    [ranking] = rank_documents(vectors(1), vectors(5), TEXT_OF, None, 100)
    assert sorted(ranking.documents) == list(range(len(TEXT_OF)))
    assert ranking.documents[-2:] == [2, 5]


def test_a_run_file_has_trecs_columns(tmp_path):
    rankings = [Ranking([2, 0], [0.5, -0.25]), Ranking([1], [1 / 3])]
    path = tmp_path / "new" / "run.trec"
    write_run(path, rankings, ["q7", "q9"], ["a", "b", "c"])
    assert path.read_text().splitlines() == [
        "q7 Q0 c 1 0.5 rankpo-fast", "q7 Q0 a 2 -0.25 rankpo-fast",
        "q9 Q0 b 1 0.333333333 rankpo-fast",
    ]  # fmt: skip
    write_run(path, rankings, None, None)
    assert path.read_text().splitlines()[2] == "1 Q0 1 1 0.333333333 rankpo-fast"
