"""Triton's cache as it travels: what is kept of a kernel, and whether all of them are there.

Triton finds a kernel by its source and line, the types and divisibility of its arguments, its
options, the version of ptxas and Triton's own files: the same wheel of the same Python makes the
same keys, whatever the paths. Of a kernel it then reads the binary and its description. Where
these lie is written beside them, and has to be written anew where they arrive.
"""

import contextlib
import hashlib
import json
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import triton_key

from ..cases import tiles
from ..launch import __file__ as LAUNCH

CACHE = Path("build/gpu-carry/triton")
STAMP = "sources.txt"  # of what the cache was made of
KEPT = (".cubin", ".json", ".so")
GROUP = "__grp__"  # begins the name of the file that lists a kernel's files
SOURCES = Path(__file__).parents[2] / "kernels" / "rankpo_kernels" / "triton"


def settle(directory: Path) -> None:
    """Keep of each kernel what is run, and name its files where they lie now."""
    for group in directory.glob(f"*/{GROUP}*"):
        folder = group.parent
        for path in folder.iterdir():
            if path != group and path.suffix not in KEPT and path.is_file():
                path.unlink()
        paths = {path.name: str(path.resolve()) for path in folder.iterdir() if path != group}
        content = json.dumps({"child_paths": paths})
        if group.read_text() != content:
            group.write_text(content)


def fingerprint(arch: int) -> str:
    """Of what decides which kernels there are and by which keys they are found: the kernels and
    their launchers, these steps, Triton and its ptxas."""
    digest = hashlib.sha256(triton_key().encode())
    digest.update(make_backend(GPUTarget("cuda", arch, 32)).hash().encode())
    files = [*SOURCES.glob("*.py"), *Path(__file__).parent.glob("*.py")]
    for path in sorted([*files, Path(tiles.__file__), Path(LAUNCH)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_complete(directory: Path, arch: int) -> bool:
    """Whether it holds every kernel that this source makes, as this Triton looks for it."""
    with contextlib.suppress(OSError):
        return (directory / STAMP).read_text() == fingerprint(arch)
    return False


def mebibytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**20
