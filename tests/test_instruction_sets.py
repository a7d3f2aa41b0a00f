"""No instruction set is left out in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.instruction_sets import CHOSEN, below


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param(("avx512", "AVX512"), ["avx2", "baseline"], id="server"),
        pytest.param(("avx2", "AVX2"), ["baseline"], id="desktop"),
        pytest.param(("avx512", "AVX2"), ["avx2", "baseline"], id="torch-alone-has-less"),
        pytest.param(("baseline", "DEFAULT"), [], id="oldest"),
        pytest.param(("baseline", "SVE256"), ["baseline"], id="arm"),
    ],
)
def test_all_sets_besides_the_machines_own_are_run(own, expected):
    assert [one.rows for one in below(dict(zip(("rows", "torch"), own, strict=True)))] == expected


def test_tests_do_not_run_in_another_set_than_was_asked_for():
    tests = Path(__file__).parent
    environment = {
        **os.environ, CHOSEN: "avx2", "RANKPO_INSTRUCTION_SET": "baseline",
        "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]),
    }  # fmt: skip
    plugin = ["-p", "support.instruction_sets"]
    command = [sys.executable, "-m", "pytest", *plugin, "--co", "test_paths.py"]
    done = subprocess.run(command, env=environment, cwd=tests, capture_output=True, text=True)
    assert done.returncode == 1 and "the tests would run in {'rows': 'baseline'" in done.stderr
