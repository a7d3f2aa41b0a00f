"""How many threads a process may compute with, as the system tells it."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rankpo_fast import threads

V1, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, cpus",
    [
        pytest.param({}, 8, id="no groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "max 100000\n",
             f"{V2}/a/cpu.max": "250000 100000\n"}, 3, id="version 2, the limit is the parent's",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n0::/\n",
             f"{V1}/cpu.cfs_quota_us": "200000\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            2, id="version 1, inside the container",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:cpu:/x\n", f"{V1}/x/cpu.cfs_quota_us": "-1\n",
             f"{V1}/x/cpu.cfs_period_us": "100000\n"}, 8, id="version 1 without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "1000 100000\n"}, 1, id="a little",
        ),
    ],
)  # fmt: skip
def test_a_process_has_the_cpus_that_it_may_use(files, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.usable_cpus(tmp_path) == cpus


def test_threads_are_lowered_to_that_and_never_raised(monkeypatch):
    before = torch.get_num_threads()
    for usable, left in ((before + 4, before), (1, 1)):
        monkeypatch.setattr(threads, "usable_cpus", lambda root, usable=usable: usable)
        threads.fit_threads()
        assert torch.get_num_threads() == left
    torch.set_num_threads(before)


def test_the_one_thread_of_torchrun_is_said_with_what_would_be_faster(monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = threads.describe_threads()
    assert said == "1 thread of 16 CPUs, as OMP_NUM_THREADS says; 8 may be faster"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.describe_threads() == "1 thread"


def test_a_thread_in_the_background_computes_alone_and_changes_no_other():
    """Helpers of its own would make those of the foreground sleep between any two operations."""
    with threads.threads(2):
        with threads.background_thread() as background:
            assert background.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
