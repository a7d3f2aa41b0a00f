"""A server that judges, a few pairs, and `annotate` on them."""

import json

import pytest
from pytest_httpserver import HTTPServer

from rankpo_fast.cli import main
from support.judge_server import KEY, MODEL, JudgeServer


@pytest.fixture
def server():
    """Threaded: several requests are answered at once."""
    with HTTPServer(host="127.0.0.1", port=0, threaded=True) as http:
        yield JudgeServer(http)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write_pairs(path, count):
    rows = [
        {"query": f"query {i}", "passage1": f"{'ba'[i % 2]} {i}", "passage2": f"{'ab'[i % 2]} {i}",
         "query_id": f"q{i}", "passage_rank1": 2, "passage_rank2": 5}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def annotate(server, tmp_path):
    """annotate(*flags) -> exit code; of 4 pairs unless pairs.jsonl is there already."""

    def run(*flags, model=(MODEL,), retries=2):
        pairs = tmp_path / "pairs.jsonl"
        if not pairs.exists():
            write_pairs(pairs, 4)
        argv = ["annotate", "--base_url", server.url, "--model", *model, "--pairs", pairs,
                "--output", tmp_path / "prefs.jsonl", "--max_retries", retries]  # fmt: skip
        return main([*map(str, argv), *map(str, flags)])

    return run


@pytest.fixture
def rows(tmp_path):
    """rows(name) -> the rows of a file of JSON lines in the test's folder."""
    return lambda name="prefs.jsonl": [
        json.loads(line) for line in (tmp_path / name).read_text().splitlines()
    ]
