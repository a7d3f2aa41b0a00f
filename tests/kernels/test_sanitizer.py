"""The native library under AddressSanitizer and UBSan: `sanitized.cpp` calls it at random."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETS = ["baseline", "avx2", "avx512"]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -O2"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The program, built by the library's own CMakeLists."""
    build = tmp_path_factory.mktemp("sanitized")
    probe = build / "probe.cpp"
    probe.write_text("int main() {}")
    compiler = os.environ.get("CXX", "c++")
    try:
        command = [compiler, *FLAGS.split(), str(probe), "-o", str(build / "probe")]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([build / "probe"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{compiler} has no sanitizers here: {error}")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DRANKPO_OUTPUT_DIR={build}"]
    configure += ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}", "-DRANKPO_SANITIZED=ON"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "sanitized"


@pytest.mark.long
@pytest.mark.parametrize("name", SETS)
def test_no_access_strays_and_nothing_is_undefined(name, sanitized):
    environment = {**os.environ, "RANKPO_INSTRUCTION_SET": name, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sanitized, "0"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if not done.stdout.endswith(f"calls, {name}\n"):
        pytest.skip(f"this machine has no {name}: {done.stdout}")
