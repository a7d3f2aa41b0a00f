"""`make gpu`: the steps of a rented GPU as far as time goes; a second call goes on from there.

    python -m bench.rented [--minutes 7.5] [--only STEP ...] [--again STEP ...] [--rehearse]

Environment: OUT is where results go (build/gpu); RESUME a result file to go on from where OUT has
none; COMMIT what a tree without .git is called. Exit status 1 if anything is red or there is no
GPU, 2 for bad input.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import wheels

ROOT = Path(__file__).parents[2]
CARRIED, SITE = ROOT / "build" / "gpu-carry", ROOT / "build" / "gpu-site"
MINUTES = 7.5  # of the first call's eight: the machine takes the rest to start and end


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rented", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--again", nargs="+", metavar="STEP", help="also if they are done")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args(argv)
    stop = time.monotonic() + 60 * args.minutes
    prepare(args.rehearse)
    # Only now: torch and Triton read the environment when they are imported.
    from rankpo_fast.errors import InputError

    from .call import Asked, call

    folder = "gpu-rehearsal" if args.rehearse else "gpu"
    out = Path(os.environ.get("OUT") or ROOT / "build" / folder).resolve()
    resume = Path(os.environ["RESUME"]) if os.environ.get("RESUME") else None
    only, again = args.only or (), args.again or ()
    try:
        return call(Asked(out, stop, CARRIED / "triton", resume, args.rehearse, only, again))
    except InputError as error:
        print(f"make gpu: error: {error}", file=sys.stderr)
        return 2


def prepare(rehearsal: bool) -> None:
    """The environment of this process and of all that it starts; the peers that were carried."""
    print(wheels.install(CARRIED / "wheels", SITE))
    ours = [str(path) for path in (SITE, ROOT / "kernels", ROOT, ROOT / "tests")]
    sys.path[:0] = ours
    os.environ["PYTHONPATH"] = os.pathsep.join([*ours, os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A library that asks on import whether there is a GPU must not touch it: see `runner`.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TRITON_CACHE_DIR"] = str(CARRIED / "triton")
    if rehearsal:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    sys.exit(main())
