"""Where the time of a step goes: a table for the user, and the trace it is made from.

The parts are the `record_function` spans of step.py, cache.py, ranks.py and log.py. What the host
is at, the innermost span says; what the device works for, the span in which its work was launched:
backward launches from threads of its own, so time decides, not the thread.
"""

import bisect
import gzip
import json
import math
import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, schedule

from rankpo_fast.errors import InputError

WARM_UP = 4  # steps before: compilation, allocation, and the profiler's own start
PARTS = (
    "data", "forward", "loss", "backward", "forward again", "optimizer", "communication", "logging",
)  # fmt: skip
OTHER = "other"
TRACE = "trace.json.gz"
ON_DEVICE, LAUNCHES = {"kernel", "gpu_memcpy", "gpu_memset"}, {"cuda_runtime", "cuda_driver"}


class Profile:
    """A context manager; `step` after each optimizer step. Profiles `steps` of them, then rests.

    Raises:
        InputError: fewer steps are left.
    """

    def __init__(self, directory: Path, steps: int, left: int):
        if steps and left < WARM_UP + steps:
            raise InputError(f"--profile_steps {steps} needs {WARM_UP} steps before, but {left} "
                             f"are left in all: {WARM_UP + steps} would do")  # fmt: skip
        self._directory, self._steps, self._seen = directory, steps, 0
        self._tokens = 0
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> "Profile":
        if self._steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes into the progress bar
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            when = schedule(wait=WARM_UP - 1, warmup=1, active=self._steps, repeat=1)
            self._profiler = torch.profiler.profile(activities=activities, schedule=when)
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self, tokens: int) -> str | None:
        """After a step of so many tokens; the table, once."""
        if self._profiler is None:
            return None
        self._seen += 1
        if self._seen > WARM_UP:
            self._tokens += tokens
        if self._seen < WARM_UP + self._steps:
            self._profiler.step()
            return None
        self._profiler.stop()
        path = self._directory / TRACE
        path.parent.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        return f"{table(path, self._tokens)}\nthe trace is in {path}"


def table(path: Path, tokens: int) -> str:
    """Of a trace whose steps had so many tokens in all."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    notes = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in notes if event["name"].startswith("ProfilerStep")]
    begin, thread = min(event["ts"] for event in steps), steps[0]["tid"]
    parts = [e for e in notes if e["name"] in PARTS and e["tid"] == thread and e["ts"] >= begin]
    course = _course([(e["ts"], e["ts"] + e["dur"], e["name"]) for e in parts], steps)
    host, device = _host_times(*course), _device_times(*course, events)
    total = sum(event["dur"] for event in steps)

    def cells(time: float) -> str:
        return f"{time / len(steps) / 1e3:10.2f} ms{time / total:8.1%}"

    lines = [
        f"{len(steps)} steps of {total / len(steps) / 1e3:,.1f} ms, "
        f"{tokens / total * 1e6:,.0f} tokens/s",
        f"{'':15}{'host':>13}{'of step':>8}" + f"{'device':>13}{'of step':>8}" * bool(device),
    ]
    rows = [(name, host[name], device[name]) for name in (*PARTS, OTHER)]
    rows.append(("in all", total, sum(on_device for *_, on_device in rows)))
    for name, on_host, on_device in rows:
        if on_host or on_device:
            lines.append(f"{name:15}{cells(on_host)}{cells(on_device) if rows[-1][2] else ''}")
    return "\n".join(lines)


def _host_times(starts: list[float], names: list[str | None]) -> dict[str | None, float]:
    """Microseconds of each part."""
    times: dict[str | None, float] = defaultdict(float)
    for (begin, end), name in zip(pairwise(starts), names[:-1], strict=True):
        times[name] += end - begin
    return times


def _device_times(
    starts: list[float], names: list[str | None], events: list[dict]
) -> dict[str | None, float]:
    """Microseconds of the work that each part launched; empty where there is no device."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event["args"]
    }
    times: dict[str | None, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ON_DEVICE and event["args"].get("correlation") in launched:
            launch = launched[event["args"]["correlation"]]
            place = bisect.bisect_right(starts, launch) - 1
            times[names[place] if place >= 0 else None] += event["dur"]
    return times


def _course(
    spans: list[tuple[float, float, str]], steps: list[dict]
) -> tuple[list[float], list[str | None]]:
    """From each of the times on, the innermost of the nested spans (begin, end, name): OTHER if
    there is none, None between steps."""
    starts, names = [], []
    open_spans: list[tuple[float, str | None]] = [(math.inf, None)]

    def close(until: float) -> None:
        while open_spans[-1][0] <= until:
            end, _ = open_spans.pop()
            starts.append(end)
            names.append(open_spans[-1][1])

    spans = [*spans, *((e["ts"], e["ts"] + e["dur"], OTHER) for e in steps)]
    for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        close(begin)
        open_spans.append((end, name))
        starts.append(begin)
        names.append(name)
    close(max(end for _, end, _ in spans))
    return starts, names
