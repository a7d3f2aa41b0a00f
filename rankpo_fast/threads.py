"""How many threads compute on the CPU: no more than the process may use, and said where fewer do.

torch counts the machine's cores, also in a container that may use two of them; torchrun gives each
of several processes one thread, whatever there is. A thread in the background computes alone.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch


def fit_threads(root: Path = Path("/")) -> None:
    """Lower torch's number of threads to what the process may use."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus(root)))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes on so many; None: on as many as outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def background_thread() -> ThreadPoolExecutor:
    """One thread, on which torch computes without helpers, as on those of torch's DataLoader.

    Helpers would be a second pool of OpenMP, which keeps one for each thread that computes. GNU's
    lets waiting helpers spin only while it has no more threads than there are CPUs, and with two
    pools it has: then those of the foreground sleep and are woken again in every operation. On two
    CPUs a step of the tiny model on 64 queries took 103 ms so, and 65 ms with one pool.
    """
    usual = torch.get_num_threads()
    thread = ThreadPoolExecutor(1)
    thread.submit(_compute_alone).result()
    torch.set_num_threads(usual)  # also of threads that are started later
    return thread


def _compute_alone() -> None:
    torch.get_num_threads()  # from its first use on the number is the thread's own
    torch.set_num_threads(1)


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that the process may run on, and its control groups (a container's) pay for; >= 1."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cpus = len(os.sched_getaffinity(0))
    return max(1, min([cpus, *map(math.ceil, _quotas(root))]))


def describe_threads() -> str:
    """For the user; with what would make the processes of torchrun use all CPUs, where they do
    not."""
    threads, cpus = torch.get_num_threads(), usable_cpus()
    text = f"{threads} thread{'s' if threads > 1 else ''}"
    each = cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this host, which share it
    if each > threads and "OMP_NUM_THREADS" in os.environ:
        text += f" of {cpus} CPUs, as OMP_NUM_THREADS says; {each} may be faster"
    return text


def _quotas(root: Path) -> list[float]:
    """CPUs of each group with a limit that the process is in, directly or not; versions 1, 2."""
    quotas = []
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup"
        if "cpu" in controllers.split(","):
            top /= "cpu"
        elif controllers:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's, and only the top is there.
        for level in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
            quota, period = _quota(level)
            if quota > 0:
                quotas.append(quota / period)
    return quotas


def _quota(group: Path) -> tuple[int, int]:
    """Microseconds of CPU in each period; 0 or less: no limit."""
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
        return (0 if quota == "max" else int(quota)), int(period)
    names = [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
    if not all(name.exists() for name in names):
        return 0, 1
    limit, span = (int(name.read_text()) for name in names)
    return limit, span
