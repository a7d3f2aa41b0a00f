"""What is this machine, and what does it reach? Versions, products, copies, L2; and whether it
finds its kernels in Triton's cache, which was filled on a machine without a GPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .. import machine
from ..cases.loss import named
from ..measure import MOST_RUNS, percentiles, seconds_of
from ..questions import Result, Row
from ..tables import duration, number
from .plan import Plan, Size
from .runner import Part
from .state import Found

L2_BYTES = {"cuda": 24 << 20, "cpu": 1 << 12}  # less than half of an H200's
PROGRAMS, TIMES = {"cuda": 528, "cpu": 2}, {"cuda": 100, "cpu": 1}  # four on a multiprocessor
BLOCK = tl.constexpr(1024)


@triton.jit
def read_kernel(x_ptr, out_ptr, SIZE, TIMES):  # type: ignore[no-untyped-def]  # Triton's own types
    """Reads all of x so many times, past L1: each program another block each time."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for turn in range(TIMES):
        first = (pid + turn) % programs
        for start in range(first * BLOCK, SIZE, programs * BLOCK):
            total += tl.load(x_ptr + start + offs, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + offs, total)


def parts(plan: Plan, fill: Callable[[], Found]) -> list[Part]:
    """`fill` compiles what the carried cache lacks."""
    return [
        Part("versions", partial(versions, plan)),
        Part("rates", partial(rates, plan)),
        Part("Triton's cache", partial(cache, plan)),
        Part("kernels that are not in it", fill, 100.0),
        *(Part(f"products {size[0]}x{size[1]}x{size[2]}", partial(products, size, plan))
          for size in plan.products),
        Part("addmm(out_dtype=)", partial(addmm_in_fp32, plan)),
        Part("L2", partial(l2, plan)),
    ]  # fmt: skip


def versions(plan: Plan) -> Found:
    about = machine.about(plan.device)
    return Found(facts=about, says=f"{about['device']}, torch {about['torch']}")


def rates(plan: Plan) -> Found:
    if plan.rehearsal:
        return Found(facts={"rates": {"gemm": {"float32": 1e9}, "copy": 1e9}}, says="not measured")
    found = machine.measure_rates(plan.device)
    said = ", ".join(f"{number(x / 1e12)} TFLOP/s in {name}" for name, x in found.gemm.items())
    return Found(facts={"rates": asdict(found)}, says=f"{said}; {number(found.copy / 1e12)} TB/s")


def products(size: Size, plan: Plan) -> Found:
    """The three of which every pipeline is made, by cuBLAS, into bf16 and into fp32."""
    M, N, D = size
    q, p = (torch.randn(n, D, device=plan.device).to(plan.dtype) for n in (M, N))
    s = q @ p.T
    dq, dp = torch.empty_like(q), torch.empty_like(p)
    runs: dict[str, Callable[[], Any]] = {
        "S = QP'": lambda: torch.mm(q, p.T, out=s),
        "dQ = SP": lambda: torch.mm(s, p, out=dq),
        "dP = S'Q": lambda: torch.mm(s.T, q, out=dp),
        "dP = S'Q in fp32": lambda: torch.mm(s.T, q, out_dtype=torch.float32),
    }
    if plan.rehearsal:
        del runs["dP = S'Q in fp32"]  # a CPU has none
    rows = [timed(name, run, plan, 2 * M * N * D) for name, run in runs.items()]
    shape = named("MND", (*size, str(plan.dtype).removeprefix("torch.")), plan.device)
    result = Result(
        "products", "probe", "How fast are the products alone?", shape, tuple(rows),
        flops=2 * M * N * D,
    )  # fmt: skip
    reached = (f"{number(2 * M * N * D / row.seconds / 1e12)}" for row in rows if row.seconds)
    return Found([result], says=f"{', '.join(reached)} TFLOP/s")


def timed(name: str, run: Callable[[], Any], plan: Plan, flops: float) -> Row:
    run()
    once = seconds_of(run, plan.device)
    repeats = 1 if plan.rehearsal else max(1, min(MOST_RUNS, int(0.01 / once)))
    all_seconds = [seconds_of(run, plan.device, repeats) for _ in range(plan.rounds)]
    seconds, low, high = percentiles(all_seconds)
    rate = plan.rates.gemm.get(str(plan.dtype).removeprefix("torch."))
    share = flops / seconds / rate if rate else None
    return Row(name, seconds=seconds, low=low, high=high, gemm=share)


def addmm_in_fp32(plan: Plan) -> Found:
    """Sums in fp32 of products in bf16, without a copy: what chunks of rows are added up by."""
    M, N, D = (64, 64, 32) if plan.rehearsal else (4096, 16384, 1024)
    a, b = (torch.randn(*shape, device=plan.device).to(plan.dtype) for shape in ((M, N), (N, D)))
    total = torch.randn(M, D, device=plan.device)
    exact = total.double() + a.double() @ b.double()
    if plan.rehearsal:
        return Found(says="not asked: a CPU has no out_dtype")
    got = torch.addmm(total, a, b, out_dtype=torch.float32)
    error = ((got.double() - exact).norm() / exact.norm()).item()
    into = total.clone()
    torch.addmm(into, a, b, out_dtype=torch.float32, out=into)  # in place, as the kernels do
    in_place = ((into.double() - exact).norm() / exact.norm()).item()
    plain = timed("mm", lambda: torch.mm(a, b), plan, 2 * M * N * D)
    wide = timed(
        "addmm", lambda: torch.addmm(into, a, b, out_dtype=torch.float32, out=into), plan,
        2 * M * N * D,
    )  # fmt: skip
    assert plain.seconds and wide.seconds
    ratio = wide.seconds / plain.seconds
    says = f"error {error:.1e}, {ratio:.2f} times mm into bf16"
    fact = {"addmm(out_dtype=float32)": says}
    wrong = f"error {error:.1e}, in place {in_place:.1e}"
    return Found(facts=fact, says=says, red="" if max(error, in_place) < 1e-5 else wrong)


def l2(plan: Plan) -> Found:
    size = L2_BYTES[plan.device] // 4
    programs, turns = PROGRAMS[plan.device], TIMES[plan.device]
    x = torch.randn(size, device=plan.device)
    out = torch.empty(programs * BLOCK.value, device=plan.device)
    row = timed("read", lambda: read_kernel[(programs,)](x, out, size, turns), plan, 0)
    assert row.seconds
    rate = turns * x.nbytes / row.seconds
    says = f"{number(rate / 1e12)} TB/s read from {x.nbytes >> 20} MiB"
    return Found(facts={} if plan.rehearsal else {"L2": says}, says=says)


# --- Triton's cache ---


@dataclass
class Compiled:
    """Kernels that a process took from Triton's cache, and those that it had to compile."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0  # of the misses

    @property
    def words(self) -> str:
        if not self.hits + self.misses:
            return "no kernel"
        return f"{self.hits} kernels from the cache, {self.misses} compiled in {self.seconds:.0f} s"


@contextmanager
def counting() -> Iterator[Compiled]:
    """Triton tells of every kernel that it finds or compiles."""
    compiled = Compiled()

    def listen(*, cache_hit: bool, times: Any, **rest: Any) -> None:
        compiled.hits += cache_hit
        compiled.misses += not cache_hit
        compiled.seconds += 0.0 if cache_hit else times.total / 1e6

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        triton.knobs.compilation.listener = before


def cache(plan: Plan) -> Found:
    """One known kernel, which the carried cache has if this Triton makes the same keys."""
    if triton.knobs.runtime.interpret:
        return Found(says="not asked: kernels are interpreted")
    start = time.perf_counter()
    with counting() as compiled:
        launch_the_known_kernel(plan.device)
    took = duration(time.perf_counter() - start)
    words = f"hit in {took}" if compiled.hits else f"MISS: compiled in {took}"
    return Found(facts={"Triton's cache": words}, says=words)


def launch_the_known_kernel(device: str) -> None:
    x = torch.empty(BLOCK.value, device=device)
    read_kernel[(1,)](x, x, BLOCK.value, 2)
