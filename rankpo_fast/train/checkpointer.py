"""The checkpoints of a run: no step is saved twice, none before its numbers are known.

A disk that refuses one ends no run: it is said at once and in every line of the log, and tried
again, until one is written.
"""

from rankpo_fast.errors import NotSaved
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.after_save import run_after_save
from rankpo_fast.train.callbacks import Callbacks
from rankpo_fast.train.choice import Choice
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule


class Checkpointer:
    """Saves what trains, in the run's directory."""

    def __init__(
        self,
        run: Run,
        encoder: Encoder,
        optimizer: Optimizer,
        memory: Memory,
        schedule: SaveSchedule,
        log: MetricsLog,
        callbacks: Callbacks,
        choice: Choice,
    ):
        self._run, self._schedule, self._log, self._callbacks = run, schedule, log, callbacks
        self._encoder, self._optimizer, self._memory = encoder, optimizer, memory
        self._choice = choice
        self._saved: int | None = None  # the last step that was
        self.trouble: str | None = None  # why the last one was not, the same on all ranks

    def save(self, step: int) -> None:
        """After `step` steps; nothing where that was done already. All ranks must call it.

        Raises:
            FloatingPointError: loss or gradient of the step is not finite.
        """
        if step == self._saved:
            return
        self._log.settle()
        path, failed = None, None
        try:
            path = checkpoints.save(
                self._run.path / output.CHECKPOINTS,
                step,
                self._encoder,
                self._optimizer,
                self._run.settings,
                self._memory.max_tokens,
                choice=self._choice.state(),
                keep=self._run.training.save_total_limit,
                ranks=self._run.ranks,
            )
        except OSError as error:
            failed = f"the checkpoint of step {step} could not be written ({error})"
        told = self._run.ranks.objects(failed)
        self.trouble = next((failed for failed in told if failed is not None), None)
        if self.trouble is not None:
            self._log.say(f"{self.trouble}: the run goes on, and tries again")
            self._schedule.failed()
            self._log.unsaved_since = self._run.first_step if self._saved is None else self._saved
            return
        self._schedule.saved()
        self._saved, self._log.unsaved_since = step, None
        assert path is not None
        self._callbacks.checkpoint(step, path)
        command = self._run.training.after_save
        failed = None
        if command is not None and self._run.ranks.first:
            failed = run_after_save(command, path, step)
        if failed is not None:
            self._log.say(f"{failed}: the run goes on")

    def check(self) -> None:
        """NotSaved where the last checkpoint was not written."""
        if self.trouble is not None:
            raise NotSaved(f"{self.trouble}; the model is saved")
