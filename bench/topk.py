"""What does exact top-k cost beyond its product of matrices, and what memory with a corpus on disk?

    python -m bench.topk [--queries 2000] [--passages 200000] [--dims 384] [--k 100]
    python -m bench.topk --on_disk --queries 500 --passages 1000000

In memory: `search` and the same products alone, block by block into one buffer, in turns, on one
thread; seconds of CPU time, and their ratio. The first queries' results are held against a stable
sort of all their scores; one passage in a hundred stands twice, so that scores are equal.

On the disk: fp16 as `--index_dir` has them, read by memory mapping, in a process of its own.
"""

import argparse
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.retrieval.search import search

from .apart import in_a_process
from .measure import mark_resident, peak_resident, status_bytes

CHUNK = 4096  # `search`'s own
ROUNDS, CHECKED, WRITTEN = 5, 32, 1 << 16
MIB = 2**20


def vectors(rows: int, dims: int, seed: int) -> Tensor:
    """Of length 1."""
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)))


def products(queries: Tensor, corpus: Tensor) -> None:
    """All scores, each block over the one before."""
    buffer = queries.new_empty(min(CHUNK, len(queries)) * min(CHUNK, len(corpus)))
    for part in queries.split(CHUNK):
        for block in corpus.split(CHUNK):
            size = len(part), len(block)
            torch.mm(part, block.T, out=buffer[: size[0] * size[1]].view(size))


def sorted_all(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the first queries: the k best of all their scores, equal ones by their rows."""
    part = queries[:CHUNK]  # products of other shapes would round otherwise
    scores = torch.cat([(part @ block.T)[:CHECKED] for block in corpus.split(CHUNK)], dim=1)
    found = scores.sort(dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


def in_memory(m: int, n: int, dims: int, k: int) -> str:
    torch.set_num_threads(1)
    queries, corpus = vectors(m, dims, 0), vectors(n, dims, 1)
    corpus[n // 2 : n // 2 + n // 100] = corpus[: n // 100]
    alone, whole = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        products(queries, corpus)
        between = time.process_time()
        found = search(queries, corpus, k)
        alone.append(between - began)
        whole.append(time.process_time() - between)
    for ours, expected in zip(found, sorted_all(queries, corpus, k), strict=True):
        assert torch.equal(ours[:CHECKED], expected), "not what sorting all scores finds"
    ratios = [ours / plain for ours, plain in zip(whole, alone, strict=True)]
    return (f"{m:,} queries, {n:,} passages, {dims} dims, k = {k}, one thread: the products alone "
            f"{statistics.median(alone):.2f} s, search {statistics.median(whole):.2f} s of CPU "
            f"time; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) of {ROUNDS}; equal to sorting all scores")  # fmt: skip


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    own: int  # bytes at the peak, above what the process began with
    resident: int  # with pages of the file, which the system takes back where it needs them


def write_vectors(path: Path, n: int, dims: int) -> None:
    file = np.lib.format.open_memmap(path, "w+", np.float16, (n, dims))
    for start in range(0, n, WRITTEN):
        rows = min(WRITTEN, n - start)
        file[start : start + rows] = vectors(rows, dims, 1 + start).numpy()
    file.flush()


def searched(path: Path, m: int, k: int) -> Cost:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*not writable")
    corpus = torch.from_numpy(np.load(path, mmap_mode="r"))
    queries = vectors(m, corpus.shape[1], 0)
    search(queries, corpus[:CHUNK], k)  # libraries allocate once
    resident, own = mark_resident(), status_bytes("RssAnon")
    peak, done = own, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, status_bytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    began, began_cpu = time.perf_counter(), time.process_time()
    search(queries, corpus, k)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    done.set()
    thread.join()
    return Cost(seconds, cpu_seconds, peak - own, peak_resident() - resident)


def on_disk(m: int, n: int, dims: int, k: int) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vectors.npy"
        write_vectors(path, n, dims)
        size = path.stat().st_size
        cost = in_a_process(searched, path, m, k)
    if isinstance(cost, str):
        raise SystemExit(cost)
    return (f"{m:,} queries, {n:,} passages, {dims} dims in fp16 on the disk ({size / MIB:,.0f} "
            f"MiB), k = {k}, one thread: {cost.seconds:.1f} s, {cost.cpu_seconds:.1f} s of CPU "
            f"time; {cost.own / MIB:,.0f} MiB of memory, {cost.resident / MIB:,.0f} MiB with the "
            f"file's pages")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--on_disk", action="store_true")
    options = parser.parse_args(argv)
    measured = on_disk if options.on_disk else in_memory
    print(measured(options.queries, options.passages, options.dims, options.k))


if __name__ == "__main__":
    main()
