"""The checkpoints of a run: no step is saved twice, none before its numbers are known.

A disk that refuses one ends no run: it is said at once and in every line of the log, and tried
again, until one is written.
"""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from rankpo_fast.errors import NotSaved
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import Ranks
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.after_save import run_after_save
from rankpo_fast.train.background import HostCopy, begun, ended
from rankpo_fast.train.callbacks import Callbacks
from rankpo_fast.train.checkpoint import State
from rankpo_fast.train.choice import Choice
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule


class _Ended(NamedTuple):
    """How the writing of a checkpoint did."""

    path: Path | None
    failed: str | None  # why it was not written
    not_handed_on: str | None = None  # what --after_save met


class Checkpointer:
    """Saves what trains, in the run's directory; a context manager, which leaves none half written.

    With --background_saves a checkpoint is written while the training goes on, and what became of
    it is known once `wait` has returned; without it, once `save` has.
    """

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
        self._copy = HostCopy(run.ranks) if run.training.background_saves else None
        # In parts all ranks write, and talk to each other while they also train.
        self._writers = run.ranks.beside() if self._copy and run.sharded else run.ranks
        self._begun: int | None = None  # the last step whose checkpoint is written, or about to be
        self._saved = run.first_step  # the last one that is safe
        self._writing: Future[_Ended] | None = None
        self._heard: _Ended | None = None  # whose end was said
        self.trouble: str | None = None  # why the last one was not written, the same on all ranks

    def __enter__(self) -> Self:
        run, keep, found = self._run, self._run.training.save_total_limit, self._run.checkpoint
        own = run.path / output.CHECKPOINTS
        if keep and run.ranks.first and found is not None and found.path.parent == own:
            # A kill may have come once it was there and before older ones were gone.
            checkpoints.drop_older(found.path, keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writing is None or kind is KeyboardInterrupt:  # which waits for nothing
            return
        try:
            self._hear(self._writing.result(), last=True)
        except Exception:
            if kind is None:  # else the error that ends the run is the one to tell of
                raise

    def save(self, step: int, *, last: bool = False) -> None:
        """After `step` steps; nothing where that was done already. All ranks must call it.

        Args:
            last: returns once it is on the disk, or refused.

        Raises:
            FloatingPointError: loss or gradient of the step is not finite.
        """
        if last:
            self.wait()  # after which one that failed is tried again
        if step == self._begun:
            return
        self._log.settle()
        self.wait()
        state = checkpoints.state_of(
            step,
            self._encoder,
            self._optimizer,
            self._run.settings,
            self._memory.max_tokens,
            choice=self._choice.state(),
            ranks=self._run.ranks,
        )
        copied = None if last else self._copied(state)
        self._begun = step
        self._schedule.begun()
        if copied is not None:
            self._writing = begun(partial(self._write, copied, self._writers), self._run.device)
        else:
            self._writing = ended(partial(self._write, state, self._run.ranks))
            self.wait(last=last)

    def look(self) -> None:
        """Say how the one under way ended, if it has: after a step."""
        if self._writing is not None and self._writing.done():
            self._hear(self._writing.result())

    def wait(self, *, last: bool = False) -> None:
        """Until the one under way is on the disk, or refused. All ranks must call it.

        Args:
            last: none will be tried after it.
        """
        if self._writing is None or self._begun is None:
            return
        result = self._writing.result()
        self._hear(result, last=last)
        told = self._run.ranks.objects(result.failed)
        self.trouble = next((failed for failed in told if failed is not None), None)
        if self.trouble is None:
            self._saved = self._begun
        else:
            if self._choice.lost(self._begun):
                self._log.say(f"step {self._begun} is the best so far, but could not be kept")
            self._begun = None
        self._writing = None

    def check(self) -> None:
        """NotSaved where the last checkpoint was not written."""
        if self.trouble is not None:
            raise NotSaved(f"{self.trouble}; the model is saved")

    def _copied(self, state: State) -> State | None:
        """None where it is to be written while the step waits."""
        if self._copy is None:
            return None
        before = self._copy.refused
        copied = self._copy.of(state)
        if self._copy.refused and not before:
            self._log.say("checkpoints are written while a step waits: a host has no room for a "
                          "copy of weights and optimizer")  # fmt: skip
        return copied

    def _write(self, state: State, ranks: Ranks) -> _Ended:
        try:
            path = checkpoints.save(
                self._run.path / output.CHECKPOINTS,
                state,
                keep=self._run.training.save_total_limit,
                ranks=ranks,
            )
        except OSError as error:
            return _Ended(None, f"the checkpoint of step {state.step} could not be written "
                                f"({error})")  # fmt: skip
        command, failed = self._run.training.after_save, None
        if command is not None and ranks.first:
            failed = run_after_save(command, path, state.step)
        return _Ended(path, None, failed)

    def _hear(self, result: _Ended, *, last: bool = False) -> None:
        """Say how the one under way ended, once."""
        if result is self._heard:
            return
        self._heard = result
        if result.path is None:
            on = "" if last else ": the run goes on, and tries again"
            self._log.say(f"{result.failed}{on}")
            self._schedule.failed()
            self._log.unsaved_since = self._saved
            return
        self._log.unsaved_since = None
        assert self._begun is not None
        self._callbacks.checkpoint(self._begun, result.path)
        if result.not_handed_on is not None:
            self._log.say(f"{result.not_handed_on}{'' if last else ': the run goes on'}")
