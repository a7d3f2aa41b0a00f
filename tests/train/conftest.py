"""Small data for both stages, and a way to run a stage with few words."""

import dataclasses
import json
import random
import signal
from pathlib import Path

import pytest

from rankpo_fast import config as configs
from rankpo_fast.train.contrastive import train_contrastive
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.rankpo import train_rankpo

TRADES = ["nurse", "teacher", "developer", "cook", "pilot", "baker", "judge", "miner"]
PLACES = ["Berlin", "Lyon", "Oslo"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def contrastive_file(tmp_path_factory) -> str:
    """24 rows: the positive has the trade and the place of the query, the negatives do not."""
    pairs = [(trade, place) for trade in TRADES for place in PLACES]
    rows = [
        {
            "query": f"we are looking for a {trade} in {place}",
            "positives": [f"{trade} from {place} with years of experience"],
            "negatives": [f"{t} from {p} with years of experience" for t, p in pairs if t != trade],
        }
        for trade, place in pairs
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "contrastive.jsonl", rows)


@pytest.fixture(scope="session")
def preference_file(tmp_path_factory) -> str:
    """24 rows: of two people with the trade, the senior one is preferred."""
    coin = random.Random(0)
    rows = []
    for trade in TRADES:
        for place in PLACES:
            texts = [f"senior {trade} in {place}", f"junior {trade} in {place}"]
            swap = coin.random() < 0.5
            rows.append(
                {
                    "query": f"we are looking for a {trade} in {place}",
                    "passage1": texts[swap],
                    "passage2": texts[not swap],
                    "preferred": "AB"[swap],
                    "confidence_score": 50 + coin.randrange(50),
                }
            )
    return write_rows(tmp_path_factory.mktemp("rows") / "preferences.jsonl", rows)


SMALL = {
    "bf16": False,
    "gradient_checkpointing": False,
    "num_negatives": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "device": "cpu",
}


@pytest.fixture
def run_stage(tmp_path, contrastive_file, preference_file):
    """run_stage("contrastive" or "rankpo", model, "name of the output", **flags) -> its Path."""
    stages = {
        "contrastive": (
            train_contrastive,
            configs.ContrastiveDataConfig,
            configs.ContrastiveLossConfig,
            contrastive_file,
        ),
        "rankpo": (
            train_rankpo,
            configs.RankPODataConfig,
            configs.RankPOLossConfig,
            preference_file,
        ),
    }

    def run(stage: str, model: Path | str, name: str, **flags) -> Path:
        train, data, loss, file = stages[stage]
        flags = {
            **SMALL,
            "model_name_or_path": str(model),
            "train_data": [file],
            "output_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"),
            **flags,
        }
        classes = [
            configs.ModelConfig,
            data,
            loss,
            configs.TrainingConfig,
            configs.EvaluationConfig,
            configs.ComputeConfig,
            *([configs.ReplayConfig] if stage == "rankpo" else []),
        ]
        return train(*(_settings(cls, flags) for cls in classes))

    return run


def _settings(cls: type, flags: dict) -> object:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in flags.items() if name in names})


@pytest.fixture
def stop_after(monkeypatch):
    """SIGTERM during the given step, as a scheduler would send it; or another signal."""

    def arm(step, number=signal.SIGTERM):
        original = MetricsLog.step

        def step_then_signal(self, done, *args, **kwargs):
            original(self, done, *args, **kwargs)
            if done == step:
                signal.raise_signal(number)

        monkeypatch.setattr(MetricsLog, "step", step_then_signal)

    yield arm
    monkeypatch.undo()


@pytest.fixture
def read_metrics():
    """The lines of an output directory's metrics.jsonl."""

    def read(output: Path) -> list[dict]:
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    return read
