"""What a call of InfoNCE's Triton launcher costs the host, before the GPU has its work.

    python -m bench.host [--calls 1000]

Kernels are looked up and specialised as always, but a stub stands for the driver: what CUDA itself
takes is not in it. The least of all calls, by part: Triton's own way to a launch, memory, the rest.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from .aot import HOPPER, Driver
from .launch import SYMMETRIC, launch

M, D = 256, 64  # of which torch's own work on the CPU is small
FORMS: dict[str, dict[str, Any]] = {
    "few launches": {"few": True},
    "few launches, both directions": {"few": True, "options": SYMMETRIC},
    "stored": {"stored": True},
    "forward": {"grads": False},
}


class Kernel:
    """Stands for a compiled one."""

    function, packed_metadata = 0, None

    def launch_metadata(self, *grid_and_arguments: Any) -> None:
        """Nobody asks for it."""

    def run(self, *launch: Any) -> None:
        """Nothing to run it on."""


class Parts:
    """Seconds of a call that went into some functions."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return run


@contextmanager
def stubbed() -> Iterator[None]:
    triton.runtime.driver.set_active(Driver(HOPPER))
    with mock.patch.object(triton.compiler, "compile", lambda *job, **options: Kernel()):
        yield


def measure(run: Callable[[], Any], calls: int) -> tuple[float, float, float, int]:
    """(seconds in all, in launches, for memory; launches) of the fastest call; the first of them
    without anything that looks on."""
    run()
    whole = min(_seconds(run) for _ in range(calls))
    launches, memory = Parts(), Parts()
    in_launches = for_memory = float("inf")
    with (
        mock.patch.object(JITFunction, "run", launches.timed(JITFunction.run)),
        mock.patch.object(torch, "empty", memory.timed(torch.empty)),
    ):
        for _ in range(calls):
            launches.seconds = memory.seconds = 0.0
            run()
            in_launches = min(in_launches, launches.seconds)
            for_memory = min(for_memory, memory.seconds)
    return whole, in_launches, for_memory, launches.calls // calls


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    calls = parser.parse_args(argv).calls
    q, p = (torch.randn(M, D, dtype=torch.bfloat16) for _ in range(2))
    print(f"{'us a call':32}{'in all':>8}{'launches':>10}{'memory':>8}{'the rest':>10}")
    with stubbed():
        for name, how in FORMS.items():
            run = partial(launch, q, p, torch.arange(M), **how)
            whole, in_launches, memory, count = measure(run, calls)
            figures = [x * 1e6 for x in (whole, in_launches, memory, whole - in_launches - memory)]
            of = f"{figures[1]:.0f} ({count})"
            print(f"{name:32}{figures[0]:8.0f}{of:>10}{figures[2]:8.0f}{figures[3]:10.0f}")


if __name__ == "__main__":
    main()
