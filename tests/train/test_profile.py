"""The profile: every microsecond of a step under one name, whatever thread launched the work."""

import gzip
import json

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.train.profile import table


def note(name, begin, end, thread=1):
    return {"ph": "X", "cat": "user_annotation", "name": name, "tid": thread, "ts": begin,
            "dur": end - begin}  # fmt: skip


def launch(number, at, time, kind="kernel"):
    """Work that a thread of its own launches, as backward's does, and that runs late."""
    arguments = {"correlation": number}
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 9, "ts": at,
         "dur": 1, "args": arguments},
        {"ph": "X", "cat": kind, "name": "k", "tid": 7, "ts": at + 5000, "dur": time,
         "args": arguments},
    ]  # fmt: skip


STEPS = [
    note("ProfilerStep#4", 1000, 11000),
    note("data", 1000, 1500),
    note("forward", 2000, 4000),
    note("forward", 50, 900),  # before the steps
    note("backward", 4000, 10000),
    note("forward again", 5000, 7000),
    note("forward", 1000, 11000, thread=2),
    note("ProfilerStep#5", 11000, 21000),
    note("data", 11000, 13500),
    {"ph": "M", "name": "process_name"},
]


def rows_of(events, tmp_path):
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    first, _, *rows = table(tmp_path / "trace.json.gz", tokens=400).splitlines()
    names = [row[:15].strip() for row in rows]
    figures = [[float(x.strip("%")) for x in row[15:].replace(" ms", "").split()] for row in rows]
    return first, dict(zip(names, figures, strict=True))


def test_nested_spans_share_the_time_and_what_is_left_is_other(tmp_path):
    first, rows = rows_of(STEPS, tmp_path)
    assert first == "2 steps of 10.0 ms, 20,000 tokens/s"
    assert rows == {
        "data": [1.5, 15.0],
        "forward": [1.0, 10.0],
        "backward": [2.0, 20.0],
        "forward again": [1.0, 10.0],
        "other": [4.5, 45.0],
        "in all": [10.0, 100.0],
    }


def test_the_device_works_for_the_part_that_launched_it(tmp_path):
    events = [*STEPS, *launch(1, 2500, 600), *launch(2, 5500, 3000), *launch(3, 7500, 1000),
              *launch(4, 11100, 400, "gpu_memcpy"), *launch(5, 500, 9999)]  # fmt: skip
    _, rows = rows_of(events, tmp_path)
    device = {name: row[2:] for name, row in rows.items()}
    assert device == {
        "data": [0.2, 2.0],
        "forward": [0.3, 3.0],
        "backward": [0.5, 5.0],
        "forward again": [1.5, 15.0],
        "other": [0.0, 0.0],
        "in all": [2.5, 25.0],
    }


@pytest.mark.long
def test_a_run_says_where_the_time_went_and_trains_the_same(
    tiny_llama_dir, run_stage, read_metrics, capsys
):
    flags = {"activation_memory_gb": 0.0, "max_tokens_per_micro_batch": 64}
    profiled = run_stage("contrastive", tiny_llama_dir, "profiled", profile_steps=2, **flags)
    said = capsys.readouterr().err
    assert said.count("2 steps of ") == 1
    for part in ("data", "forward", "loss", "backward", "forward again", "optimizer", "logging"):
        assert f"\n{part} " in said
    assert (profiled / "profile" / "trace.json.gz").exists()
    plain = run_stage("contrastive", tiny_llama_dir, "plain", **flags)
    lines = [[line["loss"] for line in read_metrics(output)] for output in (profiled, plain)]
    assert lines[0] == lines[1]
    run_stage("contrastive", tiny_llama_dir, "profiled", overwrite_output_dir=True, max_steps=1)
    assert not (profiled / "profile").exists()


def test_a_run_too_short_to_profile_is_refused(tiny_llama_dir, run_stage, tmp_path):
    with pytest.raises(InputError, match="--profile_steps 3 .* 7 would do"):
        run_stage("contrastive", tiny_llama_dir, "out", profile_steps=3)
    assert not (tmp_path / "out").exists()
