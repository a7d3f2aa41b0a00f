"""Steps that are programs of their own, the tests that need a GPU and compute-sanitizer; and those
that ask the bench's questions about peers and training."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..cases import in_batch, info_nce, rankpo
from ..questions import Question, Result, Settings, Shape, described
from .plan import Plan
from .runner import Part
from .state import Found

ROOT = Path(__file__).parents[2]
MARK = "gpu"
# Where the marked tests are, of most worth first; a folder's other files come after them.
FIRST = [
    "tests/ops/test_cuda.py", "tests/train/test_cuda.py", "tests/kernels/test_triton_streamed.py",
    "tests/kernels/test_triton_kept.py", "tests/kernels/test_triton_info_nce.py",
    "tests/kernels/test_triton_in_batch.py", "tests/kernels/test_triton_rankpo.py",
    "tests/kernels/test_triton_info_nce_edges.py",
]  # fmt: skip
MOST_WORKERS = 12
TESTS_S, GRACE_S = 240.0, 10.0  # of a file; and of its end
LONGEST_S = 1e6  # a wait can be
ANSWER_S = 90.0  # to a question of the bench
OUR_PACKAGES = ("bench", "rankpo", "support")
SANITIZER = "compute-sanitizer"
SANITIZED = "(nothing-round and fresh and 0.02) or (stored and excluded)"  # tests, by name
UNSUPPORTED = "Device not supported"
FINDINGS = re.compile(r"Invalid|Race reported|Misaligned|Uninitialized")


# --- tests ---


def pytest_parts(plan: Plan) -> list[Part]:
    names = marked_files()
    if plan.rehearsal:  # to list a file takes 6 s, and two show that the command is right
        names = names[:2]
    return [Part(name, partial(run_tests, name, plan), TESTS_S) for name in names]


def marked_files() -> list[str]:
    """Files that carry the marker anywhere."""
    found = {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(rf"mark\.{MARK}\b", path.read_text(encoding="utf-8"))
    }
    first = [name for name in FIRST if name in found]
    return first + sorted(found - set(first))


def run_tests(name: str, plan: Plan) -> Found:
    """All of a file's that have the marker; interrupted before the step's time is up, so that
    pytest says what has passed until then."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", MARK, "-rfE", name]
    if plan.rehearsal:
        command.append("--collect-only")
    elif find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    output, code = ended(command, plan.deadline - time.monotonic() - GRACE_S, signal.SIGINT)
    print(output, flush=True)
    return of_pytest(output, code)


def ended(
    command: list[str],
    seconds: float,
    by: signal.Signals,
    environment: dict[str, str] | None = None,
) -> tuple[str, int | None]:
    """(what a program says, its exit status; None where it was ended by that signal)."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(by, signal.SIG_DFL),  # a shell's `&` ignores SIGINT
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(min(max(0.1, seconds), LONGEST_S))
        except subprocess.TimeoutExpired:
            process.send_signal(by)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
        log.seek(0)
        return log.read(), code


def of_pytest(output: str, code: int | None) -> Found:
    """Its last line, the tests that failed, and what it lacked to run at all."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    last = lines[-1] if lines else ""
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed:
        return Found(red=f"{last}: {'; '.join(failed[:5])}")
    if code is None:
        return Found(says=f"cut off: {last}", cut=True)
    if code in (0, 5):  # 5: none has the marker
        return Found(says=last)
    missing = re.search(r"No module named '([\w.]+)'", output)
    if missing and not missing.group(1).startswith(OUR_PACKAGES):
        return Found(says=f"not run: {missing.group(1)} is not installed")
    return Found(red=f"exit status {code}: {last}")


# --- compute-sanitizer ---


def sanitizer_parts(plan: Plan) -> list[Part]:
    return [Part(tool, partial(sanitized, tool, plan)) for tool in ("memcheck", "racecheck")]


def sanitized(tool: str, plan: Plan, seconds: float = 45.0) -> Found:
    """A few tests under it; without torch's cache every tensor is an allocation of its own, whose
    ends memcheck knows."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    if shutil.which(SANITIZER, path=path) is None:
        return Found(says="not run: there is no compute-sanitizer")
    command = [
        SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-p",
        "no:cacheprovider", "tests/ops/test_cuda.py", "-k", SANITIZED,
    ]  # fmt: skip
    environment = os.environ | {"PATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    output, code = ended(command, seconds, signal.SIGKILL, environment)
    print(output, flush=True)
    return of_sanitizer(output, code, seconds)


def of_sanitizer(output: str, code: int | None, seconds: float) -> Found:
    lines = [line for line in output.splitlines() if line.strip()]
    if UNSUPPORTED in output:
        return Found(says="not run: compute-sanitizer does not support this device")
    if finding := next((line for line in lines if FINDINGS.search(line)), ""):
        return Found(red=finding[:200])
    if code is None:
        return Found(says=f"cut off after {seconds:g} s, without a finding so far")
    last = lines[-1] if lines else "said nothing"
    return Found(red=f"exit status {code}: {last}"[:200]) if code else Found(says=last)


# --- the bench's questions ---


def peer_parts(plan: Plan) -> list[Part]:
    """The first shape of every loss, then the second."""
    if plan.rehearsal:
        [question] = [each for each in info_nce.QUESTIONS if each.name == "info_nce"]
        shape = {"M": 64, "N": 64, "D": 32, "dtype": "float32"}
        return [asked(question, shape, replace(plan.settings, without=compiled()))]
    questions = [*info_nce.QUESTIONS, *in_batch.QUESTIONS, *rankpo.QUESTIONS]
    shapes = [(each, each.shapes("cuda", "default")) for each in questions]
    return [
        asked(each, of_question[wave], plan.settings)
        for wave in (0, 1)
        for each, of_question in shapes
        if len(of_question) > wave
    ]


def compiled() -> frozenset[str]:
    from ..peers import COMPILED

    return COMPILED


def ladder_parts(plan: Plan) -> list[Part]:
    """Tokens a second with each lever on top of those before it, then of peers."""
    from .. import training  # seconds of imports, that what comes first does not wait for

    names = ("ladder",) if plan.rehearsal else ("ladder", "liger", "padding", "backbones")
    by_name = {question.name: question for question in training.QUESTIONS}
    found = []
    for name in names:
        question = by_name[name]
        for shape in question.shapes("cuda", "quick") or question.shapes("cuda", "default")[:1]:
            if plan.rehearsal:
                shape = {"batch": 8, "negatives": 1, "steps": 2, "backbone": "tiny"}
            found.append(replace(asked(question, shape, plan.settings), seconds=150.0))
    return found


def asked(question: Question, shape: Shape, settings: Settings) -> Part:
    def run() -> Found:
        result: Result = question.answer(shape, settings)
        return Found([result], says=in_short(result))

    return Part(f"{question.name} {described(shape)}", run, ANSWER_S)


def in_short(result: Result) -> str:
    """Each row's ratio, or what it says instead."""
    said = []
    for row in result.rows:
        value = (
            f"{row.tokens:.0f} tokens/s" if row.tokens else f"{row.ratio:.2f}" if row.ratio else ""
        )
        said.append(f"{row.implementation}: {value or row.note or 'lower bound'}")
    return "; ".join(said)
