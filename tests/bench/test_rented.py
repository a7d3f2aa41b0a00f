"""A call on a rented GPU: worth comes first, what has ended is kept, the next call goes on, and
what is red is said. Steps are stand-ins here; test_rented_rehearsal.py runs the real ones."""

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench import results
from bench.questions import OURS, Result, Row
from bench.rented import __main__ as command
from bench.rented import call, commands, state, wheels
from bench.rented.pipelines import PIPELINES
from bench.rented.plan import real, rehearsed
from bench.rented.runner import Part, Runner, Step
from bench.rented.speed import measured, of_size
from bench.rented.state import CUT_OFF, DONE, NOT_REACHED, RED, Found, Record
from bench.rented.steps import SECONDS, steps

ROOT = Path(__file__).parents[2]
WORTH = [
    "probes", "correctness", "speed", "memory", "tiles", "tests", "sanitizer", "peers", "training",
]  # fmt: skip


class Played:
    """Steps of parts that note that they ran."""

    def __init__(self, directory):
        self.directory = directory

    def part(self, name, found=None, seconds=60.0, does=lambda: None):
        def run():
            with (self.directory / "ran").open("a") as ran:
                ran.write(f"{name}\n")
            does()
            return found or Found(says="fine")

        return Part(name, run, seconds)

    @property
    def ran(self):
        path = self.directory / "ran"
        return path.read_text().split() if path.exists() else []

    def call(self, *steps, seconds=60.0, commit="abc", alive=lambda: None):
        """The exit code, and the record as a reader finds it."""
        path = self.directory / "out" / "results.json"
        record = Record.resumed(path, None)
        log, stop = self.directory / "out" / "log.txt", time.monotonic() + seconds
        path.parent.mkdir(exist_ok=True)
        code = Runner(record, commit, log, stop, alive).run(
            [Step(name, most, lambda *_, parts=parts: parts) for name, most, parts in steps]
        )
        return code, Record.resumed(path, None)


@pytest.fixture
def played(tmp_path):
    return Played(tmp_path)


def states(record):
    return {
        f"{step}: {name}": part["state"]
        for step, known in record.steps.items()
        for name, part in known["parts"].items()
    }


def table(note="", case="stored"):
    row = Row(OURS, note, seconds=None if note else 1.0)
    return Result(case, "loss", "?", {"M": 8}, (row,))


# --- order ---


def test_what_is_worth_most_comes_first():
    assert list(SECONDS) == [step.name for step in steps(False, Found)] == WORTH


def test_a_first_call_reaches_the_lower_bounds_even_if_everything_takes_its_time():
    first = [SECONDS[name] for name in ("probes", "correctness", "speed")]
    assert sum(first) <= 60 * command.MINUTES
    assert sum(SECONDS.values()) <= 60 * 15


def test_all_parts_have_names_of_their_own():
    record = Record(Path("results.json"))
    for rehearsal in (False, True):
        for step in steps(rehearsal, Found):
            names = [part.name for part in step.parts(record, math.inf)]
            assert names and len(set(names)) == len(names)


def test_sizes_are_those_that_users_ask_about():
    plan = real()
    assert plan.sizes[:2] == ((16384, 16384, 1024), (4096, 4096, 1024))
    assert {(16384, 384), (4096, 4096), (65536, 384)} <= {(M, D) for M, _, D in plan.sizes}
    names = {pipeline.name for pipeline in of_size(plan.sizes[0], plan)}
    assert {"forward", "stored", "exact", "both directions", "in-batch RankPO"} <= names
    assert plan.again == 20 and plan.exact[0] == (16384, 16384, 1024)
    assert all(size % 16 for size in plan.exact[1][:2])  # ragged
    assert {p.name for p in PIPELINES if p.small} == {
        p.name for p in PIPELINES if p.name.startswith("few launches")
    }


def test_steps_and_parts_run_in_order(played):
    code, record = played.call(
        ("one", 60, [played.part("a"), played.part("b")]), ("two", 60, [played.part("c")])
    )
    assert code == 0 and played.ran == ["a", "b", "c"]
    assert states(record) == {"one: a": DONE, "one: b": DONE, "two: c": DONE}
    assert record.unfinished == []


# --- what has ended is kept ---


def test_results_are_on_the_disk_when_a_part_ends(played):
    path = played.directory / "out" / "results.json"

    def look():
        read = results.read(path)  # a whole file
        (played.directory / "seen").write_text(" ".join(r.case for r in read.results))

    first = played.part("a", Found([table()], {"L2": "fast"}))
    code, record = played.call(("one", 60, [first, played.part("b", does=look)]))
    assert code == 0 and (played.directory / "seen").read_text() == "stored"
    assert record.machine["L2"] == "fast"
    assert record.results[0].about[state.PART] == "one: a"


def test_a_step_that_is_cut_off_goes_on_where_it_was(played):
    def parts(does=lambda: None):
        return [played.part("a"), played.part("b", does=does), played.part("c")]

    code, record = played.call(("one", 1, parts(lambda: time.sleep(30))), ("two", 60, []))
    assert code == 0 and played.ran == ["a", "b"]
    assert states(record) == {"one: a": DONE, "one: b": CUT_OFF, "one: c": NOT_REACHED}
    assert record.steps["one"]["state"] == CUT_OFF and record.unfinished == ["one"]
    code, record = played.call(("one", 60, parts()), ("two", 60, []))
    assert played.ran == ["a", "b", "b", "c"] and set(states(record).values()) == {DONE}


def test_the_end_of_a_call_cuts_every_step(played):
    steps = [("one", 60, [played.part("a", does=lambda: time.sleep(30))]),
             ("two", 60, [played.part("b")])]  # fmt: skip
    start = time.monotonic()
    code, record = played.call(*steps, seconds=1)
    assert time.monotonic() - start < 10 and played.ran == ["a"]
    assert states(record) == {"one: a": CUT_OFF}
    assert record.steps["two"] == {"state": NOT_REACHED, "parts": {}}
    assert record.unfinished == ["one", "two"]


def test_a_second_call_starts_from_a_file_elsewhere(played, tmp_path):
    played.call(("one", 60, [played.part("a", Found([table()]))]))
    kept = tmp_path / "2026-11-30-gpu.json"
    (tmp_path / "out" / "results.json").rename(kept)
    record = Record.resumed(tmp_path / "out" / "results.json", kept)
    record.declare("one", ["a", "b"])
    assert record.left("one", ["a", "b"], "abc") == ["b"]
    assert record.path.parent == tmp_path / "out" and record.results[0].case == "stored"


def test_a_part_that_runs_again_replaces_what_it_said(played):
    one = [("one", 60, [played.part("a", Found([table("wrong")]))])]
    assert played.call(*one)[0] == 1
    code, record = played.call(("one", 60, [played.part("a", Found([table()]))]), commit="def")
    assert code == 0 and [r.rows[0].note for r in record.results] == [""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_keeps_what_has_ended(played, number):
    parent = os.getpid()

    def interrupted():
        time.sleep(0.5)
        os.kill(parent, number)
        time.sleep(30)

    start = time.monotonic()
    parts = [played.part("a"), played.part("b", does=interrupted), played.part("c")]
    code, record = played.call(("one", 60, parts))
    assert code == 1 and time.monotonic() - start < 15
    assert states(record) == {"one: a": DONE, "one: b": CUT_OFF, "one: c": NOT_REACHED}
    assert number.name in (played.directory / "out" / "log.txt").read_text()


def test_what_a_part_has_started_ends_with_it(played):
    def starts():
        child = subprocess.Popen(["sleep", "60"])
        (played.directory / "child").write_text(str(child.pid))
        time.sleep(60)

    played.call(("one", 1, [played.part("a", does=starts)]))
    child = Path(f"/proc/{(played.directory / 'child').read_text()}/stat")
    stop = time.monotonic() + 5
    while child.exists() and " Z " not in child.read_text() and time.monotonic() < stop:
        time.sleep(0.05)
    assert not child.exists() or " Z " in child.read_text()


# --- red ---


def raises():
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        pytest.param({"does": raises}, "RuntimeError: an illegal memory access", id="raises"),
        pytest.param({"does": lambda: os._exit(7)}, "exit code 7", id="dies"),
        pytest.param({"does": lambda: os.kill(os.getpid(), 9)}, "exit code -9", id="killed"),
        pytest.param({"found": Found([table("wrong")])}, f"stored 8: {OURS}: wrong", id="row"),
        pytest.param({"found": Found(red="unequal")}, "unequal", id="says-so"),
        pytest.param(
            {"does": lambda: time.sleep(30), "seconds": 0.5}, "longer than 0.5 s", id="hangs"
        ),
    ],
)
def test_what_is_red_stops_nothing_and_sets_the_exit_status(played, part, says):
    parts = [played.part("a", **part), played.part("b")]
    code, record = played.call(("one", 60, parts), ("two", 60, [played.part("c")]))
    assert code == 1 and played.ran == ["a", "b", "c"]
    assert states(record) == {"one: a": RED, "one: b": DONE, "two: c": DONE}
    assert says in record.red[0] and record.steps["one"]["state"] == RED


def test_after_a_lost_gpu_a_process_runs_nothing_more(played):
    """The next part gets another."""
    pid = played.directory / "pid"

    def alive():
        return "no GPU" if pid.read_text() == str(os.getpid()) else None

    def loses():
        pid.write_text(str(os.getpid()))

    parts = [played.part("a", does=loses), played.part("b")]
    code, record = played.call(("one", 60, parts), alive=alive)
    assert code == 1 and states(record) == {"one: a": RED, "one: b": DONE}
    assert "no GPU" in record.red[0]


def test_a_step_that_is_asked_for_again_is_forgotten(played):
    played.call(("one", 60, [played.part("a")]), ("two", 60, [played.part("b")]))
    record = Record.resumed(played.directory / "out" / "results.json", None)
    record.forget("one")
    record.write()
    played.call(("one", 60, [played.part("a")]), ("two", 60, [played.part("b")]))
    assert played.ran == ["a", "b", "a"]


def test_a_rehearsal_counts_for_nothing_but_a_rehearsal(tmp_path):
    def asked(rehearsal):
        return call.Asked(tmp_path, 0.0, tmp_path, rehearsal=rehearsal)

    first = call.resumed(asked(True))
    first.declare("one", ["a"])
    first.write()
    assert "one" in call.resumed(asked(True)).steps
    assert call.resumed(asked(False)).steps == {}


def test_what_is_red_runs_again_only_after_a_change(played):
    one = ("one", 60, [played.part("a", does=raises)])
    for commit, times in (("abc", 1), ("abc", 1), ("def", 2)):
        code, _ = played.call(one, commit=commit)
        assert code == 1 and len(played.ran) == times


# --- what comes back ---


def test_few_files_with_plain_names_come_back(played):
    part = played.part("a", Found([table()]), does=lambda: print("hello"))
    played.call(("one", 60, [part]), ("two", 1, [played.part("b", does=lambda: time.sleep(9))]))
    files = [path for path in (played.directory / "out").rglob("*")]
    assert len(files) <= 8 and all(re.fullmatch(r"[\w.-]+", path.name) for path in files)
    assert "hello" in (played.directory / "out" / "log.txt").read_text()


def test_times_are_read_back_beside_their_lower_bounds():
    rows = (
        Row("3 GEMMs", seconds=1.0),
        Row(f"{OURS}, stored", seconds=1.2, error=1e-3),
        Row(f"{OURS}, exact", "wrong"),
    )
    shape = {"M": 8, "N": 16, "D": 4, "dtype": "bfloat16"}
    about = {"flops over MND": {"stored": 6.0}}
    run = results.Run({}, [Result("speed", "loss", "?", shape, rows, "3 GEMMs", about=about)])
    assert list(measured(run)) == [("stored", 8, 16, 4, 1.2, 1.0, 6.0, 1e-3)]


def test_a_summary_names_what_is_left(played):
    parts = [played.part("a"), played.part("b", does=lambda: time.sleep(30))]
    _, record = played.call(("one", 1, parts))
    words = call.summary(record)
    assert "1 done, 1 cut off" in words and "goes on with one" in words
    assert words.endswith("-gpu.json")
    record.machine[call.REHEARSED] = "no figure here is a measurement"
    assert call.summary(record).endswith("no figure here is a measurement")  # and not to be kept


# --- the parts that are programs ---


@pytest.mark.parametrize(
    ("output", "code", "red", "says"),
    [
        ("=== 3 passed in 1.0s ===", 0, "", "3 passed in 1.0s"),
        ("=== 1 failed in 1s ===\n", 1, "exit status 1: 1 failed in 1s", ""),
        ("FAILED a.py::t\n=== 1 failed in 1s ===", 1, "1 failed in 1s: FAILED a.py::t", ""),
        ("FAILED a.py::t\n=== 1 failed in 1s ===", None, "1 failed in 1s: FAILED a.py::t", ""),
        ("=== 9 passed in 9s ===", None, "", "cut off: 9 passed in 9s"),
        ("no tests ran in 0.1s", 5, "", "no tests ran in 0.1s"),
        ("E   No module named 'hypothesis'\n1 error", 2, "", "not run: hypothesis is not"),
        ("E   No module named 'bench.gone'\n1 error", 2, "exit status 2: 1 error", ""),
    ],
    ids=["passed", "failed", "named", "failed-then-cut", "cut", "none", "package", "ours"],
)
def test_what_pytest_says_is_understood(output, code, red, says):
    found = commands.of_pytest(output, code)
    assert found.red == red and found.says.startswith(says)
    assert found.cut == says.startswith("cut off")


@pytest.mark.long
def test_pytest_that_is_cut_off_says_what_has_passed(tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n"
        f"pytestmark = pytest.mark.{commands.MARK}\n"
        "def test_fast(): pass\n"
        "def test_slow(): time.sleep(60)\n"
    )
    monkeypatch.setattr(commands, "find_spec", lambda name: None)  # one process
    found = commands.run_tests(
        str(tmp_path / "test_slow.py"), real(deadline=time.monotonic() + commands.GRACE_S + 6)
    )
    assert found.cut and "1 passed" in found.says


def test_a_part_that_cuts_itself_off_runs_again(played):
    one = ("one", 60, [played.part("a", Found(says="9 passed", cut=True))])
    code, record = played.call(one)
    assert code == 0 and states(record) == {"one: a": CUT_OFF}
    assert record.steps["one"]["parts"]["a"]["says"] == "9 passed"
    played.call(one)
    assert played.ran == ["a", "a"]


@pytest.mark.parametrize(
    ("output", "code", "red", "says"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "", "ERROR SUMMARY"),
        ("Device not supported", 1, "", "not run"),
        ("Invalid __global__ read of size 4", 9, "Invalid __global__", ""),
        ("= Invalid __global__ read of size 4\n...", None, "= Invalid", ""),
        ("...", None, "", "cut off"),
        ("1 failed", 1, "exit status 1: 1 failed", ""),
    ],
    ids=["clean", "refused", "finding", "finding-then-cut", "cut", "tests-failed"],
)
def test_what_the_sanitizer_says_is_understood(output, code, red, says):
    found = commands.of_sanitizer(output, code, 45)
    assert found.red.startswith(red) and bool(found.red) == bool(red)
    assert found.says.startswith(says)


@pytest.mark.long
def test_the_marker_selects_the_tests_of_a_gpu():
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", commands.MARK]
    files = [
        "tests/ops/test_cuda.py",
        "tests/kernels/test_triton_rankpo.py",
        "tests/ops/test_in_batch.py",
    ]
    done = subprocess.run([*asked, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    counts = dict(re.findall(r"^(\S+): (\d+)$", done.stdout, re.MULTILINE))
    assert set(counts) == set(files), done.stdout + done.stderr
    assert all(int(count) >= 80 for count in counts.values())


def test_every_file_that_has_the_marker_is_a_part():
    names = [part.name for part in commands.pytest_parts(real())]
    assert set(commands.FIRST) <= set(names) and names[: len(commands.FIRST)] == commands.FIRST


# --- the command ---


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(call, "sees_a_gpu", lambda: False)
    asked = call.Asked(tmp_path / "out", time.monotonic() + 9, tmp_path / "none")
    assert call.call(asked) == 1 and "torch sees no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "resume", "says"),
    [
        (["--only", "prbes"], None, "unknown step 'prbes'"),
        (["--again", "prbes"], None, "unknown step 'prbes'"),
        ([], "nowhere.json", "no such file"),
    ],
    ids=["step", "again", "resume"],
)  # fmt: skip
def test_bad_input_is_named(flags, resume, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "prepare", lambda rehearsal: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("RESUME", resume or "")
    assert command.main(flags) == 2 and says in capsys.readouterr().err


def test_peers_that_were_carried_are_installed_without_a_network(tmp_path):
    made = tmp_path / "tiny-1.0-py3-none-any.whl"
    script = textwrap.dedent("""
        import sys, zipfile
        with zipfile.ZipFile(sys.argv[1], "w") as wheel:
            wheel.writestr("tiny.py", "NAME = 'tiny'")
            wheel.writestr("tiny-1.0.dist-info/METADATA",
                           "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0")
            wheel.writestr("tiny-1.0.dist-info/WHEEL",
                           "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any")
            wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    """)
    subprocess.run([sys.executable, "-c", script, str(made)], check=True)
    assert wheels.install(tmp_path, tmp_path / "site") == "1 wheels installed"
    assert (tmp_path / "site" / "tiny.py").exists()
    assert wheels.install(tmp_path / "none", tmp_path / "site").startswith("no wheels")
    assert not (tmp_path / "site" / "tiny.py").exists()


def test_a_rehearsal_has_the_parts_of_the_real_steps():
    record = Record(Path("results.json"))
    there, here = (
        {step.name: step.parts(record, math.inf) for step in steps(r, Found)} for r in (False, True)
    )
    assert list(there) == list(here)
    assert len(here["probes"]) == len(there["probes"]) - len(real().products) + len(
        rehearsed().products
    )
    assert len(here["correctness"]) == len(there["correctness"])
