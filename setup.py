"""Builds the native CPU library with CMake and maps the packages onto the tree.

`kernels/` is a source root like `src/`: PyPI has a package called `kernels`, which transformers
imports, so nothing here may be importable under that name. `bench/` is installed as rankpo_bench,
since `bench` is anybody's name; its own imports are relative. The rest of the metadata is in
pyproject.toml.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Compile the library into the place where setuptools expects an extension module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        output = [f"-DRANKPO_OUTPUT_DIR={target.parent}", f"-DRANKPO_OUTPUT_NAME={target.name}"]
        try:
            subprocess.run([*configure, *output], check=True)
            subprocess.run(["cmake", "--build", build, "--config", "Release"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # optional=True below turns this into a warning: the torch fallback needs no compiler.
            print(f"rankpo-fast: the native CPU library was not built: {error}", file=sys.stderr)
            raise CompileError(str(error)) from error


native = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels/native").glob("*"))

setup(
    packages=[
        *find_packages("kernels"),
        *find_packages(include=["rankpo_fast", "rankpo_fast.*"]),
        *(name.replace("bench", "rankpo_bench", 1) for name in find_packages(include=["bench*"])),
    ],
    package_dir={
        "rankpo_kernels": "kernels/rankpo_kernels",
        "rankpo_fast": "rankpo_fast",
        "rankpo_bench": "bench",
    },
    package_data={"rankpo_kernels": ["py.typed"], "rankpo_fast": ["py.typed"]},
    ext_modules=[
        Extension(
            "rankpo_kernels.librankpo_native",
            sources=[path for path in native if path.endswith(".cpp")],
            depends=["CMakeLists.txt", *native],
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
