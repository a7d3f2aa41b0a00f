"""When a checkpoint is due.

    --save_steps n      after every n-th step
    --save_minutes m    when the last one is m minutes old, and at the end of every epoch

The second is the default, so that a run that is killed loses minutes, whatever a step takes. The
first rank's clock decides for all.
"""

import time

from rankpo_fast.config import TrainingConfig

DEFAULT_MINUTES = 10.0
YOUNG = 60.0  # seconds: no epoch's end is saved so soon after another checkpoint, or the start


class SaveSchedule:
    """Counts from when it is made; `due` after a step, `saved` after a checkpoint."""

    def __init__(self, config: TrainingConfig):
        minutes = config.save_minutes
        if minutes is None:
            minutes = DEFAULT_MINUTES if config.save_steps is None else 0.0
        self._seconds, self._steps = 60 * minutes, config.save_steps
        self._kept = config.save_total_limit
        self._last = time.monotonic()

    def due(self, step: int, *, ends_epoch: bool, last: bool) -> bool:
        """Whether a checkpoint is to follow on `step` steps.

        Args:
            ends_epoch: with it an epoch is done.
            last: none follows, and the model itself is going to be saved.
        """
        if self._steps is not None and step % self._steps == 0:
            return True
        if not self._seconds or last:
            return False
        age = time.monotonic() - self._last
        return age >= self._seconds or (ends_epoch and age >= YOUNG)

    def saved(self) -> None:
        self._last = time.monotonic()

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
