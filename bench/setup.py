"""Leaves out of rankpo-bench what only a checkout has a use for: `pytest bench/`, and this."""

from setuptools import setup
from setuptools.command.build_py import build_py

CHECKOUT = ("conftest", "test_cases", "setup")


class BuildPy(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] not in CHECKOUT]


setup(cmdclass={"build_py": BuildPy})
