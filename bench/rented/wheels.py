"""Wheels of small peers, and of what tests take, for a machine without internet: they travel beside
the checkout.

    python -m bench.rented.wheels [DIRECTORY]

Small, most of them pure Python; the machine has what they need. quack-kernels stays here:
without CUTLASS' hundred megabytes it is nothing.
"""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

WHEELS = Path("build/gpu-carry/wheels")
PEERS = ["liger-kernel>=0.8.2,<1", "cut-cross-entropy>=25.1", "inf-cl>=1.2,<2"]
# Of the training ladder and the memory step; 3 MB, 1 MB, and what peft imports. bitsandbytes' 60 MB
# are more than may travel.
LEVERS = ["torchao>=0.16,<1", "peft>=0.19,<1", "accelerate>=1,<2", "psutil>=5"]
TESTS = ["hypothesis>=6,<7", "sortedcontainers", "pytest-xdist>=3,<4", "execnet"]  # and its needs
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fetch(directory: Path) -> None:
    """For Python 3.12 on Linux x86-64, from the index that pip is set to."""
    shutil.rmtree(directory, ignore_errors=True)  # two versions of one would stop its install
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.12", "--implementation", "cp", "--dest", str(directory),
        *(word for platform in PLATFORMS for word in ("--platform", platform)),
        *PEERS, *LEVERS, *TESTS,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    print("\n".join(sorted(path.name for path in directory.glob("*.whl"))))


def install(directory: Path, target: Path) -> str:
    """Into a folder of their own, without a network; in words how it went."""
    wheels = sorted(map(str, directory.glob("*.whl")))
    shutil.rmtree(target, ignore_errors=True)
    if not wheels:
        return "no wheels were carried: peers that are missing will say so"
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
        "--no-compile", "--no-cache-dir", "--target", str(target), *wheels,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        return f"wheels not installed: {' '.join(done.stderr.split())[-200:]}"
    return f"{len(wheels)} wheels installed"


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else WHEELS)
