"""Long work is told of without drowning a log."""

import pytest

from rankpo_fast import progress as module
from rankpo_fast.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(clock, seconds, total=1000, label="encoding"):
    with progress(label, total, "text") as advance:
        for _ in range(total):
            clock[0] += seconds / total
            advance(1)


def test_a_log_gets_a_line_each_tenth_and_one_at_the_end(clock, capsys):
    work(clock, 1000.0)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "encoding: 2 of 1,000 texts, 0:16:38 left"
    assert said[1] == "encoding: 102 of 1,000 texts, 0:14:58 left"
    assert said[-1] == "encoding: 1,000 texts in 0:16:40" and len(said) == 11


@pytest.mark.parametrize("seconds, label", [(1.9, "encoding"), (1000.0, None)])
def test_quick_work_and_what_has_no_label_say_nothing(seconds, label, clock, capsys):
    work(clock, seconds, label=label)
    assert not capsys.readouterr().err


def test_other_ranks_say_nothing(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(clock, 1000.0)
    assert not capsys.readouterr().err


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(module, "on_terminal", lambda: True)
    monkeypatch.setattr(module, "DELAY", 0)
    work([0.0], 1.0, total=10)
    said = capsys.readouterr().err
    assert "10/10 texts" in said and "left" in said
