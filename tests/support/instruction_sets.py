"""The numeric tests in each instruction set below the machine's own, as smaller machines have them.

    python tests/support/instruction_sets.py [arguments of pytest]

Sums are rounded otherwise in each, and a bound that holds in one by luck alone fails in another.
Tests are those of losses and kernels, and of the adapters' equality to other libraries: what is
compared with a bound that follows from rounding. Not Triton's: its interpreter is numpy, which
these variables do not reach. As a plugin of that pytest, in all its processes, this file sees to
it that the set is what was asked for.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rankpo_kernels.chunked import native

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/ops/test_info_nce.py", "tests/ops/test_info_nce_options.py",
    "tests/ops/test_info_nce_peers.py", "tests/ops/test_info_nce_op.py",
    "tests/ops/test_in_batch.py", "tests/ops/test_rankpo.py", "tests/ops/test_rankpo_group.py",
    "tests/kernels/test_native.py", "tests/kernels/test_chunked.py", "tests/test_losses.py",
    "tests/integrations/test_sentence_transformers_losses.py",
    "tests/integrations/test_open_clip.py", "tests/integrations/test_flag_embedding.py",
    "tests/integrations/test_tevatron.py",
]  # fmt: skip
CHOSEN = "RANKPO_TESTED_INSTRUCTION_SET"


@dataclass(frozen=True)
class InstructionSet:
    """What our rows and torch's kernels call it, and the words by which oneMKL and oneDNN take it,
    whose products nothing in torch tells."""

    rows: str
    torch: str
    mkl: str
    onednn: str

    @property
    def sets(self) -> dict[str, str]:
        """As `native.instruction_sets` says it."""
        return {"rows": self.rows, "torch": self.torch}

    @property
    def variables(self) -> dict[str, str]:
        return {
            "RANKPO_INSTRUCTION_SET": self.rows, "ATEN_CPU_CAPABILITY": self.torch.lower(),
            "MKL_ENABLE_INSTRUCTIONS": self.mkl, "ONEDNN_MAX_CPU_ISA": self.onednn,
            CHOSEN: self.rows,
        }  # fmt: skip


SETS = [  # from the largest
    InstructionSet("avx512", "AVX512", "AVX512", "ALL"),
    InstructionSet("avx2", "AVX2", "AVX2", "AVX2"),
    InstructionSet("baseline", "DEFAULT", "SSE4_2", "SSE41"),
]


def below(own: dict[str, str]) -> list[InstructionSet]:
    """Those that the machine has besides its own, which `make test` runs in."""
    names = {who: [one.sets[who] for one in SETS] for who in own}
    largest = max(names[who].index(x) if x in names[who] else 0 for who, x in own.items())
    return [one for one in SETS[largest:] if one.sets != own]


def pytest_configure(config: pytest.Config) -> None:
    [asked] = [one for one in SETS if one.rows == os.environ[CHOSEN]]
    found = native.instruction_sets()
    if found != asked.sets:
        pytest.exit(f"asked for {asked}, but the tests would run in {found}", returncode=1)


def main() -> int:
    own, failed = native.instruction_sets(), []
    sets = below(own)
    print(f"this machine: {own}; below it: {', '.join(one.rows for one in sets) or 'none'}")
    plugin = ["-p", "support.instruction_sets", "-k", "not triton", *TESTS, *sys.argv[1:]]
    for one in sets:
        print(f"\n{one.rows}:", flush=True)
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **one.variables, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-m", "pytest", *plugin], env=environment, cwd=ROOT)
        if run.returncode:
            failed.append(one.rows)
    if failed:
        print(f"\nfailed in {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
