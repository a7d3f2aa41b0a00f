"""`python -m bench [--quick] [--device cpu|cuda] [--rounds N] [--output FILE]`"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.cases import info_nce, rankpo
from bench.measure import Row, measure
from rankpo_kernels import native


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape a case")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each contender")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: build/bench)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}")

    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("time is a ratio to the first row, its 20th to 80th percentile behind it;")
    print("memory is the peak above inputs and gradients; error is against fp64\n")
    torch.manual_seed(0)
    results = []
    for module in (info_nce, rankpo):
        for case in module.cases(args.device, args.quick):
            print(f"{case.name}: {case.question}")
            rows = measure(case, args.rounds)
            print(table(rows), flush=True)
            results.append(
                {"case": case.name, "question": case.question, "shape": case.shape}
                | {"rows": [dataclasses.asdict(row) for row in rows]}
            )
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    output = args.output or Path("build/bench") / f"{day}-{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    print(f"written to {output}")
    return 0


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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if device == "cuda":
        card = torch.cuda.get_device_name()
    else:
        library = native.library()
        rows = library.rankpo_instruction_set().decode() if library else "torch"
        card = f"{platform.machine()}, {torch.get_num_threads()} threads, rows by {rows}"
    return {
        "device": card,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
