"""`annotate --people`: what people answer on the page becomes rows of stage 2 and a report."""

import json
import socket
import threading
import time
from urllib.request import Request, urlopen

import pytest

from rankpo_fast.cli import main
from rankpo_fast.data.rows import read_preferences

PAIRS = [
    {"query": f"job {i}", "passage1": f"good {i}", "passage2": f"bad {i}", "passage_id1": 2 * i,
     "passage_id2": 2 * i + 1}
    for i in range(3)
]  # fmt: skip


with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]


def answer_all(page: str, name: str, choose) -> None:
    """As the page would: ask what is next, send what `choose` says of both texts."""
    state = json.load(urlopen(f"{page}state?annotator={name}"))
    while (asked := state["question"]) is not None:
        sent = {"annotator": name, "pair": asked["pair"], "turn": asked["turn"], "unsure": False,
                "choice": choose(asked["left"], asked["right"]), "seconds": 2}  # fmt: skip
        request = Request(f"{page}verdict", json.dumps(sent).encode(),
                          {"Content-Type": "application/json"})  # fmt: skip
        state = json.load(urlopen(request))


def honest(left: str, right: str) -> str:
    return "skip" if left.endswith("2") else "left" if left.startswith("good") else "right"


@pytest.fixture
def files(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return pairs, tmp_path / "prefs.jsonl"


def run(files, *names: str) -> int:
    """The command, while these people judge every pair."""
    pairs, output = files

    def judge() -> None:
        token = output.with_name(f"{output.name}.journal.jsonl.token")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                page = f"http://127.0.0.1:{PORT}/{token.read_text().strip()}/"
                urlopen(f"{page}state")
                break
            except OSError:
                time.sleep(0.05)
        for name in names:
            answer_all(page, name, honest)

    thread = threading.Thread(target=judge)
    thread.start()
    code = main(["annotate", "--people", f"--port={PORT}", f"--annotators={len(names)}",
                 f"--pairs={pairs}", f"--output={output}"])  # fmt: skip
    thread.join()
    return code


def test_verdicts_of_two_people_become_rows_and_a_skipped_pair_none(files, capsys):
    assert run(files, "ada", "ben") == 0
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["passage_id1"] for row in rows] == [0, 2]  # keys are carried
    assert [row.chosen for row in read_preferences(files[1])] == ["good 0", "good 1"]
    assert set(rows[0]["judges"]) == {"ada", "ben"}
    report = json.loads(files[1].with_name("prefs.jsonl.report.json").read_text())
    assert set(report["judges"]) == {"ada", "ben"}
    assert "1 without verdict" in capsys.readouterr().out
    # Started again, nothing is asked: both have finished.
    before = files[1].read_bytes()
    pairs, output = files
    assert main(["annotate", "--people", "--port=0", "--annotators=2", f"--pairs={pairs}",
                 f"--output={output}"]) == 0  # fmt: skip
    assert files[1].read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--people", "--model=x"], "--model is not of --people"),
        (["--people", "--mode=grade"], "--mode is not of --people"),
        (["--annotators=2"], "--annotators needs --people"),
    ],
)
def test_what_means_nothing_to_people_is_refused(files, capsys, flags, said):
    pairs, output = files
    assert main(["annotate", f"--pairs={pairs}", f"--output={output}", *flags]) == 2
    assert said in capsys.readouterr().err
