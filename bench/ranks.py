"""What do negatives across ranks cost one of them? Counted where it runs: on gloo processes.

Bytes are what a rank sends when a collective goes round a ring of all ranks. M queries and N
passages of each rank, D dims, fp32.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast import in_batch_rankpo_loss, info_nce_loss
from rankpo_fast.ops import info_nce, ranks
from rankpo_kernels.chunked import in_batch
from rankpo_kernels.problem import DIRECTIONS, PQ, QP

from .apart import server
from .measure import exponent
from .processes import answered, processes
from .questions import OURS, Question, Result, Row, Settings, Shape

# where a product has its left factor; below autograd, as in an op, a matmul is not yet an mm
PRODUCTS = {"mm": 0, "matmul": 0, "addmm": 1, "addmm_": 1}
CASES: dict[str, Callable[..., Tensor]] = {
    "gather": info_nce_loss,
    "ring": partial(info_nce_loss, exchange="ring"),
    "symmetric": partial(info_nce_loss, directions=(QP, PQ)),
    "four directions": partial(info_nce_loss, directions=DIRECTIONS),
    "in-batch RankPO": in_batch_rankpo_loss,
}


class Account(TorchDispatchMode):
    """Counts flops of products, messages and bytes sent."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.messages = self.bytes = 0
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._patch(ranks, "_all_gather", lambda out, x, group: (group.size() - 1) * x.nbytes)
        self._patch(dist, "all_to_all_single", self._all_to_all)
        self._patch(c10d, "all_reduce", lambda x, op, of: 2 * x.nbytes * (1 - 1 / of.size()))
        self._patch(dist, "batch_isend_irecv", self._point_to_point)
        launcher = info_nce.launcher_of
        self._put(info_nce, "launcher_of", lambda *of: self._watched(launcher(*of)))
        self._put(in_batch, "in_batch", self._watched(in_batch.in_batch))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def _patch(self, where: Any, name: str, size: Callable[..., float]) -> None:
        original = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.messages += 1
            self.bytes += round(size(*args, **kwargs))
            return original(*args, **kwargs)

        self._put(where, name, counted)

    def _put(self, where: Any, name: str, instead: Callable) -> None:
        self.patches.enter_context(mock.patch.object(where, name, instead))

    def _all_to_all(
        self,
        out: Tensor,
        x: Tensor,
        out_rows: Sequence[int],
        rows: Sequence[int],
        group: dist.ProcessGroup,
    ) -> float:
        return x.nbytes * (1 - rows[group.rank()] / sum(rows)) if x.numel() else 0

    def _point_to_point(self, messages: Sequence[dist.P2POp]) -> int:
        return sum(message.tensor.nbytes for message in messages if message.op is dist.isend)

    def _watched(self, launch: Callable) -> Callable:
        """A mode does not see into a custom op."""

        def watched(*args: Any) -> Any:
            with self.mode():
                return launch(*args)

        return watched

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (left := PRODUCTS.get(func.overloadpacket.__name__)) is not None:
            self.flops += 2 * out.numel() * args[left].shape[-1]
        return out


class Traffic(NamedTuple):
    """What a rank computes and sends."""

    flops: int
    messages: int
    bytes: int


def count(M: int, N: int, D: int, case: str) -> tuple[Traffic, Traffic]:
    """Of this rank's forward, and of its backward."""
    q, p = (torch.randn(n, D, requires_grad=True) for n in (M, N))
    with Account() as account:
        loss = CASES[case](q, p, process_group=dist.group.WORLD)
        forward = Traffic(account.flops, account.messages, account.bytes)
        loss.backward()
        whole = Traffic(account.flops, account.messages, account.bytes)
    return forward, Traffic(*(b - a for a, b in zip(forward, whole, strict=True)))


# --- the question ---

NAME, ASKS = "scaling over ranks", __doc__.splitlines()[0].partition("? ")[0] + "?"
IMPLEMENTATIONS = {f"{OURS}, {case}": case for case in CASES}
SIZES = {"quick": (1, 2), "default": (1, 2, 4), "full": (1, 2, 4)}  # ranks


def answer(shape: Shape, settings: Settings) -> Result:
    counts: dict[str, list[Traffic]] = {
        name: [] for name in IMPLEMENTATIONS if settings.takes(name)
    }
    method = server().get_start_method()
    for size in SIZES[settings.level]:
        with tempfile.TemporaryDirectory() as place, processes(size, Path(place), method) as ask:
            for name, of_sizes in counts.items():
                passes = answered(ask(count, **shape, case=IMPLEMENTATIONS[name]))[0]
                of_sizes.append(Traffic(*map(sum, zip(*passes, strict=True))))
    rows = (_row(name, shape, settings.level, of_sizes) for name, of_sizes in counts.items())
    about = {"MiB of a rank's passages": 4 * shape["N"] * shape["D"] / 2**20}
    return Result(NAME, "scaling", ASKS, shape, tuple(rows), about=about)


def _row(name: str, shape: Shape, level: str, counts: list[Traffic]) -> Row:
    sizes = SIZES[level]
    products = [shape["M"] * size * shape["N"] * shape["D"] for size in sizes]
    return Row(
        name, axis="ranks", sizes=sizes, messages=tuple(each.messages for each in counts),
        work=tuple(each.flops / product for each, product in zip(counts, products, strict=True)),
        sent=tuple(each.bytes / 2**20 for each in counts),
        exponent=exponent(sizes, [each.bytes for each in counts]),
    )  # fmt: skip


QUESTIONS = [
    Question(
        NAME, "scaling", ASKS, lambda device, level: [{"M": 256, "N": 512, "D": 64}], answer,
        lambda device: list(IMPLEMENTATIONS),
    )
]  # fmt: skip
