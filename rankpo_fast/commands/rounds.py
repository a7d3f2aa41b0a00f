"""`rankpo-fast rounds`: stage 1 with negatives that each round's model mines for the next."""

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    RoundsConfig,
    TrainingConfig,
)
from rankpo_fast.data.files import whole_file
from rankpo_fast.extras import lacks
from rankpo_fast.rounds.report import as_markdown, png
from rankpo_fast.rounds.run import FIGURE, REPORT, Settings, run_rounds


def run(
    model: ModelConfig,
    data: ContrastiveDataConfig,
    loss: ContrastiveLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    rounds: RoundsConfig,
) -> None:
    """Raises InputError for what the user can put right, TrainingStopped after SIGTERM."""
    given = Settings(model, data, loss, training, evaluation, compute, rounds)
    settings, steps = run_rounds(given)
    drawn = evaluation.asked and not lacks("plots")
    if drawn:
        with whole_file(settings.path / FIGURE) as file:
            file.write_bytes(png(settings, steps))
    report = as_markdown(settings, steps, FIGURE if drawn else None)
    with whole_file(settings.path / REPORT) as file:
        file.write_text(report, encoding="utf-8")
    print(report)
    if evaluation.asked and not drawn:
        print("no figure: that takes matplotlib, pip install 'rankpo-fast[plots]'")
    print(f"model and report in {settings.path}")
