"""A training ends where its target is reached; evaluations are not in its time."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import Readings
from bench.questions import NOT_REACHED, OURS, Rates, Settings
from bench.training import end_to_end
from bench.training.end_to_end import answer, reach
from bench.training.implementations import Task
from bench.training.steps import task_of

SHAPE = {"batch": 16, "negatives": 1, "steps": 4, "every": 2, "backbone": "tiny", "ndcg": 1e-4}
SETTINGS = Settings("cpu", "quick", 7, Rates({"float32": 1e10}, 1e10))
STEP_S, EVALUATION_S, EVALUATION_BYTES = 0.01, 0.3, 2**28


@pytest.fixture
def task(tmp_path) -> Task:
    return dataclasses.replace(task_of(SHAPE, "cpu"), output=tmp_path / "output")


def plain_loop(task: Task) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(task.steps):
        time.sleep(STEP_S)
        model(torch.ones(1, 3, dtype=torch.int64)).last_hidden_state.sum().backward()
        optimizer.step()


@pytest.mark.long
def test_training_ends_at_the_first_evaluation_above_the_target(task, monkeypatch):
    """Which sees the weights as they are then, every few steps, while the clock stands still; and
    what it takes is not the training's."""
    figures, seen = iter([0.1, 0.3]), []

    def evaluator(model, task):
        encoder = SimpleNamespace(backbone=SimpleNamespace(load_state_dict=seen.append))

        def evaluate():
            torch.ones(EVALUATION_BYTES, dtype=torch.uint8)
            time.sleep(EVALUATION_S)
            return next(figures)

        return encoder, evaluate

    monkeypatch.setattr(end_to_end, "evaluator", evaluator)
    longer = dataclasses.replace(task, steps=50)
    start = time.perf_counter()
    reached = reach(0.2, 2, plain_loop, longer)
    whole = time.perf_counter() - start
    assert (reached.steps, reached.ndcg) == (4, 0.3) and len(seen) == 2
    assert 4 * STEP_S < reached.seconds < whole - 2 * EVALUATION_S
    assert reached.joules is None and 0 < reached.peak < EVALUATION_BYTES


def test_the_last_step_is_evaluated_too(task, monkeypatch):
    encoder = SimpleNamespace(backbone=SimpleNamespace(load_state_dict=lambda state: None))
    monkeypatch.setattr(end_to_end, "evaluator", lambda *_: (encoder, lambda: 0.1))
    said = reach(0.2, 3, plain_loop, task)
    assert said == f"{NOT_REACHED}: 0.100 of 0.2 after 4 steps"


def test_energy_is_that_of_all_stretches_and_none_of_a_device_that_does_not_tell():
    readings = [Readings(joules=j, throttled=t) for j, t in ((10.0, None), (30.0, "hot"))]
    assert end_to_end._energy(readings, 4.0) == {"joules": 40, "watts": 10, "throttled": "hot"}
    assert end_to_end._energy([Readings(joules=10.0), Readings()], 4.0) == {}


@pytest.mark.long
def test_every_implementation_reaches_a_target_that_an_untrained_model_has():
    pytest.importorskip("sentence_transformers")
    result = answer(SHAPE, SETTINGS)
    assert set(result.about["steps"]) == set(end_to_end.implementations())
    for row in result.rows:
        assert not row.note and row.seconds > 0 and row.ndcg > 1e-4
        assert result.about["steps"][row.implementation] == [2]


@pytest.mark.long
def test_a_target_that_is_never_reached_is_red_for_ours(monkeypatch):
    ours = {OURS: end_to_end.implementations()[OURS]}
    monkeypatch.setattr(end_to_end, "implementations", lambda: ours)
    [row] = answer(SHAPE | {"ndcg": 0.99}, SETTINGS).rows
    assert row.note.startswith(f"{NOT_REACHED}: 0.") and row.note.endswith("of 0.99 after 4 steps")
    assert row.red and not dataclasses.replace(row, implementation="a peer").red
