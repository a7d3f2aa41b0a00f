"""What `rankpo-fast label` writes: rows, splits, evaluation sets, grades; alike on every engine."""

import csv
import json
import re

import pytest
from label.conftest import COUNTRIES, HEAD, LADDER, RULES, records

from rankpo_fast.cli import main
from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.data.rows import read_contrastive

SHARES = ["--validation_share", "0.3", "--test_share", "0.3"]
LOOSE = RULES.replace("at_least: 2", "at_least: 1")
GRADES = "grades: {1: 2, 2: 3, 3: 4}\n"
GRADED = LOOSE.replace("same: region", "same: region\n    weight: 2") + GRADES


def held(query: dict, item: dict) -> dict[str, bool]:
    places = [COUNTRIES[record["country"]] for record in (query, item)]
    ranks = [LADDER.index(r["rank"]) if r["rank"] else None for r in (query, item)]
    return {
        "geography": None not in places and places[0] == places[1],
        "seniority": None not in ranks and 0 <= ranks[0] - ranks[1] <= 1,
        "area": bool({*query["skills"]} & {*item["skills"]}),
    }


def text(record: dict) -> str:
    skills = ", ".join(record["skills"])
    return record["title"].strip() + (f" <keyword> {skills}" if skills else "")


@pytest.fixture
def world(make):
    """Items of few texts, so that some are equal: of titles that are drawn of 8."""
    queries = records(60, 1, "q")
    items = [record | {"title": f"i {n % 8}"} for n, record in enumerate(records(120, 2, "i"))]
    files = make(LOOSE, queries, items)
    return files, {r["id"]: r for r in queries}, {r["id"]: r for r in items}


@pytest.mark.parametrize(
    "negatives", [pytest.param("random", marks=pytest.mark.long), "near_misses"]
)
def test_rows_hold_what_fits_and_nothing_that_fits_as_a_negative(negatives, world):
    files, queries, items = world
    flags = ["--negatives", negatives, "--max_positives", "4"]
    assert main([*files.command, *flags]) == 0
    rows = files.rows("train.jsonl")
    assert len(rows) > 20
    assert len(read_contrastive([files.folder / "out/train.jsonl"])) == len(rows)
    short = 0
    for row in rows:
        query = queries[row["ids"]["query"]]
        twins = [other for other in queries.values() if text(other) == text(query)]
        fitting = {key for key, item in items.items() if all(held(query, item).values())}
        banned = {
            text(item) for item in items.values()
            if any(all(held(twin, item).values()) for twin in twins)
        }  # fmt: skip
        assert row["query"] == text(query)
        for name in ("positives", "negatives"):
            assert row[name] == [text(items[key]) for key in row["ids"][name]]
            assert len({*row[name]}) == len(row[name]) <= {"positives": 4, "negatives": 5}[name]
        assert {*row["ids"]["positives"]} <= fitting
        assert len(row["positives"]) == min(4, len({text(items[key]) for key in fitting}))
        assert not banned & {*row["negatives"]}
        short += len(row["negatives"]) < 5
        for key, rule in zip(row["ids"]["negatives"], row.get("failed", [None] * 5), strict=False):
            wrong = [name for name, holds in held(query, items[key]).items() if not holds]
            assert wrong == [rule] or (rule is None and wrong)
    assert short == 0
    failed = {rule for row in rows for rule in row.get("failed", ())} - {None}
    assert failed == (set(RULE_NAMES) if negatives == "near_misses" else set())


RULE_NAMES = re.findall("name: (.*)", RULES)


def test_evaluation_sets_have_every_positive_and_share_no_query_with_training(world):
    files, queries, items = world
    assert main([*files.command, *SHARES]) == 0
    out = files.folder / "out"
    seen = [{row["query"] for row in files.rows("train.jsonl")}]
    for split in ("validation", "test"):
        found = read_retrieval(out / f"{split}_queries.jsonl", out / "corpus.jsonl")
        assert found.corpus == [text(item) for item in items.values()]
        rows = files.rows(f"{split}_queries.jsonl")
        for row in rows:
            query = queries[row["id"]]
            fits = [n for n, item in enumerate(items.values()) if all(held(query, item).values())]
            assert row["positives"]["index"] == fits
        seen.append({row["query"]["text"] for row in rows})
    assert all(len(texts) > 5 for texts in seen)
    assert sum(map(len, seen)) == len(set.union(*seen))
    answered = sum(
        any(all(held(query, item).values()) for item in items.values())
        for query in queries.values()
    )
    report = json.loads((out / "report.json").read_text())
    assert report["records"]["queries without a match, left out"] == len(queries) - answered


@pytest.mark.long
def test_splits_can_share_no_item_either(world):
    files, queries, items = world
    assert main([*files.command, *SHARES, "--disjoint_items"]) == 0
    trained = {
        text for row in files.rows("train.jsonl") for text in row["positives"] + row["negatives"]
    }
    corpora = [trained]
    for split in ("validation", "test"):
        corpus = files.rows(f"{split}_corpus.jsonl")
        corpora.append({row["text"] for row in corpus})
        for row in files.rows(f"{split}_queries.jsonl"):
            fits = [n for n, item in enumerate(corpus)
                    if all(held(queries[row["id"]], items[item["id"]]).values())]  # fmt: skip
            assert row["positives"]["index"] == fits
    assert all(len(texts) > 10 for texts in corpora)
    assert sum(map(len, corpora)) == len(set.union(*corpora))


@pytest.mark.long
def test_grades_are_of_the_weights_of_the_rules_that_hold(world, make):
    files, queries, items = world
    make(GRADED, [*queries.values()], [*items.values()])
    assert main([*files.command, *SHARES]) == 0

    def grade(query, item):
        rules = held(query, item)
        weight = 2 * rules["geography"] + rules["seniority"] + rules["area"]
        return max(0, weight - 1)

    out = files.folder / "out"
    for split in ("validation", "test"):
        found = read_retrieval(out / "beir", split=split)
        for key, grades in zip(found.query_ids, found.grades, strict=True):
            by_hand = {n: grade(queries[key], item) for n, item in enumerate(items.values())}
            assert grades == {n: g for n, g in by_hand.items() if g}
    rows, graded = files.rows("train.jsonl"), files.rows("train_graded.jsonl")
    for row, other in zip(rows, graded, strict=True):
        keys = row["ids"]["positives"] + row["ids"]["negatives"]
        query = queries[row["ids"]["query"]]
        assert other["grades"] == [grade(query, items[key]) for key in keys]
        assert other["passages"] == row["positives"] + row["negatives"]


def written(files) -> dict[str, bytes]:
    out = files.folder / "out"
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".jsonl"}


@pytest.mark.long
def test_the_seed_decides_every_draw(world):
    files, *_ = world
    flags = ["--negatives", "near_misses", "--max_positives", "2", "--overwrite_output_dir"]
    found = []
    for seed in (1, 1, 2):
        assert main([*files.command, *flags, "--seed", str(seed)]) == 0
        found.append(written(files))
    assert found[0] == found[1] != found[2]


@pytest.mark.long
def test_csv_and_parquet_are_read_as_jsonl_is(world):
    import duckdb

    files, queries, items = world
    flags = ["--overwrite_output_dir", *SHARES]
    assert main([*files.command, *flags]) == 0
    expected = written(files)
    rules, jobs, talents = files.inputs
    with (files.folder / "talents.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, [*next(iter(items.values()))])
        lines.writeheader()
        lines.writerows(item | {"skills": ";".join(item["skills"])} for item in items.values())
    duckdb.sql(f"COPY (FROM '{jobs}') TO '{files.folder / 'jobs.parquet'}'")
    rules.write_text(rules.read_text().replace("items:\n", 'items:\n  lists: {skills: ";"}\n'))
    swapped = [word.replace("jobs.jsonl", "jobs.parquet").replace("talents.jsonl", "talents.csv")
               for word in files.command]  # fmt: skip
    assert main([*swapped, *flags]) == 0
    assert written(files) == expected


@pytest.mark.long
def test_what_an_earlier_run_wrote_is_replaced_only_where_that_is_asked_for(world, capsys):
    files, *_ = world
    assert main([*files.command, *SHARES]) == 0
    before = written(files)
    assert main(files.command) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err and written(files) == before
    assert main([*files.command, "--overwrite_output_dir", "--test_share", "0"]) == 0
    assert "test_queries.jsonl" not in written(files)


@pytest.mark.long
def test_the_report_tells_of_every_rule_and_shows_examples(world, capsys):
    files, *_ = world
    assert main([*files.command, "--negatives", "near_misses"]) == 0
    report = (files.folder / "out/report.md").read_text()
    for name in RULE_NAMES:
        assert f"| {name} |" in report and f"A near miss: not {name}" in report
    assert re.search(r"region of queries: \d+ values are not in the map: Chile\n", report)
    assert "A match" in report
    assert "positives of a query: " in capsys.readouterr().out


@pytest.mark.long
def test_spark_writes_the_same_files(world, make, tmp_path, monkeypatch):
    pytest.importorskip("pyspark")
    (tmp_path / "spark-defaults.conf").write_text(
        "spark.master local[2]\nspark.sql.shuffle.partitions 2\nspark.ui.enabled false\n"
    )
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    files, queries, items = world
    places = "  - within: {field: [lat, lon], km: 9000}\n    weight: 0.5\n"
    rules = GRADED.replace("grades:", places + "grades:")
    make(rules, [*queries.values()], [*items.values()], HEAD)
    flags = [*SHARES, "--overwrite_output_dir", "--negatives", "near_misses",
             "--max_positives", "3"]  # fmt: skip
    assert main([*files.command, *flags]) == 0
    expected = written(files)
    assert main([*files.command, *flags, "--engine", "spark"]) == 0
    assert written(files) == expected


RECORDS = "id,title,t\n" + "".join(f"{n},a {n},{n % 3}\n" for n in range(4))
SAME_T = """\
queries: &side {id: id, text: "{title}"}
items: *side
rules: [{same: t}]
"""


@pytest.mark.parametrize(
    ("written", "title"),
    [
        pytest.param("#9,a 9,0", "a 9", id="no-comment"),
        pytest.param("9,a 9,0\n\n", "a 9", id="blank-line"),
        pytest.param('9,"a, ""b""\nc",0', 'a, "b"\nc', id="quoted-newline"),
        pytest.param("".join(f"x{n},y {n},7\n" for n in range(25_000)) + '9,"a\nb",0', "a\nb",
                     id="behind-a-sample"),
    ],
)  # fmt: skip
def test_every_record_of_a_csv_is_read_as_it_stands(written, title, tmp_path):
    """DuckDB's sniffer drops rows that begin with #, and its sample misses the last one. A column
    may be called t, as the SQL once called a record."""
    for name, text in (("rules.yaml", SAME_T), ("q.csv", RECORDS), ("i.csv", RECORDS + written)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    flags = zip(("--config", "--queries", "--items", "--output_dir"),
                ("rules.yaml", "q.csv", "i.csv", "out"), strict=True)  # fmt: skip
    assert main(["label", *(w for flag, name in flags for w in (flag, str(tmp_path / name)))]) == 0
    corpus = (tmp_path / "out/corpus.jsonl").read_text(encoding="utf-8").splitlines()
    assert title in [json.loads(line)["text"] for line in corpus]
