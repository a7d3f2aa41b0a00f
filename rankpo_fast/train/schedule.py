"""Which batches make which step, and when a checkpoint is due.

    --save_steps n      after every n-th step
    --save_minutes m    when the last one is m minutes old, and at the end of every epoch

The second is the default, so that a run that is killed loses minutes, whatever a step takes. The
first rank's clock decides for all.
"""

import math
import time
from dataclasses import dataclass

from rankpo_fast.config import TrainingConfig
from rankpo_fast.data.order import BatchData

DEFAULT_MINUTES = 10.0
RETRY = 60.0  # seconds after a checkpoint that could not be written
YOUNG = 60.0  # seconds: no epoch's end is saved so soon after another checkpoint, or the start


@dataclass(frozen=True)
class StepSchedule:
    """Which batches make which optimizer step; epochs follow each other without a seam."""

    rows_per_batch: int
    batches_per_epoch: int
    batches_per_step: int
    total_batches: int

    @classmethod
    def of(cls, config: TrainingConfig, data: BatchData) -> "StepSchedule":
        per_step = config.gradient_accumulation_steps
        total = max(1, round(config.num_train_epochs * data.batches_per_epoch))
        if config.max_steps is not None:
            total = config.max_steps * per_step
        return cls(data.batch_size, data.batches_per_epoch, per_step, total)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_batches / self.batches_per_step)

    def batches(self, step: int) -> range:
        """Numbers of the batches of a step, all counted from 0; the last step may have fewer."""
        first = step * self.batches_per_step
        return range(first, min(first + self.batches_per_step, self.total_batches))

    def epochs(self, steps: int) -> float:
        """Epochs done after so many steps."""
        return min(steps * self.batches_per_step, self.total_batches) / self.batches_per_epoch

    def ends_epoch(self, steps: int) -> bool:
        """Whether the last of so many steps has the last batch of an epoch, or the first of the
        next one."""
        return math.floor(self.epochs(steps)) > math.floor(self.epochs(steps - 1))

    def summary(self, batch_size: int) -> str:
        """For the user, who asked for batches of that size."""
        rows = f"{self.batches_per_step} x {self.rows_per_batch} rows"
        if self.rows_per_batch < batch_size:
            rows += f" (all there are, of {batch_size:,} that a batch may have)"
        return f"{self.total_steps:,} of {rows}, {self.epochs(self.total_steps):.4g} epochs"


class SaveSchedule:
    """Counts from when it is made; `due` after a step, `begun` with a checkpoint, and `failed` if
    it could not be written."""

    def __init__(self, config: TrainingConfig):
        minutes = config.save_minutes
        if minutes is None:
            minutes = DEFAULT_MINUTES if config.save_steps is None else 0.0
        self._seconds, self._steps = 60 * minutes, config.save_steps
        self._kept = config.save_total_limit
        self._last = time.monotonic()
        self._again = math.inf  # when one that failed is tried again

    def due(self, step: int, *, ends_epoch: bool, last: bool) -> bool:
        """Whether a checkpoint is to follow on `step` steps.

        Args:
            ends_epoch: with it an epoch is done.
            last: none follows, and the model itself is going to be saved.
        """
        if self._steps is not None and step % self._steps == 0:
            return True
        if time.monotonic() >= self._again and not last:
            return True
        if not self._seconds or last:
            return False
        age = time.monotonic() - self._last
        return age >= self._seconds or (ends_epoch and age >= YOUNG)

    def begun(self) -> None:
        self._last, self._again = time.monotonic(), math.inf

    def failed(self) -> None:
        self._again = time.monotonic() + RETRY

    def summary(self) -> str:
        """For the user."""
        times = []
        if self._steps is not None:
            times.append(f"every {self._steps:,} steps")
        if self._seconds:
            epochs = "at the end of an epoch of a minute or more"
            times.append(f"every {self._seconds / 60:g} minutes and {epochs}")
        times.append("when stopped")
        kept = f"the last {self._kept:,} kept" if self._kept else "all kept"
        return f"{', '.join(times)}; {kept}"
