"""What does `rankpo-fast label` take for 100,000 jobs and 1,000,000 talents?

    python -m bench.labels [--jobs N] [--talents N] [flags of label]

Records of the demo's world are written, equal texts among them, and labelled by its rules in a
process of its own: seconds, peak memory and bytes on the disk.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.demo import world

SEED = 0


def write_records(folder: Path, jobs: int, talents: int, seed: int = SEED) -> None:
    """rules.yaml, jobs.jsonl and talents.jsonl, one record in memory at a time."""
    rng = random.Random(seed)
    made_jobs = (world.make_job(rng) for _ in range(jobs))
    write_jsonl(folder / "jobs.jsonl", world.job_records(made_jobs))
    made_talents = (world.make_talent(rng) for _ in range(talents))
    write_jsonl(folder / "talents.jsonl", world.talent_records(made_talents))
    (folder / "rules.yaml").write_text(world.RULES, encoding="utf-8")


def run(folder: Path, flags: Iterable[str]) -> tuple[float, float]:
    """Seconds and GB of the command."""
    names = ("config", "rules.yaml"), ("queries", "jobs.jsonl"), ("items", "talents.jsonl")
    given = [text for flag, name in names for text in (f"--{flag}", str(folder / name))]
    command = [sys.executable, "-m", "rankpo_fast.cli", "label", *given,
               "--output_dir", str(folder / "out"), "--overwrite_output_dir", *flags]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--talents", type=int, default=1_000_000)
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        write_records(folder, options.jobs, options.talents)
        print(f"records written in {time.perf_counter() - began:.0f} s", flush=True)
        seconds, peak = run(folder, flags)
        written = sum(file.stat().st_size for file in _files(folder / "out")) / 1e9
        print(f"{options.jobs:,} jobs, {options.talents:,} talents: {seconds:.0f} s, "
              f"{peak:.1f} GB of memory at the peak, {written:.2f} GB written")  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
