"""Which of a run's models is its result: the last one, or the best of those that were evaluated.

    score = sum of --metric_weights * figures of --metric_for_best_model

The best is on disk as a checkpoint, which stays until a better one is there. What was found so far
is in every checkpoint, so that a run that goes on chooses as if it had never stopped.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankpo_fast.config import EvaluationConfig, TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.retrieval.metrics import NAMES


@dataclass(frozen=True)
class Best:
    """An evaluation."""

    step: int
    score: float
    figures: dict[str, float]


class Choice:
    """What the evaluations of a run have shown; the same on all ranks."""

    def __init__(self, config: TrainingConfig, state: Mapping[str, Any] | None = None):
        """`state`: of an earlier one, to go on with."""
        metrics = config.metric_for_best_model
        weights = config.metric_weights or [1.0] * len(metrics)
        self._weights = dict(zip(metrics, weights, strict=True))
        self._patience = config.patience
        state = state or {"best": None, "evaluated": 0, "without_gain": 0}
        best = state["best"]
        self.best = None if best is None else Best(**best)
        self._before = self.best
        self.evaluated: int = state["evaluated"]  # the last step that was
        self._without_gain: int = state["without_gain"]  # evaluations since the best

    @property
    def wanted(self) -> bool:
        """Whether the best model is the result, not the last one."""
        return bool(self._weights)

    @property
    def over(self) -> bool:
        """Whether as many evaluations in a row as --patience allows brought nothing."""
        return self._patience is not None and self._without_gain >= self._patience

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; None: there is nothing to choose."""
        if not self.wanted:
            return None
        best = None if self.best is None else asdict(self.best)
        return {
            "best": best, "evaluated": self.evaluated, "without_gain": self._without_gain
        }  # fmt: skip

    def consider(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether the model of this step is better than any before it, which the caller saves."""
        score = sum(weight * figures[name] for name, weight in self._weights.items())
        gain = self.best is None or score > self.best.score
        self.evaluated, self._without_gain = step, 0 if gain else self._without_gain + 1
        if gain:
            self._before, self.best = self.best, Best(step, score, dict(figures))
        return gain

    def lost(self, step: int) -> bool:
        """The model of this step could not be kept: if it is the best, the one before it is."""
        lost = self.best is not None and self.best.step == step
        if lost:
            self.best = self._before
        return lost

    def describe(self) -> str:
        """Of what the score is."""
        terms = [n if w == 1 else f"{w:g} {n}" for n, w in self._weights.items()]
        patience = "" if self._patience is None else (
            f"; the run ends after {self._patience:,} evaluations in a row without gain"
        )  # fmt: skip
        return f"the model of the evaluated step with the highest {' + '.join(terms)}{patience}"

    def __str__(self) -> str:
        if self.best is None:
            return "nothing yet"
        named = (f"{name} {self.best.figures[name]:.4f}" for name in self._weights)
        return f"step {self.best.step}, {', '.join(named)}, score {self.best.score:.4f}"


def check_choice(training: TrainingConfig, evaluation: EvaluationConfig) -> None:
    """InputError where --metric_for_best_model names what no evaluation of the run measures."""
    metrics = training.metric_for_best_model
    if not metrics:
        return
    name = "metric_for_best_model"
    if not evaluation.asked:
        raise InputError(f"--{name} needs something to measure: give --query_data, "
                         f"--preference_data, or both", name)  # fmt: skip
    if training.eval_steps is None:
        raise InputError(f"--{name} needs --eval_steps: it chooses among evaluated steps", name)
    known = [f"{kind}@{cutoff}" for kind in NAMES for cutoff in evaluation.cutoffs]
    known = known if evaluation.query_data is not None else []
    if evaluation.preference_data is not None:
        known.append("alignment")
    for metric in metrics:
        if metric not in known:
            raise InputError(f"--{name} {metric} is not measured here; there are "
                             f"{', '.join(known)}", name)  # fmt: skip
