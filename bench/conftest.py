"""`pytest bench/ [--level quick|default|full]` measures every implementation of every loss, one
test each, by pytest-benchmark: --benchmark-save, --benchmark-compare, --benchmark-compare-fail."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases.loss import LossQuestion
from bench.measure import Case, above_the_gate, noting
from bench.questions import LEVELS, Row, Shape, described
from bench.registry import QUESTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--level", choices=LEVELS, default="quick", help="of the bench's shapes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    level = metafunc.config.getoption("level")
    asked = [
        pytest.param((question, shape), name, id=f"{question.name} {described(shape)} {name}")
        for question in QUESTIONS.values()
        if isinstance(question, LossQuestion)
        for shape in question.shapes(DEVICE, level)
        for name in question.implementations(DEVICE)
    ]
    metafunc.parametrize(("asked", "implementation"), asked)


@functools.lru_cache(maxsize=1)  # the implementations of a case stand side by side
def _case(question: LossQuestion, shape: tuple) -> Case:
    torch.manual_seed(0)
    return question.case(dict(shape), DEVICE)


@pytest.fixture
def run(
    asked: tuple[LossQuestion, Shape], implementation: str, benchmark: Any
) -> Callable[[], None]:
    """One forward and backward of the implementation, awaited; red where its gate is."""
    question, shape = asked
    stopped: dict[str, str] = {}
    with noting(question.name, stopped):
        case = _case(question, tuple(shape.items()))
    if not stopped:
        if (note := above_the_gate(case, implementation)) is not None:
            pytest.fail(note)
        with noting(implementation, stopped):
            case.implementations[implementation]()
    for name, note in stopped.items():
        (pytest.fail if Row(name, note).red else pytest.skip)(note)
    benchmark.group = f"{question.name} {described(shape)}"
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes}
    benchmark.extra_info |= {"error": case.errors.get(implementation)}

    def awaited() -> None:
        case.implementations[implementation]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return awaited
