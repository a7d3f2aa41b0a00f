"""See conftest.py, which makes the cases."""

from collections.abc import Callable
from typing import Any


def test_what_it_costs(run: Callable[[], None], benchmark: Any) -> None:
    benchmark(run)
