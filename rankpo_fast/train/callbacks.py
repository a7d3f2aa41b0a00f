"""What Python callers hear of a training while it goes."""

from collections.abc import Mapping, Sequence
from pathlib import Path


class Callback:
    """Override what you need. All are called in the training's own thread, on the first rank; an
    exception ends the training. On a GPU numbers come a step late, and so do these calls."""

    def on_log(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Every `logging_steps`, and after the last step, with what metrics.jsonl gets.

        Returns:
            True to end the training after the step under way: the model is saved as it is then,
            and evaluated.
        """

    def on_evaluation(self, step: int, figures: dict[str, float]) -> bool | None:
        """After each evaluation, with its figures, "ndcg@20" say; the return value as of `on_log`.
        At the end of a training it is too late to end it."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Once a checkpoint is on the disk, and --after_save has ended: of an earlier step than the
        last, if steps went on while it was written."""


class Callbacks:
    """Several of them; `ended` once one of them asked for the end."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks = list(callbacks)
        self.ended = False

    def log(self, step: int, line: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            self.ended |= bool(callback.on_log(step, dict(line)))

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            self.ended |= bool(callback.on_evaluation(step, dict(figures)))

    def checkpoint(self, step: int, path: Path) -> None:
        for callback in self._callbacks:
            callback.on_checkpoint(step, path)


NOBODY = Callbacks()
