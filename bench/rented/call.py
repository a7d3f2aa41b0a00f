"""One call: what is to be run, and what a reader is told at its end."""

import contextlib
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rankpo_fast.errors import InputError
from rankpo_fast.flags import closest

from .. import machine
from ..results import Run
from ..tables import duration, times
from . import carried
from .runner import Runner, Step
from .speed import measured
from .state import Found, Record
from .steps import steps

RESULTS, LOG = "results.json", "log.txt"
REHEARSED = "rehearsal"  # of a machine
FILL_S = 75.0


@dataclass(frozen=True)
class Asked:
    """Of one call."""

    out: Path
    stop: float  # of time.monotonic()
    cache: Path  # Triton's, which may have been carried here
    resume: Path | None = None
    rehearsal: bool = False
    only: Sequence[str] = ()  # steps; all
    again: Sequence[str] = ()  # steps that run although they are done


def call(asked: Asked) -> int:
    """The exit code."""
    asked.out.mkdir(parents=True, exist_ok=True)
    for leftover in asked.out.glob(f".{RESULTS}.*"):  # of a call that was killed while it wrote
        leftover.unlink()
    every = steps(asked.rehearsal, partial(fill, asked))
    to_run, again = chosen(every, asked.only, "--only"), chosen(every, asked.again, "--again")
    record = resumed(asked)
    if asked.again:
        for step in again:
            record.forget(step.name)
    if asked.cache.is_dir():
        carried.settle(asked.cache)
    commit, log = str(machine.about("cpu")["commit"]), asked.out / LOG
    device = "cpu" if asked.rehearsal else "cuda"
    runner = Runner(record, commit, log, asked.stop, partial(machine.lost, device))
    if not asked.rehearsal and not sees_a_gpu():
        runner.say("make gpu: torch sees no GPU: nothing was asked (REHEARSE=1 runs on the CPU)")
        return 1
    with rehearsing(asked.rehearsal):
        code = runner.run(to_run)
    runner.say(summary(record))
    return code


def resumed(asked: Asked) -> Record:
    """What earlier calls found, in OUT or else in the file that is named; a rehearsal's counts for
    nothing but a rehearsal."""
    path = asked.out / RESULTS
    if asked.resume is not None and not asked.resume.exists():
        raise InputError(f"RESUME={asked.resume}: no such file")
    record = Record.resumed(path, None if path.exists() else asked.resume)
    if bool(record.machine.get(REHEARSED)) != asked.rehearsal:
        record = Record(path)
    if asked.rehearsal:
        record.machine[REHEARSED] = "no figure here is a measurement"
    return record


def chosen(every: list[Step], names: Sequence[str], flag: str) -> list[Step]:
    """Those of the names; all without any."""
    known = [step.name for step in every]
    for name in names:
        if name not in known:
            raise InputError(f"{flag}: unknown step {name!r}{closest(name, known)}")
    return [step for step in every if not names or step.name in names]


def sees_a_gpu() -> bool:
    """Asked in a process of its own, since one that has asked cannot be forked any more."""

    def ask() -> None:
        with contextlib.suppress(Exception):
            torch.zeros(1, device="cuda").item()
            sys.exit(0)
        sys.exit(1)

    process = multiprocessing.get_context("fork").Process(target=ask)
    process.start()
    process.join()
    return process.exitcode == 0


@contextlib.contextmanager
def rehearsing(rehearsal: bool) -> Iterator[None]:
    """The interpreter has bf16 wrong; the tests' way around it is in their folder."""
    if not rehearsal:
        yield
        return
    from support.interpreter import exact_bf16  # type: ignore[import-not-found]

    with exact_bf16():
        yield


def fill(asked: Asked) -> Found:
    """Compile, on all cores, what Triton's cache lacks: nothing where it was carried whole."""
    if asked.rehearsal:
        return Found(says="not asked: kernels are interpreted")
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    command = [
        sys.executable, "-m", f"{__package__}.cache", str(asked.cache), "--seconds", f"{FILL_S:g}",
        "--arch", arch, "--missing",
    ]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, flush=True)
    return Found(says=(done.stdout.strip().splitlines() or ["said nothing"])[-1])


def summary(record: Record) -> str:
    """Times beside their lower bounds, then how each step went, what is red last."""
    lines = ["", "times the lower bound:"]
    for m in measured(Run(record.machine, record.results)):
        lines.append(
            f"  {m.pipeline:28}{m.M:>6}x{m.N}x{m.D:<6}{times(m.seconds / m.lower_bound):>7}  "
            f"{duration(m.seconds)} beside {duration(m.lower_bound)}"
        )
    lines.append("")
    for name, step in record.steps.items():
        parts = [part["state"] for part in step["parts"].values()]
        said = ", ".join(f"{parts.count(state)} {state}" for state in dict.fromkeys(parts))
        lines.append(f"{name:14}{step['state']:14}{said}")
    lines += [f"RED {text}"[:300] for text in record.red]
    if left := record.unfinished:
        lines.append(f"the next call goes on with {', '.join(left)}: RESUME={record.path}")
    if REHEARSED in record.machine:
        return "\n".join([*lines, f"a rehearsal: {record.machine[REHEARSED]}"])
    date = str(record.machine.get("date", "DATE"))[:10]
    lines.append(f"to keep: cp {record.path} bench/results/{date}-gpu.json")
    return "\n".join(lines)
