"""What InfoNCE should cost on an H100, from counting alone: nothing in this table is measured.

`python -m bench.cost [--M 4096 ...] [--N ...] [--D 384 ...] [--aot build/aot.json]`

The launchers themselves run, on tensors that hold nothing: chunks and tiles are theirs, and each
kernel and torch op is counted as it comes. A launch takes its flops at a rate that cuBLAS reaches,
or its bytes at the memory's rate, whichever is longer, and a fixed time more: the sum is a lower
bound. A tensor that a launch takes counts as moved once; the columns of a score kernel once per
group of row tiles.

A second table is of an H200, and of the kernels as they compile: what `hopper` predicts of them,
from the file that `python -m bench.aot` writes, beside its targets, and what a result file of such
a GPU measured. M queries, N passages, D dims.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rankpo_fast.errors import InputError
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.problem import DIRECTIONS, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.tiles import (
    against_few_launches,
    against_keeping,
    against_storing,
)

from . import hopper, results
from .aot import HOPPER, Driver
from .cases.info_nce import DIMS
from .launch import SYMMETRIC, launch, workspace
from .meter import Meter
from .peers import cross_entropy
from .questions import OURS


@dataclass(frozen=True)
class Rates:
    """Assumed of an H100 SXM: of its 989 TFLOP/s in dense bf16 a product reaches 700 to 790."""

    flops: float = 740e12
    bytes: float = 3.35e12
    launch: float = 3e-6

    def seconds(self, meter: Meter) -> float:
        return sum(
            max(each.flops / self.flops, each.bytes / self.bytes) + self.launch
            for each in meter.launches
        )


H100 = Rates()
# Two cores, of which three GEMMs in fp32 reached this: bench/results/2026-11-24-cpu.json.
CPU = Rates(flops=180e9, bytes=20e9, launch=5e-6)
SIZES = [4096, 16384, 32768, 65536]
RESULTS = Path(__file__).parent / "results"


def plain_torch(q: Tensor, p: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """bf16 logits, as autograd has it."""
    q, p = (x.detach().requires_grad_() for x in (q, p))
    return torch.autograd.grad(cross_entropy(q, p, labels, symmetric=False), [q, p])


def liger_like(q: Tensor, p: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Chunks of about M D logits in bf16, a kernel that turns them into gradients, two products."""
    leaves = [x.detach().requires_grad_() for x in (q, p)]
    units = [F.normalize(x, dim=1) for x in leaves]
    a, b = (x.detach() for x in units)
    da, db = torch.empty_like(a), torch.zeros_like(b)
    rows = triton.next_power_of_2(triton.cdiv(len(a), triton.cdiv(len(b), a.shape[1])))
    for a_RD, da_RD in zip(a.split(rows), da.split(rows), strict=True):
        logits = a_RD @ b.T
        logits.neg_()  # stands for that kernel
        torch.mm(logits, b, out=da_RD)
        db.addmm_(logits.T, a_RD)
    return torch.autograd.grad(units, leaves, [da, db])


PIPELINES: dict[str, Callable[..., Any]] = {
    "exact": partial(launch, stored=False, few=False),
    "few launches": partial(launch, stored=False, few=True),
    "stored": partial(launch, stored=True),
    "forward": partial(launch, grads=False),
    "symmetric": partial(launch, options=SYMMETRIC, kept=False),
    "symmetric, kept": partial(launch, options=SYMMETRIC, kept=True, few=False),
    "four directions": partial(launch, options={"directions": DIRECTIONS}),
    "plain torch": plain_torch,
    "liger-like": liger_like,
    "fused on a CPU": partial(launch, function=chunked.info_nce),
}


def count(pipeline: str, M: int, N: int, D: int) -> Meter:
    on_cpu = pipeline.endswith("CPU")
    device, dtype = ("cpu", torch.float32) if on_cpu else ("meta", torch.bfloat16)
    with FakeTensorMode() if on_cpu else contextlib.nullcontext():
        q, p = (torch.empty(n, D, dtype=dtype, device=device) for n in (M, N))
        labels = torch.empty(M, dtype=torch.int64, device=device)
        with Meter(q, p, labels) as meter:
            kept = PIPELINES[pipeline](q, p, labels)
    del kept  # results are held to the end
    return meter


BATCHES: dict[str, dict[str, Any]] = {
    "one direction": {},
    "one direction, fp32": {},
    "both directions": SYMMETRIC,
    "both directions, margin": SYMMETRIC | {"false_negative_margin": 0.1},
    "both directions, smoothing": SYMMETRIC | {"label_smoothing": 0.1},
}


def form(batch: str, size: int, D: int) -> tuple[str, dict[str, str]]:
    """Which form the launcher takes of size x size, from what it launches; and what is against the
    others that have fewer flops or launches."""
    dtype = torch.float32 if batch.endswith("fp32") else torch.bfloat16
    q, p = (torch.empty(size, D, dtype=dtype, device="meta") for _ in range(2))
    labels, options = torch.empty(size, dtype=torch.int64, device="meta"), BATCHES[batch]
    with Meter(q, p, labels) as meter:
        launch(q, p, labels, options=options)
    names = {each.name for each in meter.launches}
    flops = sum(each.flops for each in meter.launches)
    few, both = "finished_kernel" in names, "directions" in options
    lean = "kept" if both else "stored"
    taken = "few launches" if few else lean if flops == 6 * size * size * D else "exact"
    settings = InfoNCESettings(workspace_bytes=workspace(q, "cuda"), **options)
    against = {"few launches": against_few_launches(dtype, size, D, size)}
    if both:
        against[lean] = against_keeping(dtype, D, Relations(labels), settings)
    else:
        against[lean] = against_storing(dtype, size, D, size)
    if both and taken == "exact" and not against[lean]:  # what the table does not know
        try:
            with Meter(q, p, labels):
                launch(q, p, labels, options=options, few=False, kept=True)
        except ValueError as error:
            against[lean] = str(error)
    return taken, {name: why for name, why in against.items() if why}


def forms(sizes: Sequence[int], Ds: Sequence[int]) -> str:
    lines = []
    for batch in BATCHES:
        for D in Ds:
            for size in sizes:
                taken, against = form(batch, size, D)
                whys = "; ".join(f"not {name}: {why}" for name, why in against.items())
                lines.append(f"{batch:27}{D:5}{size:7}  {taken:13}{whys}")
    return "\n".join(lines)


def crossover(D: int) -> int:
    """The smallest power of two M = N from which storing is never slower, by this model."""
    sizes = [2**k for k in range(8, 17)]
    of = lambda name, n: H100.seconds(count(name, n, n, D))  # noqa: E731
    slower = [n for n in sizes if of("stored", n) > of("exact", n)]
    return 2 * max(slower, default=sizes[0] // 2)


def table(Ms: Sequence[int], Ns: Sequence[int] | None, Ds: Sequence[int]) -> str:
    lines = [f"{'D':>5}{'M':>7}{'N':>7}  {'':16}{'flops/MND':>10}{'GB':>8}{'launches':>9}"
             f"{'MiB':>8}{'us':>11}{'ratio':>7}"]  # fmt: skip
    for D in Ds:
        for M, N in zip(Ms, Ns or Ms, strict=True):
            for name in PIPELINES:
                try:
                    meter = count(name, M, N, D)
                except ValueError as error:  # of a form asked for by name, where it cannot be
                    lines.append(f"{D:5}{M:7}{N:7}  {name:16}{error}")
                    continue
                flops = sum(each.flops for each in meter.launches)
                size = sum(each.bytes for each in meter.launches)
                rates, itemsize = (CPU, 4) if name.endswith("CPU") else (H100, 2)
                gradients = 0 if name == "forward" else itemsize * (M + N) * D
                mnd = M * N * D
                seconds, bare = rates.seconds(meter), round(flops / mnd) * mnd / rates.flops
                lines.append(
                    f"{D:5}{M:7}{N:7}  {name:16}{flops / mnd:10.2f}{size / 1e9:8.2f}"
                    f"{len(meter.launches):9}{(meter.peak - gradients) / 2**20:8.0f}"
                    f"{seconds * 1e6:11.0f}{seconds / bare:7.2f}"
                )
    return "\n".join(lines)


def predictions(aot: Path, measured: dict[tuple[str, int], float]) -> str:
    """A line a pipeline and D: ratios to the products at the rate of a large GEMM."""
    rows = [row for row in json.loads(aot.read_text()) if row["arch"] == HOPPER]
    lines = [f"{'pipeline':17}{'D':>5}{'predicted':>11}{'target':>8}{'':6}{'whole step':>11}"
             f"{'measured':>10}"]  # fmt: skip
    for name, pipeline in hopper.PIPELINES.items():
        kernels = hopper.kernels_of(rows, name)
        for D, target in pipeline.targets.items():
            if D not in kernels:
                lines.append(f"{name:17}{D:5} no kernels in {aot}")
                continue
            predicted = hopper.ratio(name, kernels[D], D)
            whole = hopper.ratio(name, kernels[D], D, whole=True)
            was = f"{measured[name, D]:10.2f}" if (name, D) in measured else f"{'-':>10}"
            above = "above" if predicted > target else ""
            lines.append(
                f"{name:17}{D:5}{predicted:11.2f}{target:8.2f} {above:5}{whole:11.2f}{was}"
            )
    return "\n".join(lines)


def measurements(folder: Path) -> dict[tuple[str, int], float]:
    """By pipeline and dims, what the newest result file of an H200 has of SIZE x SIZE in bf16."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = results.read(path)
        except InputError:  # of another kind
            continue
        if "H200" not in str(run.machine.get("device")):
            continue
        gemm = run.machine.get("rates", {}).get("gemm", {}).get("bfloat16")
        for result in run.results:
            name = next((n for n, p in hopper.PIPELINES.items() if p.case == result.case), None)
            size = [result.shape.get(key) for key in ("M", "N", "dtype")]
            ours = [row.seconds for row in result.rows if row.implementation == OURS]
            if name and gemm and size == [hopper.SIZE, hopper.SIZE, "bfloat16"] and any(ours):
                D = result.shape["D"]
                flops = hopper.bare_seconds(name, hopper.SIZE, hopper.SIZE, D) * hopper.GEMM
                found[name, D] = ours[0] * gemm / flops
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    parser.add_argument("--aot", type=Path, default=Path("build/aot.json"))
    parser.add_argument("--M", type=int, nargs="+", default=SIZES)
    parser.add_argument("--N", type=int, nargs="+", help="one for each M; default: equal to it")
    parser.add_argument("--D", type=int, nargs="+", default=DIMS)
    args = parser.parse_args()
    if args.N and len(args.N) != len(args.M):
        parser.error(f"{len(args.M)} --M but {len(args.N)} --N")
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Driver(90))  # tiles are those of an H100
    print(f"A MODEL, NOT MEASURED. Assumed of an H100 SXM, bf16: {H100}")
    print("MiB: peak above inputs and gradients; ratio: us over the flops alone at that rate\n")
    print(table(args.M, args.N, args.D))
    print("\nstoring exp(s) wins from M = N =, and the launcher stores from:")
    for D in args.D:
        sizes = (2**k for k in range(8, 24))
        says = next(n for n in sizes if not against_storing(torch.bfloat16, n, D, n))
        print(f"{D:5}{crossover(D):7}{says:7}")
    print("\nthe form that a batch of M = N takes, and what is against others (exact: 8MND)\n")
    print(forms(args.M, args.D))
    print(f"\nPREDICTED, NOT MEASURED, of an H200 at M = N = {hopper.SIZE}:")
    if args.aot.exists():
        print("ratios to the products at the rate of a large GEMM; whole step: with norms, sums of")
        print("tiles, gradients to bf16 and launches\n")
        print(predictions(args.aot, measurements(RESULTS)))
    else:
        print(f"no {args.aot}: `python -m bench.aot` compiles the kernels")


if __name__ == "__main__":
    main()
