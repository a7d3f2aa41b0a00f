"""A directory of result files is read by date, and ours is followed through it."""

from pathlib import Path

import pytest

from bench import plots
from bench.history import history, trends, write_history
from bench.results import Run, write
from rankpo_fast.errors import InputError
from support.bench_runs import MACHINE, info_nce

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def measured(date: str, commit: str, ours: float, device: str = "a GPU") -> Run:
    machine = MACHINE | {"device": device, "commit": commit, "date": f"{date}T10:00:00+00:00"}
    return Run(machine, [info_nce(4096, ours)])


@pytest.fixture
def results(tmp_path):
    """Names of files in another order than their dates; one of format 1, one that is no JSON."""
    write(tmp_path / "a.json", measured("2026-11-24", "bbb", 1.2))
    write(tmp_path / "b.json", measured("2026-11-23", "aaa", 1.1))
    write(tmp_path / "c.json", measured("2026-11-22", "000", 1.3, device="another GPU"))
    (tmp_path / "old.json").write_text('{"machine": {}, "results": []}')
    (tmp_path / "torn.json").write_text('{"machine": {')
    return tmp_path


def test_runs_come_by_date_and_what_cannot_be_read_is_named(results):
    runs, unread = history(results)
    assert [run.machine["commit"] for run in runs] == ["000", "aaa", "bbb"]
    assert [text.split(":")[0] for text in unread] == [
        str(results / "old.json"),
        str(results / "torn.json"),
    ]
    assert "format 1" in unread[0]


def test_no_directory_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match="nowhere: no directory of result files"):
        history(tmp_path / "nowhere")


def test_a_trend_is_of_ours_on_one_device(results):
    long, short = trends(history(results)[0])
    assert long.question == "rankpo-fast on a GPU" and long.name == info_nce(4096).name
    assert [(row.implementation, row.ratio) for row in long.rows] == [
        ("2026-11-23 aaa", 1.1),
        ("2026-11-24 bbb", 1.2),
    ]
    assert short.question == "rankpo-fast on another GPU" and len(short.rows) == 1


def test_only_what_was_measured_twice_is_drawn(results):
    lines = trends(history(results)[0])
    (axes,) = plots.trend(lines).axes
    assert list(axes.lines[0].get_ydata()) == [1.1, 1.2]
    assert plots.trend(lines[1:]) is None


def test_the_page_has_the_trend_and_names_what_was_not_read(results, tmp_path):
    page = write_history(results, tmp_path / "page")
    html = page.read_text()
    assert (page.parent / "history.png").exists() and html.count("<figure>") == 1
    assert f"{results / 'torn.json'}: " in html and "2026-11-24 bbb" in html
    assert html.index("Not read") < html.index("<table")


def test_committed_results_can_be_read():
    runs, unread = history(RESULTS)
    assert unread == [] and len(runs) == len(list(RESULTS.glob("*.json"))) > 0
