"""Files are whole or not there, whoever is killed; what was begun goes, and nobody else's does."""

import os
import subprocess
import sys

import pytest
import torch

from rankpo_fast.data.files import is_temporary, save_tensors, temporary_name, whole_file

KILLED_WHILE_WRITING = """
import os, signal, sys
from rankpo_fast.data.files import whole_file
with whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)])
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    with whole_file(tmp_path / "another.jsonl") as temporary:
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.jsonl", "rows.jsonl"]


def test_nothing_of_the_living_and_of_others_is_swept(tmp_path):
    own = temporary_name(tmp_path / "rows.jsonl")
    dead = subprocess.Popen(["true"])
    dead.wait()
    of_another_host = own.name.replace(f"-{os.getpid():x}-", f"-{dead.pid:x}-")
    host = of_another_host.split("rankpo-")[1][:4]
    of_another_host = of_another_host.replace(host, f"{int(host, 16) ^ 1:04x}")
    names = [own.name, of_another_host, ".rows.jsonl.tmp", ".rows.jsonl.0123abcd.tmp"]
    for name in names:
        (tmp_path / name).touch()
    with whole_file(tmp_path / "rows.jsonl"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names, "rows.jsonl"}


def test_after_an_error_the_file_is_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"] and path.read_text() == "before"


def test_tensors_are_readable_by_whom_the_umask_lets(tmp_path):
    """safetensors alone lets nobody but their owner."""
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "kept.safetensors") as temporary:
            save_tensors({"x": torch.ones(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "kept.safetensors").stat().st_mode & 0o777 == 0o640


def test_tensors_are_begun_in_a_place_that_goes_with_a_dead_process(tmp_path, monkeypatch):
    """safetensors gives a file that it begins a name of its own, which tells nobody's."""
    places = []
    monkeypatch.setattr("safetensors.torch.save_file", lambda _, path, *__: places.append(path))
    with pytest.raises(FileNotFoundError):  # since nothing was written
        save_tensors({"x": torch.ones(1)}, tmp_path / "kept.safetensors")
    assert is_temporary(places[0].parent.name) and not list(tmp_path.iterdir())
