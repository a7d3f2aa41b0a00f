"""What a call costs the host is told by part, of the launcher that runs."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.long
def test_parts_make_up_a_call():
    """In a process of its own: there kernels are not interpreted."""
    apart = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--calls", "3"]
    said = subprocess.run(command, env=apart, capture_output=True, text=True, check=True).stdout
    _, *lines = said.splitlines()
    launches = []
    for line in lines:
        whole, in_launches, count, memory, rest = map(int, re.findall(r"\d+", line))
        assert abs(whole - (in_launches + memory + rest)) <= 2  # as they are rounded
        assert in_launches > 0 and memory > 0
        launches.append(count)
    assert launches == [5, 6, 5, 3]
