"""Pairs that the joins find are those that a loop over every query and item finds."""

import datetime
import math

import pytest
from label.conftest import COUNTRIES, HEAD, LADDER, RULES, records

from rankpo_fast.cli import main
from rankpo_fast.label.run import rules_met

DATES = HEAD.replace("  fields:", "  dates: [until]\n  fields:", 1)
DATES = DATES[:200] + DATES[200:].replace("  fields:", "  dates: [start]\n  fields:", 1)


def region(record):
    return COUNTRIES[record["country"]]


def level(record):
    return LADDER.index(record["rank"]) if record["rank"] else None


def same_region(q, i):
    return region(q) is not None and region(q) == region(i)


def one_below(q, i):
    return None not in (level(q), level(i)) and 0 <= level(q) - level(i) <= 1


def common(q, i):
    return len({*q["skills"]} & {*i["skills"]})


def km(q, i):
    a, b, c, d = (math.radians(x) for x in (q["lat"], q["lon"], i["lat"], i["lon"]))
    h = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * 6371.0088 * math.asin(min(1, math.sqrt(h)))


def share(q, i, whole):
    return bool(common(q, i)) and common(q, i) / whole >= 0.5


def day(text):
    return text and datetime.date.fromisoformat(text)


# A rule as the file has it, and the same in Python.
CASES = {
    "same": ("same: region", same_region),
    "same-of-two-names": (
        "same: {query: title, item: title}",
        lambda q, i: q["title"] == i["title"],
    ),
    "in-a-list-of-items": (
        "in: {query: rank, item: skills}",
        lambda q, i: q["rank"] in i["skills"],
    ),
    "in-given-values": (
        "all: [{same: region}, {in: {item: rank, values: [student, postdoc]}}]",
        lambda q, i: same_region(q, i) and i["rank"] in ("student", "postdoc"),
    ),
    "ordinal": ("ordinal_distance: {field: level, below: 1, above: 0}", one_below),
    "ordinal-equal": (
        "ordinal_distance: {field: level, at_most: 0}",
        lambda q, i: level(q) is not None and level(q) == level(i),
    ),
    "ordinal-of-fractions": (
        "ordinal_distance: {field: pay, below: 2.5, above: 7}",
        lambda q, i: None not in (q["pay"], i["pay"]) and -2.5 <= i["pay"] - q["pay"] <= 7,
    ),
    "overlap": ("overlap: {field: skills, at_least: 2}", lambda q, i: common(q, i) >= 2),
    "share-of-query": (
        "overlap: {field: skills, share: 0.5}",
        lambda q, i: share(q, i, len(q["skills"])),
    ),
    "share-of-item": (
        "overlap: {field: skills, share: 0.5, of: item}",
        lambda q, i: share(q, i, len(i["skills"])),
    ),
    "share-of-union": (
        "overlap: {field: skills, share: 0.5, of: union}",
        lambda q, i: share(q, i, len({*q["skills"], *i["skills"]})),
    ),
    "within-a-little": (
        "within: {field: [lat, lon], km: 30}",
        lambda q, i: km(q, i) <= 30,
    ),
    "within-much-and-over-the-pole": (
        "within: {field: [lat, lon], km: 400}",
        lambda q, i: km(q, i) <= 400,
    ),
    "within-half-the-earth": (
        "within: {field: [lat, lon], km: 9000}",
        lambda q, i: km(q, i) <= 9000,
    ),
    "range-of-the-other-side": (
        "all: [{same: region}, {range: {item: pay, from: least, to: pay}}]",
        lambda q, i: same_region(q, i) and i["pay"] is not None
        and (q["least"] is None or i["pay"] >= q["least"])
        and (q["pay"] is None or i["pay"] <= q["pay"]),
    ),
    "range-of-dates": (
        "all: [{same: region}, {range: {query: until, from: start, to: 2024-06-30}}]",
        lambda q, i: same_region(q, i) and day(q["until"]) <= datetime.date(2024, 6, 30)
        and (i["start"] is None or day(q["until"]) >= day(i["start"])),
    ),
    "not": (
        "all: [{same: region}, {not: {overlap: {field: skills, at_least: 1}}}]",
        lambda q, i: same_region(q, i) and common(q, i) == 0,
    ),
    "any": (
        "any: [{overlap: {field: skills, at_least: 3}}, {same: title}]",
        lambda q, i: common(q, i) >= 3 or q["title"] == i["title"],
    ),
    "at-least-two-of-three": (
        "at_least: {count: 2, of: [{same: region}, {same: rank}, {overlap: {field: skills, "
        "at_least: 2}}]}",
        lambda q, i: same_region(q, i) + (q["rank"] is not None and q["rank"] == i["rank"])
        + (common(q, i) >= 2) >= 2,
    ),
}  # fmt: skip


QUICK = ("same", "ordinal", "overlap", "within-a-little", "range-of-dates", "not")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CASES]
)
def test_a_rule_matches_what_it_says(name, make):
    rule, holds = CASES[name]
    queries, items = records(40, 1, "q "), records(60, 2, "i ")
    for record in items[:5]:
        record["skills"] = ["student", "a"]  # for `in`
        record["title"] = queries[0]["title"]
    files = make(f"  - {rule}\n", queries, items, DATES if "dates" in name else HEAD)
    expected = [{i for i, item in enumerate(items) if holds(query, item)} for query in queries]
    assert any(expected)
    assert [set(row) for row in rules_met(*files.inputs)] == expected


def test_times_of_other_zones_are_compared_in_utc(make):
    times = ["2024-06-30T23:30:00-02:00", "2024-07-01T01:30:00", "2024-07-01 03:00:00+01:30"]
    queries = [{"id": n, "title": "q", "start": time} for n, time in enumerate(times)]
    side = '  id: id\n  text: "{title}"\n  dates: [start]\n'
    head = f"queries:\n{side}items:\n{side}rules:\n"
    bounds = "range: {item: start, from: start, to: 2024-07-01T03:30:00+02:00}"
    rules = f"  - all: [{{same: title}}, {{{bounds}}}]\n"
    files = make(rules, queries, queries, head)
    assert rules_met(*files.inputs) == [{0: 1, 1: 1, 2: 1}] * 3


def test_near_misses_meet_all_rules_but_one(make):
    queries, items = records(40, 3, "q "), records(80, 4, "i ")
    files = make(RULES, queries, items)
    held = [
        {i: same_region(q, t) + one_below(q, t) + (common(q, t) >= 2) for i, t in enumerate(items)}
        for q in queries
    ]
    expected = [{i: n for i, n in row.items() if n >= 2} for row in held]
    assert {n for row in expected for n in row.values()} == {2, 3}
    assert rules_met(*files.inputs) == expected


@pytest.mark.long
def test_rules_join_by_all_their_keys_at_once(make, capsys):
    """Places alone are near each other in all 90,000 pairs; with the titles 300 are left."""
    queries, items = (
        [record | {"title": str(n)} for n, record in enumerate(records(300, seed, prefix))]
        for seed, prefix in ((5, "q "), (6, "i "))
    )
    places = "  - within: {field: [lat, lon], km: 20000}\n"
    files = make(places, queries, items)
    assert main([*files.command, "--max_pairs", "300"]) == 2
    assert "would make 90,000 pairs, more than --max_pairs 300" in capsys.readouterr().err
    files = make(places + "  - same: title\n", queries, items)
    assert main([*files.command, "--max_pairs", "300", "--test_share", "0"]) == 0
