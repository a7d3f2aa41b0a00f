"""What an installation brings, and what the habitual files say of it. The wheel: `make wheel`."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml

from rankpo_fast import __version__
from rankpo_fast.errors import InputError
from rankpo_fast.extras import EXTRAS, require_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BENCH = tomllib.loads((ROOT / "bench/pyproject.toml").read_text())
OPTIONAL = PROJECT["optional-dependencies"]
BASE = {"torch", "triton", "numpy"}
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
PACKAGES = {"rankpo_fast": ROOT / "rankpo_fast", "rankpo_kernels": ROOT / "kernels/rankpo_kernels"}
# What an area may import at module level beside the base; functions import what they need.
AREAS = {
    "rankpo_fast/integrations/sentence_transformers": {"sentence_transformers"},
    "rankpo_fast/integrations": {*EXTRAS["train"].values(), "accelerate"},
    "rankpo_fast/ops": set(),
    "rankpo_fast/losses.py": set(),
    "rankpo_fast/cli.py": set(),
    "rankpo_fast/config": set(),
    "rankpo_fast": set(EXTRAS["train"].values()),
    "kernels": set(),
}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def at_import(path: Path) -> set[str]:
    """Modules that are imported when `path` is: not in functions, not for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return found


def strangers(modules: set[str]) -> set[str]:
    """Top-level packages among them that are neither Python's nor ours."""
    tops = {module.partition(".")[0] for module in modules}
    return tops - sys.stdlib_module_names - set(PACKAGES)


def file_of(module: str) -> Path | None:
    """The source of a module of ours; None for others, and for names that are no module."""
    package, *rest = module.split(".")
    if package not in PACKAGES:
        return None
    place = PACKAGES[package].joinpath(*rest)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.exists():
            return path
    return None


def test_an_installation_brings_torch_triton_and_numpy_alone():
    assert names(PROJECT["dependencies"]) == BASE


def test_extras_are_those_that_documents_and_messages_name():
    assert set(OPTIONAL) == {
        *("train", "plots", "data", "label", "spark", "judge", "lora", "lowbit", "liger", "flash"),
        *("hf", "st"),
        *("tensorboard", "wandb", "trackio", "mlflow"),
        *("all", "bench", "docs", "test"),
    }  # fmt: skip
    for path in sorted((ROOT / "rankpo_fast").rglob("*.py")):
        for words in re.findall(r"rankpo-fast\[([\w,]+)\]", path.read_text()):
            assert set(words.split(",")) <= set(OPTIONAL), path


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_asked_for_is_what_the_extra_installs(extra):
    assert names(OPTIONAL[extra]) == set(EXTRAS[extra])


def test_all_leaves_out_what_needs_a_compiler_or_java_and_what_developers_need():
    (everything,) = OPTIONAL["all"]
    named = set(re.search(r"\[(.*)\]", everything)[1].split(","))
    assert named == set(OPTIONAL) - {"all", "flash", "spark", "bench", "docs", "test"}


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch):
    require_extra("demo", "train", "plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError) as error:
        require_extra("demo", "train", "plots")
    assert str(error.value) == "demo needs matplotlib: pip install 'rankpo-fast[plots]'"
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(InputError) as error:
        require_extra("demo", "train", "plots")
    install = "pip install 'rankpo-fast[train,plots]'"
    assert str(error.value) == f"demo needs tqdm, pyyaml and matplotlib: {install}"


@pytest.mark.parametrize("area", AREAS)
def test_modules_import_the_base_and_what_their_area_has(area):
    """The innermost area that a file lies in counts."""
    place = ROOT / area
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        inside = [name for name in AREAS if path.is_relative_to(ROOT / name)]
        if max(inside, key=len) == area:
            assert strangers(at_import(path)) <= BASE | AREAS[area], path


def test_all_that_the_losses_import_is_ours_or_of_the_base():
    seen: set[Path] = set()
    waiting = [PACKAGES["rankpo_fast"] / name for name in ("losses.py", "extras.py")]
    waiting += (PACKAGES["rankpo_fast"] / "ops").glob("*.py")
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        modules = at_import(path)
        assert strangers(modules) <= BASE, path
        waiting += [file for module in modules if (file := file_of(module)) is not None]
    assert len(seen) > 20


def _built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that setup.py names; nothing is built."""
    program = (
        "import setuptools, runpy, sys; taken = {};"
        "setuptools.setup = lambda **words: taken.update(words); sys.argv = ['setup.py'];"
        "runpy.run_path('setup.py'); print(*taken['packages'])"
    )
    monkeypatch.setenv("RANKPO_NATIVE", "0")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout.split()


def test_the_wheel_has_both_packages_and_no_bench(monkeypatch):
    packages = _built(ROOT, monkeypatch)
    assert {package.partition(".")[0] for package in packages} == set(PACKAGES)
    there = {str(path.parent) for path in (ROOT / "rankpo_fast").rglob("__init__.py")}
    assert len([name for name in packages if name.startswith("rankpo_fast")]) == len(there)


def test_the_bench_is_a_distribution_of_its_own_with_all_its_packages():
    named = BENCH["tool"]["setuptools"]["packages"]
    folders = [path.parent for path in (ROOT / "bench").rglob("__init__.py")]
    folders = [folder.relative_to(ROOT / "bench") for folder in folders]
    folders = [folder for folder in folders if "build" not in folder.parts]
    assert set(named) == {".".join(["rankpo_bench", *folder.parts]) for folder in folders}
    assert BENCH["project"]["entry-points"]["rankpo_fast.commands"]["bench"].startswith(named[0])


def test_nothing_is_importable_as_kernels_but_a_bare_folder():
    """A package of that name, which transformers imports, has to go before our folder."""
    assert not (ROOT / "kernels/__init__.py").exists()
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is not None and spec.origin is None


def test_one_version_is_named_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == __version__ == citation["version"] == BENCH["project"]["version"]
    assert f"rankpo-fast[train,plots,label]=={__version__}" in BENCH["project"]["dependencies"]
    assert OPTIONAL["bench"] == [f"rankpo-bench=={__version__}"]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_targets_are_phony_and_documented():
    text = (ROOT / "Makefile").read_text()
    documented = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert _targets() == documented == phony


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_ask_for_little_and_name_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if "uses" in step:
                assert re.search(r"@v\d+(\.\d+)*$", step["uses"]), step
            for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                assert target in _targets()
            for file in re.findall(r"\.ci/[\w.]+", step.get("run", "")):
                assert (ROOT / file).exists()


def test_ci_names_targets_that_exist():
    calls = re.findall(r"^make ([a-z -]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(WORKFLOWS) == 3 and {name for call in calls for name in call.split()} <= _targets()
    assert "docs" in " ".join(calls)


def test_pre_commit_formats_with_the_ruff_that_tests_ask_for():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (ruff,) = [repo for repo in config["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    (asked,) = [requirement for requirement in OPTIONAL["test"] if requirement.startswith("ruff")]
    assert asked.startswith(f"ruff>={ruff['rev'].removeprefix('v')},")
