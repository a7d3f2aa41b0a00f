"""Builds the native CPU library with CMake and maps the packages onto the tree.

`kernels/` is a source root like `src/`: PyPI has a package called `kernels`, which transformers
imports, so nothing here may be importable under that name. `bench/` is a distribution of its own.
The rest of the metadata is in pyproject.toml.

The library is opened by ctypes and picks its instruction set at run time: one wheel a platform,
whatever the Python. Without it the losses take torch's path, and the wheel runs anywhere:
RANKPO_NATIVE=0 in the environment builds such a one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CMAKE = (3, 20)
WANTED = os.environ.get("RANKPO_NATIVE", "1") != "0"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def cmake_to_install() -> list[str]:
    """What pip has to bring to build: nothing where the machine's own cmake will do."""
    try:
        said = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    version = re.search(r"(\d+)\.(\d+)", said)
    there = version is not None and (int(version[1]), int(version[2])) >= CMAKE
    return [] if there else [f"cmake>={CMAKE[0]}.{CMAKE[1]}"]


class CMakeBuild(build_ext):
    """Compile the library into the place where setuptools expects an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of the Python that builds it: no Python imports it."""
        return os.path.join(*fullname.split(".")) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        output = [f"-DRANKPO_OUTPUT_DIR={target.parent}", f"-DRANKPO_OUTPUT_NAME={target.name}"]
        compile = ["cmake", "--build", build, "--config", "Release"]
        try:
            subprocess.run([*configure, *output], check=True)
            subprocess.run([*compile, "--parallel", str(os.cpu_count() or 1)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # optional=True below turns this into a warning: the torch fallback needs no compiler.
            print(f"rankpo-fast: the native CPU library was not built: {error}", file=sys.stderr)
            raise CompileError(str(error)) from error


class Wheel(bdist_wheel):
    """Tagged for any Python 3, of the platform that the library was built for, if it was."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob(f"librankpo_native*{SUFFIX}"))
        return "py3", "none", super().get_tag()[2] if built else "any"


native = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels/native").glob("*"))

setup(
    packages=[
        *find_packages("kernels"),
        *find_packages(include=["rankpo_fast", "rankpo_fast.*"]),
    ],
    package_dir={"rankpo_kernels": "kernels/rankpo_kernels", "rankpo_fast": "rankpo_fast"},
    include_package_data=False,  # pictures stay in the repository
    package_data={
        "rankpo_kernels": ["py.typed"],
        "rankpo_fast": [
            "py.typed",
            "judge/page.html",
            "judge/prompts/*.txt",
            "sweep/paper.csv",
        ],
    },
    setup_requires=cmake_to_install() if WANTED else [],  # read by pip's build isolation
    ext_modules=[
        Extension(
            "rankpo_kernels.librankpo_native",
            sources=[path for path in native if path.endswith(".cpp")],
            depends=["CMakeLists.txt", *native],
            optional=True,
        )
    ]
    if WANTED
    else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
