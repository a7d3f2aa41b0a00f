"""What a pipeline should take on an H200, from its kernels' instructions: predicted, not measured.

A score kernel's tile is a main loop, whose steps take the longest of what tensor cores, shared
memory and L2 need for them, and an epilogue, whose instructions `bench.sass` counts. How much of
the epilogue the tensor cores wait for is the form's:

    one program     all of it, and the start of the next program
    P programs      of each what the others' main loops do not cover; they share the issue slots
    specialised     loads of the next tile go on; two consumers, each with half of a tile, reach
                    their epilogues about one instruction apart, and nothing multiplies meanwhile
    ordered         two consumers, each with a tile of its own: one multiplies beside the other's
                    epilogue (ping-pong)

The two products of a chunk are cuBLAS': waves of tiles, or the bytes of their sums in fp32. Nothing
is faster than the rate measured for a large GEMM, which power limits to 80 % of the peak.

Instructions are of kernels compiled for 1024 dims; others change the main loop alone. The model's
error is thought to be 15 %, the rate from L2 is what is known least.
M queries, N passages, D dims, R rows of a chunk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankpo_kernels.triton import waves
from rankpo_kernels.workspace import LARGE_WORKSPACE

from .sass import Counts

SMS = 132  # measured: what PyTorch reports of an H200
CLOCK = 1.83e9  # Hz, measured under load, about
GEMM = 788e12  # FLOP/s, measured: bf16, 8192 x 8192 x 8192, random data
COPY = 4.3e12  # bytes/s read and written, measured
# Multiplications of dense bf16 of a multiprocessor a clock: the peak in NVIDIA's datasheet of the
# H100, 989.4 TFLOP/s, is 132 x 2 x 2048 x 1.83 GHz.
TENSOR = 2048
SHARED = 128  # bytes a clock: 32 banks of 4 bytes, CUDA programming guide
# Bytes a clock from L2 to a multiprocessor. The A100's 40 MB of L2 give 5120 in all (whitepaper),
# a slice of 512 KB 64; the H200's 60 MB have a fifth more than the H100's 50, so 6144 if slices are
# as wide: 46.5 of 132 each, less what conflicts and the farther half take. At least 35 of them are
# seen: 192 x 192 tiles at 777 TFLOP/s on an H100 without multicast (github.com/pranjalssh/fast.cu).
L2 = 43
STORE = 64  # bytes a clock of stores of a multiprocessor to L2: as wide as loads; assumed
LOAD = 800  # clocks until a load from L2 or memory is there, under load; assumed
START = 700  # clocks from a program's end until another's first instruction; assumed
WAIT = 500  # clocks of an epilogue in which it waits: barriers of its sums, loads; assumed
STALL = 1.15  # an issue slot in seven stays empty; assumed
OVERLAP = 1.05  # programs that run beside each other do not interleave perfectly; assumed
LAUNCH = 2e-6  # seconds between two kernels of a stream; assumed
# cuBLAS at whole waves: 8192 x 8192 are 15.5 waves of 128 x 256, which take as long as 16.
WHOLE_WAVES = GEMM * 16 / (2048 / SMS)
FLOPS_A_CLOCK = GEMM / SMS / CLOCK

# Tiles that cuBLAS may choose, and how well each runs beside the largest; assumed.
CUBLAS_TILES = {**waves.PRODUCT_TILES, (128, 192): 0.97, (192, 128): 0.97, (192, 192): 0.97}

SIZE = 16384  # M and N of the targets
WORKSPACE = LARGE_WORKSPACE  # bytes, of a chunk
DIMS = (384, 1024, 2048, 4096)
BLOCK = 128  # rows of which chunks are multiples
GROUP = 8  # tiles of rows that walk the columns together: tiles.Tiles
FORWARD, STORED, RANKPO = "forward", "stored", "in-batch RankPO"
BOTH, KEPT = "both directions", "both directions, kept"


@dataclass(frozen=True)
class Pipeline:
    """What `rankpo_kernels.triton.launches` calls one."""

    products: int  # of 2MND each, with which it is compared
    targets: dict[int, float]  # by dims, of scores and products to those at the measured rate
    row_sums: int  # fp32 numbers that a tile leaves of a row
    case: str  # of the bench, that measures it


PIPELINES = {
    FORWARD: Pipeline(1, dict.fromkeys(DIMS, 1.10), 2, "info_nce forward"),
    STORED: Pipeline(3, {384: 1.15, 1024: 1.08, 2048: 1.06, 4096: 1.05}, 2, "info_nce"),
    BOTH: Pipeline(4, {384: 1.25, 1024: 1.12, 2048: 1.08, 4096: 1.06}, 2, "info_nce symmetric"),
    KEPT: Pipeline(3, {1024: 1.15, 2048: 1.12, 4096: 1.10}, 2, "info_nce symmetric"),
    RANKPO: Pipeline(3, {384: 1.20, 1024: 1.10, 2048: 1.08, 4096: 1.06}, 5, "in_batch_rankpo"),
}


# What is known to miss its target, with the figure above which it may not rise. At D = 384 a tile
# of 128 x 128 takes 19 % longer to come from L2 than to be multiplied, and what it stores goes the
# same way; a wider one's epilogue takes half as long as its products, and nothing runs beside it.
# RankPO's epilogue of 29 instructions a score spills in the wider one, which D = 4096 would need.
# The pass that keeps both directions' exponentials has 3,000 instructions: two sums, and a store.
MISSED = {
    (FORWARD, 384): 1.20, (STORED, 384): 1.17, (RANKPO, 384): 1.25, (RANKPO, 4096): 1.08,
    (KEPT, 1024): 1.22, (KEPT, 2048): 1.14, (KEPT, 4096): 1.11,
}  # fmt: skip


@dataclass(frozen=True)
class ScoreKernel:
    """Of a tile BLOCK_M x BLOCK_N."""

    name: str
    M: int
    N: int
    K: int
    stages: int
    warps: int  # that have an epilogue
    programs: int  # of a multiprocessor
    consumers: int  # with code of their own; 0 where warps are not specialised
    persistent: bool
    prologue: Counts
    epilogue: Counts
    ordered: bool = False  # consumers have tiles of their own

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "ScoreKernel":
        """Of a row of `bench.aot`."""
        tiles, programs = row["tiles"], row["programs_per_sm"]
        if row["persistent"]:  # launched as often as was meant; others as often as they fit
            programs = min(programs, row["programs_meant"])
        return cls(
            row["kernel"], tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"],
            tiles["num_stages"], row["epilogue_warps"], programs,
            row["consumers"] if row["warp_specialized"] else 0, row["persistent"],
            Counts(**row["prologue"]), Counts(**row["epilogue"]),
        )  # fmt: skip

    @property
    def tile_bytes(self) -> int:
        """Of bf16 scores that it stores; sums of rows are not worth the count."""
        whole = 2 * self.M * self.N
        by_threads = self.epilogue.stored_bytes * 32 * self.warps
        if self.consumers and self.epilogue.bulk_stores:
            return whole
        return whole if 2 * by_threads > whole or self.epilogue.bulk_stores else 0


def issue_clocks(counts: Counts, warps: int) -> float:
    """Until all warps of a multiprocessor have issued their instructions: a scheduler issues one a
    clock, each of its pipes as `bench.sass` has it."""
    a_warp = max(counts.all, 2 * counts.alu, 8 * counts.special, 4 * counts.memory)
    return warps / 4 * a_warp * STALL


def tensor_clocks(kernel: ScoreKernel, D: int) -> float:
    return kernel.M * kernel.N * D / TENSOR


def step_clocks(kernel: ScoreKernel) -> float:
    """Of BLOCK_K dims, one program alone."""
    M, N, K = kernel.M, kernel.N, kernel.K
    groups = max(1, kernel.warps // 4)
    # a warp group multiplies 64 rows by all columns, or by its part where rows are too few
    parts = max(1, groups // max(1, M // 64))
    instructions = max(1, M // 64) * parts
    reads = instructions * (64 + N // parts) * K * 2
    loads = (M + N) * K * 2
    tensor = M * N * K / TENSOR
    return max(tensor, (reads + loads) / SHARED, loads / L2)


def main_clocks(kernel: ScoreKernel, D: int) -> float:
    """The main loop of a tile while another's does not run."""
    loads = (kernel.M + kernel.N) * kernel.K * 2 / L2
    one_stage = LOAD + loads + tensor_clocks(kernel, kernel.K)  # filled, read, free again
    in_flight = one_stage / max(1, kernel.stages) / kernel.programs
    return -(-D // kernel.K) * max(step_clocks(kernel), in_flight)


def epilogue_clocks(kernel: ScoreKernel) -> float:
    """Of one tile alone on its multiprocessor, from the last product to the last store."""
    return issue_clocks(kernel.epilogue, kernel.warps) + kernel.tile_bytes / STORE + WAIT


def tile_clocks(kernel: ScoreKernel, D: int) -> float:
    """Of a multiprocessor a tile, at the clock and power of the measured GEMM."""
    main = main_clocks(kernel, D)
    clocks = main + _exposed(kernel, main) if kernel.consumers else _alone_or_beside(kernel, main)
    traffic = (kernel.M + kernel.N) * D * 2 + kernel.tile_bytes
    return max(clocks, traffic / L2, 2 * kernel.M * kernel.N * D / FLOPS_A_CLOCK)


def _alone_or_beside(kernel: ScoreKernel, main: float) -> float:
    prologue = issue_clocks(kernel.prologue, kernel.warps)
    start = LOAD if kernel.persistent else START + LOAD
    alone = start + prologue + main + epilogue_clocks(kernel)
    if kernel.programs == 1:
        return alone
    # programs share the issue slots, whatever they interleave
    issued = prologue + issue_clocks(kernel.epilogue, kernel.warps)
    return max(main, issued, OVERLAP * alone / kernel.programs)


def _exposed(kernel: ScoreKernel, main: float) -> float:
    """Clocks of a specialised kernel's tile in which nothing multiplies: its epilogue, and what
    comes before the next tile's first product."""
    epilogue = epilogue_clocks(kernel) + issue_clocks(kernel.prologue, kernel.warps)
    if kernel.ordered:
        return max(0.0, epilogue - main)
    # Consumers take turns by instructions, so that one is alone in its epilogue for as long as the
    # other's last one takes, and again before the other's first.
    apart = 64 * kernel.N * 16 / TENSOR if kernel.consumers > 1 else 0
    return max(0.0, epilogue - kernel.consumers * apart)


def score_seconds(kernel: ScoreKernel, R: int, N: int, D: int) -> float:
    clocks = waves.waves(R, N, (kernel.M, kernel.N), SMS) * tile_clocks(kernel, D)
    stored = R * N * 2 if kernel.tile_bytes else 0
    moved = 2 * D * (R + N * -(-R // (GROUP * kernel.M))) + stored
    return max(clocks / CLOCK, moved / COPY)


def product_seconds(rows: int, columns: int, depth: int, moved: int, adds: int) -> float:
    """Of cuBLAS: `moved` bytes in all, `adds` of them at the ends of tiles, of which the last wave
    has nothing to run beside."""
    options = []
    for tile, rate in CUBLAS_TILES.items():
        count = waves.waves(rows, columns, tile, SMS)
        flops = count * SMS * 2 * tile[0] * tile[1] * depth
        options.append(flops / (WHOLE_WAVES * rate) + adds / count / COPY)
    least = 2 * rows * columns * depth / GEMM
    return max(min(options), least, moved / COPY)


def seconds(pipeline: str, kernels: Sequence[ScoreKernel], M: int, N: int, D: int) -> float:
    """Of scores and products; in both directions the first kernel scores all rows at once, for the
    sums of columns."""
    if pipeline == FORWARD:
        return sum(score_seconds(kernel, M, N, D) for kernel in kernels)
    first = 1 if pipeline == BOTH else 0
    total = sum(score_seconds(kernel, M, N, D) for kernel in kernels[:first])
    if pipeline == KEPT:  # what is kept is read and written once more
        total += 4 * M * N / COPY
    return total + sum(
        sum(score_seconds(kernel, R, N, D) for kernel in kernels[first:])
        + product_seconds(R, D, N, 2 * R * N + 2 * N * D + 4 * R * D, adds=4 * R * D)
        + product_seconds(N, D, R, 2 * R * N + 2 * R * D + 8 * N * D, adds=8 * N * D)
        for R in chunks(pipeline, M, N, D)
    )


def other_seconds(pipeline: str, kernels: Sequence[ScoreKernel], M: int, N: int, D: int) -> float:
    """Of what targets leave out: norms and labels, sums of tiles written and read, gradients from
    fp32 to bf16, and all launches."""
    parts = 2 * 4 * PIPELINES[pipeline].row_sums * M * -(-N // kernels[0].N)
    moved, launches = 2 * (M + N) * D + parts, 2 + len(kernels)
    if pipeline != FORWARD:
        count = len(chunks(pipeline, M, N, D))
        moved += 8 * (M + N) * D
        launches = 3 + count * (4 + len(kernels))  # scores; pairs, two products, gradients of q
        launches += 12 if pipeline == KEPT else 0  # turn, rest, and what decides about the rest
    return moved / COPY + launches * LAUNCH


def chunks(pipeline: str, M: int, N: int, D: int) -> list[int]:
    """Rows of each, as the launchers choose them."""
    if pipeline == KEPT:
        return [M]
    row_bytes = 2 * N + 4 * (PIPELINES[pipeline].row_sums + 1) * -(-N // BLOCK)
    each = waves.rows_of_chunk(M, N, D, WORKSPACE // row_bytes, BLOCK, SMS)
    return [min(each, M - start) for start in range(0, M, each)]


def bare_seconds(pipeline: str, M: int, N: int, D: int) -> float:
    """Of the products alone, at the measured rate."""
    return PIPELINES[pipeline].products * 2 * M * N * D / GEMM


def ratio(pipeline: str, kernels: Sequence[ScoreKernel], D: int, *, whole: bool = False) -> float:
    """Predicted of M = N = SIZE; `whole`: with what targets leave out."""
    total = seconds(pipeline, kernels, SIZE, SIZE, D)
    total += other_seconds(pipeline, kernels, SIZE, SIZE, D) if whole else 0
    return total / bare_seconds(pipeline, SIZE, SIZE, D)


def kernels_of(rows: Iterable[Mapping[str, Any]], pipeline: str) -> dict[int, list[ScoreKernel]]:
    """By dims, from rows of `bench.aot`: tiles are not the same for all."""
    kernels: dict[int, list[ScoreKernel]] = {}
    for D in PIPELINES[pipeline].targets:
        places = [(row["pipelines"].get(pipeline, {}).get(str(D)), row) for row in rows]
        of_it = [(place, row) for place, row in places if place is not None]
        if of_it:
            of_it.sort(key=lambda of: of[0])
            kernels[D] = [ScoreKernel.of(row) for _, row in of_it]
    return kernels


def faults(pipeline: str, kernels: Mapping[int, Sequence[ScoreKernel]]) -> Iterator[str]:
    """Where a pipeline is predicted above its target, or above what is known of it."""
    for D, target in PIPELINES[pipeline].targets.items():
        if not kernels.get(D):
            yield f"none of its kernels for sm_90 multiplies tiles of scores at D={D}"
            continue
        limit, known = target, MISSED.get((pipeline, D))
        if known is not None:
            limit = known
        if (predicted := ratio(pipeline, kernels[D], D)) > limit:
            bare = f"{2 * PIPELINES[pipeline].products}MND"
            said = "" if known is None else f", missed until now by {known:.2f}"
            yield f"predicted {predicted:.3f} of {bare} at D={D}, target {target:.2f}{said}"
