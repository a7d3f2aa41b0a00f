"""What of the house rules a machine can hold: CONTRIBUTING.md has them in words."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "rankpo_kernels": "kernels/rankpo_kernels",
    "rankpo_fast": "rankpo_fast",
    "bench": "bench",
}
LOSSES = ("info_nce", "in_batch", "rankpo")
SOURCES = [path for folder in PACKAGES.values() for path in (ROOT / folder).rglob("*.py")]
NATIVE = [path for path in (ROOT / "kernels/native").iterdir() if path.suffix in (".cpp", ".h")]
TESTS = list((ROOT / "tests").rglob("*.py"))
# A floor imports from those below it, a wing nothing of the other but what they share.
NOT_FROM = {
    "kernels/rankpo_kernels": ("rankpo_fast", "bench"),
    "kernels/rankpo_kernels/chunked": ("rankpo_kernels.triton",),
    "rankpo_fast": ("bench", "rankpo_bench"),
    "rankpo_fast/ops": ("rankpo_fast.losses", "rankpo_fast.train", "rankpo_fast.model"),
    "rankpo_fast/data": ("rankpo_fast.train", "rankpo_fast.model", "rankpo_fast.ops"),
    "rankpo_fast/model": ("rankpo_fast.train", "rankpo_fast.ops", "rankpo_fast.retrieval"),
    "rankpo_fast/train": ("rankpo_fast.cli", "rankpo_fast.commands", "rankpo_fast.integrations"),
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import, also of those inside functions; relative ones of bench."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            module = f"bench.{module}" if node.level else module
            yield from ((module, alias.name) for alias in node.names)


@pytest.mark.parametrize(
    ("paths", "most"), [(SOURCES + NATIVE, 450), (TESTS, 600)], ids=["source", "tests"]
)
def test_a_file_can_be_read_at_a_sitting(paths, most):
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count > most} == {}


def test_no_module_takes_what_another_keeps_to_itself():
    taken = [
        (str(path.relative_to(ROOT)), module, name)
        for path in SOURCES
        for module, name in imports(path)
        if module.split(".")[0] in PACKAGES and name.startswith("_") and not name.startswith("__")
    ]
    assert taken == []


@pytest.mark.parametrize("folder", NOT_FROM)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for module, name in imports(path):
            full = f"{module}.{name}"
            assert not full.startswith(tuple(f"{other}." for other in NOT_FROM[folder])), path


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_one_name_on_every_floor(loss):
    floors = ("rankpo_fast/ops/{}.py", "kernels/rankpo_kernels/chunked/{}.py",
              "kernels/rankpo_kernels/triton/{}.py", "kernels/native/{}.cpp")  # fmt: skip
    assert all((ROOT / floor.format(loss)).is_file() for floor in floors)
