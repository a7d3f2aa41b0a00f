"""Whatever a server does, the run goes on, counts it, and a rerun asks what is left alone."""

import json
import time
from collections import Counter

import pytest
from werkzeug import Response

from rankpo_fast.judge import asking
from rankpo_fast.judge.journal import Journal
from support.judge_server import KEY, MODEL, by_alphabet, completion, error, reply, shown

BAD = "a 0"  # the passage whose questions are answered badly


def once_bad(bad, always=False):
    """Answers the questions that show BAD with `bad()` the first time, or always."""
    seen: Counter[tuple[str, ...]] = Counter()

    def answering(body):
        texts = tuple(shown(body))
        seen[texts] += 1
        return bad() if BAD in texts and (always or seen[texts] == 1) else by_alphabet(body)

    return answering


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)


def stall():
    time.sleep(0.6)
    return reply("Preferred: A")


PASSING = [
    pytest.param(lambda: error(429, "slow down", **{"Retry-After": "0"}), "429", id="429"),
    pytest.param(lambda: error(500, "oops"), "500", id="500"),
    pytest.param(lambda: Response("<html>bad gateway</html>", 502), "502", id="no-json-error"),
    pytest.param(lambda: Response("<html>hello</html>", 200), "malformed reply", id="html"),
    pytest.param(
        lambda: Response(json.dumps(completion("x"))[:50], 200, content_type="application/json"),
        "malformed reply", id="truncated-json",
    ),
    pytest.param(
        lambda: Response('{"choices": []}', 200, content_type="application/json"),
        "malformed reply", id="no-choice",
    ),
    pytest.param(stall, "timeout", id="stall"),
]  # fmt: skip


@pytest.mark.parametrize("bad, kind", PASSING)
def test_what_passes_is_tried_again_and_counted(bad, kind, annotate, server, rows, capsys):
    server.answering = once_bad(bad)
    assert annotate("--timeout", 0.3) == 0
    assert f"{kind} (2)" in capsys.readouterr().err
    assert len(rows()) == 4 and sum(server.asked.values()) == 10


@pytest.mark.parametrize("bad, kind", PASSING[1:2] + PASSING[3:4] + PASSING[6:])
def test_what_stays_leaves_its_questions_alone_for_a_rerun(bad, kind, annotate, server, rows,
                                                           capsys):  # fmt: skip
    server.answering = once_bad(bad, always=True)
    assert annotate("--timeout", 0.3, retries=1) == 1
    said = capsys.readouterr().err
    assert (
        f"2 questions have no answer: {kind} (2)" in said
        and f"without an answer: {kind} (4)" in said
    )
    assert len(rows()) == 3
    before, server.answering = sum(server.asked.values()), by_alphabet
    assert annotate() == 0
    assert len(rows()) == 4 and sum(server.asked.values()) == before + 2


OVERFLOW = "This model's maximum context length is 100 tokens"


@pytest.mark.parametrize(
    "bad, kind",
    [
        (lambda: error(400, OVERFLOW, "context_length_exceeded"), "context overflow"),
        (lambda: error(400, "blocked", "content_filter"), "refused by a filter"),
    ],
)
def test_what_no_try_would_help_is_asked_once(bad, kind, annotate, server, rows, capsys):
    server.answering = once_bad(bad, always=True)
    assert annotate() == 1
    assert f"2 questions have no answer: {kind} (2)" in capsys.readouterr().err
    assert len(rows()) == 3 and set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    "bad, error",
    [
        (lambda: reply("I like both of them."), "unparsed"),
        (lambda: reply('{"comparison": "A is', "length"), "truncated"),
        (lambda: reply("", refusal="I cannot judge people."), "refused"),
        (lambda: reply("", "content_filter"), "refused"),
    ],
)
def test_answers_without_a_verdict_are_kept_and_counted(bad, error, annotate, server, rows,
                                                        tmp_path, capsys):  # fmt: skip
    server.answering = once_bad(bad)
    assert annotate() == 0
    assert "2 answers do not parse" in capsys.readouterr().err
    kept = [row for row in rows("prefs.jsonl.journal.jsonl")[1:] if row["preferred"] is None]
    assert [row["error"] for row in kept] == [error] * 2
    assert len(rows()) == 3
    figures = json.loads((tmp_path / "prefs.jsonl.report.json").read_text())
    assert figures["judges"][MODEL]["without_verdict"] == {error: 2}
    assert annotate() == 0 and sum(server.asked.values()) == 8  # paid, so not asked again
    assert annotate("--retry_unparsed", 1) == 0
    assert len(rows()) == 4 and sum(server.asked.values()) == 10
    roles = [message["role"] for message in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_unparsed_answers_are_asked_for_as_often_as_wanted_and_no_more(annotate, server):
    server.answering = once_bad(lambda: reply("hm"), always=True)
    assert annotate("--retry_unparsed", 2) == 0
    assert sorted(server.asked.values()) == [1] * 6 + [3, 3]
    assert annotate("--retry_unparsed", 2) == 0
    assert sum(server.asked.values()) == 12


def test_what_should_be_asked_again_and_got_no_answer_is_left(annotate, server, capsys, tmp_path):
    """Such a question has an answer in the journal, which does not parse."""
    server.answering = once_bad(lambda: reply("hm"), always=True)
    assert annotate() == 0
    server.answering = lambda body: error(503, "down")
    assert annotate("--retry_unparsed", 1, retries=0) == 1
    assert "2 questions have no answer" in capsys.readouterr().err
    left = json.loads((tmp_path / "prefs.jsonl.report.json").read_text())["left"]
    assert left == {"503": 2}
    server.answering = by_alphabet
    assert annotate("--retry_unparsed", 1) == 0


def test_retry_after_is_waited_for_by_all(annotate, server):
    server.answering = once_bad(lambda: error(429, "wait", **{"Retry-After": "1"}))
    assert annotate("--concurrency", 1) == 0
    pauses = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert sum(pause > 0.99 for pause in pauses) == 2  # no machine is so quick as to wait less


def test_a_quota_that_is_used_up_ends_the_run(annotate, server, capsys):
    server.answering = lambda body: error(429, "pay", "insufficient_quota")
    assert annotate("--concurrency", 1) == 1
    assert "insufficient_quota" in capsys.readouterr().err and len(server.bodies) == 1


def test_a_wait_of_hours_ends_the_run(annotate, server, capsys):
    server.answering = lambda body: error(429, "later", **{"Retry-After": "7200"})
    assert annotate("--concurrency", 1) == 1
    assert "asks to wait for 7,200 s" in capsys.readouterr().err and len(server.bodies) == 1


def test_a_server_that_breaks_down_is_not_asked_everything(annotate, server, capsys, tmp_path):
    rows = [{"query": f"q {i}", "passage1": "a", "passage2": "b"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.answering = lambda body: error(503, "down")
    assert annotate("--concurrency", 2, retries=0) == 1
    assert "3 questions in a row got no answer" in capsys.readouterr().err
    assert len(server.bodies) <= 5


def test_a_server_without_json_schemas_is_asked_in_words(annotate, server, rows, capsys):
    def answering(body):
        if "response_format" in body:
            return error(400, "response_format is not supported")
        return by_alphabet(body)

    server.answering = answering
    assert annotate("--concurrency", 1) == 0
    assert len(rows()) == 4 and len(server.bodies) == 9
    assert capsys.readouterr().err.count("goes without") == 1


def test_a_model_that_names_its_limits_otherwise_is_asked_its_way(annotate, server, rows):
    def answering(body):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens': use 'max_completion_tokens'")
        if "temperature" in body:
            return error(400, "Unsupported value: 'temperature'")
        assert body["max_completion_tokens"] == 512
        return by_alphabet(body)

    server.answering = answering
    assert annotate("--concurrency", 1) == 0
    assert len(rows()) == 4 and "response_format" in server.bodies[-1]


def test_a_bad_request_is_no_reason_to_ask_for_ever(annotate, server, capsys):
    server.answering = lambda body: error(400, "no")
    assert annotate("--concurrency", 1) == 1
    assert len(server.bodies) == 9 and "bad request (8)" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_before_anything_is_asked(annotate, server, capsys):
    server.http.stop()
    assert annotate() == 2
    assert "no server answers there" in capsys.readouterr().err


def test_a_model_that_the_server_lacks_is_said_with_those_it_has(annotate, server, capsys):
    assert annotate(model=("tiny-juge",)) == 2
    said = capsys.readouterr().err
    assert f"has {MODEL}" in said and "did you mean" in said and not server.bodies


def test_a_key_that_is_refused_is_not_repeated(annotate, server, capsys, monkeypatch):
    server.http.clear_all_handlers()
    body = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    server.http.expect_request("/v1/models").respond_with_json(body, status=401)
    assert annotate() == 2
    said = capsys.readouterr().err
    assert "refuses the key" in said and KEY not in said and "[key]" in said


def test_a_key_that_is_asked_for_must_be_there(annotate, capsys, monkeypatch):
    assert annotate("--api_key_env", "NO_SUCH_KEY") == 2
    assert "NO_SUCH_KEY: this variable of the environment is not set" in capsys.readouterr().err


def test_a_password_in_the_address_is_refused(annotate, capsys):
    assert annotate("--base_url", "http://me:secret@localhost/v1") == 2
    said = capsys.readouterr().err
    assert "must hold no password" in said and "secret" not in said


def test_a_rate_is_kept(annotate, server):
    assert annotate("--requests_per_minute", 600) == 0
    assert server.times[-1] - server.times[0] > 0.65  # eight, a tenth of a second apart


def test_a_full_disk_ends_the_run(annotate, monkeypatch, capsys):
    def full(self, answer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", full)
    assert annotate() == 1
    assert "No space left" in capsys.readouterr().err
