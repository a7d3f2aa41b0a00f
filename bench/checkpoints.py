"""How long does a step wait for its checkpoint, written beside the training or not?

    python -m bench.checkpoints [--device auto] [--times 5] [--directory DIR]

BERT base with AdamW, 1.2 GiB of weights and moments. A checkpoint is written from the run's own
tensors, as with `--background_saves false`; then copied to the host's memory, which is all that a
step waits for by default, and written from there, while products of matrices go on in this thread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import BertConfig, BertModel

from rankpo_fast.config import ComputeConfig
from rankpo_fast.ranks import Ranks
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.allocator import freed_memory_kept
from rankpo_fast.train.background import HostCopy, begun
from rankpo_fast.train.optim import Optimizer

SIDE = 1024  # of the matrices


def trained(device: torch.device) -> tuple[nn.Module, Optimizer]:
    """After one update, so that there are moments."""
    model: nn.Module = BertModel(BertConfig())
    model.to(device)
    optimizer = Optimizer([torch.optim.AdamW(model.parameters(), fused=True)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.update([torch.zeros((), device=device)], 1e-3, 0.0)
    return model, optimizer


def rate(device: torch.device, more: Callable[[float], bool]) -> float:
    """Products a second, for as long as after so many seconds there are to be `more`."""
    matrix, count, began = torch.randn(SIDE, SIDE, device=device), 0, time.perf_counter()
    while more(time.perf_counter() - began):
        matrix.mm(matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count / (time.perf_counter() - began)


class Times(NamedTuple):
    """Of one checkpoint."""

    written: float  # seconds, while the step waits
    copied: float  # seconds
    slowed: float  # products while it is written from the copy: 1 is half as many a second


def measure(state: checkpoints.State, folder: Path, copy: HostCopy, ranks: Ranks) -> Times:
    began = time.perf_counter()
    checkpoints.save(folder, state, keep=1, ranks=ranks)
    written = time.perf_counter()
    copied = copy.of(state)
    done = time.perf_counter()
    if copied is None:
        raise SystemExit("the host has no room for a copy")
    alone = rate(ranks.device, lambda passed: passed < written - began)
    save = partial(checkpoints.save, folder, copied, keep=1, ranks=ranks)
    writing = begun(save, ranks.device)
    beside = rate(ranks.device, lambda _: not writing.done())
    writing.result()
    return Times(written - began, done - written, alone / beside - 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--times", type=int, default=5, help="two or more")
    parser.add_argument("--directory", help="whose disk is measured. [of temporary files]")
    options = parser.parse_args(argv)
    ranks = Ranks(ComputeConfig(device=options.device).torch_device())
    copy = HostCopy(ranks)
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as name,
        freed_memory_kept(ranks.device),
    ):
        model, optimizer = trained(ranks.device)
        found = []
        for step in range(options.times):
            state = checkpoints.state_of(step, model, optimizer, {}, 0, ranks=ranks)
            found.append(measure(state, Path(name), copy, ranks))
    written, later, slowed = (
        statistics.median(of) for of in zip(*found[1:], strict=True)
    )  # the first copy takes memory from the system
    print(f"{ranks.device}, {torch.get_num_threads()} threads; medians of {len(found) - 1}\n")
    print(f"a checkpoint written while a step waits: {written:.2f} s")
    print(f"copied: {later:.3f} s, {later / written:.1%} of that; first {found[0].copied:.3f} s")
    print(f"while the copy is written, a product takes {slowed:.0%} longer")


if __name__ == "__main__":
    main()
