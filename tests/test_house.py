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
# Each takes from those before it alone.
LAYERS = (
    "rankpo_kernels.relations",
    "rankpo_kernels.problem",
    "rankpo_kernels.objective",
    "rankpo_kernels.chunked",
    "rankpo_kernels.triton",
    "rankpo_fast.ops",
    "rankpo_fast.losses",
    "rankpo_fast.ranks",
    "rankpo_fast.data",
    "rankpo_fast.node",
    "rankpo_fast.label",
    "rankpo_fast.model",
    "rankpo_fast.plan",
    "rankpo_fast.retrieval",
    "rankpo_fast.judge",
    "rankpo_fast.train",
    "rankpo_fast.trainers",
    "rankpo_fast.rounds",
    "rankpo_fast.sweep",
    "rankpo_fast.integrations",
    "rankpo_fast.commands",
    "rankpo_fast.demo",
    "rankpo_fast.cli",
    "bench",
)
SIDE_BY_SIDE = {"rankpo_kernels.chunked", "rankpo_kernels.triton"}  # and nothing of each other


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


def attributes(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what is taken of imported modules by a dot."""
    modules = {
        name: module for module, name in imports(path) if (ROOT / _file(module, name)).exists()
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules:
            yield f"{modules[node.value.id]}.{node.value.id}", node.attr


def _file(module: str, name: str) -> str:
    package, *rest = module.split(".")
    return "/".join([PACKAGES.get(package, package), *rest, f"{name}.py"])


def test_no_module_takes_what_another_keeps_to_itself():
    taken = [
        (str(path.relative_to(ROOT)), module, name)
        for path in SOURCES
        for module, name in [*imports(path), *attributes(path)]
        if module.split(".")[0] in PACKAGES and name.startswith("_") and not name.startswith("__")
    ]
    assert taken == []


def layer(module: str) -> str | None:
    """The one that a module belongs to; None for what all may take, as errors and paths."""
    return next((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), None)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "kernels" else parts)


def test_imports_point_one_way():
    wrong = []
    for path in SOURCES:
        own = layer(module_of(path))
        for module, name in imports(path):
            other = layer(f"{module}.{name}")
            if own is None or other is None or own == other:
                continue
            if LAYERS.index(other) > LAYERS.index(own) or {own, other} == SIDE_BY_SIDE:
                wrong.append((str(path.relative_to(ROOT)), f"{module}.{name}"))
    assert wrong == []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_one_name_on_every_floor(loss):
    floors = ("rankpo_fast/ops/{}.py", "kernels/rankpo_kernels/chunked/{}.py",
              "kernels/rankpo_kernels/triton/{}.py", "kernels/native/{}.cpp")  # fmt: skip
    assert all((ROOT / floor.format(loss)).is_file() for floor in floors)
