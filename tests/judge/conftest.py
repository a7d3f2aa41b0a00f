"""A server that judges, a few pairs, and `annotate` on them."""

import json

import pytest
from pytest_httpserver import HTTPServer

from rankpo_fast.cli import main
from support.judge_server import KEY, MODEL, JudgeServer, write_pairs


@pytest.fixture
def server():
    """Threaded: several requests are answered at once."""
    with HTTPServer(host="127.0.0.1", port=0, threaded=True) as http:
        yield JudgeServer(http)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """It takes longer than all the rest; a test that looks at it is marked so."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("rankpo_fast.judge.picture.png", lambda figures: b"")


@pytest.fixture
def draws():
    """For tests that want the picture."""


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
