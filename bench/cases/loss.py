"""What the cases of losses share: how a case becomes a question, data, lower bounds, runs.

M queries, N passages, B pairs, D dims.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast.errors import InputError

from ..gpu import watching
from ..measure import Case, Run, measure, noting, relative_error
from ..peers import SCALE
from ..questions import NOT_INSTALLED, Question, Result, Row, Settings, Shape

DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # of a shape that names none
# Of loss and gradients against fp64, at a temperature of 0.02: rounding of the logits, twice for
# gradients; where gradients are stored in 16 bits, theirs.
GATE = {
    torch.float64: 1e-11, torch.float32: 2 * (2e-6 + 8 * 2**-24 * SCALE),
    torch.bfloat16: 8e-3, torch.float16: 2e-3,
}  # fmt: skip
SCORE_BYTES = 2**32  # of the lower bound's S
Shapes = Mapping[str, Mapping[str, Sequence[tuple]]]  # by device and level: sizes, then a dtype


@dataclass(frozen=True)
class LossQuestion(Question):
    """`case(shape, device)` is what `answer` measures."""

    case: Callable[[Shape, str], Case]
    axes: str

    def shape(self, text: str, device: str) -> Shape | None:
        """Of 4096x4096x1024 or 4096x4096x1024:float16; None where the axes are others."""
        sizes, _, dtype = text.partition(":")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise InputError(f"--shapes: {text!r} is no shape like 4096x4096x1024")
        if dtype and getattr(torch, dtype, None) not in GATE:
            raise InputError(f"--shapes: {text!r}: dtype {dtype!r} is no float type of the losses")
        numbers = [int(size) for size in sizes.split("x")]
        if len(numbers) != len(self.axes):
            return None
        shape = named(self.axes, [*numbers, *([dtype] if dtype else [])], device)
        if shape.get("N", 0) % shape.get("M", 1):
            raise InputError(f"--shapes: {text!r}: N is no multiple of M")
        return shape


def loss_question(
    name: str,
    asks: str,
    axes: str,
    shapes: Shapes,
    case: Callable[[Shape, str], Case],
    implementations: Iterable[str],
) -> LossQuestion:
    """axes: the letters of a shape's sizes, "MND" or "BD"."""
    names = tuple(implementations)

    def shapes_of(device: str, level: str) -> list[Shape]:
        return [named(axes, shape, device) for shape in shapes[device][level]]

    def answer(shape: Shape, settings: Settings) -> Result:
        try:
            asked = case(shape, settings.device)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("rankpo"):
                raise
            note = f"{error.name} {NOT_INSTALLED}"  # which ours adapts to
            return Result(name, "loss", asks, shape, (Row(name, note),))
        gate = None if math.isinf(asked.gate) else asked.gate
        with watching(settings.device) as readings:
            rows = measure(asked, settings)
        if readings.throttled:  # implementations take turns: it was everybody's
            rows = tuple(
                replace(row, throttled=readings.throttled if row.seconds else None) for row in rows
            )
        return Result(
            name, "loss", asks, shape, rows, asked.lower_bound, asked.flops, asked.bytes, gate,
            readings.said,
        )  # fmt: skip

    return LossQuestion(name, "loss", asks, shapes_of, answer, lambda _: names, case, axes)


def named(axes: str, shape: Sequence, device: str) -> Shape:
    """(8192, 8192, 1024) -> {"M": 8192, "N": 8192, "D": 1024, "dtype": "float32"}."""
    sizes, dtype = shape[: len(axes)], shape[len(axes) :]
    return dict(zip(axes, sizes, strict=True)) | {"dtype": dtype[0] if dtype else DTYPE[device]}


def dtype_of(shape: Shape) -> torch.dtype:
    return getattr(torch, shape["dtype"])


def draw(
    M: int, N: int, D: int, device: str, dtype: torch.dtype, *, converged: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, passages in groups of N // M with the positive first, labels; vectors of length 1.

    Fresh: positives are about as similar as the hardest of the others. Converged: at 0.9, where a
    finished training leaves them, and all others far below.
    """
    q, p = torch.randn(M, D, device=device), torch.randn(N, D, device=device)
    labels = torch.arange(M, device=device) * (N // M)
    p[labels] = q + math.sqrt(1 / 0.81 - 1) * p[labels] if converged else p[labels] + 0.1 * q
    q, p = (F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (q, p))
    return q, p, labels


def forward_backward(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Run:
    """(loss, gradients of the leaves)."""

    def run() -> Sequence[Tensor]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def forward(loss: Callable[[], Tensor]) -> Run:
    @torch.no_grad()
    def run() -> Sequence[Tensor]:
        return (loss(),)

    return run


def exact(leaves: Iterable[Tensor]) -> list[Tensor]:
    """The same numbers in fp64."""
    return [x.detach().double().requires_grad_() for x in leaves]


@dataclass(frozen=True)
class Errors(Mapping[str, float]):
    """Of each implementation against what `truth` says for it, taken when it is asked for; NaN for
    those that do not run."""

    runs: Mapping[str, Run]
    truth: Callable[[str], Sequence[Tensor]]
    found: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        if name not in self.found:
            self.found[name] = math.nan
            with noting(name, {}):
                self.found[name] = relative_error(self.runs[name](), self.truth(name))
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)


def beside_gemms(
    count: int, q: Tensor, p: Tensor, leaves: Iterable[Tensor], runs: Mapping[str, Run], *,
    backward: bool = True, **errors: Any,
) -> Case:  # fmt: skip
    """Runs that read the leaves, and make gradients of them if `backward`, beside their lower bound
    of so many products of q [M, D] and p [N, D]; `errors` are errors, converged and gate of the
    Case."""
    lower_bound = f"{count} GEMM{'s' * (count > 1)}"
    moved = sum(leaf.nbytes for leaf in leaves)
    return Case(
        q.device.type,
        {lower_bound: gemms(count, q, p, backward=backward), **runs},
        lower_bound,
        flops=2 * count * len(q) * len(p) * q.shape[1],
        bytes=moved * (1 + backward),
        keep_bytes=moved if backward else 0,
        dtype=q.dtype,
        **errors,
    )


def gemms(
    count: int, q: Tensor, p: Tensor, *, backward: bool = True, most: int = SCORE_BYTES
) -> Run:
    """The lower bound, into buffers that exist: dQ = S P and dP = S'Q, and S = QP' for the others;
    by rows where S has more bytes than `most`, so that it needs no more of a GPU than that."""
    q, p = q.detach(), p.detach()
    rows = max(1, min(len(q), most // (len(p) * q.element_size())))
    scores = q.new_empty(rows, len(p))
    dq, dp = torch.empty_like(q), torch.empty_like(p)

    def run() -> Sequence[Tensor]:
        for number, (of_q, of_dq) in enumerate(zip(q.split(rows), dq.split(rows), strict=True)):
            s = scores[: len(of_q)]
            for _ in range(count - 2 * backward):
                torch.mm(of_q, p.T, out=s)
            if backward:
                torch.mm(s, p, out=of_dq)
                torch.addmm(dp, s.T, of_q, beta=min(number, 1), out=dp)
        return (dq, dp)

    return run
