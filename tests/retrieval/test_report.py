"""`evaluate` with run files, two models, groups and a report."""

import json

import numpy as np
import pytest
import pytrec_eval

from rankpo_fast.cli import main
from rankpo_fast.data.retrieval import RetrievalSet, read_retrieval
from rankpo_fast.errors import InputError
from rankpo_fast.retrieval.evaluate import measure_run
from rankpo_fast.retrieval.ranking import read_run

CUTOFFS = [1, 5, 10]


def retrieval_set(queries=12, documents=40, seed=0) -> RetrievalSet:
    """Graded 1 to 3, some relevant documents missing from the corpus."""
    random = np.random.default_rng(seed)
    grades = [
        {int(d): int(g) for d, g in zip(random.choice(documents + 3, 5, replace=False),
                                        random.integers(1, 4, 5), strict=True)}
        for _ in range(queries)
    ]  # fmt: skip
    return RetrievalSet(
        [f"q{q}" for q in range(queries)], [f"text {d}" for d in range(documents)], grades,
        query_ids=[f"q{q}" for q in range(queries)],
        document_ids=[f"d{d:03}" for d in range(documents)],
    )  # fmt: skip


def random_run(data: RetrievalSet, tied: bool, seed=1) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    return {
        query: {
            data.document_ids[d]: float(random.integers(4) if tied else random.normal())
            for d in random.permutation(len(data.corpus))[:25]
        }
        for query in data.query_ids
    }


def write(path, run, ordered) -> None:
    lines = [
        f"{query} Q0 {document} {rank} {scores[document]!r} name"
        for query, scores in run.items()
        for rank, document in enumerate(ordered(scores), 1)
    ]
    path.write_text("\n".join(lines) + "\n")


def as_trec_eval_sorts(scores):
    return sorted(sorted(scores, reverse=True), key=scores.__getitem__, reverse=True)


@pytest.mark.parametrize("tied", [False, True])
def test_figures_of_a_run_are_those_of_pytrec_eval(tied, tmp_path):
    """The ranks of the file are trec_eval's own order of equal scores; lines are in no order."""
    data, path = retrieval_set(), tmp_path / "a.run"
    run = random_run(data, tied)
    write(path, run, as_trec_eval_sorts)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    names = data.document_ids + [f"absent{i}" for i in range(3)]
    qrels = {
        query: {names[d]: grade for d, grade in grades.items()}
        for query, grades in zip(data.query_ids, data.grades, strict=True)
    }
    wanted = {"ndcg_cut.1,5,10", "recall.1,5,10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    if tied:
        with pytest.warns(UserWarning, match="12 queries have documents of equal scores"):
            found = measure_run(path, data, CUTOFFS)
    else:
        found = measure_run(path, data, CUTOFFS)
    for cutoff in CUTOFFS:
        for ours, name in (("ndcg", "ndcg_cut"), ("recall", "recall")):
            expected = [theirs[query][f"{name}_{cutoff}"] for query in data.query_ids]
            np.testing.assert_allclose(found.by_query[f"{ours}@{cutoff}"], expected, atol=1e-12)
        # trec_eval has no cut of the reciprocal rank: the whole one, where it is within the cut.
        whole = [pytrec_eval.RelevanceEvaluator({q: qrels[q]}, {"recip_rank"}).evaluate(
            {q: run[q]})[q]["recip_rank"] for q in data.query_ids]  # fmt: skip
        cut = [value if value * cutoff >= 1 - 1e-12 else 0 for value in whole]
        np.testing.assert_allclose(found.by_query[f"mrr@{cutoff}"], cut, atol=1e-6)


def test_unknown_documents_keep_their_ranks_and_own_ones_do_not(tmp_path):
    data = RetrievalSet(["a"], ["x", "y", "z"], [{2: 1}], own=[0], query_ids=["0"],
                        document_ids=["0", "1", "2"])  # fmt: skip
    path = tmp_path / "a.run"
    path.write_text("".join(f"{q} Q0 {d} {r} {-r} n\n" for r, (q, d) in enumerate(
        [("0", "0"), ("0", "u"), ("0", "v"), ("0", "2"), ("other", "2")]
    )))  # fmt: skip
    with pytest.warns(UserWarning) as said:
        found = measure_run(path, data, [3])
    assert found.figures["mrr@3"] == pytest.approx(1 / 3)
    told = " ".join(str(warning.message) for warning in said)
    assert all(part in told for part in ("1 queries are none", "2 documents are not in", "1 docu"))


@pytest.mark.parametrize(
    "content, named",
    [
        ("q0 Q0 d000 1 0.5\n", "a.run:1.*must be query Q0"),
        ("q0 Q0 d000 1 0.5 n\nq0 Q0 d001 2 nan n\n", "a.run:2.*must be"),
        ("q0 Q0 d000 1 0.5 n\nq0 Q0 d000 2 0.4 n\n", "a.run:2.*stands twice"),
        ("x Q0 d000 1 0.5 n\n", "no line of a query that is measured"),
        ("q0 Q0 x 1 0.5 n\n", "none of its documents"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused(content, named, tmp_path):
    (tmp_path / "a.run").write_text(content)
    with pytest.raises(InputError, match=named):
        read_run(tmp_path / "a.run", retrieval_set(), 10)


@pytest.fixture
def files(tmp_path, tiny_bert_dir, tiny_llama_dir):
    """Data of three queries in two groups, and the flags that name them."""
    texts = ["a nurse in Lyon", "a teacher", "a data engineer", "a gardener"]
    rows = [
        {"query": text, "positives": {"index": [n]}, "metadata": {"field": "ab"[n % 2]}}
        for n, text in enumerate(texts[:3])
    ]
    pairs = [{"query": a, "passage1": a, "passage2": b, "preferred": "A"}
             for a in texts for b in texts if a != b]  # fmt: skip
    for name, content in (("queries", rows), ("corpus", [{"text": t} for t in texts]),
                          ("pairs", pairs)):  # fmt: skip
        lines = [json.dumps(row) for row in content]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--query_data", tmp_path / "queries.jsonl", "--corpus_data", tmp_path / "corpus.jsonl",
            "--cutoffs", 1, 3]  # fmt: skip


def evaluate(*flags) -> int:
    return main(["evaluate", *map(str, flags)])


def test_what_output_run_writes_run_files_reads(files, tiny_bert_dir, tmp_path, capsys):
    one, two = tmp_path / "model.json", tmp_path / "run.json"
    run = tmp_path / "a.run"
    compute = ["--no_cache", "--device", "cpu"]
    assert evaluate("--model", tiny_bert_dir, *files, *compute, "--output", one,
                    "--output_run", run) == 0  # fmt: skip
    assert evaluate("--run_files", run, *files, "--output", two) == 0
    model, rankings = (json.loads(path.read_text()) for path in (one, two))
    assert model.pop("similarities") and model == rankings


def test_two_models_are_compared_and_reported(
    files, tiny_bert_dir, tiny_llama_dir, tmp_path, capsys
):
    out, report = tmp_path / "both.json", tmp_path / "report"
    flags = [*files, "--preference_data", tmp_path / "pairs.jsonl", "--group_key", "field",
             "--no_cache", "--device", "cpu"]  # fmt: skip
    assert evaluate("--compare", tiny_bert_dir, tiny_llama_dir, *flags, "--output", out,
                    "--report", report) == 0  # fmt: skip
    found = json.loads(out.read_text())
    one, two = found["systems"]
    for name in ("ndcg@3", "alignment"):
        change = found["differences"][name]
        assert change["value"] == pytest.approx(two[name] - one[name])
        assert change["low"] <= change["value"] <= change["high"] and 0 < change["p"] <= 1
    assert {group: row["queries"] for group, row in one["groups"].items()} == {"a": 2, "b": 1}
    mean = (2 * one["groups"]["a"]["ndcg@3"] + one["groups"]["b"]["ndcg@3"]) / 3
    assert mean == pytest.approx(one["ndcg@3"])
    assert sum(one["similarities"]["positives"]["histogram"]) == 3
    rows = [json.loads(line) for line in (report / "per_query.jsonl").read_text().splitlines()]
    assert [row["group"] for row in rows] == ["a", "b", "a"]
    assert np.mean([row[str(tiny_bert_dir)]["ndcg@3"] for row in rows]) == pytest.approx(
        one["ndcg@3"]
    )
    page = (report / "report.md").read_text()
    for head in (f"{tiny_llama_dir} against {tiny_bert_dir}", "## Groups", "## Reliability"):
        assert head in page
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "difference, its 95 % interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "required: --model_name_or_path"),
        (["--compare", "a", "b", "c"], "two different models"),
        (["--compare", "a", "a"], "two different models"),
        (["--compare", "a"], "--compare has a alone: give another model beside it"),
        (["--compare", "a", "b", "--output_run", "x.run"], "--output_run holds the rankings"),
        (["--run_files", "missing.run"], "missing.run: no such file"),
        (["--compare", "a", "b", "--group_key", "nothing"], '"nothing"'),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(flags, named, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate(*files, *flags) == 2
    assert named in capsys.readouterr().err


def test_beir_queries_have_groups_too(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t2\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "a"}\n')
    (tmp_path / "queries.jsonl").write_text(
        '{"_id": "q2", "text": "b", "kind": 2}\n{"_id": "q1", "text": "c", "kind": 1}\n'
    )
    assert read_retrieval(tmp_path, group_key="kind").groups == ["1", "2"]
