"""What a run says while it goes: metrics.jsonl, its reporters, a bar or lines for the user.

Numbers of a step are read when they have come to the host, on a card a step later: nothing waits.
"""

import json
import os
import resource
import statistics
import sys
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.progress import BAR, duration, on_terminal
from rankpo_fast.train.output import METRICS
from rankpo_fast.train.reporters import Reporters
from rankpo_fast.train.step import StepResult


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as it is written down."""

    epoch: float  # epochs done with it
    loss: float
    learning_rate: float
    grad_norm: float  # before clipping
    metrics: list[dict[str, float]]  # of each batch
    tokens: int
    queries: int
    seconds: float


class MetricsLog:
    """A context manager; `step` after each optimizer step, `write` for anything else.

    A step's numbers are read when they are there, on a card while the next step is under way;
    before anything is built upon a step, `settle` waits for it.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainingConfig,
        reporters: Reporters,
        first_step: int,
        total_steps: int,
        *,
        silent: bool = False,
    ):
        self._silent = silent  # as ranks are that only read the numbers of their steps
        self._path = Path(os.devnull) if silent else directory / METRICS
        self._every, self._total_steps = config.logging_steps, total_steps
        self._first_step = first_step
        self._lines = not silent and not on_terminal()
        self._reporters = reporters
        self._stack = ExitStack()
        self._began: float | None = None  # of the first step, in seconds
        self._unread: deque[tuple[int, float, StepResult]] = deque()
        self._records: list[StepRecord] = []  # since the last line
        self._last_read = 0.0

    def __enter__(self) -> "MetricsLog":
        if not self._silent:
            _drop_lines_after(self._path, self._first_step)
        with self._stack as stack:
            self._file = stack.enter_context(self._path.open("a", encoding="utf-8"))
            self._bar = stack.enter_context(tqdm(
                total=self._total_steps, initial=self._first_step, desc="training", unit="step",
                dynamic_ncols=True, bar_format=BAR, disable=self._silent or self._lines,
            ))  # fmt: skip
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, step: int, epoch: float, result: StepResult) -> None:
        """Raises FloatingPointError if the step's numbers, or the last one's, are not finite."""
        self._unread.append((step, epoch, result))
        while self._unread and (len(self._unread) > 1 or result.arrived is None):
            self._read()

    def settle(self) -> None:
        """Wait for the numbers of all steps; raises FloatingPointError like `step`."""
        while self._unread:
            self._read()

    def _read(self) -> None:
        step, epoch, result = self._unread.popleft()
        loss, norm, metrics = result.read(step)
        now = perf_counter()
        seconds = now - max(result.began, self._last_read)
        self._last_read = now
        record = StepRecord(
            epoch, loss, result.learning_rate, norm, metrics, result.tokens,
            result.queries, seconds,
        )  # fmt: skip
        self._records.append(record)
        memory, speed = peak_memory(), record.tokens / seconds
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tok/s, {memory / 2**30:.1f} GiB")
        self._bar.update()
        self._began = result.began if self._began is None else self._began
        due = step % self._every == 0 or step == self._total_steps
        shown = self._lines and (due or step == self._first_step + 1)
        if not (due or shown):
            return
        line = {**_line(self._records), "peak_memory_bytes": memory}
        if shown:
            self._print(step, line, now)
        if due:
            self.write(step, line)
            self._records = []

    def _print(self, step: int, line: Mapping[str, float], now: float) -> None:
        """What the bar would show, and of the steps since the last line of metrics.jsonl."""
        left = (now - self._began) / (step - self._first_step) * (self._total_steps - step)
        many = len(self._records)
        self.say(
            f"step {step:,} of {self._total_steps:,}: loss {line['loss']:.4f}"
            f"{f' (mean of {many} steps)' if many > 1 else ''}, rate {line['learning_rate']:.2e}, "
            f"{line['tokens_per_second']:,.0f} tok/s, {line['peak_memory_bytes'] / 2**30:.1f} GiB, "
            f"{duration(left)} left"
        )

    def write(self, step: int, line: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        self._reporters.write(step, line)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.write(step, {f"eval/{name}": value for name, value in figures.items()})
        self.say(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in figures.items()))

    def say(self, text: str) -> None:
        """A line to the user that leaves the bar whole."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one in use, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(records: list[StepRecord]) -> dict[str, float]:
    """Means and rates over some steps; the learning rate and gradient norm are the last step's."""
    seconds = sum(record.seconds for record in records)
    return {
        "epoch": records[-1].epoch,
        "loss": sum(record.loss for record in records) / len(records),
        "learning_rate": records[-1].learning_rate,
        "grad_norm": records[-1].grad_norm,
        **_mean([batch for record in records for batch in record.metrics]),
        "tokens_per_second": sum(record.tokens for record in records) / seconds,
        "queries_per_second": sum(record.queries for record in records) / seconds,
    }


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Over the batches that have them."""
    names = dict.fromkeys(name for batch in metrics for name in batch)
    return {name: statistics.fmean(m[name] for m in metrics if name in m) for name in names}


def _drop_lines_after(path: Path, step: int) -> None:
    """A run that goes on from `step` writes the later lines again; damaged lines go too."""
    kept, damaged = [], 0
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                damaged += 1
    if damaged:
        warnings.warn(f"{path}: dropped damaged lines, {damaged} of them", stacklevel=2)
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))
