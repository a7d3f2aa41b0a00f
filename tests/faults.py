"""The table of faults as one command: each fault, what it should end in, what was seen, seconds.

usage: python tests/faults.py [--kills N] [pytest's options]

The exit status is 1 where something else was seen.

A kind of fault is a test whose name is its claim; the rows are those tests.
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = ("data/test_cache.py", "data/test_files.py", "data/test_sources.py", "test_absurd_input.py",
         "test_disk_full.py", "test_paths.py", "test_signals.py", "train/test_lock.py",
         "train/test_output.py", "train/test_resume.py", "train/test_memory.py",
         "train/test_content.py", "train/test_long_runs.py", "train/test_silent_ranks.py",
         "train/test_background.py", "train/test_kills.py", "train/test_resume_table.py",
         "test_fuzz.py")  # fmt: skip


class Table:
    """A plugin of pytest that prints a row when a test has ended."""

    def __init__(self) -> None:
        self.rows = self.wrong = 0
        print(f"{'seen':8} {'seconds':>7}  fault, and what it should end in")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        seen = {"passed": "as said", "failed": "ELSE", "skipped": "skipped"}[report.outcome]
        name = report.nodeid.rpartition("::")[2].removeprefix("test_")
        claim, _, case = name.partition("[")
        fault = f"{claim.replace('_', ' ')}{f' ({case[:-1]})' if case else ''}"
        print(f"{seen:8} {report.duration:7.2f}  {fault}", flush=True)
        if report.outcome == "failed":
            print(report.longreprtext.rstrip().splitlines()[-1])
        self.rows, self.wrong = self.rows + 1, self.wrong + (report.outcome == "failed")


def main(options: list[str]) -> int:
    table = Table()
    quiet = ("-o", "addopts=--import-mode=importlib", "-p", "no:terminal", "-p", "no:warnings")
    files = (str(TESTS / name) for name in FILES)
    code = pytest.main([*files, *quiet, "--kills=50", *options], plugins=[table])
    print(f"{table.rows} faults, {table.wrong} of them ended in something else")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
