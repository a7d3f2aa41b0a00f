"""Do the tests notice? Breaks a copy of the code in known ways and runs the tests that should see.

    PYTHONPATH=tests python -m mutants [name ...]

Prints what caught each mutant; exits with 1 if one survived. Not part of `make test`: each takes as
long as its tests take to fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS
from mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]


def copied(to: Path) -> Path:
    """The tree as it stands, the native library included, without what is not source."""
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info",
        "build", "dist", "outputs",
    )  # fmt: skip
    return Path(shutil.copytree(ROOT, to / "tree", ignore=skipped))


def mutated(tree: Path, mutant: Mutant) -> str:
    """The text of its file with the replacement."""
    text = (tree / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {count} times in {mutant.file}: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    """Python in the copy, which PYTHONPATH puts before the editable install of this tree."""
    paths = os.pathsep.join([str(tree / "kernels"), str(tree)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def first_failure(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The test that failed first, None if all passed."""
    options = ["-x", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    try:
        result = run(tree, "-m", "pytest", *options, *tests)
    except subprocess.TimeoutExpired as expired:
        return f"no end within {expired.timeout} s"
    if result.returncode == 0:
        return None
    # a test, and not a file that cannot be imported: that would prove nothing
    if found := re.search(r"^(?:FAILED|ERROR) (.*?::.*?)(?: - |$)", result.stdout, re.MULTILINE):
        return found[1]
    raise RuntimeError(f"pytest {' '.join(tests)}:\n{result.stdout}{result.stderr}")


def caught_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        (tree / mutant.file).write_text(mutated(tree, mutant))
        if mutant.file.startswith("kernels/native/"):
            run(tree, "setup.py", "--quiet", "build_ext", "--inplace").check_returncode()
        return first_failure(tree, mutant.tests)


def check_whole(suites: set[tuple[str, ...]]) -> None:
    """A mutant that a red test catches, or one that is not imported, would prove nothing."""
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        code = "import bench as a, rankpo_fast as b, rankpo_kernels as c\n"
        code += "print(a.__file__, b.__file__, c.__file__)"
        for file in run(tree, "-c", code).stdout.split():
            if not Path(file).resolve().is_relative_to(tree.resolve()):
                raise SystemExit(f"{file} is imported, and not its copy in {tree}")
        for tests in suites:
            if (failure := first_failure(tree, tests)) is not None:
                raise SystemExit(f"fails without a mutant: {failure}")


def main() -> int:
    parser = argparse.ArgumentParser("python -m mutants", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="default: all")
    names = parser.parse_args().names
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]

    for mutant in chosen:
        mutated(ROOT, mutant)  # a row that has aged is told of before the long wait
    width = max(len(mutant.name) for mutant in chosen)
    survived = 0
    check_whole({mutant.tests for mutant in chosen})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, caught in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += caught is None
            print(f"{mutant.name:{width}}  {caught or 'SURVIVED'}", flush=True)
    return 1 if survived else 0
