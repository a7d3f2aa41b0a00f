"""What does a run do between two steps: signals, schedules, the log, what exact resuming asks for?

    python -m bench.bookkeeping

The first training of `make demo`, whose model is so small that no share is larger: processor time
of the training's thread from the end of a step to the begin of the next, beside that of a step on
one thread; medians.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rankpo_fast.demo.steps import SHORT, Demo
from rankpo_fast.train import loop


def main() -> None:
    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []  # begin and end of each step
    step = loop.train_step

    def timed(*args: Any) -> Any:
        began = time.thread_time()
        metrics = step(*args)
        times.append((began, time.thread_time()))
        return metrics

    with tempfile.TemporaryDirectory() as name, mock.patch.object(loop, "train_step", timed):
        demo = Demo(Path(name), 0, SHORT)
        demo.make_world()
        demo.train_with_random_negatives()
    inside = statistics.median(end - began for began, end in times)
    between = statistics.median(
        after - end for (_, end), (after, _) in zip(times[:-1], times[1:], strict=True)
    )
    print(f"{len(times)} steps of {1e3 * inside:.1f} ms, {1e3 * between:.2f} ms between two: "
          f"{between / inside:.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
