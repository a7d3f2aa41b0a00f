"""Whoever is killed has lost no answer, and pays for none again."""

import json
import os
import signal
import subprocess
import sys
import time

import openai  # noqa: F401 - before processes are forked, each of which would import it
import pytest

from rankpo_fast.cli import main
from rankpo_fast.judge.journal import question_key
from support.judge_server import MODEL, by_alphabet, write_pairs

pytestmark = pytest.mark.long
PAIRS, KILLS, CONCURRENCY = 60, 10, 4


def argv(server, folder, name):
    flags = {"--base_url": server.url, "--model": MODEL, "--concurrency": CONCURRENCY,
             "--pairs": folder / "pairs.jsonl", "--output": folder / name}  # fmt: skip
    return ["annotate", *(str(part) for pair in flags.items() for part in pair)]


def fork(server, folder, name) -> int:
    """The number of a process that runs it: imports, which take longest, are done already."""
    process = os.fork()
    if process == 0:
        os._exit(main(argv(server, folder, name)))
    return process


def journaled(folder, name):
    """The answers whose lines are whole."""
    path = folder / f"{name}.journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines[1:]]


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def slow(server, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)

    def answering(body):
        time.sleep(0.02)
        return by_alphabet(body)

    server.answering = answering
    return server


def texts_of(answer, rows):
    row = rows[answer["pair"]]
    return tuple(row[f"passage{i + 1}"] for i in answer["shown"])


def test_ten_kills_pay_for_no_answer_twice_and_change_no_row(slow, tmp_path):
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    rows = {
        question_key(row["query"], row["passage1"], row["passage2"]): row
        for row in map(json.loads, lines)
    }
    asked_when_kept: dict[tuple, int] = {}
    for _ in range(KILLS):
        before = len(journaled(tmp_path, "killed"))
        process = fork(slow, tmp_path, "killed")
        wait_for(lambda before=before: len(journaled(tmp_path, "killed")) >= before + 6)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        kept = [texts_of(answer, rows) for answer in journaled(tmp_path, "killed")]
        assert len(set(kept)) == len(kept) > before
        for texts in kept:
            asked_when_kept.setdefault(texts, slow.asked[texts])
    assert os.waitpid(fork(slow, tmp_path, "killed"), 0)[1] == 0
    # What was on the disk was never asked again; what was under way at a kill, at most once each.
    assert {texts: slow.asked[texts] for texts in asked_when_kept} == asked_when_kept
    assert len(slow.asked) == 2 * PAIRS
    assert sum(slow.asked.values()) <= 2 * PAIRS + KILLS * CONCURRENCY
    slow.asked.clear()
    assert os.waitpid(fork(slow, tmp_path, "whole"), 0)[1] == 0
    assert sum(slow.asked.values()) == 2 * PAIRS
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_asking_and_keeps_what_is_under_way(number, code, slow, tmp_path):
    command = [sys.executable, "-m", "rankpo_fast.cli", *argv(slow, tmp_path, "prefs")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(journaled(tmp_path, "prefs")) >= 5)
    process.send_signal(number)
    began = time.monotonic()
    said = process.communicate()[1]
    assert process.returncode == code and "questions are left; all answers are in" in said
    assert time.monotonic() - began < 30  # and not the hour that all answers would take
    assert "Traceback" not in said
    kept = journaled(tmp_path, "prefs")
    assert sum(slow.asked.values()) == len(kept) < 2 * PAIRS
    assert not (tmp_path / "prefs").exists()
