"""Bad rules and bad records: one line names file, line and what is wrong; nothing is written."""

import json
import re
from pathlib import Path

import pytest
from label.conftest import HEAD, RULES, records

from rankpo_fast.cli import main
from rankpo_fast.label.rule_file import RuleFile
from rankpo_fast.label.templates import Template

PLACES = "  - within: {field: [lat, lon], km: 30}\n"


@pytest.fixture
def refusal(make, capsys):
    """What the command says of rules and records, of which it writes nothing."""

    def run(rules: str, *flags: str, head: str = HEAD, change=lambda queries, items: None) -> str:
        queries, items = records(20, 1, "q"), records(20, 2, "i")
        change(queries, items)
        files = make(rules, queries, items, head)
        assert main([*files.command, *flags]) == 2
        out = files.folder / "out"
        assert not out.exists() or not list(out.iterdir())
        [line] = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
        return line.removeprefix("rankpo-fast: error: ").replace(f"{files.folder}/", "")

    return run


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("  - sane: region\n", "rules.yaml:17: a rule has no sane (did you mean same?)"),
        ("  - same: regoin\n", "rules.yaml:17: no record of jobs.jsonl has a value in regoin (did "
         "you mean region?)"),
        ("  - same: region\n    wieght: 2\n", "rules.yaml:18: a rule has no wieght (did you mean "
         "weight?)"),
        ("  - overlap: {field: skills, at_lest: 2}\n", "rules.yaml:17: overlap has no at_lest (did "
         "you mean at_least?)"),
        ("  - overlap: {field: skills}\n", "rules.yaml:17: overlap needs at_least, a number of "
         "values, or share, a part of them"),
        ("  - overlap: {field: skills, share: 40}\n", "rules.yaml:17: share must be from 1e-06 to "
         "1, got 40"),
        ("  - same: region\n  - same: region\n", "rules.yaml:17: two rules are called same region: "
         "give each a name"),
        ("  - same: region\n    weight: 2\n", "rules.yaml:17: a weight means nothing without "
         "grades"),
        ("  - same: region\ngrades: {1: 2}\n", "rules.yaml:18: grade 1 needs 2, but all weights "
         "are 1"),
        ("  - not: {same: region}\n", "rules.yaml:17: no join can be made of the rules"),
        ("  - within: {query: lat, item: [lat, lon], km: 3}\n", "rules.yaml:17: within: query must "
         "be a list, got one value"),
        ("  - within: {field: [lat, lon]}\n", "rules.yaml:17: within needs km"),
        ("  - same: [a\n", "rules.yaml:18: malformed YAML: expected ',' or ']'"),
        ("  - same: skills\n", "jobs.jsonl:1: skills must be one value, got"),
        ("  - same: title\n", "rules.yaml:17: rule 'same title' matches nothing: no item, for any "
         "query, so there is no match at all"),
        ("  - range: {item: pay, from: start}\n  - same: region\n", "jobs.jsonl:1: start must be a "
         "number, got 2024-"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_used_is_named_with_its_line(rules, says, refusal):
    assert refusal(rules).startswith(says)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  id: id\n", "", "rules.yaml:2: queries needs id"),
        ("map: regions", "map: region", "rules.yaml:5: there is no map region (did you mean "
         "regions?)"),
        ("skills|, }]", "skills|, }", "rules.yaml:3: queries: text: a [ without a ]"),
        ("{title}", "{titel}", "rules.yaml:3: no record of jobs.jsonl has a value in titel (did "
         "you mean title?)"),
        ("maps:", "mpas:", "rules.yaml:13: the rule file has no mpas (did you mean maps?)"),
        ("  ladder: [student,", "  ladder: [postdoc,", "rules.yaml:15: postdoc stands twice in the "
         "order"),
        ("  id: id\n", "  id: id\n  dates: [start]\n", "rules.yaml:3: no rule reads the date "
         "start"),
        ("  id: id\n", '  id: id\n  lists: {colour: ";"}\n', "rules.yaml:3: neither a rule nor the "
         "text reads the list colour"),
        ("  id: id\n", '  id: id\n  lists: {titel: ";"}\n', "rules.yaml:3: neither a rule nor the "
         "text reads the list titel (did you mean title?)"),
    ],
)  # fmt: skip
def test_what_stands_above_the_rules_is_held_to_the_same(old, new, says, refusal):
    assert refusal(RULES, head=HEAD.replace(old, new, 1)).startswith(says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lat": 91}, "talents.jsonl:4: lat must be from -90 to 90 degrees, got 91"),
        ({"lon": -180.5}, "talents.jsonl:4: lon must be from -180 to 180 degrees, got -180.5"),
        ({"lat": "north"}, "talents.jsonl:4: lat must be a number, got north"),
        ({"lat": [1, 2]}, "talents.jsonl:4: lat must be one value, got [1,2]"),
        ({"id": "i0"}, 'talents.jsonl:4: id "i0" stands in an earlier record too, talents.jsonl:1'),
        ({"id": None}, "talents.jsonl:4: id, the id, is missing or empty"),
        ({"title": " "}, "talents.jsonl:4: title is missing or empty, which the text needs"),
        ({"title": {"en": "x"}}, 'talents.jsonl:4: title must be a value or a list of them, got '
         '{"en":"x"}: write title.NAME for one inside'),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_named_with_its_line(change, says, refusal):
    rules = PLACES + "  - same: region\n"
    assert refusal(rules, change=lambda _, items: items[3].update(change)).startswith(says)


def test_lines_are_counted_as_the_file_has_them(make, capsys):
    files = make(PLACES, records(5, 1, "q"), records(5, 2, "i"))
    jobs = files.inputs[1]
    lines = jobs.read_text().splitlines()
    jobs.write_text("\n\n".join([*lines[:2], "{broken", *lines[2:]]))
    assert main(files.command) == 2
    assert "jobs.jsonl:5: malformed JSON" in capsys.readouterr().err
    jobs.write_text("\n\n".join([*lines[:2], "[1]", *lines[2:]]))
    assert main(files.command) == 2
    assert "jobs.jsonl:5: a record must be an object, got array" in capsys.readouterr().err


def test_rules_that_no_item_meets_together_are_told_apart_from_dead_ones(refusal):
    def change(queries, items):
        for record in queries + items:
            record |= {"country": "Sweden", "rank": "postdoc", "skills": ["a", "b"]}
            record["rank"] = "student" if record["id"] == "q0" else "professor"
        queries[:] = queries[:1]
        items[0] |= {"rank": "student", "skills": []}

    assert refusal(RULES, change=change).startswith(
        "rules.yaml: no item meets the rules of any query; alone they match, of all pairs: "
        "geography 100.00%, seniority 5.00%, area 95.00%"
    )


@pytest.mark.long
def test_a_rule_that_decides_nothing_is_said(make, capsys):
    queries, items = records(20, 1, "q"), records(20, 2, "i")
    for record in queries + items:
        record["country"] = "Sweden"
    assert main(make(RULES, queries, items).command) == 0
    err = capsys.readouterr().err
    assert "rules.yaml:17: rule 'geography' matches everything: it decides nothing" in err


def test_inputs_are_never_written_over(make, capsys):
    files = make(RULES, records(5, 1, "q"), records(5, 2, "i"))
    (files.folder / "corpus.jsonl").write_bytes(files.inputs[2].read_bytes())
    words = [w.replace("talents", "corpus").removesuffix("/out") for w in files.command]
    assert main([*words, "--overwrite_output_dir"]) == 2
    assert "corpus.jsonl is also read (--items" in capsys.readouterr().err


def test_the_rule_file_of_the_documentation_can_be_read(tmp_path):
    page = Path(__file__).parents[2] / "docs/labels.md"
    [rules] = re.findall("^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "rules.yaml").write_text(rules)
    read = RuleFile.read(tmp_path / "rules.yaml")
    assert [rule.name for rule in read.rules] == [
        "geography", "seniority", "research area", "free in time",
    ]  # fmt: skip
    assert read.grades == ((5, 3), (4, 2), (3, 1))


@pytest.mark.parametrize(
    "text", ["{a", "a}", "[a]", "[[{a}]", "[{a} [{b}]]", "{}", "nothing", "{a}]"]
)
def test_templates_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError):
        Template.parse(text)


def test_what_a_message_asks_for_is_an_extra(make, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert main(make(RULES, records(5, 1), records(5, 2)).command) == 2
    assert "label needs duckdb: pip install 'rankpo-fast[label]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,t\n1,a\n2\n3,c\n", "i.csv:3: 2 columns are expected, as in line 1, and 1 found"),
        ("id,t\n1,a\n2,b,c\n", "i.csv:3: 2 columns are expected, as in line 1, and 3 found"),
        (
            'id;t\n1;"a\n2;b\n',
            "i.csv:2: a quote is not closed (one inside a value is written twice)",
        ),
        ("id,t\r\n1,a\r\n2,b\n", "i.csv: lines that end in different ways"),
        ("id,t,t\n1,a,b\n", "i.csv:1: two columns are named t"),
        ("id,t,T\n1,a,b\n", "i.csv:1: two columns are named t and T, capitals apart"),
        ("id,t\n1,\xe9\n", "i.csv:2: not UTF-8"),
        ("id,\xe9\n1,a\n", "i.csv:1: not UTF-8"),
        ("\n", "i.csv: there are no records"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named_with_its_line(text, says, tmp_path, capsys):
    """DuckDB's first line alone says neither which row nor why."""
    rules = 'queries: &side {id: id, text: "{t}"}\nitems: *side\nrules: [{same: t}]\n'
    (tmp_path / "rules.yaml").write_text(rules)
    (tmp_path / "q.csv").write_text("id,t\n1,a\n")
    (tmp_path / "i.csv").write_bytes(text.encode("latin1"))
    files = [str(tmp_path / name) for name in ("rules.yaml", "q.csv", "i.csv", "out")]
    flags = zip(("--config", "--queries", "--items", "--output_dir"), files, strict=True)
    assert main(["label", *(word for pair in flags for word in pair)]) == 2
    assert f"error: {tmp_path}/{says}" in capsys.readouterr().err
