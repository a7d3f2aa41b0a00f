"""Pairs become preferences that stage 2 reads, without the judge's bias to places."""

import fcntl
import json

import pytest

from rankpo_fast.cli import main
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.judge.report import p_value
from support.judge_server import KEY, MODEL, always_first, by_alphabet, reply, shown


def report(tmp_path):
    return json.loads((tmp_path / "prefs.jsonl.report.json").read_text())


def test_both_orders_are_asked_and_rows_are_those_of_stage_2(annotate, server, rows, tmp_path):
    assert annotate() == 0
    assert len(server.asked) == 8 and set(server.asked.values()) == {1}
    found = rows()
    assert [row["preferred"] for row in found] == ["B", "A", "B", "A"]
    assert {(row["confidence_score"], row["query_id"][0], row["orders"]) for row in found} == {
        (80, "q", "both")
    }
    read = read_preferences(str(tmp_path / "prefs.jsonl"), use_confidence=True)
    assert [row.chosen for row in read] == ["a 0", "a 1", "a 2", "a 3"]
    assert {row.weight for row in read} == {0.8}
    first = report(tmp_path)["judges"][MODEL]["first_shown_preferred"]
    assert (first["count"], first["of"]) == (4, 8)


def test_verdicts_that_turn_with_the_order_are_no_preferences(annotate, server, rows, tmp_path):
    server.answering = always_first
    assert annotate("--ties_file", tmp_path / "ties.jsonl") == 0
    assert rows() == []
    assert [(row["passages"], row["grades"]) for row in rows("ties.jsonl")][0] == (
        ["b 0", "a 0"], [1, 1])  # fmt: skip
    figures = report(tmp_path)["judges"][MODEL]
    assert figures["flipped"]["count"] == 4 and figures["first_shown_preferred"]["count"] == 8
    assert annotate("--flips", "drop") == 0
    assert report(tmp_path)["output"] == {"rows": 0, "ties": 0, "without_verdict": 4, "open": 0}
    assert sum(server.asked.values()) == 8  # the second run asked nothing


def test_one_order_takes_the_row_as_it_is(annotate, server, rows):
    server.answering = always_first
    assert annotate("--orders", "one") == 0
    assert [row["preferred"] for row in rows()] == ["A"] * 4
    assert sum(server.asked.values()) == 4


def test_the_prompt_is_the_users_and_a_journal_of_another_is_refused(annotate, server, tmp_path,
                                                                     capsys):  # fmt: skip
    mine = tmp_path / "mine.txt"
    mine.write_text('Which fits {query}?\nA: {passage_a}\nB: {passage_b}\n{"x": 1}\n')
    server.answering = lambda body: reply("B")
    assert annotate("--prompt", mine) == 0
    asked = {body["messages"][0]["content"] for body in server.bodies}
    assert 'Which fits query 0?\nA: b 0\nB: a 0\n{"x": 1}\n' in asked
    count = len(server.bodies)
    assert annotate() == 2
    assert "its answers were asked with prompt" in capsys.readouterr().err
    assert len(server.bodies) == count


@pytest.mark.parametrize(
    "text, named",
    [
        ("{query} {passage_a}", "{passage_b} is missing"),
        ("x\n{query} {passage_a} {passage_b} {passage_c}", "mine.txt:2: {passage_c} is unknown"),
    ],
)
def test_a_prompt_that_cannot_be_filled_is_refused(text, named, annotate, server, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text(text)
    assert annotate("--prompt", tmp_path / "mine.txt") == 2
    assert named in capsys.readouterr().err and not server.bodies


def test_texts_with_braces_are_shown_as_they_are(annotate, server, tmp_path):
    row = {"query": "{passage_b}", "passage1": "{query} a", "passage2": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert annotate() == 0
    assert {frozenset(texts) for texts in server.asked} == {frozenset({"{query} a", "b"})}


def test_grades_are_graded_rows_by_query(annotate, server, rows, tmp_path):
    row = {"query": "q", "query_id": 7, "passage_id1": "x", "passage_id2": "y"}
    pairs = [
        row | {"passage1": "a", "passage2": "b"},
        row | {"passage1": "b", "passage2": "c", "passage_id1": "y", "passage_id2": "z"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    grades = {"a": 3, "b": 0, "c": 1}
    server.answering = lambda body: reply(f"Grade: {grades[shown(body)[0]]}\nConfidence: 70")
    assert annotate("--mode", "grade") == 0
    [found] = rows()
    assert (found["passages"], found["grades"]) == (["a", "b", "c"], [3, 0, 1])
    assert (found["query_id"], found["passage_ids"]) == (7, ["x", "y", "z"])
    assert sum(server.asked.values()) == 3  # b once


def test_a_list_is_ranked_in_both_orders_and_the_places_are_averaged(annotate, server, rows,
                                                                     tmp_path):  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "q", "passages": ["a", "b", "c"]}))

    # c is always last; of a and b the one that is shown first is the best: they are equal.
    def answering(body):
        order = sorted(range(3), key=lambda i: (shown(body)[i] == "c", i))
        return reply(f"Ranking: {' > '.join(f'[{i + 1}]' for i in order)}")

    server.answering = answering
    assert annotate("--mode", "list") == 0
    [found] = rows()
    assert found["grades"] == [2.25, 2.25, 0]
    first = report(tmp_path)["judges"][MODEL]["first_shown_preferred"]
    assert (first["count"], first["of"]) == (4, 6)


def test_confidence_is_the_probability_of_the_verdict_where_it_is_served(annotate, server, rows):
    def answering(body):
        assert body["logprobs"] is True
        answer = json.loads(by_alphabet(body).data)
        text = answer["choices"][0]["message"]["content"]
        letter = json.loads(text)["preferred"]
        before, after = text.split(f'"{letter}"')
        other = "B" if letter == "A" else "A"
        top = [{"token": letter, "logprob": -0.1054}, {"token": f" {other}", "logprob": -2.3026},
               {"token": "x", "logprob": -5.0}]  # fmt: skip
        answer["choices"][0]["logprobs"] = {"content": [
            {"token": before + '"', "logprob": 0.0, "top_logprobs": []},
            {"token": letter, "logprob": -0.1054, "top_logprobs": top},
            {"token": '"' + after, "logprob": 0.0, "top_logprobs": []},
        ]}  # fmt: skip
        return json.dumps(answer)

    from werkzeug import Response

    server.answering = lambda body: Response(answering(body), 200, content_type="application/json")
    assert annotate("--logprobs") == 0
    assert {row["confidence_score"] for row in rows()} == {90.0}  # 0.9 / (0.9 + 0.1)


def test_several_judges_agree_to_a_degree_and_have_a_consensus(annotate, server, rows, tmp_path):
    names = ("one", "two", "three")
    server.http.clear_all_handlers()
    server.http.expect_request("/v1/models").respond_with_json(
        {"data": [{"id": name, "object": "model"} for name in names]}
    )
    server.http.expect_request("/v1/chat/completions").respond_with_handler(server._answer)

    def answering(body):
        """Two go by the alphabet, the third always against it."""
        letter = json.loads(json.loads(by_alphabet(body).data)["choices"][0]["message"]["content"])
        against = {"A": "B", "B": "A"}[letter["preferred"]]
        return reply(f"Preferred: {against if body['model'] == 'three' else letter['preferred']}")

    server.answering = answering
    assert annotate(model=names) == 0
    assert [row["preferred"] for row in rows()] == ["B", "A", "B", "A"]
    scores = {row["confidence_score"] for row in rows()}
    assert len(scores) == 1 and 60 < scores.pop() < 75  # two of three, drawn to the middle
    found = report(tmp_path)["agreement"]
    assert found["units"] == 4 and -0.5 < found["alpha"] < 0.1
    assert annotate("--consensus", "majority", model=names) == 0
    assert {row["confidence_score"] for row in rows()} == {66.67}


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(annotate, server, capsys, tmp_path):
    assert annotate("--dry_run", "--price_in", 1000, "--price_out", 2000) == 0
    said = capsys.readouterr().out
    assert "8 requests" in said and "estimated, a token being 4 bytes" in said
    assert "at most 4,096 of answers" in said and "at most" in said.split(";")[-1]
    assert not server.bodies and [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_dry_run_reads_the_journal_that_another_process_writes(annotate, capsys, tmp_path):
    assert annotate("--concurrency", 1) == 0
    [path] = tmp_path.glob("*.journal.jsonl")
    capsys.readouterr()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"key": "half')
        file.flush()
        assert annotate("--dry_run") == 0
    assert "8 questions to tiny-judge; 8 are answered" in capsys.readouterr().out
    assert path.read_bytes().endswith(b"half")


def test_no_more_is_asked_than_may_be_spent(annotate, server, capsys, rows):
    # An answer of 100 + 10 tokens costs 0.11; one to come is held for more.
    prices = ("--price_in", 1000, "--price_out", 1000, "--max_answer_tokens", 50)
    assert annotate("--max_cost", 1.0, "--concurrency", 1, *prices) == 1
    said = capsys.readouterr().err
    assert "than is left of --max_cost" in said and "questions have no answer" in said
    spent = 0.11 * len(server.bodies)
    assert 0 < spent <= 1.0 and len(server.bodies) < 8
    before = len(server.bodies)
    assert annotate("--max_cost", 1.0, "--concurrency", 1, *prices) == 1
    assert len(server.bodies) == before  # what the journal's answers cost counts
    assert annotate("--max_cost", 3.0, *prices) == 0
    assert len(rows()) == 4 and set(server.asked.values()) == {1}


def test_batch_files_go_out_and_come_in(annotate, server, rows, tmp_path, capsys):
    assert annotate("--batch_out", tmp_path / "batch.jsonl") == 0
    requests = rows("batch.jsonl")
    assert len(requests) == 8 and {r["url"] for r in requests} == {"/v1/chat/completions"}
    assert {r["body"]["model"] for r in requests} == {MODEL}
    results = [
        {"custom_id": r["custom_id"], "error": None,
         "response": {"status_code": 200, "body": json.loads(by_alphabet(r["body"]).data)}}
        for r in requests
    ]  # fmt: skip
    results[0] = {"custom_id": requests[0]["custom_id"], "response": None, "error": {"code": "x"}}
    results.append(results[1] | {"custom_id": "another's"})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    assert annotate("--batch_in", tmp_path / "results.jsonl") == 1
    said = capsys.readouterr()
    assert "1 failed" in said.out and "7 taken" in said.out and "1 results are of other" in said.err
    assert len(rows()) == 3 and not server.bodies
    assert annotate() == 0
    assert len(rows()) == 4 and len(server.bodies) == 1


def test_the_key_stands_in_no_file_and_no_message(annotate, server, tmp_path, capsys):
    server.answering = lambda body: reply(f"Preferred: A, says {KEY}")
    assert annotate() == 0
    assert server.keys == {f"Bearer {KEY}"}
    said = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4  # pairs, preferences, journal, report
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert KEY not in said.out + said.err
    assert any(b"[key]" in path.read_bytes() for path in files)


@pytest.mark.parametrize(("p", "text"), [(1e-245, "p < 0.0001"), (0.0035, "p = 0.0035")])
def test_p_values_are_written_as_people_write_them(p, text):
    assert p_value(p) == text


def test_rows_that_are_judged_get_a_report_and_a_picture(draws, tmp_path, capsys):
    rows = [
        {"query": "q", "passage1": f"a{i}", "passage2": "b", "model": "m", "confidence_score": 90,
         "preferred": "A" if i < 65 else "B", "passage_rank1": 1, "passage_rank2": 2}
        for i in range(100)
    ]  # fmt: skip
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["annotate", "--report_on", str(tmp_path / "judged.jsonl")]) == 0
    assert "first shown preferred 65 of 100 (55% to 74%, p = 0.0035)" in capsys.readouterr().out
    figures = json.loads((tmp_path / "judged.jsonl.report.json").read_text())
    assert figures["judges"]["m"]["confidence"]["histogram"][9] == 100
    assert (tmp_path / "judged.jsonl.report.png").read_bytes().startswith(b"\x89PNG")


def test_judges_of_a_file_have_their_own_names_and_prices(annotate, server, tmp_path):
    judges = [
        {"model": MODEL, "base_url": server.url, "name": "cheap", "price_in": 1, "price_out": 1},
        {"model": MODEL, "base_url": server.url, "name": "dear", "price_in": 10, "price_out": 20},
    ]
    write(tmp_path / "pairs.jsonl", [{"query": "q", "passage1": "a", "passage2": "b"}])
    write(tmp_path / "judges.yaml", judges, "- {}\n")  # JSON is YAML
    argv = ["annotate", "--judges", tmp_path / "judges.yaml", "--pairs", tmp_path / "pairs.jsonl",
            "--output", tmp_path / "prefs.jsonl"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    found = report(tmp_path)
    assert {name: one["cost"] for name, one in found["judges"].items()} == {
        "cheap": 220e-6, "dear": 2400e-6}  # fmt: skip
    assert found["agreement"]["alpha"] is None  # all said one thing
    assert set(server.asked.values()) == {2}


def write(path, rows, line="{}\n"):
    path.write_text("".join(line.format(json.dumps(row)) for row in rows))


REFUSED = [
    (["--mode", "grade", "--orders", "one"], "--orders needs --mode pair or list"),
    (["--mode", "list", "--ties_file", "t"], "--ties_file needs --mode pair"),
    (["--orders", "one", "--flips", "drop"], "--flips drop needs --orders both"),
    (["--price_in", "1"], "--price_in and --price_out go together"),
    (["--max_cost", "1"], "--max_cost needs --price_in"),
    (["--dry_run", "--batch_out", "b"], "--batch_out and --dry_run exclude each other"),
    (["--report", "r.txt"], "--report must be a .json file"),
    (["--journal", "pairs.jsonl"], "pairs.jsonl is also read"),
    (["--ties_file", "prefs.jsonl"], "are both"),
    (["--report_on", "x.jsonl"], "--report_on stands alone"),
    (["--base_url", "localhost:8000"], "must be as http://localhost:8000/v1"),
    (["--judges", "none.yaml"], "leave those out"),
    (["--pairs", "bad.jsonl"], 'bad.jsonl:2: missing key "passage2"'),
    (["--batch_in", "bad.jsonl"], 'bad.jsonl:1: missing key "custom_id"'),
    (["--tokenizer", "no/such/tokenizer"], "--tokenizer no/such/tokenizer"),
]


@pytest.mark.parametrize("flags, named", REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_done_is_refused_by_name(flags, named, annotate, server, tmp_path,
                                                monkeypatch, capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = {"query": "q", "passage1": "a", "passage2": "b"}
    write(tmp_path / "bad.jsonl", [row, {"query": "q", "passage1": "a"}])
    assert annotate(*flags) == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said
    assert not server.bodies and not (tmp_path / "prefs.jsonl").exists()


def test_equal_passages_are_left_out_and_a_pair_that_comes_twice_is_asked_once(
    annotate, server, rows, tmp_path, capsys
):
    row = {"query": "q", "passage1": "a", "passage2": "b"}
    write(tmp_path / "pairs.jsonl", [row, row | {"passage2": "a"}, row])
    assert annotate() == 0
    assert len(rows()) == 2 and sum(server.asked.values()) == 2
    assert "1 pairs of equal passages are left out" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["pair", "grade", "list"])
def test_the_default_prompt_that_is_written_is_the_one_that_is_used(mode, annotate, server,
                                                                    tmp_path):  # fmt: skip
    mine = tmp_path / "mine.txt"
    assert main(["annotate", "--write_prompt", str(mine), "--mode", mode]) == 0
    assert annotate("--mode", mode, "--prompt", mine, "--batch_out", tmp_path / "one") == 0
    assert annotate("--mode", mode, "--batch_out", tmp_path / "two") == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
