"""docs/walkthrough.md: its commands run in order, on fewer records, each on what the last left."""

import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import records
import simulated_judge

from rankpo_fast.cli import main

PAGE = Path(__file__).parents[1] / "docs/walkthrough.md"
URL = "http://127.0.0.1:8765/v1"
SMALLER = {"--max_steps": "2", "--eval_steps": "2"}


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture
def judge():
    """serve(argv of the example) -> its URL, at a port of its own."""
    servers = []

    def serve(argv):
        flags = dict(zip(argv[::2], argv[1::2], strict=True))
        scores = simulated_judge.read_scores(Path(flags["--passages"]), flags["--text"], "quality")
        made = simulated_judge.Judge(
            scores, sharpness=6.0, bias=float(flags["--bias"]), noise=0.0, seed=0
        )
        servers.append(simulated_judge.serve(made))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.long
def test_the_commands_of_the_walk_run_as_they_are_printed(judge, tmp_path, monkeypatch, capsys):
    pytest.importorskip("duckdb")
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    [rules] = blocks("yaml")
    Path("rules.yaml").write_text(rules, encoding="utf-8")
    url, ran = None, set()
    for command in commands():
        match command:
            case ["mkdir" | "export", *_]:
                continue
            case ["python", "../examples/records.py", *argv]:
                records.main([*argv, "--jobs", "150", "--talents", "600"])
            case ["python", "../examples/simulated_judge.py", *argv]:
                url = judge(argv)
            case ["rankpo-fast", name, *argv]:
                for flag in SMALLER.keys() & set(argv):
                    argv[argv.index(flag) + 1] = SMALLER[flag]
                argv = [url if word == URL else word for word in argv]
                assert main([name, *argv]) == 0, command
                ran.add(name)
            case _:
                raise AssertionError(
                    f"the page has a command that no reader was promised: {command}"
                )
    assert ran == {"label", "contrastive", "mine", "pairs", "annotate", "rankpo", "merge",
                   "evaluate", "plan"}  # fmt: skip
    pairs, preferences = (
        [json.loads(line) for line in Path(f"train_{what}.jsonl").read_text().splitlines()]
        for what in ("pairs", "prefs")
    )
    assert 0 < len(preferences) < len(pairs)  # flips are left out
    assert all(str(row["query_id"]).startswith("J") for row in preferences)
    assert "alignment" in Path("report/report.md").read_text()
    assert "are not in the map" not in capsys.readouterr().out
