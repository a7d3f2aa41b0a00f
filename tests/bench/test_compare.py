"""A comparison finds what got worse, and does not take noise for it."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from bench.compare import BETTER, UNCLEAR, WORSE, _orders, beyond_noise, compare, shift, table
from bench.measure import percentiles
from bench.questions import OURS, Result, Row
from bench.results import Run, read, write
from rankpo_fast.errors import InputError
from support.bench_runs import RUN, SCALING

SEEDS = 300


def row(implementation=OURS, ratios=None, seconds=1.0, **more) -> Row:
    """A row as a run gives it: the lower bound takes a second."""
    given = {}
    if ratios is not None:
        middle, low, high = percentiles(ratios)
        given = {"ratio": middle, "ratio_low": low, "ratio_high": high, "ratios": tuple(ratios)}
        seconds = middle
    spread = {"low": 0.99 * seconds, "high": 1.01 * seconds}
    return Row(implementation, **{"seconds": seconds, **spread, **given, **more})


def run(*rows: Row, lower_bound="3 GEMMs", device="a GPU", case="info_nce", **machine) -> Run:
    rows = (row("3 GEMMs", ratio=1.0), *rows)
    shape = {"M": 64, "dtype": "float32"}
    result = Result(case, "loss", "?", shape, rows, lower_bound=lower_bound)
    return Run({"device": device, **machine}, [result])


def rounds(seed, n=5, scale=1.0, noise=0.03) -> list[float]:
    draw = random.Random(seed)
    return [scale * math.exp(draw.gauss(0, noise)) for _ in range(n)]


def verdicts(before: Run, after: Run, **how) -> dict[tuple[str, str], str]:
    found = compare(before, after, **how).changes
    return {(change.implementation, change.respect): change.verdict for change in found}


def called(scale, n, noise) -> float:
    """The share of seeds in which ours fails."""
    pairs = (
        (rounds(2 * s, n, noise=noise), rounds(2 * s + 1, n, scale, noise)) for s in range(SEEDS)
    )
    return sum(compare(run(row(ratios=a)), run(row(ratios=b))).code for a, b in pairs) / SEEDS


@pytest.mark.parametrize(
    ("n", "noise"), [(3, 0.02), (5, 0.02), (5, 0.025), (5, 0.03), (10, 0.03), (20, 0.05)]
)
def test_a_planted_slowdown_of_a_tenth_is_found(n, noise):
    assert called(1.1, n, noise) > 0.94


@pytest.mark.parametrize(
    ("n", "noise", "most"),
    [(5, 0.03, 0.01), (5, 0.1, 0.04), (10, 0.1, 0.04), (20, 0.05, 0.02), (3, 0.03, 0.04)],
)
def test_noise_alone_is_ignored(n, noise, most):
    assert called(1.0, n, noise) <= most


def test_a_small_slowdown_is_below_the_threshold_however_sure_it_is():
    sure = [1.0 + 1e-4 * i for i in range(7)]
    slower = [1.04 * x for x in sure]
    assert verdicts(run(row(ratios=sure)), run(row(ratios=slower))) == {}
    lower = verdicts(run(row(ratios=sure)), run(row(ratios=slower)), threshold=0.03)
    assert lower == {(OURS, "time"): WORSE}


def test_what_may_be_noise_is_shown_as_unclear_and_fails_nothing():
    found = compare(run(row(ratios=[1, 2, 3])), run(row(ratios=[1.5, 2.5, 3.5])))
    assert [change.verdict for change in found.changes] == [UNCLEAR] and found.code == 0
    assert "more --rounds" in table(found)


def test_two_rounds_tell_nothing():
    found = compare(run(row(ratios=[1.0, 1.01])), run(row(ratios=[2.0, 2.01])))
    assert [change.verdict for change in found.changes] == [UNCLEAR]


def test_one_slow_round_moves_neither_size_nor_verdict():
    a, b = [1.0, 1.01, 1.02, 0.99, 0.98, 1.0, 1.01], [1.0, 1.01, 1.02, 0.99, 0.98, 1.0, 3.0]
    assert shift(a, b) == pytest.approx(1, abs=0.02)
    assert verdicts(run(row(ratios=a)), run(row(ratios=b))) == {}


@pytest.mark.parametrize(("m", "n"), [(3, 3), (3, 4), (5, 5)])
def test_the_rank_test_counts_the_orders_there_are(m, n):
    wrong = [
        sum(x > y for x in low for y in set(range(m + n)) - set(low))
        for low in itertools.combinations(range(m + n), m)
    ]
    for pairs in range(m * n + 1):
        assert _orders(m, n, pairs) == wrong.count(pairs)


def test_equal_rounds_are_noise():
    assert not beyond_noise([1.0] * 9, [1.0] * 9)
    assert beyond_noise([1.0] * 5, [1.1] * 5) and not beyond_noise([1.1] * 5, [1.0] * 5)


def test_a_slower_machine_is_no_regression():
    a, b = row(ratios=rounds(1)), row(ratios=rounds(2))
    slow = replace(b, seconds=3 * b.seconds, low=3 * b.low, high=3 * b.high)
    found = compare(run(a), run(slow, device="a slower GPU"))
    assert found.changes == [] and found.machines == {"device": ("a GPU", "a slower GPU")}
    assert table(found).startswith("device: a GPU -> a slower GPU\n")


@pytest.mark.parametrize(
    ("device", "verdict"), [("a GPU", {(OURS, "time"): WORSE}), ("another", {})]
)
def test_without_a_lower_bound_in_common_seconds_are_compared_on_the_same_device(device, verdict):
    before = run(row(ratios=rounds(1)), lower_bound="4 GEMMs")
    after = run(row(ratios=rounds(2, scale=1.2)), device=device)
    assert verdicts(before, after) == verdict


@pytest.mark.parametrize(
    ("band", "verdict"), [((1.2, 1.3), WORSE), ((1.05, 1.3), UNCLEAR)], ids=["apart", "overlap"]
)
def test_files_without_rounds_are_told_by_their_percentiles(band, verdict):
    before = row(ratio=1.0, ratio_low=0.95, ratio_high=1.1)
    after = row(ratio=1.25, ratio_low=band[0], ratio_high=band[1])
    assert verdicts(run(before), run(after)) == {(OURS, "time"): verdict}


def test_a_peer_that_got_worse_is_shown_and_fails_nothing():
    a, b = row("torch", ratios=rounds(1)), row("torch", ratios=rounds(2, scale=1.5))
    found = compare(run(a), run(b))
    assert [change.verdict for change in found.changes] == [WORSE] and found.code == 0
    assert "not ours" in table(found) and "torch" in table(found)


def test_what_became_better_is_shown():
    before = rounds(1)
    found = compare(run(row(ratios=before)), run(row(ratios=[x / 1.5 for x in before])))
    assert [change.verdict for change in found.changes] == [BETTER] and found.code == 0
    assert "better" in table(found) and "0.67" in table(found)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"peak_mib": 20.0}, {"peak_mib": 35.0}, {}),
        ({"peak_mib": 20.0}, {"peak_mib": 40.0}, {(OURS, "memory"): WORSE}),
        ({"peak_mib": 1000.0}, {"peak_mib": 1040.0}, {}),
        ({"peak_mib": 0.0}, {"peak_mib": 40.0}, {(OURS, "memory"): WORSE}),
        ({"peak_mib": 1000.0}, {"peak_mib": 500.0}, {(OURS, "memory"): BETTER}),
        ({"error": 1e-3}, {"error": 1.9e-3}, {}),
        ({"error": 1e-3}, {"error": 2.1e-3}, {(OURS, "error"): WORSE}),
        ({"converged": 1e-3}, {"converged": 1e-2}, {(OURS, "converged"): WORSE}),
    ],
    ids=["pages", "more-memory", "below-the-threshold", "from-nothing", "less-memory", "rounding",
         "error", "converged"],
)  # fmt: skip
def test_memory_and_errors_are_compared(before, after, expected):
    a, b = (row(ratios=[1.0] * 5, **fields) for fields in (before, after))
    assert verdicts(run(a), run(b)) == expected


def test_an_error_in_another_instruction_set_is_no_regression_and_the_set_is_said():
    sets = [{"instruction set": f"{name} in torch"} for name in ("AVX512", "AVX2")]
    before, after = (
        run(row(ratios=[1.0] * 5, error=error), **of)
        for error, of in zip((1e-3, 3e-3), sets, strict=True)
    )
    found = compare(before, after)
    assert [change.verdict for change in found.changes] == [UNCLEAR] and found.code == 0
    said = table(found)
    assert "instruction set: AVX512 in torch -> AVX2 in torch" in said
    assert "in another instruction set errors" in said


@pytest.mark.parametrize(
    ("implementation", "note", "code"),
    [(OURS, "error 1.0e+00 above the gate 1.0e-03", 1), ("quack", "out of memory", 0)],
    ids=["red-gate", "peer"],
)
def test_who_ran_and_no_longer_does_is_said(implementation, note, code):
    ran, stopped = row(implementation, ratios=rounds(1)), Row(implementation, note)
    found = compare(run(ran), run(stopped))
    assert [change.verdict for change in found.changes] == [WORSE] and found.code == code
    assert note in table(found)
    assert verdicts(run(stopped), run(ran)) == {(implementation, "note"): BETTER}


def test_falling_over_sooner_is_worse():
    ours, _ = SCALING.rows
    ended = replace(ours, times=ours.times[:2], peaks=ours.peaks[:2], limit="16384: over 60 s")
    before, after = (Run({}, [replace(SCALING, rows=(x,))]) for x in (ours, ended))
    found = compare(before, after)
    assert found.code == 1 and "M: every size -> 16384: over 60 s" in table(found)
    assert compare(after, before).code == 0


@pytest.mark.parametrize(
    ("changes", "respect", "verdict"),
    [
        ({"times": (2e-4, 2e-3, 3.2e-2)}, "time", WORSE),
        ({"times": (1e-4, 1e-3, 3.2e-2)}, "time", UNCLEAR),
        ({"peaks": (10.0, 20.0, 400.0)}, "memory", WORSE),
        ({"peaks": (20.0, 30.0, 290.0)}, None, None),
        ({"work": (6.0, 6.0, 8.0)}, "flops", WORSE),
        ({"sent": (1.0, 2.0, 3.0)}, "sent", BETTER),
        ({"sent": (0.0, 2.0, 4.0)}, "sent", BETTER),
    ],
    ids=["every-size", "one-size", "memory", "pages", "flops", "sent", "to-nothing"],
)
def test_a_scaling_is_compared_size_by_size(changes, respect, verdict):
    ours = replace(SCALING.rows[0], work=(6.0, 6.0, 6.0), sent=(1.0, 2.0, 4.0))
    before, after = (
        Run({"device": "a GPU"}, [replace(SCALING, rows=(x,))])
        for x in (ours, replace(ours, **changes))
    )
    expected = {} if respect is None else {(OURS, respect): verdict}
    assert verdicts(before, after) == expected


@pytest.mark.parametrize(
    ("least", "most", "verdict"), [(0.1, 0.12, WORSE), (0.1, 0.24, UNCLEAR)], ids=["apart", "noise"]
)
def test_what_was_learnt_is_compared(least, most, verdict):
    before = row(ndcg=0.25, ndcg_low=0.23, ndcg_high=0.26)
    after = row(ndcg=0.11, ndcg_low=least, ndcg_high=most)
    assert verdicts(run(before), run(after)) == {(OURS, "nDCG"): verdict}


def test_a_peer_that_became_faster_makes_ours_no_slower():
    ours = row(ratio=0.5, ratio_low=0.49, ratio_high=0.51, seconds=0.5)
    faster = replace(ours, ratio=0.625, ratio_low=0.61, ratio_high=0.64)
    assert verdicts(run(ours, lower_bound=None), run(faster, lower_bound=None)) == {}


def test_a_row_of_ours_that_is_gone_fails():
    ours, peer = row(ratios=[1.0] * 5), row("torch", ratios=[1.0] * 5)
    found = compare(run(ours, peer), run(peer))
    assert found.code == 1 and "no row any more" in table(found)
    assert compare(run(ours, peer), run(ours)).code == 0


def test_a_throttled_time_says_so():
    hot = row(ratios=rounds(2, scale=1.5), throttled="power cap in 9 of 10 samples")
    assert "after: power cap in 9" in table(compare(run(row(ratios=rounds(1))), run(hot)))


def test_rows_of_one_file_alone_are_listed_and_versions_are_said():
    before = run(row("gone", ratios=[1.0] * 5), torch="2.11", date="a")
    after = run(row("new", ratios=[1.0] * 5), torch="2.13", date="b")
    found = compare(before, after)
    assert (found.rows, found.code) == (1, 0)
    said = table(found)
    assert "only before: info_nce 64 float32: gone" in said
    assert "only after: info_nce 64 float32: new" in said
    assert "torch: 2.11 -> 2.13" in said and "date" not in said


@pytest.mark.parametrize("threshold", [-0.1, 5.0, math.nan], ids=str)
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(InputError, match="share from 0 to 1"):
        compare(run(row()), run(row()), threshold)


def test_runs_without_a_row_in_common_are_bad_input():
    with pytest.raises(InputError, match="nothing to compare"):
        compare(run(row()), run(row(), case="another"))


def test_a_dtype_is_not_compared_with_another():
    before, after = run(row(ratios=[1.0] * 5)), run(row(ratios=[1.0] * 5))
    other = replace(after.results[0], shape={"M": 64, "dtype": "bfloat16"})
    with pytest.raises(InputError, match="nothing to compare"):
        compare(before, replace(after, results=[other]))


def test_a_run_compared_with_itself_from_its_file_has_no_changes(tmp_path):
    write(tmp_path / "run.json", RUN)
    found = compare(RUN, read(tmp_path / "run.json"))
    assert (found.changes, found.machines) == ([], {})
    assert found.rows == sum(len(result.rows) for result in RUN.results)
