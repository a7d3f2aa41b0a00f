"""Clicks depend on the position; the preferences made of them must not."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from rankpo_fast.cli import main
from rankpo_fast.data.clicks import (
    ClickList,
    click_preferences,
    estimated_propensity,
    power_propensity,
    read_clicks,
)
from rankpo_fast.data.memory import Rows
from rankpo_fast.data.rows import read_preferences
from rankpo_fast.errors import InputError

POSITIONS = 6
RELEVANCE = np.linspace(0.3, 0.8, POSITIONS)  # of passage i, if it is looked at
TRUE = 1 / np.arange(1, POSITIONS + 1)  # propensities: eta = 1
QUERIES, SHOWS = 10, 4000


def simulated(*, swapped):
    """Lists of a ranker that puts the worst passages first, and swaps two in a share of its lists;
    clicked as the position-based model says, and summed over lists of one order."""
    rng, lists = np.random.default_rng(0), []
    for query in range(QUERIES):
        orders: Counter = Counter()
        for swap in rng.random(SHOWS) < swapped:
            order = list(range(POSITIONS))
            if swap:
                i, j = rng.choice(POSITIONS, 2, replace=False)
                order[i], order[j] = order[j], order[i]
            orders[tuple(order)] += 1
        for order, shows in orders.items():
            clicks = rng.binomial(shows, TRUE * RELEVANCE[list(order)]).tolist()
            passages = tuple(f"passage {i}" for i in order)
            positions = tuple(range(1, POSITIONS + 1))
            lists.append(ClickList(f"query {query}", passages, tuple(clicks), positions,
                                   (shows,) * POSITIONS))  # fmt: skip
    return lists


def right(preferences):
    """Share of the preferences whose chosen passage is the more relevant one."""
    relevance = {f"passage {i}": value for i, value in enumerate(RELEVANCE)}
    return np.mean([relevance[r.chosen] > relevance[r.rejected] for r in preferences.rows])


def test_weighted_clicks_recover_the_relevance_that_raw_clicks_hide():
    lists = simulated(swapped=0.5)
    raw = click_preferences(lists, power_propensity(0.0))
    weighted = click_preferences(lists, power_propensity(1.0))
    assert len(weighted.rows) == QUERIES * math.comb(POSITIONS, 2)
    assert right(raw) < 0.5  # positions and relevance pull in opposite directions
    assert right(weighted) > 0.95
    assert max(row.weight for row in weighted.rows) == 1.0
    # The weight is the difference in relevance: correlated pair by pair, but for noise.
    relevance = {f"passage {i}": value for i, value in enumerate(RELEVANCE)}
    differences = [relevance[r.chosen] - relevance[r.rejected] for r in weighted.rows]
    assert np.corrcoef(differences, [r.weight for r in weighted.rows])[0, 1] > 0.9


def test_propensities_are_estimated_within_a_twentieth():
    found = estimated_propensity(simulated(swapped=0.5))
    assert list(found) == list(range(1, POSITIONS + 1)) and max(found.values()) == 1.0
    # Hundreds of clicks for each two positions, and five ratios for each: 2 % of noise.
    assert np.abs(np.array(list(found.values())) / TRUE - 1).max() < 0.05


def test_the_estimate_is_exact_where_clicks_are_their_expectations():
    lists = [
        ClickList("q", ("a", "b"), (r[0], r[1] / 4), (1, 4), (1, 1))
        for r in ((0.8, 0.2), (0.5, 0.5))
    ]
    turned = [
        ClickList("q", ("b", "a"), (r[1], r[0] / 4), (1, 4), (1, 1))
        for r in ((0.8, 0.2), (0.5, 0.5))
    ]
    assert estimated_propensity([*lists, *turned]) == pytest.approx({1: 1.0, 4: 0.25})


def test_positions_that_nothing_compares_are_refused():
    same_order = simulated(swapped=0)
    with pytest.raises(InputError, match="position 2, 3, 4, 5, 6 compares with position 1: "):
        estimated_propensity(same_order)
    # Moved between 1 and 2, but never clicked at 2: a ratio of 0 is no propensity.
    lists = [ClickList("q", ("a", "b"), (1, 0), (1, 2), (1, 1)),
             ClickList("q", ("b", "a"), (1, 0), (1, 2), (1, 1))]  # fmt: skip
    with pytest.raises(InputError, match="position 2 compares"):
        estimated_propensity(lists)


def preferences(*rows, eta=1.0, max_weight=10.0):
    made = click_preferences(read_clicks([Rows("rows", rows)]), power_propensity(eta),
                             max_weight=max_weight)  # fmt: skip
    return [(r.chosen, r.rejected, round(r.weight, 4)) for r in made.rows]


def test_a_lone_click_is_preferred_by_one_over_its_propensity():
    one = {"query": "q", "passages": ["a", "b", "c"], "clicks": [0, 0, 1]}
    other = {"query": "r", "passages": ["a", "b", "c"], "clicks": [1, 0, 0]}
    assert preferences(one, other) == [
        ("c", "a", 1.0), ("c", "b", 1.0), ("a", "b", round(1 / 3, 4)), ("a", "c", round(1 / 3, 4)),
    ]  # fmt: skip
    assert {weight for *_, weight in preferences(one, other, max_weight=2)} == {1.0, 0.5}
    far = {**one, "positions": [1, 2, 10_000]}
    assert preferences(far, eta=400.0)[0] == ("c", "a", 1.0)  # a propensity that rounds to 0


def test_grades_counts_and_impressions():
    row = {"query": "q", "passages": ["a", "b"], "clicks": [1, 2], "positions": [3, 7]}
    assert preferences(row, eta=0.0) == [("b", "a", 1.0)]  # applied beside clicked
    # 30 of 100 against 10 of 10: the rates decide, not the counts.
    row |= {"clicks": [30, 10], "impressions": [100, 10]}
    assert preferences(row, eta=0.0) == [("b", "a", 1.0)]
    # Ten lists in one row are ten rows.
    log = [{"query": "q", "passages": ["a", "b"], "clicks": c} for c in [[1, 0]] * 6 + [[0, 1]] * 2]
    summed = {"query": "q", "passages": ["a", "b"], "clicks": [6, 2], "impressions": 8}
    other = {"query": "r", "passages": ["a", "b"], "clicks": [4, 0], "impressions": 8}
    assert preferences(*log, other) == preferences(summed, other)


def test_clicks_that_cancel_are_ties_and_counted():
    rows = [{"query": "q", "passages": ["a", "b", "c"], "clicks": [1, 0, 0]},
            {"query": "q", "passages": ["b", "a"], "clicks": [1, 0]}]  # fmt: skip
    made = click_preferences(read_clicks([Rows("rows", rows)]), power_propensity(1.0))
    assert [(r.chosen, r.rejected) for r in made.rows] == [("a", "c")]
    assert (made.ties, made.lists, made.without_click, made.clicked) == (1, 2, 0, 2)


GOOD = {"query": "q", "passages": ["a", "b", "c"], "clicks": [0, 1, 0]}
BAD = [
    ({"query": None}, '"query" must be a string'),
    ({"passages": ["a"]}, '"passages" has 1 of the two'),
    ({"passages": ["a", "b", "a"]}, '"passages" has "a" twice'),
    ({"passages": ["a", "b", 3]}, '"passages[2]" must be a string'),
    ({"clicks": [0, 1]}, '"clicks" has 2 numbers for 3 passages'),
    ({"clicks": [0, -1, 0]}, '"clicks" must be numbers of 0 or more, got -1'),
    ({"clicks": [0, True, 0]}, "got true"),
    ({"clicks": [0, float("nan"), 0]}, "got NaN"),
    ({"positions": [1, 2]}, '"positions" has 2 numbers'),
    ({"positions": [0, 1, 2]}, '"positions" must be whole numbers from 1, got 0'),
    ({"positions": [1, 1, 2]}, '"positions" has a number twice'),
    ({"impressions": 0}, '"impressions" must be a whole number from 1'),
    ({"impressions": [1, 2.5, 1]}, '"impressions" must be whole numbers from 1, got 2.5'),
]


@pytest.mark.parametrize("changes, message", BAD, ids=str)
def test_bad_rows_are_named(changes, message, tmp_path):
    path = tmp_path / "clicks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | changes)))
    with pytest.raises(InputError) as error:
        read_clicks([path])
    assert f"{path}:2: " in str(error.value) and message in str(error.value)


# --- the command ---


@pytest.fixture
def run(tmp_path, capsys):
    """run(rows, *flags) -> exit code, output, errors."""

    def command(rows, *flags):
        data, out = tmp_path / "clicks.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["clicks", "--clicks_data", str(data), "--output_file", str(out), *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def test_the_command_writes_rows_that_stage_2_reads(run, tmp_path):
    code, said, _ = run([GOOD, GOOD | {"query": "r", "clicks": [0, 0, 0]}])
    assert code == 0 and "2 lists, 1 without a click; 1 clicked passages, 0 of them" in said
    rows = read_preferences([tmp_path / "out.jsonl"], use_confidence=True)
    assert [(r.query, r.chosen, r.rejected, r.weight) for r in rows] == [
        ("q", "b", "a", 1.0), ("q", "b", "c", 1.0),
    ]  # fmt: skip


def test_the_command_takes_propensities_of_a_file_and_estimates_them(run, tmp_path):
    path = tmp_path / "p.json"
    path.write_text("[1.0, 0.5, 0.01]")
    code, said, _ = run([GOOD | {"clicks": [0, 0, 1]}], "--propensity", str(path))
    assert code == 0 and "1 clicked passages, 1 of them clipped" in said
    turned = GOOD | {"passages": ["b", "c", "a"]}
    rows = [GOOD | {"clicks": [4, 1, 1]}, turned | {"clicks": [4, 2, 1]}]
    code, said, _ = run([*rows, turned | {"passages": ["c", "a", "b"]}], "--propensity", "estimate")
    assert code == 0 and "propensities: 1: 1.000, 2: " in said


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1.0, 0.5]", "has propensities of 2 positions, but passages were shown at position 3"),
        ("[1.0, 0.5, 0]", "position 3 must be in (0, 1], got 0"),
        ("{}", "no JSON list"),
        ("[1", "no JSON list"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_propensities_that_cannot_be_used_is_named(run, tmp_path, content, message):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    code, _, said = run([GOOD], "--propensity", str(path))
    assert code == 2 and str(path) in said and message in said
    assert not (tmp_path / "out.jsonl").exists()


def test_settings_that_contradict_are_refused(run, tmp_path):
    path = tmp_path / "clicks.jsonl"
    for flags, message in [
        (["--eta", "1", "--propensity", "estimate"], "--eta 1.0 needs --propensity power"),
        (["--eta", "-1"], "--eta must be >= 0"),
        (["--max_weight", "0.5"], "--max_weight must be >= 1"),
        (["--output_file", str(path)], "is also read (--clicks_data"),
        (["--output_file", "p.json", "--propensity", "p.json"], "is also read (--propensity"),
    ]:
        code, _, said = run([GOOD], *flags)
        assert code == 2 and message in said, said
    code, _, said = run([GOOD | {"clicks": [0, 0, 0]}])
    assert code == 2 and "no passage was clicked" in said
