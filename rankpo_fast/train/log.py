"""What a run says while it goes: metrics.jsonl, its reporters, a bar or lines for the user.

Numbers of a step are read when they have come to the host, on a GPU a step later: nothing waits.
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
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch.profiler import record_function
from tqdm import tqdm

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.progress import BAR, duration, on_terminal
from rankpo_fast.train.callbacks import NOBODY, Callbacks
from rankpo_fast.train.output import METRICS
from rankpo_fast.train.reporters import Reporters
from rankpo_fast.train.step import StepMetrics


class MetricsLog:
    """A context manager; `step` after each optimizer step, `write` for anything else.

    A step's numbers are read when they are there, on a GPU while the next step is under way;
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
        callbacks: Callbacks = NOBODY,
        silent: bool = False,
    ):
        self._silent = silent  # as ranks are that only read the numbers of their steps
        self._path = Path(os.devnull) if silent else directory / METRICS
        self._every, self.total_steps = config.logging_steps, total_steps
        self._first_step = first_step
        self._lines = not silent and not on_terminal()
        self._reporters, self._callbacks = reporters, callbacks
        self._stack = ExitStack()
        self._began: float | None = None  # of the first step, in seconds
        self._unread: deque[_Unread] = deque()
        self._means = _Means()  # since the last line
        self._last_read = 0.0
        self._last: _Read | None = None
        self._unwritten = b""  # of the file
        self.unsaved_since: int | None = None  # the last step that is safe, where saving fails

    def __enter__(self) -> "MetricsLog":
        if not self._silent:
            _drop_lines_after(self._path, self._first_step)
        with self._stack as stack:
            self._file = stack.enter_context(self._path.open("ab", buffering=0))
            self._bar = stack.enter_context(tqdm(
                total=self.total_steps, initial=self._first_step, desc="training", unit="step",
                dynamic_ncols=True, bar_format=BAR, disable=self._silent or self._lines,
            ))  # fmt: skip
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        lost = self._unwritten.count(b"\n")
        if lost:
            self.say(f"{self._path}: {lost:,} lines could not be written")
        self._stack.close()

    def step(self, step: int, epoch: float, metrics: StepMetrics) -> None:
        """Raises FloatingPointError if the step's numbers, or the last one's, are not finite.

        Args:
            epoch: epochs done with it.
        """
        if metrics.notes:
            self.say(f"step {step}: out of memory, done again with {'; '.join(metrics.notes)}")
        with record_function("logging"):
            self._unread.append(_Unread(step, epoch, metrics))
            while self._unread and (len(self._unread) > 1 or metrics.arrived is None):
                self._read(self._unread.popleft())

    def settle(self) -> None:
        """Wait for the numbers of all steps; raises FloatingPointError like `step`."""
        while self._unread:
            self._read(self._unread.popleft())

    def finish(self) -> None:
        """`settle`, and a line of the steps since the last one, where the run ends early."""
        self.settle()
        if self._means.steps and self._last is not None:
            self._write_means(self._last)

    def _read(self, unread: "_Unread") -> None:
        step, metrics = unread.step, unread.metrics
        metrics.check_finite(step)
        now = perf_counter()
        seconds = now - max(metrics.began, self._last_read)
        self._last_read = now
        self._means.add(metrics, seconds)
        memory, speed = peak_memory(), metrics.tokens / seconds
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, {speed:,.0f} tok/s, {memory / 2**30:.1f} GiB"
            f"{self._warning(step)}"
        )
        self._bar.update()
        self._began = metrics.began if self._began is None else self._began
        read = self._last = _Read(step, unread.epoch, metrics.learning_rate, metrics.grad_norm)
        due = step % self._every == 0 or step == self.total_steps
        if self._lines and (due or step == self._first_step + 1):
            self._print(step, self._line(read), now - self._began)
        if due:
            self._write_means(read)

    def _write_means(self, last: "_Read") -> None:
        line = self._line(last)
        self.write(last.step, line)
        self._callbacks.log(last.step, line)
        self._means = _Means()

    def _line(self, last: "_Read") -> dict[str, float]:
        """Means of the steps since the last line, up to `last`."""
        return {
            "epoch": last.epoch,
            "loss": self._means.loss,
            "learning_rate": last.learning_rate,
            "grad_norm": last.grad_norm,
            **self._means.metrics,
            "tokens_per_second": self._means.tokens / self._means.seconds,
            "queries_per_second": self._means.queries / self._means.seconds,
            "peak_memory_bytes": peak_memory(),
            **self._unsaved(last.step),
        }

    def _unsaved(self, step: int) -> dict[str, float]:
        """How many steps would be lost, in every line for as long as checkpoints fail."""
        since = self.unsaved_since
        return {} if since is None else {"steps_not_saved": float(step - since)}

    def _print(self, step: int, line: Mapping[str, float], seconds: float) -> None:
        """What the bar would show, and of the steps since the last line of metrics.jsonl.

        Args:
            seconds: since the first step began.
        """
        left = seconds / (step - self._first_step) * (self.total_steps - step)
        many = self._means.steps
        self.say(
            f"step {step:,} of {self.total_steps:,}: loss {line['loss']:.4f}"
            f"{f' (mean of {many} steps)' if many > 1 else ''}, rate {line['learning_rate']:.2e}, "
            f"{line['tokens_per_second']:,.0f} tok/s, {line['peak_memory_bytes'] / 2**30:.1f} GiB, "
            f"{duration(left)} left{self._warning(step)}"
        )

    def _warning(self, step: int) -> str:
        lost = self._unsaved(step).get("steps_not_saved")
        return "" if lost is None else f"; NOT SAVED: the last {lost:,.0f} steps"

    def write(self, step: int, line: Mapping[str, float]) -> None:
        """On a full disk the line waits for the next one: no run ends over it."""
        known = bool(self._unwritten)
        self._unwritten += json.dumps({"step": step, **line}).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not known:
                self.say(
                    f"{self._path} cannot be written ({error}): the run goes on, and tries again"
                )
        self._reporters.write(step, line)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.write(step, {f"eval/{name}": value for name, value in figures.items()})
        self.say(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in figures.items()))
        self._callbacks.evaluation(step, figures)

    def say(self, text: str) -> None:
        """A line to the user that leaves the bar whole."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)


@dataclass(frozen=True, eq=False)
class _Unread:
    """A step whose numbers the device may still be computing."""

    step: int
    epoch: float
    metrics: StepMetrics


class _Read(NamedTuple):
    """Of a step whose numbers are known."""

    step: int
    epoch: float
    learning_rate: float
    grad_norm: float


@dataclass
class _Means:
    """Of several steps, none of whose batches is held on to."""

    losses: list[float] = field(default_factory=list)
    batch_metrics: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    queries: int = 0
    seconds: float = 0.0

    def add(self, metrics: StepMetrics, seconds: float) -> None:
        self.losses.append(metrics.loss)
        self.batch_metrics += metrics.batch_metrics
        self.tokens += metrics.tokens
        self.queries += metrics.queries
        self.seconds += seconds

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def metrics(self) -> dict[str, float]:
        """Over the batches that have them."""
        names = dict.fromkeys(name for batch in self.batch_metrics for name in batch)
        return {
            name: statistics.fmean(batch[name] for batch in self.batch_metrics if name in batch)
            for name in names
        }


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one in use, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _drop_lines_after(path: Path, step: int) -> None:
    """A run that goes on from `step` writes the later lines again; damaged lines go too."""
    kept, damaged = [], 0
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
    if damaged:
        warnings.warn(f"{path}: dropped damaged lines, {damaged} of them", stacklevel=2)
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))
