"""People's verdicts over HTTP: saved before that is said, counted once, closed to others."""

import http.client
import json
import signal
import threading
import time
import warnings
from urllib.parse import urlsplit

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Journal, question_key
from rankpo_fast.judge.page import LARGEST_BODY, serve_page
from rankpo_fast.judge.people import pair_id, shown_order, verdicts
from support.judge_page import PAIRS, free_port, serving

ASKED = {"prompt": "who fits?"}


class Client:
    """One browser, without the page."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.base, self.host = parts.path, parts.netloc
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)

    def request(self, method, path, body=None, **headers):
        """(status, what was said)."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, headers)
        reply = self.connection.getresponse()
        content = reply.read()
        return reply.status, json.loads(content) if reply.status != 501 else content

    def state(self, name="Anna"):
        return self.request("GET", f"{self.base}state?annotator={name}")[1]

    def post(self, body, **headers):
        headers = {"Content_Type": "application/json"} | headers
        return self.request("POST", f"{self.base}verdict", json.dumps(body), **headers)

    def choose(self, choice, name="Anna", of="question", unsure=False):
        return self.post(verdict(self.state(name)[of], choice, name, unsure=unsure))


def verdict(about, choice, name="Anna", **changes):
    sent = {"annotator": name, "pair": about["pair"], "turn": about["turn"], "choice": choice}
    return {**sent, "unsure": False, "seconds": 1.25, **changes}


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "answers.jsonl", ASKED) as opened:
        yield opened


@pytest.fixture
def server(journal):
    with serve_page(PAIRS, journal, instructions="who fits?") as serving:
        yield serving


@pytest.fixture
def client(server):
    return Client(server.url)


def on_disk(journal):
    return [json.loads(line) for line in journal.path.read_text().splitlines()[1:]]


def test_a_verdict_is_on_the_disk_when_it_is_said_to_be_saved(client, journal):
    question = client.state()["question"]
    status, after = client.choose("left", unsure=True)
    [answer] = on_disk(journal)
    first, second = (PAIRS[0][f"passage{i + 1}"] for i in answer["shown"])
    assert status == 200 and after["done"] == 1 and after["question"]["query"] == "job 1"
    assert (question["left"], question["right"]) == (first, second)
    assert answer["key"] == question_key("who fits?", "Anna", "job 0", first, second)
    assert answer["pair"] == question["pair"] == pair_id("job 0", "a0", "b0")
    assert answer["preferred"] == "AB"[answer["shown"][0]] and answer["answer"] == "left"
    assert (answer["judge"], answer["confidence"], answer["seconds"]) == ("Anna", 50, 1.2)
    assert answer["usage"] is None and abs(answer["created"] - time.time()) < 60


def test_the_side_is_random_yet_the_same_each_time():
    pairs = [pair_id(f"job {i}", "a", "b") for i in range(1000)]
    orders = [shown_order("Anna", pair) for pair in pairs]
    assert orders == [shown_order("Anna", pair) for pair in pairs]
    other = [shown_order("Ben", pair) for pair in pairs]
    for share in (orders.count([1, 0]), sum(a == b for a, b in zip(orders, other, strict=True))):
        assert 400 < share < 600  # 6 standard deviations of a fair coin


def test_each_annotator_goes_on_where_they_were(client, journal, tmp_path):
    client.choose("left"), client.choose("tie"), client.choose("right", "Ben")
    with Journal(tmp_path / "copy.jsonl", ASKED) as again:
        for answer in journal.answers:
            again.add(answer)
        with serve_page(PAIRS, again, instructions="who fits?") as restarted:
            client = Client(restarted.url)
            assert client.state("Anna")["question"]["query"] == "job 2"
            assert client.state("Ben")["question"]["query"] == "job 1"
            assert client.state("Cleo")["done"] == 0
            assert client.request("GET", f"{client.base}state")[1]["annotators"] == ["Anna", "Ben"]


def test_undo_withdraws_the_last_answer_and_the_next_one_stands(client, journal):
    client.choose("left"), client.choose("right")
    undone = client.state()["last"]
    status, after = client.choose("undo", of="last")
    assert status == 200 and after["done"] == 1 and after["question"]["query"] == "job 1"
    client.choose("undo", of="last")
    assert client.state()["done"] == 0 and client.state()["last"] is None
    assert verdicts(journal.answers) == []
    client.choose("tie")
    assert [answer["answer"] for answer in on_disk(journal)] == [
        *("left", "right", "undo", "undo", "tie")
    ]
    [standing] = verdicts(journal.answers)
    assert standing["preferred"] == "tie" and standing["pair"] == pair_id("job 0", "a0", "b0")
    assert client.post(verdict(undone, "undo"))[0] == 200  # sent again: it is withdrawn already
    assert client.post(verdict(undone, "undo", turn=2))[0] == 409  # there is nothing to withdraw
    assert len(on_disk(journal)) == 5


def test_two_tabs_count_once(client, journal):
    question = client.state()["question"]
    assert client.post(verdict(question, "left"))[0] == 200
    status, said = client.post(verdict(question, "right"))
    assert status == 409 and "another tab" in said["error"]
    assert said["state"]["question"]["query"] == "job 1"  # what the late tab shows
    assert client.post(verdict(question, "left"))[0] == 200  # sent again: our reply was lost
    assert [answer["answer"] for answer in on_disk(journal)] == ["left"]


def test_tabs_that_answer_at_once_write_one_answer(server, journal):
    question = Client(server.url).state()["question"]
    replies, start = [], threading.Barrier(8)

    def send(choice):
        client = Client(server.url)
        start.wait()
        replies.append(client.post(verdict(question, choice))[0])

    threads = [threading.Thread(target=send, args=(c,)) for c in ("left", "right") * 4]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(replies) == [200] * 4 + [409] * 4 and len(on_disk(journal)) == 1


def test_skipped_pairs_are_not_asked_again_and_prefer_none(client, journal):
    for choice in ("skip", "left", "tie"):
        client.choose(choice)
    state = client.state()
    assert (state["question"], state["done"], state["skipped"]) == (None, 3, 1)
    preferred = [answer["preferred"] for answer in verdicts(journal.answers)]
    assert preferred[0] is None and preferred[1] in "AB" and preferred[2] == "tie"


def test_equal_pairs_are_asked_once(journal):
    with pytest.warns(UserWarning, match="1 of 4 pairs are repetitions"):
        serving = serve_page([*PAIRS, PAIRS[0]], journal)
    with serving:
        assert Client(serving.url).state()["pairs"] == 3


def test_a_verdict_that_cannot_be_saved_is_not_taken(client, journal, monkeypatch):
    def full(answer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "add", full)
    status, said = client.choose("left")
    assert status == 507 and "No space left" in said["error"]
    assert client.state()["done"] == 0
    monkeypatch.undo()
    assert client.choose("left")[1]["done"] == 1


# --- others ---


def test_without_the_token_there_is_nothing(client):
    wrong = f"/{'x' * 32}/"
    for path in ("/", "/state", wrong, f"{wrong}state?annotator=Anna", client.base[:-1]):
        assert client.request("GET", path)[0] == 404
    assert (
        client.request("POST", f"{wrong}verdict", "{}", Content_Type="application/json")[0] == 404
    )


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),  # another port of this machine
        ({"Host": "evil.example"}, 421),  # a name that now leads here
        ({"Host": ""}, 421),
        ({"Content_Type": "text/plain"}, 415),  # which a form of another site may send
    ],
    ids=str,
)
def test_other_sites_cannot_write(client, journal, headers, status):
    question = client.state()["question"]
    assert client.post(verdict(question, "left"), **headers)[0] == status
    assert on_disk(journal) == []
    same = {"Origin": f"http://{client.host}", "Sec_Fetch_Site": "same-origin"}
    assert client.post(verdict(question, "left"), **same)[0] == 200


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:80", "10.1.2.3:9"])
def test_this_machine_is_known_by_its_own_names(client, host):
    assert client.request("GET", f"{client.base}state?annotator=A", Host=host)[0] == 200


CHANGES = [
    {"annotator": ""}, {"annotator": "x" * 65}, {"annotator": "a\nb"}, {"annotator": 3},
    {"choice": "A"}, {"choice": None}, {"turn": "0"}, {"turn": True}, {"unsure": 1},
    {"seconds": -1}, {"seconds": float("nan")}, {"seconds": None}, {"pair": 3},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_is_no_verdict_is_refused(client, journal, changes):
    assert client.post(verdict(client.state()["question"], "left") | changes)[0] == 400
    assert on_disk(journal) == [] and client.state()["done"] == 0


def test_a_pair_of_other_data_is_refused(client, journal):
    sent = verdict({"pair": "0" * 64, "turn": 0}, "left")
    status, said = client.post(sent)
    assert status == 409 and "not asked" in said["error"] and on_disk(journal) == []


def test_size_and_form_of_a_request_are_limited(client, server):
    assert client.post({"annotator": "x" * LARGEST_BODY})[0] == 413
    client = Client(server.url)
    assert client.post([1])[0] == 400
    headers = {"Content_Type": "application/json"}
    assert client.request("POST", f"{client.base}verdict", "{", **headers)[0] == 400
    deep = "[" * 8000
    assert client.request("POST", f"{client.base}verdict", deep, **headers)[0] == 400
    assert client.request("PUT", f"{client.base}verdict", "{}")[0] == 501
    client = Client(server.url)
    headers["Transfer_Encoding"] = "chunked"
    assert client.request("POST", f"{client.base}verdict", b"", **headers)[0] == 411


def test_the_page_loads_nothing_and_runs_only_its_own_script(client):
    client.connection.request("GET", client.base)
    reply = client.connection.getresponse()
    html, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    assert "//" not in html.replace("// ", "") and "innerHTML" not in html
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["Referrer-Policy"] == "no-referrer"  # the token is in the address
    assert reply.headers["Cache-Control"] == "no-store"


def test_the_token_is_the_owners_alone_and_the_same_next_time(journal):
    path = journal.path.with_name("answers.jsonl.token")
    with serve_page(PAIRS, journal) as one:
        assert path.read_text().strip() in one.url and path.stat().st_mode & 0o777 == 0o600
    with serve_page(PAIRS, journal) as two:
        assert urlsplit(one.url).path == urlsplit(two.url).path
    path.chmod(0o644)
    with pytest.raises(InputError, match="others can read it"):
        serve_page(PAIRS, journal)
    path.unlink()
    with serve_page(PAIRS, journal) as three:
        assert urlsplit(one.url).path != urlsplit(three.url).path


def test_a_port_in_use_and_pairs_that_cannot_be_shown_are_refused(journal, server):
    port = urlsplit(server.url).port
    with pytest.raises(InputError, match=f"--port {port} .*in use"):
        serve_page(PAIRS, journal, port=port)
    with pytest.raises(InputError, match=r'pairs\[1\]: missing key "passage2"'):
        serve_page([PAIRS[0], {"query": "q", "passage1": "a"}], journal)
    with pytest.raises(InputError, match=r"pairs\[0\]: .* the same text"):
        serve_page([{"query": "q", "passage1": "a", "passage2": "a"}], journal)
    with pytest.raises(InputError, match="no pairs"):
        serve_page([], journal)


def test_an_open_network_is_warned_of_and_this_machine_is_not(journal):
    with pytest.warns(UserWarning, match="unencrypted"), serve_page(PAIRS, journal, host="0.0.0.0"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve_page(PAIRS, journal, host="localhost").close()


def test_a_closed_server_writes_no_more(journal):
    with serve_page(PAIRS, journal) as serving:
        client = Client(serving.url)
        question = client.state()["question"]
    assert client.post(verdict(question, "left"))[0] == 503  # its connection was open
    assert on_disk(journal) == []


# --- the end, in a process ---


@pytest.mark.long
def test_it_ends_when_all_is_judged_or_it_is_told_to(tmp_path):
    process, url = serving(tmp_path / "answers.jsonl", free_port())
    client = Client(url)
    client.choose("left")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "stopped\n" and process.returncode == 0
    process, url = serving(tmp_path / "answers.jsonl", free_port())
    client = Client(url)
    assert client.choose("left")[1]["done"] == 2 and client.choose("left")[1]["done"] == 3
    assert process.communicate(timeout=10)[0] == "all judged\n" and process.returncode == 0


@pytest.mark.long
def test_a_kill_loses_no_verdict_and_the_address_stays(tmp_path):
    journal, port, urls = tmp_path / "answers.jsonl", free_port(), set()
    for done in range(2):
        process, url = serving(journal, port)
        urls.add(url)
        assert Client(url).choose("left")[1]["done"] == done + 1
        process.kill()
        process.communicate()
    with Journal(journal, ASKED) as opened:
        assert len(opened.answers) == 2 and len(urls) == 1
