"""What is said of a machine is what a reader needs to judge figures by."""

from types import SimpleNamespace

import pytest
import torch

from bench import machine
from rankpo_fast.model.precision import half_speed
from rankpo_kernels.chunked import native


def test_a_cpu_is_named_with_cores_instructions_and_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    flags = "flags\t: fpu avx512_bf16 amx_bf16"
    machine.CPUINFO.write_text(f"processor\t: 0\nmodel name\t: A Fast One\n{flags}\n")
    monkeypatch.setattr(machine, "TOPOLOGY", tmp_path)
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        place = tmp_path / f"cpu{number}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 3}, raising=False)
    said = machine.about("cpu")
    assert said["device"].startswith("A Fast One, ") and " MiB of cache, rows by " in said["device"]
    assert said["cores"] == "2 (4 hardware threads, 3 of them ours)"
    of_torch = torch.backends.cpu.get_cpu_capability()
    of_rows = native.library().rankpo_instruction_set().decode()
    assert said["instruction set"] == (
        f"{of_torch} in torch, {of_rows} in rows, avx512_bf16, amx_bf16"
    )
    assert said["torch"] == torch.__version__ and "numpy" in said and "driver" not in said


def test_a_gpu_is_named_with_its_limits(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(machine, "limits", lambda device: {"driver": "580.65"})
    said = machine.about("cuda")
    assert (said["device"], said["memory"], said["driver"]) == ("NVIDIA H100", "80 GiB", "580.65")
    assert said["compute capability"] == "9.0" and said["host"]


def test_a_gpu_without_a_c_compiler_says_which_kernels_run(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    monkeypatch.setattr(machine, "limits", lambda device: {})
    monkeypatch.delenv("CC", raising=False)
    for there, said in ({"clang": "/opt/clang"}, "/opt/clang"), ({}, "none: only kernels whose "):
        monkeypatch.setattr(machine.shutil, "which", there.get)
        assert machine.about("cuda")["C compiler"].startswith(said)


def test_only_what_is_installed_has_a_version(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    said = machine.about("cpu")
    assert "numpy" in said and "no-such-package" not in said


def test_a_commit_is_named_from_outside_or_from_the_tree(monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc-dirty")
    assert machine.about("cpu")["commit"] == "0123abc-dirty"


@pytest.mark.parametrize(
    ("seconds", "runs"), [(0.01, machine.RUNS), (10.0, 1)], ids=["quick", "bf16-without-hardware"]
)
def test_a_rate_is_a_median_that_takes_no_more_time_than_there_is(monkeypatch, seconds, runs):
    taken = []
    monkeypatch.setattr(
        machine, "seconds_of", lambda run, device: taken.append(1) or seconds * len(taken)
    )
    assert machine._median(lambda: None, "cpu") == seconds * (runs + 1) / 2
    assert len(taken) == runs


def test_what_is_emulated_is_not_measured_in_large_products(monkeypatch):
    speeds = {torch.bfloat16: 55.0, torch.float16: 1.1}
    monkeypatch.setattr(machine, "half_speed", lambda dtype, device: speeds[dtype])
    monkeypatch.setattr(machine, "GEMM_SIZE", {"cpu": 16})
    assert machine.emulated("cpu") == {"bfloat16": 55.0} and machine.emulated("cuda") == {}
    assert machine.measure_rates("cpu").gemm.keys() == {"float32"}


def test_a_half_product_is_timed_once_a_process():
    first = half_speed(torch.bfloat16, "cpu")
    assert first > 0 and half_speed(torch.bfloat16, "cpu") == first
