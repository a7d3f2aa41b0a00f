"""What a step frees the next one gets, without asking the system."""

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")

# In a process of its own: its heap is that of one thread, and nobody else's memory lies in it.
SCRIPT = """
import resource
from pathlib import Path

import torch

from rankpo_fast.train.allocator import freed_memory_kept

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def kept():  # MiB that the process still has of a tensor of 64 MiB that is gone
    before = resident()
    torch.ones(1 << 24)
    return (resident() - before) >> 20

print(kept())
with freed_memory_kept(torch.device("cpu")):
    print(kept())
print(kept())
with freed_memory_kept(torch.device("cuda", 0)):
    print(kept())
"""


@glibc
def test_freed_memory_is_kept_while_a_cpu_trains_and_given_back_after_it():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, training, after, gpu = map(int, done.stdout.split())
    assert training > 60 and max(before, after, gpu) < 8
