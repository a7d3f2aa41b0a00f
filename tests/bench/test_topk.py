"""The bench of exact top-k measures, and would notice a search that misses something."""

import pytest

from bench import topk


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(topk, "ROUNDS", 1)


@pytest.mark.long  # a process that imports torch
def test_it_gives_seconds_and_a_ratio_and_memory_on_the_disk():
    assert "equal to sorting all scores" in topk.in_memory(40, 9000, 16, 10)
    said = topk.on_disk(5, 9000, 16, 10)
    assert "in fp16 on the disk" in said and "MiB with the file's pages" in said


def test_a_search_that_misses_an_equal_score_is_noticed(monkeypatch):
    def careless(queries, corpus, k):
        scores, rows = topk.sorted_all(queries, corpus, k)
        return scores, rows.where(rows != 0, rows + 4500)  # a twin of it, which comes later

    monkeypatch.setattr(topk, "search", careless)
    with pytest.raises(AssertionError, match="not what sorting all"):
        topk.in_memory(40, 9000, 16, 9000)
