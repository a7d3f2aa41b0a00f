"""What importing the package brings: the losses need torch alone, and nobody needs the bench."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("rankpo_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def packages_of(program: str) -> set[str]:
    """Top-level packages that a new process has after it, without Python's own."""
    program += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name for name in done.stdout.split() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize(
    "program", ["import rankpo_fast", "from rankpo_fast import info_nce_loss, InfoNCELoss"]
)
def test_the_losses_bring_nothing_that_torch_does_not(program):
    new = packages_of(program) - packages_of("import torch")
    assert new == {"rankpo_fast", "rankpo_kernels"}


def test_nothing_in_the_package_imports_the_bench():
    assert len(SOURCES) > 80
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {name.partition(".")[0] for name in names} & {"bench", "rankpo_bench"}
            assert not found, f"{path}:{node.lineno}"


@pytest.mark.parametrize("package", ["rankpo_fast", "kernels/rankpo_kernels"])
def test_type_checkers_of_users_read_our_annotations(package):
    assert (ROOT / package / "py.typed").exists()
