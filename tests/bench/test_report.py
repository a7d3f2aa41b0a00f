"""What a result file says is shown: in the terminal, in the page, in pictures."""

import dataclasses
import re

import pytest
from matplotlib.colors import to_hex

from bench import plots
from bench.curves import growths
from bench.questions import OURS, OUT_OF_MEMORY, Result, Row
from bench.report import failures, in_short, write_report
from bench.results import Run, read, write
from bench.tables import COLUMNS, markdown, number, shown, table
from rankpo_fast.errors import InputError
from support.bench_runs import LADDER, MACHINE, RUN, SCALING, info_nce

FULL = Row(
    "rankpo-fast", "a note", seconds=0.0135, low=0.0131, high=0.0142, ratio=1.1, ratio_low=1.04,
    ratio_high=1.2, ratios=(1.1,), cold=0.02, gemm=0.9, copy=0.125, peak_mib=2108.0, error=3e-7,
    converged=4e-7, queries=114.0, tokens=18900.0, mfu=0.42, ndcg=0.2519, ndcg_low=0.24,
    ndcg_high=0.272, watts=610.0, joules=14000.0, throttled="power cap", axis="M",
    sizes=(1024, 4096), times=(0.1,), peaks=(5.0,), work=(6.0, 8.0), messages=(0, 7),
    sent=(0.5, 14.5), exponent=1.98, memory_exponent=1.01, limit="4096: out of memory",
)  # fmt: skip
TEXTS = {
    "seconds": "13.5 ms (13.1-14.2)", "ratio": "1.10 (1.04-1.20)", "cold": "20.0 ms",
    "gemm": "90.0%", "copy": "12.5%", "peak_mib": "2,108", "error": "3.0e-07",
    "converged": "4.0e-07", "queries": "114", "tokens": "18,900", "mfu": "42.0%",
    "ndcg": "0.252 (0.240-0.272)", "watts": "610", "joules": "14,000", "sizes": "M 1024 to 4096",
    "work": "6.00, 8.00", "messages": "0, 7", "sent": "0.500, 14.5", "exponent": "^1.98",
    "memory_exponent": "^1.01", "limit": "4096: out of memory",
    "throttled": "power cap", "note": "a note",
}  # fmt: skip
BESIDE = {  # fields that stand in another one's column, or in pictures
    "implementation", "low", "high", "ratio_low", "ratio_high", "ratios", "ndcg_low", "ndcg_high",
    "axis", "times", "peaks",
}  # fmt: skip


def result(*rows: Row, **more) -> Result:
    return Result("case", "loss", "?", {"M": 8, "dtype": "float32"}, rows, **more)


def run(*results: Result) -> Run:
    return Run(MACHINE, results)


def test_no_field_of_a_row_is_forgotten():
    assert {field.name for field in dataclasses.fields(Row)} == {*TEXTS, *BESIDE}


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_column_is_shown_where_a_row_has_it(column):
    with_it, without = Row("x"), result(Row("x"), Row("y", "other note"))
    lone = {"sizes": {"axis": "M"}, "seconds": {"low": 0.0131, "high": 0.0142}}.get(column.name, {})
    spread = {field: getattr(FULL, field) for field in BESIDE if field.startswith(column.name)}
    with_it = dataclasses.replace(
        with_it, **{column.name: getattr(FULL, column.name)} | lone | spread
    )
    for text in (table(result(with_it)), markdown([result(with_it)])):
        assert column.head in text and TEXTS[column.name] in text
    if column.name != "note":
        assert column not in shown(without.rows)


def test_named_columns_leave_out_others_but_no_note():
    head, row = table(result(FULL), ["ratio", "error"]).splitlines()
    assert head.split() == ["ratio", "error", "throttled", "note"]
    assert "13.5 ms" not in row
    with pytest.raises(InputError, match="no column 'time': there are seconds, ratio"):
        table(result(FULL), ["time"])


def test_an_implementation_out_of_memory_is_a_row_with_its_error():
    line = next(x for x in table(info_nce(2**17)).splitlines() if "cross_entropy" in x)
    assert line.split(maxsplit=3)[2:] == ["4.0e-03", OUT_OF_MEMORY]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        pytest.param(0.0, "0", id="zero"),
        pytest.param(9.996, "10.0", id="rounds-up-a-digit"),
        pytest.param(99.96, "100", id="rounds-up-to-the-point"),
        pytest.param(12345.6, "12,346", id="large"),
        pytest.param(0.01234, "0.0123", id="small"),
        pytest.param(1.2e-9, "1.2e-09", id="tiny"),
        pytest.param(float("inf"), "inf", id="not-finite"),
    ],
)
def test_numbers_have_three_digits(x, text):
    assert number(x) == text


def test_markdown_keeps_an_implementations_signs():
    assert r"| a \| \<b> |" in markdown([result(Row("a | <b>", seconds=1.0))])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of the run by hand, by way of its file."""
    directory = tmp_path_factory.mktemp("report")
    bad = Row("rankpo-fast, <b>", "RuntimeError: <i>bad</i> & $broken", throttled=None)
    more = result(bad, Row("rankpo-fast", seconds=1.0))
    write(directory / "run.json", Run(RUN.machine | {"note": "<u>"}, [*RUN.results, more]))
    return write_report(read(directory / "run.json"), directory)


def test_the_page_needs_nothing_else(page):
    html = page.read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,30})', html)
    assert len([x for x in sources if x.startswith("data:image/png;base64,")]) == 4
    links = {x.removeprefix("#") for x in sources if x.startswith("#")}
    assert len(sources) == 4 + len(links) and links == set(re.findall(r'id="(case\d)"', html))
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)


def test_the_page_escapes_what_files_say(page):
    html = page.read_text()
    assert not re.search("<b>|<i>|<u>", html)
    assert html.count("rankpo-fast, &lt;b&gt;") == 2  # listed as failed, and in its table
    assert "&lt;i&gt;bad&lt;/i&gt; &amp; $broken" in html and "&lt;u&gt;" in html


def test_the_page_lists_what_failed_before_any_table(page):
    html = page.read_text()
    top, tables = html[: html.index("<h2>In short")], html[html.index("<table") :]
    assert "training ladder 256 1B: rankpo-fast, + 8-bit AdamW: RuntimeError" in top
    assert top.index("Failed") < top.index("Throttled") and "rankpo-fast: power cap" in top
    assert "from siglip on, after 8 minutes" in top
    assert tables.count('<tr class="red">') == 2 and tables.count('<tr class="throttled">') == 1
    assert tables.count('<tr class="bound">') == 3


def test_an_error_of_a_peer_is_a_failure_and_a_lack_of_memory_is_none():
    rows = Row("broken", "ValueError: no"), Row("full", OUT_OF_MEMORY)
    assert failures(run(result(*rows))) == ["case 8 float32: broken: ValueError: no"]


def test_the_page_has_machine_rates_questions_and_columns(page):
    html = page.read_text()
    for text in ("NVIDIA H100", "580.65", "0123abc", "740 TFLOP/s in bfloat16", "2,900 GB/s"):
        assert text in html
    rows = [row for result in RUN.results for row in result.rows]
    for column in shown(rows):
        assert f"<dt>{column.head}</dt>" in html
        assert f">{column.head}</th>" in html or column.name in ("throttled", "note")
    for asked in RUN.results:
        assert f"<h3>{asked.name}</h3><p class=soft>{asked.question}" in html
    assert "liger-kernel<small>liger_kernel not installed</small>" in html


def test_pictures_lie_beside_the_page(page):
    names = ("time_memory", "lower_bound", "ladder", "accuracy")
    assert all((page.parent / f"{x}.png").read_bytes()[:4] == b"\x89PNG" for x in names)


def test_a_run_without_results_is_a_page_without_pictures(tmp_path):
    html = write_report(run(), tmp_path).read_text()
    assert "0 tables" in html and "<figure>" not in html
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_in_short_hides_no_defeat():
    said = " ".join(in_short(run(info_nce(4096), info_nce(2**17, ours=0.5))))
    assert "0 failed" in said and "0.50 to 1.10 times as long as the lower bound" in said
    assert "fastest at 0 of 2 shapes, with the least memory at 1" in said
    assert "quack is faster at 2: at best it takes 0.90 of our time" in said
    assert f"{OUT_OF_MEMORY.capitalize()}: torch cross_entropy (1 row)" in said
    assert "gate that ours must pass: torch cross_entropy (1 row)" in said


def test_who_is_faster_is_what_was_taken_within_rounds():
    rows = (Row(OURS, seconds=1.0, ratio=1.2), Row("quack", seconds=0.9, ratio=1.3))
    said = in_short(run(Result("a case", "loss", "?", {}, rows, lower_bound="3 GEMMs")))
    assert any("fastest at 1 of 1" in text for text in said)


def test_a_limit_is_in_the_pictures_data():
    scaling, batches = growths(RUN)
    curves = {curve.implementation: curve for curve in batches.curves}
    assert batches.axis == "M" and batches.title == "info_nce, N = M, D = 1024, bfloat16"
    assert curves["torch cross_entropy"].sizes == (4096, 16384)
    assert curves["torch cross_entropy"].limit == (2**17, OUT_OF_MEMORY)
    assert curves["rankpo-fast"].sizes == (4096, 16384, 2**17)
    assert curves["rankpo-fast"].limit is None and "liger-kernel" not in curves
    ours, peer = scaling.curves
    assert ours.limit is None and peer.limit == (16384, "16384: out of memory")
    assert peer.times == (2e-4, 3e-3)


def test_a_fall_is_marked_at_its_size():
    axes = plots.time_memory(run(SCALING)).axes
    marks = [line for ax in axes for line in ax.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in marks] == [[16384]] * 2  # in time and in memory


def test_other_dims_are_no_other_batch():
    other = dataclasses.replace(info_nce(4096), shape={"M": 8192, "N": 8192, "D": 384})
    assert growths(run(info_nce(4096), other)) == []


def test_the_lower_bound_shows_who_wins():
    axes = plots.lower_bound(run(info_nce(4096))).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    colors = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert names == ["quack", "rankpo-fast", "torch cross_entropy"]  # the fastest first
    assert colors == [plots.WINS, plots.OUR_COLOR, plots.PEER]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.99, 1.1, 2.0])


def test_the_ladder_keeps_its_order_and_what_failed():
    memory, speed = plots.ladder(run(LADDER)).axes
    assert [bar.get_width() for bar in memory.patches] == [61000, 40000, 9000, 0]
    assert [bar.get_width() for bar in speed.patches] == [41000, 82000, 63000, 0]
    assert any("RuntimeError" in text.get_text() for text in memory.texts)


def test_accuracy_has_fresh_and_converged_errors():
    axes = plots.accuracy(run(info_nce(4096))).axes[0]
    drawn = {line.get_ydata()[0] for line in axes.lines if line.get_marker() not in ("None", None)}
    assert drawn == {2e-3, 3e-3, 4e-3, 0.5}


@pytest.mark.parametrize(
    "draw",
    [plots.time_memory, plots.lower_bound, plots.ladder, plots.accuracy],
    ids=lambda f: f.__name__,
)
def test_nothing_to_draw_is_no_picture(draw):
    assert draw(run()) is None
    assert draw(run(result(Row("rankpo-fast", "needs a GPU")))) is None


def test_ours_has_one_colour_and_no_peer_has_it():
    style = plots.styles(RUN.results)
    ours = {look["color"] for name, look in style.items() if name.startswith("rankpo-fast")}
    others = {look["color"] for name, look in style.items() if not name.startswith("rankpo-fast")}
    assert ours == {plots.OUR_COLOR} and plots.OUR_COLOR not in others


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(2.1, 4.2, id="within-a-decade"),
        pytest.param(5.1, 10.2, id="across-a-power-of-ten"),
        pytest.param(1e-9, 1e7, id="many-decades"),
    ],
)
def test_an_axis_has_a_few_round_numbers(low, high):
    ticks = plots.round_numbers(low, high)
    assert 3 <= len(ticks) <= plots.TICKS and all(low <= x <= high for x in ticks)


def test_a_case_is_drawn_at_the_largest_shape_that_most_implementations_reach():
    (axes,) = plots.lower_bound(RUN).axes  # 2**17, where one runs out of memory, is in the tables
    assert axes.get_title(loc="left") == "info_nce\n16384x16384x1024 bfloat16"
