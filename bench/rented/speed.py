"""What do ours take beside the bare products that any form of them needs? And which tile is the
fastest?

A result is all pipelines of one lower bound at one size, which take turns with it; a row's name is
`rankpo-fast, PIPELINE`, and `measured` reads them back.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ..cases import rankpo, tiles
from ..cases.loss import LossQuestion, gemms
from ..gpu import watching
from ..measure import Case, Run, measure, noting
from ..meter import Meter
from ..questions import OURS, Result, Row, Settings, Shape, described
from ..results import Run as Results
from ..tables import duration, times
from .correctness import drawn, error_of, shape_of
from .pipelines import PIPELINES, Batch, Pipeline
from .plan import Plan, Size
from .runner import Part
from .state import Found

CASE = "speed"
MOST = 4096  # rows over which errors are taken beside times


def parts(plan: Plan) -> list[Part]:
    found = []
    for M, N, D in plan.sizes:
        found.append(Part(f"{M}x{N}x{D}", partial(beside_gemms, (M, N, D), plan)))
    for B, _, D in plan.pairs:
        found.append(Part(f"pairs {B}x{D}", partial(beside_a_copy, (B, B, D), plan)))
    return found


def beside_gemms(size: Size, plan: Plan) -> Found:
    """InfoNCE and in-batch RankPO: with gradients beside three products, without beside one."""
    here = [each for each in of_size(size, plan) if not each.pairwise]
    results = []
    for count in sorted({pipeline.gemms for pipeline in here}, reverse=True):
        pipelines = [pipeline for pipeline in here if pipeline.gemms == count]
        batch = drawn(pipelines[0], size, plan)
        q, p = batch.leaves
        backward = pipelines[0].backward
        bound = f"{count} GEMM{'s' * (count > 1)}"
        runs = {bound: gemms(count, q, p, backward=backward)} | runs_of(pipelines, batch)
        flops = 2 * count * len(q) * len(p) * q.shape[1]
        moved = (q.nbytes + p.nbytes) * (1 + backward)
        case = Case(plan.device, runs, bound, flops, moved, **judged(pipelines, size, plan))
        results.append(answer(case, pipelines, size, plan))
    return Found(results, says="; ".join(map(ratios, results)))


def beside_a_copy(size: Size, plan: Plan) -> Found:
    """Pairwise RankPO reads three embeddings and writes three."""
    pipelines = [each for each in PIPELINES if each.pairwise]
    batch = drawn(pipelines[0], size, plan)
    runs = rankpo.copies(batch.leaves) | runs_of(pipelines, batch)
    moved = 2 * sum(x.nbytes for x in batch.leaves)
    case = Case(plan.device, runs, rankpo.LOWER_BOUND, 0, moved, **judged(pipelines, size, plan))
    result = answer(case, pipelines, size, plan)
    return Found([result], says=ratios(result))


def of_size(size: Size, plan: Plan) -> list[Pipeline]:
    """Those that a batch of this size takes."""
    largest = max(max(each) for each in plan.small)
    return [each for each in PIPELINES if max(size[:2]) <= largest or not each.small]


def runs_of(pipelines: Sequence[Pipeline], batch: Batch) -> dict[str, Run]:
    return {f"{OURS}, {each.name}": partial(each.run, batch) for each in pipelines}


def judged(pipelines: Sequence[Pipeline], size: Size, plan: Plan) -> dict:
    """What a Case needs to refuse a time of what is wrong; errors are of at most MOST rows."""
    M, N, D = size
    fewer = (min(M, MOST), min(N, MOST), D)
    names = {f"{OURS}, {each.name}": each for each in pipelines}
    found = dict.fromkeys(names, math.nan)  # of one that does not run, as its row will say
    for name, each in names.items():
        with noting(name, {}):
            found[name] = error_of(each, drawn(each, fewer, plan))
    gate = max(max(each.gates[plan.dtype], each.gates[torch.float32]) for each in pipelines)
    return {"errors": found, "gate": gate, "dtype": plan.dtype}


def answer(case: Case, pipelines: Sequence[Pipeline], size: Size, plan: Plan) -> Result:
    with watching(plan.device) as readings:
        rows: tuple[Row, ...] = measure(case, plan.settings)
    if readings.throttled:  # they take turns: it was everybody's
        rows = tuple(
            replace(row, throttled=readings.throttled if row.seconds else None) for row in rows
        )
    work = {each.name: counted for each in pipelines if (counted := flops(each, size)) is not None}
    about = {**readings.said, "flops over MND": work}
    return Result(
        CASE, "loss", "What do ours take beside the bare products, or a copy?",
        shape_of(pipelines[0], size, plan), rows, case.lower_bound, case.flops, case.bytes,
        case.gate, about,
    )  # fmt: skip


def flops(pipeline: Pipeline, size: Size) -> float | None:
    """Over MND, as its launches add up; None of what multiplies nothing, or cannot be counted: a
    time is not to be lost for it."""
    M, N, D = size
    if pipeline.pairwise:
        return None
    batch = pipeline.of_nothing(M, N, D, torch.bfloat16)
    notes: dict[str, str] = {}
    with noting(pipeline.name, notes), Meter(*batch.leaves, batch.labels) as meter:
        kept = pipeline.run(batch)
        del kept
        return sum(each.flops for each in meter.launches) / (M * N * D)
    print(f"flops not counted of {notes}")
    return None


def ratios(result: Result) -> str:
    """exact 1.31, stored 1.12 times 3 GEMMs of 2.1 ms."""
    bound = next(row for row in result.rows if row.implementation == result.lower_bound)
    said = [
        f"{row.implementation.removeprefix(f'{OURS}, ')} {times(row.ratio)}"
        for row in result.rows
        if row.ours and row.ratio is not None
    ]
    took = duration(bound.seconds) if bound.seconds else bound.note
    return f"{', '.join(said)} times {bound.implementation} of {took}"


# --- tiles ---


def tile_parts(plan: Plan) -> list[Part]:
    """Every tile, and every size from which storing may pay: dims by dims."""
    if plan.rehearsal:  # one of each question: all take the interpreter minutes
        shape = {"M": 64, "N": 64, "D": 32, "dtype": "bfloat16"}
        return [
            tile_part(each, shape, replace(plan.settings, implementations=frozenset(names)))
            for each in tiles.QUESTIONS if (names := each.implementations("cuda")[-1:])
        ]  # fmt: skip
    asked = [(each, shape) for each in tiles.QUESTIONS for shape in each.shapes("cuda", "default")]
    return [tile_part(question, shape, plan.settings) for question, shape in asked]


def tile_part(question: LossQuestion, shape: Shape, settings: Settings) -> Part:
    def run() -> Found:
        result = question.answer(shape, settings)
        timed = [row for row in result.rows if row.ratio and not result.is_lower_bound(row)]
        best = min(timed, key=lambda row: row.ratio or 0, default=None)
        says = "" if best is None else f"best {best.implementation} {times(best.ratio or 0)}"
        return Found([result], says=says)

    return Part(f"{question.name} {described(shape)}", run)


# --- reading back ---


class Measured(NamedTuple):
    """A pipeline's time beside its lower bound, for whoever compares it with a prediction."""

    pipeline: str
    M: int
    N: int
    D: int
    seconds: float
    lower_bound: float  # seconds of the bare products in the same rounds
    flops: float | None  # over MND
    error: float | None


def measured(run: Results) -> Iterator[Measured]:
    """Of a result file, see `bench.results.read`."""
    for result in run.results:
        if result.case != CASE or "M" not in result.shape:
            continue
        bound = next(row for row in result.rows if row.implementation == result.lower_bound)
        for row in result.rows:
            name = row.implementation.removeprefix(f"{OURS}, ")
            if row.ours and row.seconds is not None and bound.seconds is not None:
                M, N, D = (result.shape[axis] for axis in "MND")
                work = result.about.get("flops over MND", {}).get(name)
                yield Measured(name, M, N, D, row.seconds, bound.seconds, work, row.error)
