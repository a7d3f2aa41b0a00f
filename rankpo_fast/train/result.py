"""What a training gives back to Python."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.output import METRICS

# Before the names of figures in metrics.jsonl: of an evaluation, of the step that is the result.
EVALUATION, BEST = "eval/", "best/"


CHOSEN = (f"{BEST}step", f"{BEST}score")  # no figures


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A finished training.

    Attributes:
        output_dir: where the model, metrics.jsonl and the checkpoints are.
        encoder: the trained one, in eval mode; None where the run had been finished before, and
            after --shard grad or full, whose weights are whole in `output_dir` alone.
        history: the lines of metrics.jsonl, a dict of numbers each: "step", and either "loss" and
            more of the training, or figures of an evaluation by names like "eval/ndcg@20"; with
            --metric_for_best_model at last those of the result, "best/step" among them.
    """

    output_dir: Path
    encoder: Encoder | None = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)

    @classmethod
    def of(cls, output_dir: Path, encoder: Encoder | None) -> "TrainingResult":
        """With the metrics that are on the disk; on ranks that see no such file none."""
        path = output_dir / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return cls(output_dir, encoder, [json.loads(line) for line in lines])

    @property
    def steps(self) -> int:
        """Optimizer steps done, those of the run that it went on from included."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def figures(self) -> dict[str, float]:
        """Of the model in `output_dir`, "ndcg@20" or "alignment" say; none where none was asked
        for."""
        for line in reversed(self.history):
            for kind in (BEST, EVALUATION):
                figures = {
                    name.removeprefix(kind): value
                    for name, value in line.items()
                    if name.startswith(kind) and name not in CHOSEN
                }
                if figures:
                    return figures
        return {}
