"""The measuring is right, and what stops an implementation is a row."""

import contextlib
import itertools
import json
import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench
from bench import machine, registry
from bench import measure as measuring
from bench.cases import in_batch, info_nce, loss, open_clip, rankpo, sentence_transformers, tiles
from bench.cases.loss import GATE, Errors, LossQuestion, gemms, loss_question
from bench.gpu import Readings
from bench.measure import Case, cache_bytes, evictor, measure, relative_error, seconds_of, turned
from bench.peers import COMPILED
from bench.questions import OURS, Question, Rates, Result, Row, Settings
from bench.results import Run, read, write
from rankpo_fast.errors import InputError
from support.launcher import SMALL

MIB = 2**20
RATES = Rates({"float32": 1e9, "bfloat16": 8e9}, 1e9)


def case(implementations, **more) -> Case:
    sizes = {"flops": 0, "bytes": 1e12} | more  # too large for any cache
    return Case("cpu", {"bound": tuple} | implementations, "bound", **sizes)


def settings(rounds=1, **more) -> Settings:
    return Settings("cpu", "quick", rounds, RATES, **more)


def measured(implementations, *, rounds=1, **more) -> dict[str, Row]:
    rows = measure(case(implementations, **more), settings(rounds))
    return {row.implementation: row for row in rows}


def fails(error):
    def run():
        raise error

    return run


def sleeps(seconds):
    def run():
        time.sleep(seconds)
        return ()

    return run


@pytest.fixture
def takes(monkeypatch):
    """takes(seconds): a run of that length on a clock which only runs move, and no busy machine."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        def run():
            now[0] += seconds
            return ()

        return run

    return lasting


def test_a_known_time_comes_out_as_itself_and_its_ratio(takes):
    rows = measured({"bound": takes(0.05), "twice": takes(0.1)}, rounds=3)
    assert rows["twice"].seconds == pytest.approx(0.1)
    assert rows["twice"].ratio == pytest.approx(2)
    assert rows["twice"].low <= rows["twice"].seconds <= rows["twice"].high
    assert len(rows["twice"].ratios) == 3


def test_short_runs_are_repeated_until_they_can_be_timed(takes):
    ran, short, long = [], takes(1e-5), takes(0.02)
    measured({"bound": short, "short": lambda: ran.append(1) or short()})
    assert len(ran) > 10
    ran.clear()
    measured({"bound": short, "long": lambda: ran.append(1) or long()})
    assert len(ran) == 4  # a warm-up, the peak, one to know how long it takes, the round


def test_runs_that_are_repeated_take_the_time_of_one(monkeypatch):
    ran = []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: len(ran))
    assert seconds_of(lambda: ran.append(1), "cpu", 5) == 1 and len(ran) == 5


def test_known_memory_comes_out_and_what_all_must_make_is_taken_off():
    size = 64 * 2**20

    def holds():
        return (torch.ones(size // 4),)

    assert measured({"holds": holds})["holds"].peak_mib == pytest.approx(64, abs=4)
    kept = measured({"holds": holds}, keep_bytes=size // 2)["holds"]
    assert kept.peak_mib == pytest.approx(32, abs=4)


def test_memory_that_a_run_has_freed_by_its_end_counts():
    def frees():
        torch.ones(64 * MIB, dtype=torch.uint8)
        return ()

    assert measured({"frees": frees})["frees"].peak_mib == pytest.approx(64, abs=4)


def test_shares_are_of_the_rates_that_were_measured(takes):
    row = measured({"bound": takes(0.01), "works": takes(0.02)}, flops=1e7, bytes=1e13)["works"]
    assert row.gemm == pytest.approx(1e7 / row.seconds / 1e9)
    assert row.copy == pytest.approx(1e13 / row.seconds / 1e9)
    assert measured({"bound": takes(0.01), "moves": takes(0.02)}, flops=0)["moves"].gemm is None


def test_what_fits_a_cache_is_also_timed_without_it(monkeypatch):
    small, large = ({"bytes": share * cache_bytes("cpu")} for share in (0.1, 3))
    assert evictor(case({}, **small)) is not None and evictor(case({}, **large)) is None
    ran = []
    monkeypatch.setattr(measuring, "evictor", lambda _: lambda: ran.append("emptied"))
    row = measured({"reads": lambda: ran.append("read") or ()})["reads"]
    assert row.cold is not None and ran[-2:] == ["emptied", "read"]


def test_the_caches_are_emptied_by_twice_their_size(monkeypatch):
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 32 * MIB)
    before = measuring.mark_resident()
    evictor(case({}, bytes=0))()
    assert measuring.peak_resident() - before == pytest.approx(64 * MIB, abs=4 * MIB)


def test_every_implementation_is_first_in_some_round(monkeypatch):
    orders = [turned("abc", number) for number in range(4)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc"]
    ran = []
    monkeypatch.setattr(measuring, "seconds_of", lambda run, *_: ran.append(run) or 1.0)
    measured({"a": list, "b": dict}, rounds=3)
    assert ran[3:] == [tuple, list, dict, list, dict, tuple, dict, tuple, list]


def test_a_slow_round_moves_no_ratio(monkeypatch):
    calls = itertools.count()

    def seconds_of(run, *_):
        slow = 1 + next(calls) // 2  # from round to round
        return 2 * slow if run is list else slow

    monkeypatch.setattr(measuring, "seconds_of", seconds_of)
    row = measured({"twice": list}, rounds=6)["twice"]
    assert row.ratios == (2,) * 6 and row.high > row.low


def test_the_order_of_implementations_does_not_matter(monkeypatch):
    """A machine that grows slower within a run: ratios of a round take it out."""

    def ratios(*names: str) -> dict[str, float]:
        clock = itertools.count(100)
        monkeypatch.setattr(measuring, "seconds_of", lambda *_: next(clock) / 100)
        rows = measured({"bound": tuple} | dict.fromkeys(names, tuple), rounds=6)
        return {name: rows[name].ratio for name in names}

    forth, back = ratios("a", "b"), ratios("b", "a")
    for name in forth:
        assert forth[name] == pytest.approx(1, abs=0.02)
        assert forth[name] == pytest.approx(back[name], abs=0.02)


def test_what_stops_an_implementation_is_a_row():
    implementations = {
        "full": fails(torch.OutOfMemoryError("CUDA out of memory")),
        "gone": fails(ModuleNotFoundError(name="quack")),
        "broken": fails(RuntimeError("no kernel image\nmore")),
        "fine": tuple,
    }
    rows = measured(implementations, rounds=2)
    assert {name: row.note for name, row in rows.items()} == {
        "bound": "", "full": "out of memory", "gone": "quack not installed",
        "broken": "RuntimeError: no kernel image", "fine": "",
    }  # fmt: skip
    assert [name for name, row in rows.items() if row.red] == ["broken"]
    assert [name for name, row in rows.items() if row.seconds is None] == ["full", "gone", "broken"]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "last"])
def test_an_error_in_one_round_leaves_no_time(number, monkeypatch):
    monkeypatch.setattr(measuring, "seconds_of", lambda run, *_: (run(), 1.0)[1])
    ran = itertools.count(-3)  # a warm-up, the peak, one to know how long it takes

    def breaks():
        if next(ran) == number:
            raise RuntimeError("no")
        return ()

    row = measured({"breaks": breaks}, rounds=3)["breaks"]
    assert (row.note, row.seconds, row.ratio) == ("RuntimeError: no", None, None) and row.red


def test_ours_is_red_whatever_stops_it():
    assert Row(OURS, "out of memory").red and not Row("torch", "out of memory").red
    for words in ("ValueError: plug-in not installed", "TypeError: f() does not take 3 arguments"):
        assert Row("torch", words).red


@pytest.mark.parametrize("state", ["errors", "converged"])
def test_a_red_gate_of_ours_is_not_timed_and_a_peer_is(state):
    errors = {OURS: 0.5, "peer": 0.5, f"{OURS}, unknown": math.nan}
    rows = measured(dict.fromkeys(errors, tuple), gate=0.1, **{state: errors})
    untimed = [name for name, row in rows.items() if row.seconds is None]
    assert untimed == [OURS, f"{OURS}, unknown"]
    assert "above the gate" in rows[OURS].note and rows[OURS].red


def test_without_a_lower_bound_an_implementation_has_a_time_but_no_ratio():
    rows = measured({"bound": fails(MemoryError()), OURS: tuple})
    assert rows["bound"].note == "out of memory"
    assert rows[OURS].seconds is not None and rows[OURS].ratio is None and not rows[OURS].red


def test_a_lower_bound_of_few_rows_at_once_has_the_products_of_all():
    q, p = torch.randn(7, 3), torch.randn(5, 3)
    s = q @ p.T
    for most in (2**20, 2 * 5 * 4):  # two rows of five scores: the last chunk is smaller
        torch.testing.assert_close(gemms(3, q, p, most=most)(), (s @ p, s.T @ q))


def test_errors_are_taken_of_those_who_are_asked():
    ran = []
    runs = {name: lambda name=name: ran.append(name) or (torch.ones(1),) for name in "ab"}
    errors = Errors(runs, lambda _: (torch.ones(1),))
    measured({name: tuple for name in "b"}, errors=errors)
    assert ran == ["b"] and errors["b"] == 0 and ran == ["b"]


def test_a_throttled_gpu_marks_every_time_of_the_case(monkeypatch):
    hot = Readings(watts=700.04, throttled="power cap in 3 of 9 samples")
    monkeypatch.setattr(loss, "watching", lambda device: contextlib.nullcontext(hot))
    runs = {OURS: tuple, "late": fails(MemoryError())}
    asked = loss_question("ours", "?", "BD", {}, lambda *_: case(runs), list(runs))
    result = asked.answer({"B": 2, "D": 2, "dtype": "float32"}, settings())
    assert [bool(row.throttled) for row in result.rows] == [True, True, False]
    assert result.about == {"W": 700.0}


def test_rounds_stop_at_the_limit():
    run = sleeps(0.02)
    rows = measure(case({"counts": run}), settings(100, limit_s=0.0))
    assert len(rows[1].ratios) == 1


def test_only_those_asked_for_and_the_lower_bound_run():
    asked = settings(implementations=frozenset(["a"]))
    rows = measure(case({"a": tuple, "b": fails(AssertionError())}), asked)
    assert [row.implementation for row in rows] == ["bound", "a"]


def test_without_the_library_that_ours_adapts_to_there_is_a_row_of_its_name():
    def case(shape, device):
        raise ModuleNotFoundError(name="sentence_transformers")

    asked = loss_question("theirs", "?", "BD", {}, case, [OURS])
    (row,) = asked.answer({"B": 2, "D": 2, "dtype": "float32"}, settings()).rows
    assert row == Row("theirs", "sentence_transformers not installed") and not row.red


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)], ids=str
)
def test_what_is_not_finite_passes_no_gate(loss, gradient):
    found = [torch.tensor([loss]), torch.tensor([gradient])]
    error = relative_error(found, [torch.ones(1), torch.ones(1)])
    rows = measured({OURS: tuple, "peer": tuple}, gate=0.1, errors={OURS: error, "peer": error})
    assert rows[OURS].seconds is None and rows[OURS].red
    assert rows["peer"].seconds is not None and rows["peer"].error == math.inf


def test_ours_that_has_no_error_says_what_it_raised():
    rows = measured({OURS: fails(ValueError("a bug"))}, gate=0.1, errors={OURS: math.nan})
    assert rows[OURS].note == "ValueError: a bug"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        ("out of resource: shared memory, Required: 262144", "out of resource: shared memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory"),
    ],
    ids=["triton", "cublas"],
)
def test_a_lack_of_the_gpu_is_a_result_of_a_peer(error, note):
    row = measured({"peer": fails(RuntimeError(error))})["peer"]
    assert note in row.note and not row.red


def test_rates_are_those_of_the_products_and_copies_they_time(monkeypatch):
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: (run(), 0.5)[1])
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 16)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(machine, "emulated", lambda device: {})  # a machine that has them all
    rates = machine.measure_rates("cpu")
    assert rates.gemm == {"float32": 2 * 16**3 / 0.5, "bfloat16": 2 * 16**3 / 0.5}
    assert rates.copy == 2 * 8 * 1024 / 0.5


@pytest.mark.parametrize("form", info_nce.FORMS, ids=lambda form: form.name.replace(" ", "-"))
@pytest.mark.parametrize("passages", [24, 72], ids=["one-a-query", "in-groups"])
def test_implementations_of_a_form_agree(form, passages):
    x = form.draw(24, passages, 32, "cpu", torch.float32)
    # test_peers compiles those that do
    runs = {name: run for name, run in form.runs(x).items() if name not in COMPILED}
    found = Errors(runs, lambda _: form.runs(x.exact())[OURS]())
    ran = {name: error for name, error in found.items() if not math.isnan(error)}
    assert len(ran) > 1 and max(ran.values()) < GATE[torch.float32]
    assert len(form.runs(x)[OURS]()) == 1 + form.backward * len(x.leaves)


def test_a_case_says_what_a_step_has_to_do():
    asked = next(q for q in info_nce.QUESTIONS if q.name == "info_nce")
    (shape,) = [asked.shape("32x64x16", "cpu")]
    made = asked.case(shape, "cpu")
    assert made.flops == 6 * 32 * 64 * 16 and made.bytes == 2 * 4 * (32 + 64) * 16
    assert made.lower_bound == "3 GEMMs"
    assert set(asked.implementations("cpu")) == set(made.implementations) - {"3 GEMMs"}


@pytest.mark.parametrize(
    ("count", "backward"), [(1, False), (3, True), (4, True)], ids=["1-forward", "3", "4"]
)
def test_the_lower_bound_makes_no_product_more_than_its_name_says(count, backward):
    q, p = (torch.randn(n, 16, requires_grad=True) for n in (24, 40))
    made = loss.beside_gemms(count, q, p, [q, p], {}, backward=backward)
    with FlopCounterMode(display=False) as counter:
        made.implementations[f"{count} GEMM{'s' * (count > 1)}"]()
    assert counter.get_total_flops() == made.flops == count * 2 * 24 * 40 * 16


@pytest.mark.parametrize("form", in_batch.FORMS, ids=lambda form: form.replace(" ", "-"))
def test_implementations_of_a_pair_loss_agree(form):
    found = in_batch.errors(form, 16, "cpu", torch.float32)
    assert max(found.values()) < in_batch.GATE[torch.float32]


def test_implementations_of_the_pairwise_loss_agree():
    found = rankpo.errors(16, "cpu", torch.float32)
    assert max(found.values()) < rankpo.GATE[torch.float32]


@pytest.mark.parametrize("room", [sentence_transformers, open_clip], ids=lambda m: m.__name__[-5:])
def test_implementations_of_an_adapter_agree(room, monkeypatch):
    pytest.importorskip(room.THEIRS.replace("-", "_"))
    monkeypatch.setattr(room, "FOR_ERRORS", 32)
    for question in room.QUESTIONS:
        made = question.case(question.shape("32x16", "cpu"), "cpu")
        assert set(made.errors) == set(question.implementations("cpu"))
        assert max(made.errors.values()) < made.gate


def test_converged_data_is_what_cross_entropy_loses():
    torch.manual_seed(0)
    found = info_nce.errors(info_nce.PLAIN, 256, 256, 128, "cpu", torch.float32, True)
    assert found[OURS] < GATE[torch.float32] and found["torch cross_entropy"] > 0.5


def test_a_gpu_has_the_shapes_that_matter_first():
    plain = next(q for q in info_nce.QUESTIONS if q.name == "info_nce")
    first = plain.shapes("cuda", "default")[0]
    assert first == {"M": 16384, "N": 16384, "D": 1024, "dtype": "bfloat16"}
    args = bench._run_parser().parse_args(["--cases", *(q.name for q in info_nce.QUESTIONS)])
    waves = [shape for _, shape in bench._asked(args, "cuda", "default")]
    assert waves.index(plain.shapes("cuda", "default")[1]) == len(info_nce.QUESTIONS)


@pytest.mark.gpu
@pytest.mark.long
def test_the_sweep_takes_the_tiles_it_names(interpreted):
    q, p, labels = (x.detach() for x in info_nce.loss.draw(24, 40, 16, "cpu", torch.bfloat16))
    if not interpreted:
        q, p, labels = q.cuda(), p.cuda(), labels.cuda()
    runs = tiles.implementations(q, p, labels, {"small": SMALL, "as shipped": None}, tiles.SMALLER)
    assert list(runs) == [
        f"{how}, {name}" for name in ("small", "as shipped") for how in tiles.SMALLER
    ]
    results = [run() for run in runs.values()]
    for result in results[1:]:
        assert relative_error(result[3:5], results[0][3:5]) < 8e-3


# --- the command ---


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Runs the command over two small questions; returns (exit code, the result file's run)."""
    rows = {"fine": Row(OURS, seconds=1.0), "red": Row(OURS, "error 1.0e+00 above the gate")}

    def question(name: str) -> Question:
        def answer(shape, settings):
            if name == "broken":
                raise MemoryError
            return Result(name, "loss", "?", shape, (rows[name],))

        shapes = [{"M": 2, "dtype": "float32"}, {"M": 4, "dtype": "float32"}]
        implementations = (OURS, "torch", "torch.compile")
        return Question(name, "loss", "?", lambda *_: shapes, answer, lambda _: implementations)

    questions = {name: question(name) for name in (*rows, "broken")}
    monkeypatch.setattr(registry, "QUESTIONS", questions)
    monkeypatch.setattr(machine, "measure_rates", lambda device: RATES)

    def run(*flags: str):
        output = tmp_path / "deep"
        code = bench.main(["run", "--device", "cpu", "--output_dir", str(output), *flags])
        files = sorted(output.glob("*.json")) if output.exists() else []
        return code, read(files[-1]) if files else None

    return run


def test_a_run_leaves_a_result_file_and_a_report(suite, tmp_path):
    code, run = suite("--cases", "fine", "--note", "tests", "812 passed")
    assert code == 0 and (tmp_path / "deep" / "report.html").exists()
    assert [(r.case, r.shape["M"]) for r in run.results] == [("fine", 2), ("fine", 4)]
    assert run.machine["tests"] == "812 passed" and run.machine["rates"]["copy"] == 1e9


def test_a_red_row_fails_the_run_and_the_rest_goes_on(suite, capsys):
    code, run = suite("--cases", "red", "fine")
    assert code == 1 and len(run.results) == 4
    assert capsys.readouterr().out.count("FAILED red") == 2


def test_a_question_that_cannot_be_asked_is_red_whatever_stopped_it(suite):
    code, run = suite("--cases", "broken", "fine")
    assert code == 1 and [r.case for r in run.results] == ["fine", "broken"] * 2
    assert run.results[1].rows == (Row(OURS, "out of memory"),)


def test_a_lost_device_ends_the_run_by_name(suite, monkeypatch):
    monkeypatch.setattr(machine, "lost", lambda device: "CUDA error: an illegal memory access")
    code, run = suite("--cases", "fine")
    assert len(run.results) == 1 and "lost the device: CUDA error" in run.machine["left out"]


@pytest.mark.parametrize("minutes", ["0", "1e-9"])
def test_what_time_does_not_allow_is_named(suite, minutes):
    code, run = suite("--minutes", minutes, "--cases", "fine", "red")
    assert code == 0 and run.results == []
    assert "fine 2 float32, red 2 float32, fine 4" in run.machine["left out"]


def test_what_is_emulated_is_left_out_with_a_word(suite, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "emulated", lambda device: {"float32": 55.0})
    code, run = suite("--cases", "fine")
    assert code == 0 and run.results == []
    assert run.machine["emulated"] == "float32 (55.0 times the time of float32)"
    left_out = "fine 2 float32 (emulated here); fine 4 float32 (emulated here)"
    assert run.machine["left out"] == left_out
    assert "emulated" in capsys.readouterr().out.split("left out")[0]
    assert "(emulated here)" in (tmp_path / "deep/report.html").read_text()


def test_quick_has_no_time_to_compile_unless_asked_to(suite):
    _, run = suite("--quick", "--cases", "fine")
    assert run.machine["left out"] == "torch.compile (compiles for seconds)"
    _, run = suite("--quick", "--cases", "fine", "--implementations", "torch.compile")
    assert "left out" not in run.machine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "fine", "fin"], "unknown case 'fin' (did you mean fine?)"),
        (
            ["--implementations", "torch", "torhc"],
            "'torhc' is in none of these cases (did you mean torch?)",
        ),
        (["--shapes", "4x4"], "have no shape 4x4"),
        (["--quick", "--full"], "not allowed with"),
        (["--rounds", "0"], "must be a number >= 1, got 0"),
        (["--minutes", "nan"], "must be a number >= 0, got nan"),
        (["--compile", "64"], "--compile, but there is no GPU"),
        (["--round", "3"], "unrecognized arguments"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_is_named_before_anything_runs(suite, capsys, flags, message):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    code, run = suite(*flags)
    assert (code, run) == (2, None) and message in capsys.readouterr().err


def file(results: str, machine: str = "{}") -> str:
    return f'{{"format": 2, "machine": {machine}, "results": {results}}}'


def rows(row: str) -> str:
    return f'[{{"case": "a", "family": "?", "question": "?", "shape": {{}}, "rows": [{row}]}}]'


@pytest.mark.parametrize(
    "text",
    [
        "5", "[]", file("3"), file("[]", "[1]"), file('["a"]'), file(rows("7")),
        file(rows('{"implementation": "a", "seconds": "1"}')),
    ],
    ids=["number", "list", "results", "machine", "result", "row", "seconds"],
)  # fmt: skip
def test_what_is_no_result_file_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match="bad.json: not a result file of the bench"):
        read(tmp_path / "bad.json")


@pytest.mark.parametrize("command", ["run", "report"])
def test_an_output_directory_that_is_none_is_named(tmp_path, capsys, command):
    (file := tmp_path / "file").touch()
    write(result := tmp_path / "result.json", Run({}, []))
    flags = [result] if command == "report" else ["--cases", "rankpo"]
    code = bench.main([command, *map(str, [*flags, "--output_dir", file])])
    assert code == 2 and f"--output_dir {file}: File exists" in capsys.readouterr().err


def test_a_shape_is_read_or_named():
    asked = next(q for q in registry.QUESTIONS.values() if isinstance(q, LossQuestion))
    assert asked.shape("8x16x4:float16", "cpu") == {"M": 8, "N": 16, "D": 4, "dtype": "float16"}
    assert asked.shape("8x16", "cpu") is None
    for text, why in [("8x0x4", "no shape"), ("8x8x8:int8", "float type"), ("8x9x4", "multiple")]:
        with pytest.raises(InputError, match=why):
            asked.shape(text, "cpu")


def test_the_result_file_has_a_line_a_case(suite, tmp_path):
    suite("--cases", "fine")
    (file,) = (tmp_path / "deep").glob("*.json")
    lines = [line for line in file.read_text().splitlines() if line.startswith('{"case"')]
    assert len(lines) == 2 and json.loads(lines[1])["shape"]["M"] == 4
