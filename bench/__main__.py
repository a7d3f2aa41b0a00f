"""`python -m bench [--quick] [--only CASES] [--device cpu|cuda] [--rounds N] [--minutes T]`"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from bench.cases import in_batch, info_nce, open_clip, rankpo, sentence_transformers
from bench.measure import Case, Row, measure
from rankpo_kernels import native

CARD_SECONDS = 3.0  # rounds of a case on a card stop then
PACKAGES = ("triton", "transformers", "liger-kernel", "cut-cross-entropy")
ROOMS = {  # of bench/cases
    "info_nce": info_nce, "in_batch": in_batch, "rankpo": rankpo,
    "sentence_transformers": sentence_transformers, "open_clip": open_clip,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape a case")
    parser.add_argument("--only", nargs="+", choices=ROOMS, help="these cases alone")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each contender")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: build/bench)")
    parser.add_argument("--minutes", type=float, help="start no case later than this")
    parser.add_argument(
        "--note", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"),
        help="what the result file says besides, of tests for instance",
    )  # fmt: skip
    parser.add_argument(
        "--compile", type=int, metavar="D", help="on a card: only compile the kernels for these D"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}")

    if args.compile:
        from bench.cases import tiles  # triton, which not every machine has

        tiles.compile_all(args.compile)
        return 0

    about = machine(args.device) | dict(args.note)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("time is a ratio to the first row, its 20th to 80th percentile behind it;")
    print("memory is the peak above inputs and gradients; error is against fp64\n")
    torch.manual_seed(0)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    output = args.output or Path("build/bench") / f"{day}-{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results, red, started = [], [], time.monotonic()
    write(output, about, results)
    for case in all_cases(args.device, args.quick, args.only):
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            about["left out"] = f"from {case.name} on, after {args.minutes:g} minutes"
            print(f"left out {about['left out']}")
            write(output, about, results)
            break
        print(f"{case.name}: {case.question}")
        rows = measure(case, args.rounds, CARD_SECONDS if args.device == "cuda" else math.inf)
        print(table(rows), flush=True)
        red += [f"{row.case}: {row.contender}" for row in rows if row.note and _is_ours(row)]
        results.append(
            {"case": case.name, "question": case.question, "shape": case.shape}
            | {"rows": [rounded(dataclasses.asdict(row)) for row in rows]}
        )
        write(output, about, results)  # what is measured stays, whatever comes
        del case  # and its buffers, before the next ones are made
    print(f"written to {output}")
    return failed(red)


def failed(red: list[str]) -> int:
    """The exit code, once it is said what it stands for."""
    for name in red:
        print(f"FAILED {name}")
    return 1 if red else 0


def write(output: Path, about: dict[str, str], results: list[dict]) -> None:
    lines = ",\n".join(map(json.dumps, results))  # a line a case
    machine = json.dumps(about, indent=1)
    output.write_text(f'{{"machine": {machine},\n"results": [\n{lines}\n]}}\n')


def all_cases(device: str, quick: bool, only: Sequence[str] | None = None) -> Iterator[Case]:
    """The largest shapes last: a card's time may run out."""
    cases = {name: room.cases(device, quick) for name, room in ROOMS.items()}
    if device == "cpu" or only:
        for name in only or cases:
            yield from cases[name]
        return
    from bench.cases import tiles

    yield from itertools.islice(cases["info_nce"], info_nce.FIRST)
    for name in list(cases)[1:]:
        yield from cases[name]
    yield from tiles.cases(device, quick)
    yield from cases["info_nce"]


def _is_ours(row: Row) -> bool:
    return row.contender.startswith("rankpo-fast")


def rounded(row: dict) -> dict:
    """Four digits, and without what is None."""
    four = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}
    return {key: x for key, x in four.items() if x is not None and x != "" and key != "case"}


def table(rows: list[Row]) -> str:
    lines = [f"  {'':28}{'seconds':>10}{'ratio':>8}{'':14}{'MiB':>8}{'error':>10}"]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.seconds is None:
            lines.append(f"  {row.contender:28}{row.note}{error:>10}")
            continue
        spread = f"{row.low:.2f}-{row.high:.2f}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        time = f"{row.seconds:10.4f}{row.ratio:8.2f}{spread:>14}"
        lines.append(f"  {row.contender:28}{time}{peak:>8}{error:>10}")
    return "\n".join(lines) + "\n"


def machine(device: str) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    commit = ""
    with contextlib.suppress(OSError):  # no git
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout
    about = {}
    if device == "cuda":
        about = {"device": torch.cuda.get_device_name(), "driver": _driver()}
        about |= {"cuda": torch.version.cuda}
        about |= {name: found for name in PACKAGES if (found := version(name))}
    else:
        library = native.library()
        rows = library.rankpo_instruction_set().decode() if library else "torch"
        about["device"] = f"{platform.machine()}, {torch.get_num_threads()} threads, rows by {rows}"
    return about | {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or commit.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        import pynvml  # nvidia-ml-py

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # a figure to note, not to fail for
        return f"unknown ({type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
