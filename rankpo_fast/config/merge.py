"""Weights between models: which ones, how, and how far."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_names, flag, require

MOST = 1000  # directories of one command


@dataclass(frozen=True)
class MergeConfig(Config):
    """What is merged. A grid of --alpha makes a directory of each value, as alpha-0.75."""

    _argument_group_name = "merge"

    model_name_or_path: list[str] = flag("The tuned model, several of them, or one adapter.")
    output_dir: str = flag("Where the merged model goes, or a directory for each --alpha.")
    base_model_name_or_path: str | None = flag(
        "What they were tuned from. [none: the mean of several models]", None
    )
    alpha: list[str] = flag(
        "How far from the base: 0 is the base, 1 the tuned model, more goes on; values, or grids "
        "START:STOP:STEP.", [],
    )  # fmt: skip
    weights: list[float] = flag("Of several models, in their order; sum 1 is made. [equal]", [])
    method: Literal["linear", "slerp"] = flag(
        "Along the line, or along the arc between two models, tensor by tensor.", "linear"
    )

    def check(self) -> None:
        check_names(self, "model_name_or_path", "base_model_name_or_path", "output_dir")
        models = len(self.model_name_or_path)
        require(self, "model_name_or_path", "one model or more", models > 0)
        if self.weights and len(self.weights) != models:
            raise InputError(f"--weights has {len(self.weights)} values for {models} models")
        for weight in self.weights:
            require(self, "weights", "numbers >= 0, not all 0", 0 <= weight < float("inf"))
        if self.weights:
            require(self, "weights", "numbers >= 0, not all 0", sum(self.weights) > 0)
        if self.method == "slerp" and (models > 1 or self.base_model_name_or_path is None):
            raise InputError("--method slerp goes between two: --base_model_name_or_path and one "
                             "model")  # fmt: skip
        if self.base_model_name_or_path is not None and not self.alpha:
            raise InputError("--alpha says how far from --base_model_name_or_path: give it")
        if self.base_model_name_or_path is None and models > 1 and self.alpha:
            raise InputError("--alpha needs --base_model_name_or_path: it is how far from there")
        _ = self.alphas

    @property
    def shares(self) -> list[float]:
        """The weight of each model; together they are 1."""
        weights = self.weights or [1.0] * len(self.model_name_or_path)
        return [weight / sum(weights) for weight in weights]

    @property
    def alphas(self) -> dict[str, float]:
        """Each value by its name, in the order given."""
        values = [value for text in self.alpha for value in _grid(text)]
        if len(values) > MOST:
            raise InputError(f"--alpha has {len(values):,} values: {MOST:,} at most")
        return {format(value.normalize() + 0, "f"): float(value) for value in values}


def _grid(text: str) -> list[Decimal]:
    """The value, or those from START to STOP, which is one of them where the steps lead there."""
    try:
        parts = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        parts = []
    if len(parts) not in (1, 3) or not all(part.is_finite() for part in parts):
        raise InputError(f"--alpha must be numbers or START:STOP:STEP, got {text!r}")
    if len(parts) == 1:
        return parts
    start, stop, step = parts
    if step <= 0 or stop < start:
        raise InputError(f"--alpha {text}: needs START <= STOP and STEP > 0")
    steps = int((stop - start) / step)
    if steps >= MOST:
        raise InputError(f"--alpha {text} has {steps + 1:,} values: {MOST:,} at most")
    return [start + step * i for i in range(steps + 1)]
