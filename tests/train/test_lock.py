"""One run at a time in a directory, and a dead one stands in nobody's way."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.train import lock
from rankpo_fast.train.lock import LOCK, held


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def without_locks(monkeypatch):
    """As on a file system that has none; and shorter times."""
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    quick(monkeypatch)


def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 1.0, "SETTLING": 0.3}.items():
        monkeypatch.setattr(lock, name, seconds)


def hold(directory, pipe, fork):
    """In a process of its own, until it is killed; with `fork` a child of it lives on."""
    with held(directory, "--output_dir"):
        child = os.fork() if fork else None
        if child != 0:
            pipe.send(child)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds `tmp_path / "out"`; gives it and the child it forked."""
    context, started = multiprocessing.get_context("fork"), []

    def start(fork=False):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(tmp_path / "out", theirs, fork), daemon=True)
        process.start()
        started.append(process.pid)
        started.extend(filter(None, [ours.recv()]))
        return process

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def take(tmp_path):
    with held(tmp_path / "out", "--output_dir"):
        return json.loads((tmp_path / "out" / LOCK).read_text())["pid"]


def test_the_second_is_refused_and_told_who_holds_it(holder, tmp_path):
    process = holder()
    who = f"--output_dir .*out is in use by process {process.pid} on {socket.gethostname()}"
    with pytest.raises(InputError, match=who):
        take(tmp_path)


def test_a_killed_process_keeps_nothing_not_even_by_a_fork(holder, tmp_path):
    process = holder(fork=True)
    process.kill()
    process.join()
    began = time.monotonic()
    assert take(tmp_path) == os.getpid()
    assert time.monotonic() - began < 5


def test_where_there_are_no_locks_a_sign_of_life_tells(holder, tmp_path, without_locks):
    process = holder()
    with (
        pytest.warns(UserWarning, match=f"in use by process {process.pid} .* sign of life"),
        pytest.raises(InputError, match=f"process {process.pid}"),
    ):
        take(tmp_path)
    process.kill()
    process.join()
    with pytest.warns(UserWarning, match="sign of life"):
        assert take(tmp_path) == os.getpid()


def of_another_host(directory):
    """The lock file of a process that this kernel does not know."""
    (directory / LOCK).write_text('{"host": "elsewhere", "pid": 7}')
    return lock._File(directory / LOCK)


def test_a_lock_that_only_another_host_sees_is_told_by_signs_of_life(tmp_path, monkeypatch):
    """As where a network file system is mounted with locks of each host alone."""
    quick(monkeypatch)
    file, done = of_another_host(tmp_path), threading.Event()
    thread = threading.Thread(target=lock._renew, args=(file, done))
    thread.start()
    try:
        with pytest.warns(UserWarning), pytest.raises(InputError, match="7 on elsewhere"):
            held(tmp_path, "--output_dir").__enter__()
    finally:
        done.set()
        thread.join()
        file.close()


def test_an_old_lock_of_another_host_is_taken_at_once(tmp_path):
    of_another_host(tmp_path).close()
    os.utime(tmp_path / LOCK, (0, time.time() - 2 * lock.PATIENCE))
    with held(tmp_path, "--output_dir"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_of_two_at_once_without_locks_one_wins(tmp_path, without_locks, monkeypatch):
    """Both have found the directory free before either has written the file."""
    barrier, met, over = threading.Barrier(2), threading.Event(), threading.Event()
    is_at = lock._is_at

    def is_at_together(*args):
        if not met.is_set():
            late = barrier.wait(5) == 0
            met.set()
            time.sleep(0.05 * late)
        return is_at(*args)

    def run(_):
        try:
            with held(tmp_path / "out", "--output_dir"):
                return over.wait(5)
        except InputError:
            over.set()
            return None

    monkeypatch.setattr(lock, "_is_at", is_at_together)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(run, range(2)), key=str) == [None, True]


def test_a_disk_that_refuses_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", full)
    with (
        pytest.raises(InputError, match="--output_dir .*out: No space left on device"),
        lock.held(tmp_path / "out", "--output_dir"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_but_what_others_wrote(tmp_path):
    with held(tmp_path / "new" / "out", "--output_dir"):
        assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == [LOCK]
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), held(tmp_path / "new" / "out", "--output_dir"):
        (tmp_path / "new" / "out" / "metrics.jsonl").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["metrics.jsonl"]
