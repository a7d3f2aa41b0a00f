"""The bench measures what it says, and what stops a peer is a row."""

import json
import sys

import pytest
import torch
from launcher import SMALL

from bench import __main__ as bench
from bench.cases import in_batch, info_nce, tiles
from bench.measure import Case, measure, relative_error


def case(contenders, **more) -> Case:
    return Case("c", "?", {}, "cpu", {"floor": tuple} | contenders, "floor", 0, **more)


def fails(error):
    def run():
        raise error

    return run


def test_what_stops_a_contender_is_a_row():
    contenders = {
        "full": fails(torch.OutOfMemoryError("CUDA out of memory")),
        "broken": fails(RuntimeError("no kernel image\nmore")),
        "fine": tuple,
    }
    rows = measure(case(contenders), rounds=2)
    assert [row.note for row in rows] == ["", "out of memory", "RuntimeError: no kernel image", ""]
    assert [row.seconds is None for row in rows] == [False, True, True, False]


def test_a_red_gate_of_ours_is_not_timed_and_a_peer_is():
    errors = {"ours": 0.5, "peer": 0.5, "unknown": float("nan")}
    contenders = dict.fromkeys(errors, tuple)
    rows = measure(case(contenders, errors=errors, gate=0.1, peers=frozenset(["peer"])), rounds=1)
    assert [row.seconds is None for row in rows] == [False, True, False, True]


def test_without_a_floor_no_contender_has_a_ratio():
    full = {"floor": fails(MemoryError()), "ours": tuple}
    rows = measure(case(full), rounds=1)
    assert [row.note for row in rows] == ["out of memory", "no floor: out of memory"]


def test_rounds_stop_at_the_limit():
    ran = []
    measure(case({"counts": lambda: ran.append(1) or ()}), rounds=100, limit_s=0.0)
    assert len(ran) == 3  # a warm-up, the peak, one round


@pytest.mark.parametrize("form", info_nce.FORMS, ids=lambda form: form.name.replace(" ", "-"))
def test_contenders_of_a_form_agree(form):
    q, p, labels = info_nce.draw(24, 24, 16, "cpu")
    assert max(info_nce.errors(form, 24, 24, 16, "cpu").values()) < info_nce.GATE["cpu"]
    runs = info_nce.contenders(form, q, p, labels)
    runs.pop("rankpo-fast, every mask", None)  # another loss
    ours, *others = (run() for run in runs.values())
    assert others and len(ours) == (3 if form.backward else 1)
    for other in others:
        assert relative_error(ours, other) < 1e-4
    info_nce.gemms(form, q, p)()


@pytest.mark.parametrize("form", in_batch.FORMS, ids=lambda form: form.replace(" ", "-"))
def test_contenders_of_a_pair_loss_agree(form):
    q, p, labels = in_batch.draw(24, 24, 16, "cpu")
    ours, plain = (run() for run in in_batch.contenders(form, q, p, labels).values())
    assert relative_error(ours, plain) < 1e-4
    assert max(in_batch.errors(form, 16, "cpu").values()) < in_batch.GATE["cpu"]
    in_batch.gemms(in_batch.FORMS[form], q, p)()


def test_a_card_has_the_sizes_that_matter_first():
    shapes = list(info_nce.shapes("cuda", quick=False))
    sizes = {M for _, M, _, _ in shapes[: info_nce.FIRST]}
    assert sizes == set(info_nce.SIZES[:2])
    assert len(set(shapes)) == 64 == len(info_nce.FORMS) * len(info_nce.SIZES) * len(info_nce.DIMS)


def test_the_sweep_takes_the_tiles_it_names(interpreted):
    q, p, labels = (x.detach() for x in info_nce.draw(24, 40, 16, "cpu"))
    if not interpreted:
        q, p, labels = q.cuda(), p.cuda(), labels.cuda()
    q, p = q.to(torch.bfloat16), p.to(torch.bfloat16)
    runs = tiles.contenders(q, p, labels, {"small": SMALL, "as shipped": None}, tiles.SMALLER)
    assert list(runs) == [
        f"{how}, {name}" for name in ("small", "as shipped") for how in tiles.SMALLER
    ]
    results = [run() for run in runs.values()]
    for result in results[1:]:
        assert relative_error(result[3:5], results[0][3:5]) < 8e-3


def test_the_result_file_has_a_line_a_case_and_says_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bench, "all_cases", lambda *_: iter([case({"rankpo-fast": tuple}), case({})])
    )
    output = tmp_path / "deep" / "result.json"
    command = ["bench", "--device", "cpu", "--rounds", "1", "--minutes", "1e-9"]
    command += ["--output", str(output), "--note", "tests", "812 passed"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 0
    said = json.loads(output.read_text())
    assert said["machine"]["tests"] == "812 passed" and said["results"] == []
    assert "left out from c on" in capsys.readouterr().out
    command[6] = "1"
    assert bench.main() == 0
    said = json.loads(output.read_text())
    assert [row["contender"] for row in said["results"][0]["rows"]] == ["floor", "rankpo-fast"]
    assert len(said["results"]) == 2


def test_a_red_gate_fails_the_bench(tmp_path, monkeypatch):
    red = case({"rankpo-fast": tuple}, errors={"rankpo-fast": 1.0}, gate=0.1)
    monkeypatch.setattr(bench, "all_cases", lambda *_: iter([red]))
    command = ["bench", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 1
