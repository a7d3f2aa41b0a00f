"""The checkpoints of a run: no step is saved twice, none before its numbers are known."""

from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.callbacks import Callbacks
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
    ):
        self._run, self._schedule, self._log, self._callbacks = run, schedule, log, callbacks
        self._encoder, self._optimizer, self._memory = encoder, optimizer, memory
        self._saved: int | None = None  # the last step that was

    def save(self, step: int) -> None:
        """After `step` steps; nothing where that was done already.

        Raises:
            FloatingPointError: loss or gradient of the step is not finite.
        """
        if step == self._saved:
            return
        self._log.settle()
        path = checkpoints.save(
            self._run.path / output.CHECKPOINTS,
            step,
            self._encoder,
            self._optimizer,
            self._run.settings,
            self._memory.max_tokens,
            keep=self._run.training.save_total_limit,
            ranks=self._run.ranks,
        )
        self._run.ranks.meet()
        self._schedule.saved()
        self._saved = step
        self._callbacks.checkpoint(step, path)
