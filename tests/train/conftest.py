"""Small data for both stages, and a way to run a stage with few words."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.train.log import MetricsLog
from support import stages

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


@pytest.fixture
def run_stage(tmp_path, contrastive_file, preference_file):
    """run_stage("contrastive" or "rankpo", model, "name of the output", **flags) -> its Path."""
    files = {"contrastive": contrastive_file, "rankpo": preference_file}

    def run(stage: str, model: Path | str, name: str, **flags) -> Path:
        places = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
        flags = {"train_data": [files[stage]], **places, **flags}
        return stages.run(stage, model_name_or_path=str(model), **flags)

    return run


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
def goes_on_bit_by_bit(run_stage, stop_after, read_metrics, monkeypatch):
    """goes_on_bit_by_bit(stage, model, figures, stop, refused, **flags) -> (straight, stopped):
    outputs of a run and of one that is stopped after the step `stop` and goes on, with the same
    weights and the same figures of each step. Changed flags are refused with their message."""

    def both(stage, model, figures=("step", "loss"), stop=3, refused=(), **flags):
        straight = run_stage(stage, model, "straight", **flags)
        stop_after(stop)
        with pytest.raises(TrainingStopped) as stopped:
            run_stage(stage, model, "stopped", **flags)
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        monkeypatch.undo()
        torch.manual_seed(12345)  # another process has other random states
        for changed, message in refused:
            with pytest.raises(InputError, match=message):
                run_stage(stage, model, "stopped", resume="newest", **{**flags, **changed})
        outputs = straight, run_stage(stage, model, "stopped", resume="newest", **flags)
        want, got = (load_file(path / "model.safetensors") for path in outputs)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)
        lines = [read_metrics(path) for path in outputs]
        for figure in figures:
            assert [line[figure] for line in lines[0]] == [line[figure] for line in lines[1]]
        return outputs

    return both


@pytest.fixture
def read_metrics():
    """The lines of an output directory's metrics.jsonl."""

    def read(output: Path) -> list[dict]:
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    return read
