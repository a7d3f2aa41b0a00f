"""An answer that was paid for is never paid again."""

import json

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Journal, question_key

ASKED = {"prompt": "which?"}


def add(path, *keys):
    with Journal(path, ASKED) as journal:
        for key in keys:
            journal.add({"key": key, "answer": "A"})


def test_answers_are_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    add(path, "one", "two")
    with Journal(path, ASKED) as journal:
        assert "one" in journal and "two" in journal and "three" not in journal
        assert [answer["key"] for answer in journal.answers] == ["one", "two"]


def test_a_line_cut_off_by_a_kill_is_taken_away_and_no_other(tmp_path):
    path = tmp_path / "answers.jsonl"
    add(path, "one", "two")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="answers.jsonl:3: cut off"):
        add(path, "three")
    with Journal(path, ASKED) as journal:
        assert [answer["key"] for answer in journal.answers] == ["one", "three"]


def test_damage_before_the_end_is_refused_by_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    add(path, "one", "two")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(InputError, match="answers.jsonl:2: damaged"):
        Journal(path, ASKED)


def test_a_journal_of_another_prompt_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    add(path, "one")
    with pytest.raises(InputError, match="asked with prompt 'which\\?', now it is 'who\\?'"):
        Journal(path, {"prompt": "who?"})


def test_a_journal_without_answers_takes_any_prompt(tmp_path):
    path = tmp_path / "answers.jsonl"
    add(path)
    for _ in range(2):
        with Journal(path, {"prompt": "who?"}) as journal:
            assert journal.answers == []
    assert len(path.read_text().splitlines()) == 1


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal(path, ASKED), pytest.raises(InputError, match="another process"):
        Journal(path, ASKED)


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "q"}) + "\n")
    with pytest.raises(InputError, match="no journal"):
        Journal(path, ASKED)
    assert json.loads(path.read_text()) == {"query": "q"}


def test_a_key_tells_the_order_of_texts_apart():
    assert question_key("p", "m", ["a", "b"]) != question_key("p", "m", ["b", "a"])
