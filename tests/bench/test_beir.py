"""Both stages on any collection with grades, by one command."""

import json
from collections import Counter

import pytest

from bench.training import beir
from bench.training.beir import SHARES, main, parsed, part, preferences, sweep_of
from rankpo_fast.data.retrieval import read_judged, read_retrieval
from rankpo_fast.model.settings import read_settings
from rankpo_fast.sweep.spec import read_sweep

TRADES = ("nurse", "baker", "judge", "miner", "pilot", "cook", "tailor", "vet")
TOWNS = ("Lyon", "Bergen", "Turin", "Ghent")
SMALL = ["--seeds", "1", "--stage1_steps", "1", "--steps", "1", "--batch_size", "4",
         "--learning_rates", "1e-3", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def collection(tmp_path):
    """A query for each trade and town: grade 2 where both are met, 1 the trade alone, 0 neither.
    Two qrels files, as published ones have."""
    both = [(trade, town) for trade in TRADES for town in TOWNS]
    path = tmp_path / "jobs"
    (path / "qrels").mkdir(parents=True)
    write(path / "corpus.jsonl", ({"_id": f"d{i}", "title": trade, "text": f"a {trade} of {town}"}
                                  for i, (trade, town) in enumerate(both)))  # fmt: skip
    write(path / "queries.jsonl", ({"_id": f"q{i}", "text": f"{trade} sought in {town}"}
                                   for i, (trade, town) in enumerate(both)))  # fmt: skip
    for name, first, last in (("dev", 0, 8), ("test", 8, len(both))):
        lines = [f"q{i}\td{j}\t{(a == c) + (a == c and b == d)}\n"
                 for i, (a, b) in list(enumerate(both))[first:last]
                 for j, (c, d) in enumerate(both) if a == c or b == d]  # fmt: skip
        (path / f"qrels/{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_query_has_the_same_part_everywhere_and_parts_have_their_shares():
    found = Counter(part(f"query {i}") for i in range(3000))
    assert found == Counter(part(f"query {i}") for i in range(3000))
    for name, tenths in SHARES.items():
        assert abs(found[name] / 3000 - tenths / 10) < 0.03


def test_preferences_are_the_order_of_grades_and_of_equal_ones_there_are_none():
    rows = preferences([("q", ("best", "good", "also good", "bad"), (2.0, 1.0, 1.0, 0.0))])
    better = {
        (row["passage1"], row["passage2"])[:: 1 if row["preferred"] == "A" else -1] for row in rows
    }
    assert better == {("best", "good"), ("best", "also good"), ("best", "bad"), ("good", "bad"),
                      ("also good", "bad")}  # fmt: skip
    many = preferences([("q", tuple(map(str, range(20))), tuple(map(float, range(20))))])
    assert len(many) == beir.PAIRS and {row["preferred"] for row in many} == {"A", "B"}


def test_every_query_is_in_one_split_whatever_files_judged_it(collection, tmp_path):
    beir.write_splits(collection, tmp_path / "split")
    queries = {}
    for name in SHARES:
        of_split = read_retrieval(tmp_path / "split", split=name)
        queries |= dict.fromkeys(of_split.queries, name)
        assert {part(query) for query in of_split.queries} == {name}
        assert {grade for grades in of_split.grades for grade in grades.values()} == {1, 2}
        judged = read_judged(tmp_path / "split", name)
        assert {grade for *_, grades in judged for grade in grades} == {0, 1, 2}
    assert len(queries) == len(TRADES) * len(TOWNS)


def test_all_that_the_sweep_asks_for_can_be_given(collection, tmp_path):
    options = parsed(["--beir", str(collection), "--output_dir", str(tmp_path / "out")])
    beir.write_splits(collection, options.output_dir / "beir")
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(sweep_of(options)))
    sweep = read_sweep(file)
    assert sweep.test is not None and sweep.seeds == (0, 1, 2)
    assert {job.setup.method for job in sweep.jobs} >= {"SFT", "SimRankPO", "RankPO"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--beir", "nowhere"], "--beir nowhere: no such directory"),
        (["--preferences", "nowhere"], "--preferences nowhere: no such file"),
        (["--output_dir", "."], "is the collection itself"),
    ],
)
def test_what_is_not_there_is_refused_by_name(flags, said, collection, monkeypatch, capsys):
    monkeypatch.chdir(collection)
    assert main(["--beir", str(collection), "--output_dir", "../out", *flags]) == 2
    assert said in capsys.readouterr().err


def test_grades_that_are_all_alike_are_refused_before_anything_is_trained(
    collection, tmp_path, capsys
):
    for file in collection.glob("qrels/*"):
        lines = [line for line in file.read_text().splitlines() if line[-1] in "1e"]
        file.write_text("\n".join(lines) + "\n")
    assert main(["--beir", str(collection), "--output_dir", str(tmp_path / "out")]) == 2
    assert "has documents of different grades" in capsys.readouterr().err


@pytest.mark.long  # six processes, which import torch each
def test_one_command_does_it_all_and_its_second_call_nothing(
    collection, tmp_path, tiny_bert_dir, monkeypatch, capsys
):
    def fewer(options):
        sweep = sweep_of(options)
        kept = ("SimRankPO", "RankPO + replay")
        sweep["methods"] = {name: sweep["methods"][name] for name in kept}
        sweep["methods"][kept[1]] |= {"grid": {"replay_weight": [0.1]}, "alphas": [0.5]}
        return sweep

    monkeypatch.setattr(beir, "sweep_of", fewer)
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    write(pairs, [{"query": "nurse", "passage1": "cook", "passage2": "nurse", "preferred": "B"}])
    flags = ["--beir", str(collection), "--model", str(tiny_bert_dir), "--output_dir", str(out),
             "--preferences", str(pairs), "--max_length=9", "--bf16=auto", *SMALL]  # fmt: skip
    assert main(flags) == 0
    report = (out / "report.md").read_text()
    assert report in capsys.readouterr().out
    _, _, _, _, heads, _, *rows = report.splitlines()
    assert heads == "| method | settings | ndcg@20 | alignment | alignment with pairs.jsonl |"
    table = {row.split(" | ")[0].removeprefix("| "): row.rstrip(" |").split(" | ")[1:]
             for row in rows[:4]}  # fmt: skip
    assert list(table) == ["before stage 1", "start", "SimRankPO", "RankPO + replay"]
    assert all(0 <= float(cell) <= 1 for cells in table.values() for cell in cells[1:])
    assert table["RankPO + replay"][0].endswith("alpha 0.5")
    figures = json.loads(next((out / "sweep/figures/test").glob("start-0.json")).read_text())
    assert table["start"][1] == f"{figures['ndcg@20']:.3f}"
    mined = [json.loads(line) for line in (out / "stage1-0.jsonl").read_text().splitlines()]
    assert {part(row["query"]) for row in mined} == {"train"} and all(r["negatives"] for r in mined)

    for model in (out / "stage1-0", next((out / "sweep").rglob("model.safetensors")).parent):
        settings = read_settings(model)
        assert settings["max_query_length"] == settings["max_passage_length"] == 9

    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(made) >= 3 and main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made
    assert main([*flags, "--steps", "2"]) == 2
    assert "--steps 2: " in capsys.readouterr().err
