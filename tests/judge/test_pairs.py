"""Pairs are two different texts among a query's best, each pair once, and reach stage 2."""

import json
from collections import Counter

import numpy as np
import pytest

from rankpo_fast.cli import main
from rankpo_fast.config import PairsConfig
from rankpo_fast.judge.pairs import draw

CORPUS = [f"{title} in {place}" for title in ("nurse", "teacher", "cook") for place in "ABCD"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def find(tmp_path, tiny_llama_dir, uncased_llama_dir):
    """find(queries, corpus, *flags) -> the rows that `pairs` writes."""

    def run(queries, corpus, *flags, uncased=False):
        argv = ["pairs", "--model_name_or_path", uncased_llama_dir if uncased else tiny_llama_dir,
                "--device", "cpu", "--cache_dir", tmp_path / "cache",
                "--output_file", tmp_path / "pairs.jsonl", "--query_data", queries]  # fmt: skip
        argv += [] if corpus is None else ["--corpus_data", corpus]
        assert main([*map(str, argv), *map(str, flags)]) == 0
        return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]

    return run


def test_rows_have_texts_ids_and_ranks_that_belong_together(find, tmp_path):
    queries = write(tmp_path / "q.jsonl", [{"query": "a nurse", "query_id": "q7"},
                                           {"query": "a cook"}])  # fmt: skip
    corpus = write(tmp_path / "c.jsonl", [{"_id": f"d{i}", "text": t}
                                          for i, t in enumerate(CORPUS)])  # fmt: skip
    found = find(queries, corpus, "--pairs_per_query", 8, "--top_k", 6)
    assert Counter(row["query_id"] for row in found) == {"q7": 8, 1: 8}
    rank_of: dict[tuple, int] = {}
    pairs = set()
    for row in found:
        assert row["passage1"] != row["passage2"]
        pairs.add((row["query"], frozenset([row["passage1"], row["passage2"]])))
        for i in (1, 2):
            assert row[f"passage_id{i}"] == f"d{CORPUS.index(row[f'passage{i}'])}"
            known = rank_of.setdefault((row["query"], row[f"passage{i}"]), row[f"passage_rank{i}"])
            assert known == row[f"passage_rank{i}"]
        by_rank = row["passage_rank1"] < row["passage_rank2"]
        assert by_rank == (row["similarity1"] > row["similarity2"])
    assert len(pairs) == 16
    assert {*rank_of.values()} == {1, 2, 3, 4, 5, 6}  # the best is 1, as in the authors' rows
    orders = Counter(row["passage_rank1"] < row["passage_rank2"] for row in found)
    assert min(orders.values()) >= 3


def test_ids_are_those_that_label_wrote(find, tmp_path):
    ids = {"query": "J7", "positives": ["T0", "T1"], "negatives": [f"T{i}" for i in range(2, 6)]}
    row = {"query": "a nurse", "positives": CORPUS[:2], "negatives": CORPUS[2:6], "ids": ids}
    mined = row | {"query": "a cook", "negatives": CORPUS[6:9]}  # ids of other negatives
    found = find(write(tmp_path / "rows.jsonl", [row, mined]), None, "--top_k", 9)
    assert {row["query_id"] for row in found} == {"J7"}
    for row in found:
        for i in (1, 2):
            number = CORPUS.index(row[f"passage{i}"])
            assert row[f"passage_id{i}"] == (f"T{number}" if number < 6 else number + 2)


def test_one_seed_gives_one_file(find, tmp_path):
    queries = write(tmp_path / "q.jsonl", [{"query": "a nurse"}])
    corpus = write(tmp_path / "c.jsonl", [{"text": text} for text in CORPUS])
    first = find(queries, corpus)
    assert find(queries, corpus) == first != find(queries, corpus, "--seed", 1)


def test_texts_of_equal_tokens_are_one_and_the_query_is_no_candidate(find, tmp_path, capsys):
    queries = write(tmp_path / "q.jsonl", [{"query": "a nurse"}, {"query": "A NURSE"}])
    texts = ["cook", "COOK", "pilot", "a nurse", "teacher"]
    corpus = write(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    found = find(queries, corpus, "--pairs_per_query", 9, uncased=True)
    assert {frozenset([row["passage1"], row["passage2"]]) for row in found} == {
        frozenset(pair) for pair in [("cook", "pilot"), ("cook", "teacher"), ("pilot", "teacher")]
    }
    assert len(found) == 3 and "1 of 1 queries have fewer than 9" in capsys.readouterr().err


def test_rows_of_stage_1_are_queries_and_corpus(find, tmp_path):
    rows = [{"query": "a nurse", "positives": ["nurse"], "negatives": ["cook", "pilot"]}]
    found = find(write(tmp_path / "rows.jsonl", rows), None)
    assert len(found) == 3
    assert {row["passage1"] for row in found} <= {"nurse", "cook", "pilot"}


def test_a_beir_directory_has_queries_corpus_and_ids(find, tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "queries.jsonl", [{"_id": "x", "text": "a nurse"}])
    write(folder / "corpus.jsonl", [{"_id": key, "title": "", "text": f"text {key}"}
                                    for key in "xyz"])  # fmt: skip
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nx\ty\t1\n")
    [row] = find(folder, None)
    assert row["query_id"] == "x"
    assert {row["passage_id1"], row["passage_id2"]} == {"y", "z"}  # x has the query's own id


def drawn(similarity, wanted, **settings):
    config = PairsConfig("q", pairs_per_query=wanted, **settings)
    random = np.random.default_rng(0)
    return [pair for _ in range(50) for pair in draw(np.array(similarity), config, random)]


def test_strata_are_paired_evenly():
    pairs = drawn(np.linspace(1, 0, 50), 6, sampling="stratified", strata=3)
    assert len(pairs) == 300
    strata = Counter((first * 3 // 50, second * 3 // 50) for first, second in pairs)
    assert strata == dict.fromkeys([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)], 50)


def test_uncertain_pairs_are_those_of_nearly_equal_similarity():
    similarity = [0.9, 0.5, 0.499, 0.1]
    pairs = Counter(drawn(similarity, 1, sampling="uncertainty"))
    assert pairs[(1, 2)] == 50
    assert Counter(drawn(similarity, 1))[(1, 2)] < 25


def test_pairs_asked_for_beyond_what_there_is_are_all_there_is():
    for sampling in ("uniform", "stratified", "uncertainty"):
        pairs = drawn([0.3, 0.2, 0.1], 9, sampling=sampling, strata=5)[:3]
        assert sorted(pairs) == [(0, 1), (0, 2), (1, 2)]
