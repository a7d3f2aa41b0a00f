"""Growth is told right, and whoever is at its limit leaves what it reached, and the machine."""

import dataclasses
import os
import signal
import time

import pytest
import torch

from bench import measure, ranks, scaling
from bench.apart import answers_here, answers_of_a_process, in_a_process
from bench.questions import OURS, Rates, Row, Settings
from bench.scaling import BUDGETS, GROWTHS, Budget, times
from bench.training.backbones import TINY
from bench.training.implementations import Measured

SETTINGS = Settings("cpu", "quick", 1, Rates({}, 1.0), frozenset([OURS, "torch cross_entropy"]))
SIZES = (16, 32, 64, 128)
MIB = 2**20
STEP = scaling.STEP | {"backbone": TINY}


class Clock:
    """Runs that take (size / 100) ** power seconds of it."""

    def __init__(self, power: float, most: float = float("inf")):
        self.power, self.most, self.now = power, most, 0.0

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, size: int):
        def run():
            if size > self.most:
                raise torch.OutOfMemoryError
            self.now += (size / 100) ** self.power
            return ()

        return run, 0


def row_of(clock: Clock, monkeypatch, limit_s: float = 1e9):
    monkeypatch.setattr(measure.time, "perf_counter", clock.perf_counter)
    seconds, note = answers_here(times, clock, SIZES, "cpu", limit_s)
    return seconds, note, scaling.row_of("peer", "M", SIZES, seconds, seconds, note)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_is_that_of_the_work(power, monkeypatch):
    seconds, note, row = row_of(Clock(power), monkeypatch)
    assert seconds == pytest.approx([(size / 100) ** power for size in SIZES]) and note == ""
    assert row.exponent == pytest.approx(power) == row.memory_exponent
    assert row.limit is None and row.sizes == SIZES


def test_the_exponent_is_of_the_upper_half():
    assert measure.exponent((1, 2, 4, 8), (5.0, 5.0, 1.0, 8.0)) == pytest.approx(3)
    assert measure.exponent((1, 2, 4), (5.0, 1.0, 2.0)) == pytest.approx(1)
    assert measure.exponent((1, 2, 4), (5.0, 1.0)) == pytest.approx(-2.32, abs=0.01)
    assert measure.exponent((1, 2, 4), (5.0,)) is measure.exponent((1, 2), (0, 1)) is None


def test_one_that_runs_out_of_memory_keeps_the_sizes_it_reached(monkeypatch):
    seconds, _, row = row_of(Clock(2.0, most=64), monkeypatch)
    assert len(seconds) == 3 and row.times == tuple(seconds) and row.exponent == pytest.approx(2)
    assert row.limit == "128: out of memory" and row.note == "" and not row.red


def test_one_that_never_ran_says_so_and_an_error_is_red():
    reached, note = answers_here(times, Clock(2.0, most=0), SIZES, "cpu", 1e9)
    row = scaling.row_of("peer", "M", SIZES, reached, [], note)
    assert (row.note, row.limit, row.times) == ("out of memory", "16: out of memory", ())
    assert scaling.row_of(OURS, "M", SIZES, [], [], note).red and not row.red
    broken = scaling.row_of("peer", "M", SIZES, [1.0], [1.0], "ValueError: no")
    assert broken.red and broken.limit == "32: ValueError: no"


def test_no_size_follows_the_first_that_takes_too_long(monkeypatch):
    clock = Clock(2.0)
    seconds, note, _ = row_of(clock, monkeypatch, limit_s=0.3)
    assert note == "" and len(seconds) == 3 and seconds[1] < 0.3 < seconds[2]


def test_a_size_that_took_too_long_is_not_reached(monkeypatch):
    clock = Clock(2.0)
    clock.implementation, clock.axis, clock.device = "peer", "M", "cpu"
    monkeypatch.setattr(measure.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(scaling, "peaks", lambda make, sizes, device: iter(sizes))
    row = scaling.row(clock, SIZES, Budget(0.3))
    assert row.times == pytest.approx((0.16**2, 0.32**2)) and row.peaks == SIZES[:2]
    assert row.limit == "64: over 0.3 s" and row.note == ""


def allocating(*sizes: int):
    for mib in sizes:
        torch.ones(mib * MIB, dtype=torch.uint8)
        yield mib


def dying(answer: str):
    yield answer
    os.kill(os.getpid(), signal.SIGKILL)


def crashing():
    yield "so far"
    os._exit(3)


@pytest.mark.long
def test_the_limit_of_memory_stops_an_allocation_there_and_nothing_here():
    got, note = answers_of_a_process(allocating, 50, 150, 300, 50, memory=200 * MIB)
    assert (got, note) == ([50, 150], "out of memory")
    assert answers_of_a_process(allocating, 300) == ([300], "")
    assert torch.ones(300 * MIB, dtype=torch.uint8).sum() == 300 * MIB


def test_one_that_is_killed_leaves_what_it_said():
    assert answers_of_a_process(dying, "so far") == (["so far"], "out of memory")
    assert in_a_process(os.getppid) != os.getppid() and in_a_process(time.gmtime, 0).tm_year == 1970
    assert in_a_process(int, "x").startswith("ValueError: invalid literal")


def test_a_crash_is_no_lack_of_memory():
    assert answers_of_a_process(crashing) == (["so far"], "exit code 3")
    assert Row("peer", "exit code 3").red


def test_plain_torch_ends_in_memory_that_ours_fits_in(monkeypatch):
    """Logits of 64 MiB, of which autograd holds three; ours keeps a chunk."""
    monkeypatch.setitem(BUDGETS["cpu"], "quick", Budget(600.0, 150))
    growth = scaling.Growth(2048, 4096, {"D": 16})
    monkeypatch.setitem(GROWTHS["M=N"]["cpu"], "quick", growth)
    (question,) = (q for q in scaling.QUESTIONS if q.name == "scaling over M=N")
    (shape,) = question.shapes("cpu", "quick")
    result = question.answer(shape, SETTINGS)
    ours, torchs = result.rows
    assert ours.limit is None and len(ours.times) == len(ours.peaks) == 2
    assert torchs.limit == "4096: out of memory" and not torchs.red
    assert torchs.peaks == pytest.approx([48], abs=1)  # three times 2048 x 2048 x 4 bytes
    assert result.about == {"seconds at most": 600.0, "MiB at most": 150}


def test_every_growth_doubles_and_its_passages_are_those_of_its_queries():
    for axis, of_devices in GROWTHS.items():
        for device, of_levels in of_devices.items():
            assert set(of_levels) <= set(BUDGETS[device])
            for growth in of_levels.values():
                assert growth.sizes[0] == growth.first and growth.sizes[-1] == growth.last
                for size in growth.sizes:
                    at = growth.fixed | dict.fromkeys(axis.split("="), size)
                    assert set(at) == {"M", "N", "D"} and at["N"] % at["M"] == 0


def test_a_trainers_limit_is_in_tokens_of_its_batch(monkeypatch):
    """Of a trainer whose step takes a second for each two rows of its batch, and memory alike."""

    def asked(measure, trainer, task, memory):
        assert memory == 640 * MIB and task.output.parent.is_dir()
        if trainer is scaling.TRAINERS[OURS]:
            return Measured(task.batch / 2, 2, task.batch * MIB)
        return Measured(task.batch / 2, 2, task.batch) if task.batch < 8 else "out of memory"

    monkeypatch.setattr(scaling, "in_a_process", asked)
    monkeypatch.setitem(scaling.BATCHES["cpu"], "default", scaling.Growth(4, 16, STEP))
    question = scaling.QUESTIONS[-1]
    (shape,) = question.shapes("cpu", "default")
    settings = dataclasses.replace(
        SETTINGS, level="default", implementations=frozenset([OURS, "sentence-transformers"])
    )
    theirs, ours = question.answer(shape, settings).rows
    assert question.shapes("cpu", "quick") == [] and ours.axis == "tokens"
    assert ours.sizes[2] > 1.8 * ours.sizes[1] > 3 * ours.sizes[0]
    assert ours.times == (2.0, 4.0) and ours.peaks == (4.0, 8.0)
    assert ours.exponent == pytest.approx(1, abs=0.1)
    assert ours.limit == f"{ours.sizes[2]}: over 5 s" and ours.note == ""
    assert theirs.limit == f"{ours.sizes[1]}: out of memory" and len(theirs.times) == 1


def test_ranks_send_what_a_ring_of_them_does():
    (question,) = ranks.QUESTIONS
    (shape,) = question.shapes("cpu", "quick")
    settings = Settings("cpu", "quick", 1, SETTINGS.rates, frozenset([f"{OURS}, gather"]))
    (row,) = question.answer(shape, settings).rows
    passages = shape["N"] * shape["D"] * 4 / MIB
    assert row.axis == "ranks" and row.sizes == (1, 2)
    # to the other, with a few counts, and their gradients back; no flop beyond S, dQ and dP
    assert row.sent[0] == 0 and row.sent[1] == pytest.approx(2 * passages, rel=2e-3)
    assert row.work == pytest.approx((6, 6)) and row.messages[0] == 0
