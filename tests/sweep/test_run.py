"""A sweep of real trainings: what was done is kept, chosen on validation, tested once."""

import json

import pytest

from rankpo_fast import evaluate
from rankpo_fast.cli import main

ROWS = [
    {"query": f"a {trade} is sought", "passage1": f"{trade} of merit", "passage2": f"{trade} {i}",
     "preferred": "A"}
    for i, trade in enumerate(("nurse", "baker", "judge", "miner", "pilot", "cook"))
]  # fmt: skip
SWEEP = """
start: {start}
settings: {{train_data: {data}/pairs.jsonl, max_steps: 2, per_device_train_batch_size: 6,
  device: cpu, bf16: false, no_cache: true, learning_rate: 3e-3}}
methods:
  SimRankPO: {{}}
  broken: {{replay_data: {data}/nowhere.jsonl}}
alphas: [0.5, 1]
seeds: [0, 1]
validation: &data {{preference_data: {data}/pairs.jsonl, query_data: {data}/queries.jsonl,
  corpus_data: {data}/corpus.jsonl, cutoffs: 20, device: cpu, no_cache: true}}
test: *data
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.long  # six processes, which import torch each
def test_what_is_done_is_kept_and_what_failed_is_tried_again(tmp_path, tiny_llama_dir, capsys):
    write(tmp_path / "pairs.jsonl", ROWS)
    write(tmp_path / "corpus.jsonl", [{"text": row["passage1"]} for row in ROWS])
    queries = [{"query": {"text": r["query"]}, "positives": {"index": [i]}}
               for i, r in enumerate(ROWS)]  # fmt: skip
    write(tmp_path / "queries.jsonl", queries)
    file, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    file.write_text(SWEEP.format(start=tiny_llama_dir, data=tmp_path))
    flags = ["sweep", "--sweep", str(file), "--output_dir", str(out), "--parallel", "2"]

    assert main(flags) == 1
    assert "2 parts failed, among them broken, seed 0" in capsys.readouterr().err
    figures = {path: path.stat().st_mtime_ns for path in out.glob("figures/*/*.json")}
    assert (
        len([*out.glob("figures/validation/*")]) == 1 + 2 * 2
    )  # one start, and each alpha of each seed
    rows = json.loads((out / "results.json").read_text())["choices"]
    chosen = [row for row in rows if row["best"] or row["frontier"]]
    assert len([*out.glob("figures/test/*")]) == 1 + 2 * len(chosen)
    assert all(("test" in row) == (row in chosen) for row in rows)
    assert [(row["method"], row["alpha"]) for row in rows] == [("SimRankPO", 0.5), ("SimRankPO", 1)]
    records = [path.with_name("training.json") for path in out.glob("runs/*/model.safetensors")]
    [model] = [path.parent for path in records if '"--seed": 0,' in path.read_text()]
    data = {name: str(tmp_path / f"{name.split('_')[0]}.jsonl") for name in ("corpus_data",)}
    measured = evaluate(
        model, query_data=str(tmp_path / "queries.jsonl"), **data, cutoffs=[20], device="cpu",
        preference_data=[str(tmp_path / "pairs.jsonl")],
    )  # fmt: skip
    assert measured.figures == rows[1]["validation"][0]
    assert rows[0]["validation"] != rows[1]["validation"]

    write(tmp_path / "nowhere.jsonl", [{"query": ROWS[0]["query"], "positives": ["nurse of merit"],
                                        "negatives": ["cook"]}])  # fmt: skip
    assert main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in figures} == figures
    assert "| broken |" in (out / "report.md").read_text()
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
