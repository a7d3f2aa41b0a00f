"""A training that is killed ends, started again, as if it had not been: bit by bit, and tidy."""

import itertools
import json
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import rankpo_fast.commands.rankpo  # noqa: F401 - in the parent of all forks
from support import kills
from support.bounded import Outcome, command

needs_ptrace = pytest.mark.skipif(
    not kills.can_watch(), reason="this system lets nobody stop a process at its system calls"
)


class Training(NamedTuple):
    """A command that starts and goes on alike, in a place of its own."""

    place: Path
    flags: tuple

    def run(self, **options) -> Outcome:
        places = "--output_dir", self.place / "out", "--cache_dir", self.place / "cache"
        return command("rankpo", *self.flags, *places, **options)

    def names(self) -> set[str]:
        return {str(path.relative_to(self.place)) for path in self.place.rglob("*")}

    def results(self) -> dict[str, object]:
        """The bytes of the model and of the last checkpoint, and what each step is told to have
        been."""
        metrics = (self.place / "out/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in metrics]
        last = max((self.place / "out/checkpoints").glob("step-*"))
        files = [*(self.place / "out").glob("*.safetensors"), *last.glob("*.safetensors")]
        tensors = {str(path.relative_to(self.place)): path.read_bytes() for path in files}
        return tensors | {"steps": [(step["step"], step["loss"]) for step in steps]}


@pytest.fixture(scope="module")
def training(tiny_bert_dir, preference_file, tmp_path_factory):
    """training(steps, **flags): stage 2, which has dropout, a reference and all caches."""

    def make(steps: int, *flags) -> Training:
        return Training(
            tmp_path_factory.mktemp("run"),
            (
                *("--model_name_or_path", tiny_bert_dir, "--train_data", preference_file),
                *("--reference_free", "false", "--device", "cpu", "--bf16", "false"),
                *("--per_device_train_batch_size", 4, "--max_steps", steps, "--logging_steps", 1),
                *("--save_total_limit", 1, "--auto_resume", *flags),
            ),
        )

    return make


@pytest.fixture(scope="module")
def short(training):
    """short() -> a training of two steps and two checkpoints, of which one is kept."""
    return partial(training, 2, "--save_steps", 1)


@pytest.fixture(scope="module")
def unbroken(short, tmp_path_factory):
    """One, and the system calls by which it changed the disk."""
    straight, record = short(), tmp_path_factory.mktemp("record") / "calls"
    ended = straight.run(before=partial(kills.killed_before, None, record))
    assert ended.code == 0, ended.said
    return straight, record.read_text().splitlines()


def ends_as_if_never_killed(broken: Training, unbroken: Training) -> None:
    ended = broken.run()
    assert ended.code == 0, ended.said
    assert broken.names() == unbroken.names()
    assert broken.results() == unbroken.results()


def every(half: int, kills: int) -> Iterator[int]:
    """Numbers of system calls: of 50 kills or more all, else a fifth; without end."""
    return itertools.count(half, 2 if kills >= 50 else 10)


@needs_ptrace
@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(lambda _: range(60, 200, 50), id="a-few"),
        *(
            pytest.param(partial(every, half), id=f"half-{half}", marks=pytest.mark.long)
            for half in (0, 1)
        ),
    ],
)
def test_killed_before_each_system_call_that_changes_the_disk(
    calls, short, unbroken, tmp_path, pytestconfig
):
    straight, _ = unbroken
    for call in calls(pytestconfig.getoption("kills")):
        broken = short()
        ended = broken.run(before=partial(kills.killed_before, call, tmp_path / "calls"))
        if ended.code == 0:  # it had no more
            break
        assert ended.code == -signal.SIGKILL, ended.said
        ends_as_if_never_killed(broken, straight)
    assert call > 150


@needs_ptrace
def test_calls_that_libraries_make_are_seen(unbroken):
    """safetensors' are made in Rust, by other names than Python's."""
    assert {"fsync", "rename", "renameat", "unlink", "unlinkat", "rmdir"} <= {*unbroken[1]}


@pytest.mark.long
def test_killed_at_random_moments_again_and_again(training, pytestconfig):
    """A training is killed until it ends, or up to ten times."""
    chance, killed = random.Random(0), 0
    long = partial(training, 40, "--save_steps", 3)
    straight, began = long(), time.monotonic()
    straight.run()
    seconds = time.monotonic() - began
    while killed < pytestconfig.getoption("kills"):
        broken = long()
        for _ in range(10):
            if broken.run(killed_after=chance.uniform(0, seconds)).code == 0:
                break
            killed += 1
        ends_as_if_never_killed(broken, straight)
