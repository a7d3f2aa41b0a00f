"""How large the steps are: on the GPU, and in a rehearsal on a CPU, where they only must run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..questions import Rates, Settings

Size = tuple[int, int, int]  # M, N, D
ROUNDS = 7
LIMIT_S = 2.0  # of the rounds of one measurement


@dataclass(frozen=True)
class Plan:
    device: str
    exact: tuple[Size, ...]  # at which errors are taken, of most pipelines
    small: tuple[Size, ...]  # and of those that larger batches do not take
    pairs: tuple[Size, ...]  # of pairwise RankPO: B, B, D
    again: int  # runs that must be equal in every bit
    sizes: tuple[Size, ...]  # that are timed, those of most worth first
    products: tuple[Size, ...]
    rounds: int = ROUNDS
    rehearsal: bool = False
    dtype: torch.dtype = torch.bfloat16
    rates: Rates = field(default_factory=lambda: Rates({}, math.inf))  # as the probes found
    deadline: float = math.inf  # of the step, by time.monotonic()

    @property
    def settings(self) -> Settings:
        return Settings(self.device, "quick", self.rounds, self.rates, limit_s=LIMIT_S)


def real(rates: Mapping | None = None, deadline: float = math.inf) -> Plan:
    DIMS, LARGE, MIDDLE = (1024, 384, 2048, 4096), 16384, 4096
    return Plan(
        device="cuda",
        exact=((LARGE, LARGE, 1024), (12_299, 16_411, 1000)),
        small=((MIDDLE, MIDDLE, 1024), (4_001, 4_111, 1000)),
        pairs=((65_536, 65_536, 1024), (8_191, 8_191, 1000)),
        again=20,
        sizes=(
            *((size, size, D) for D in DIMS for size in (LARGE, MIDDLE)),
            *((65_536, 65_536, D) for D in (384, 1024, 2048, 4096)),
        ),
        products=tuple((LARGE, LARGE, D) for D in DIMS),
        rates=_rates(rates),
        deadline=deadline,
    )


def rehearsed(rates: Mapping | None = None, deadline: float = math.inf) -> Plan:
    small = ((64, 64, 32), (33, 65, 40))
    return Plan(
        device="cpu", exact=small, small=small, pairs=((8, 8, 32), (5, 5, 40)), again=2,
        sizes=((64, 64, 32),), products=((64, 64, 32),), rounds=1, rehearsal=True,
        rates=_rates(rates), deadline=deadline,
    )  # fmt: skip


def _rates(found: Mapping | None) -> Rates:
    return Rates(found["gemm"], found["copy"]) if found else Rates({}, math.inf)
