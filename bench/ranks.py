"""What negatives across ranks cost one of them, counted where it runs: on gloo processes.

`python -m bench.ranks [--M 256] [--N 512] [--D 64] [--ranks 1 2 4]`

Bytes are what a rank sends when a collective goes round a ring of all ranks. M queries and N
passages of each rank, D dims, fp32.
"""

import argparse
import contextlib
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast import in_batch_rankpo_loss, info_nce_loss
from rankpo_fast.ops import info_nce, ranks
from rankpo_kernels import pointwise
from rankpo_kernels.objective import DIRECTIONS

from .processes import answered, processes

# where a product has its left factor; below autograd, as in an op, a matmul is not yet an mm
PRODUCTS = {"mm": 0, "matmul": 0, "addmm": 1, "addmm_": 1}
CASES = {
    "gather": info_nce_loss,
    "ring": partial(info_nce_loss, exchange="ring"),
    "symmetric": partial(info_nce_loss, directions=DIRECTIONS[:2]),
    "four directions": partial(info_nce_loss, directions=DIRECTIONS),
    "in-batch RankPO": in_batch_rankpo_loss,
}


class Account(TorchDispatchMode):
    """Counts flops of products, messages and bytes sent."""

    def __init__(self):
        super().__init__()
        self.flops = self.messages = self.bytes = 0
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        self._patch(ranks, "_all_gather", lambda out, x, group: (group.size() - 1) * x.nbytes)
        self._patch(dist, "all_to_all_single", self._all_to_all)
        self._patch(c10d, "all_reduce", lambda x, op, of: 2 * x.nbytes * (1 - 1 / of.size()))
        self._patch(dist, "batch_isend_irecv", self._point_to_point)
        launcher = info_nce._launcher
        self._put(info_nce, "_launcher", lambda *of: self._watched(launcher(*of)))
        self._put(pointwise, "pair_losses", self._watched(pointwise.pair_losses))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def _patch(self, where, name: str, size) -> None:
        original = getattr(where, name)

        def counted(*args, **kwargs):
            self.messages += 1
            self.bytes += round(size(*args, **kwargs))
            return original(*args, **kwargs)

        self._put(where, name, counted)

    def _put(self, where, name: str, instead) -> None:
        self.patches.enter_context(mock.patch.object(where, name, instead))

    def _all_to_all(self, out, x, out_rows, rows, group) -> float:
        return x.nbytes * (1 - rows[group.rank()] / sum(rows)) if x.numel() else 0

    def _point_to_point(self, messages) -> int:
        return sum(message.tensor.nbytes for message in messages if message.op is dist.isend)

    def _watched(self, launch):
        """A mode does not see into a custom op."""

        def watched(*args):
            with self.mode():
                return launch(*args)

        return watched

    @contextlib.contextmanager
    def mode(self):
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (left := PRODUCTS.get(func.overloadpacket.__name__)) is not None:
            self.flops += 2 * out.numel() * args[left].shape[-1]
        return out


def count(M: int, N: int, D: int, case: str) -> list[tuple[int, int, int]]:
    """(flops, messages, bytes) of this rank's forward, and of its backward."""
    q, p = (torch.randn(n, D, requires_grad=True) for n in (M, N))
    with Account() as account:
        loss = CASES[case](q, p, process_group=dist.group.WORLD)
        forward = account.flops, account.messages, account.bytes
        loss.backward()
        whole = account.flops, account.messages, account.bytes
    return [forward, tuple(b - a for a, b in zip(forward, whole, strict=True))]


def table(M: int, N: int, D: int, sizes: list[int]) -> str:
    lines = [f"{'':16}{'ranks':>6}{'flops/MND':>11}{'MB sent':>10}{'backward':>10}{'messages':>10}"]
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory, processes(size, Path(directory)) as ask:
            for case in CASES:
                forward, backward = answered(ask(count, M, N, D, case))[0]
                flops = (forward[0] + backward[0]) / (M * N * size * D)
                lines.append(
                    f"{case:16}{size:6}{flops:11.2f}{forward[2] / 1e6:10.3f}"
                    f"{backward[2] / 1e6:10.3f}{forward[1] + backward[1]:10}"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__)
    for name, default in (("M", 256), ("N", 512), ("D", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print("flops over M x all N x D; MB that a rank sends forward and backward, of these")
    print(f"{4 * args.N * args.D / 1e6:.3f} MB are its passages in fp32\n")
    print(table(args.M, args.N, args.D, args.ranks))


if __name__ == "__main__":
    main()
