"""The Triton launcher of InfoNCE under test: run where it can be, compared, and spied on."""

import contextlib
import tempfile
from dataclasses import replace
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter, jit

from rankpo_kernels.problem import InfoNCEProblem, InfoNCEResult, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.blocks import padded
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.tiles import Tiles
from support.gates import error
from support.info_nce_problems import GRID, D, N, exact, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(16, 32, 16, num_warps=4, num_stages=1, GROUP=2)
ROOMY = InfoNCESettings(normalize=True, workspace_bytes=1 << 20)
ALL = (True,) * 4
TIGHT = (1.5e-6, 5e-6, 4e-5)  # five times what was measured, in fp32
LOW = {torch.bfloat16: (4e-6, 8e-3, 1e-4), torch.float16: (4e-6, 2e-3, 1e-4)}
PIPELINES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16-stored": (torch.bfloat16, {"stored": True}),
    "bf16-few-launches": (torch.bfloat16, {"few": True}),
    "fp16": (torch.float16, {}),
}


def on_device(x):
    """Tensors, alone or in relations, to where the kernels take them; numbers stay."""
    if isinstance(x, Relations):
        return Relations(*map(on_device, x))
    return x if x is None or not x.dim() else x.to(DEVICE)


def launch(
    q, p, own, relations, settings, weights, *, scale, needs=ALL, tiles=SMALL, stored=False,
    few=False,
) -> InfoNCEResult:  # fmt: skip
    """Results on the CPU; the scale is a tensor on the device, as one that is learned."""
    q, p, own, relations, weights = map(on_device, (q, p, own, relations, weights))
    scale = torch.tensor(scale, device=DEVICE)
    result = info_nce(
        InfoNCEProblem(q, p, own, scale, relations, settings), weights, needs,
        tiles=tiles, stored=stored, few=few,
    )  # fmt: skip
    return InfoNCEResult(*(x if x is None else x.cpu() for x in result))


def rows_fit(R: int, N: int, dtype: torch.dtype, tiles: Tiles = SMALL) -> int:
    """The workspace of R rows of the plain form."""
    return R * (12 * triton.cdiv(N, tiles.BLOCK_N) + padded(N) * dtype.itemsize)


def named(name: str, dtype=torch.float32, rows: int = 16):
    """A case of GRID, whose gradients have chunks of so many rows."""
    names, options = GRID[name]
    levels = len(options.get("matryoshka_dims", (D,)))
    return *problem(*names, dtype=dtype), replace(
        ROOMY, workspace_bytes=rows * levels * padded(N) * 4, **options
    )


def option_case(name: str, dtype: torch.dtype):
    """For a card: tiles of 128 x 128 and smaller, none full at the end; gradients in chunks."""
    M, N, D = 150, 200, 72
    names, options = GRID[name]
    levels = len(options.get("matryoshka_dims", (D,)))
    settings = replace(ROOMY, workspace_bytes=64 * levels * N * 4, **options)
    for seed in range(20 if settings.false_negative_margin is not None else 1):
        case = *problem(*names, M=M, N=N, D=D, dtype=dtype, seed=seed), settings
        try:
            if settings.false_negative_margin is not None:
                exact(*case, torch.ones(M), scale=20.0)
        except AssertionError:  # a similarity so near a margin that rounding decides
            continue
        return case
    raise AssertionError("no such draw")


def gradients(result: InfoNCEResult) -> list[torch.Tensor]:
    return [x for x in result[3:7] if x is not None]


def uneven(M: int) -> torch.Tensor:
    """Weights of queries, one of them zero."""
    weights = torch.linspace(0.5, 2, M)
    weights[1:2] = 0
    return weights


def assert_equals_definition(
    case, bounds, *, scale=20.0, tiles=SMALL, weights=None, **how
) -> InfoNCEResult:  # fmt: skip
    """Bounds are those of the loss, of gradients and of the scale's, which is a difference."""
    weights = uneven(len(case[0])) if weights is None else weights
    truth = exact(*case, weights, scale=scale)
    result = launch(*case, weights, scale=scale, tiles=tiles, **how)
    pairs = zip([result.loss_M, *gradients(result)], [truth[0], *truth[1]], strict=True)
    loss, *grads, of_scale = [error(got, want) for got, want in pairs]
    assert loss < bounds[0] and max(grads) < bounds[1] and of_scale < bounds[2]
    return result


def spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy with 2^30 elements from one index of a dim to the next, in a file of holes; as many
    lie before it as an offset of 2^31 goes back where 32 bits are too few for it."""
    strides = list(x.contiguous().stride())
    strides[dim] = 2**30
    start = 2**31
    size = start + max(0, x.shape[dim] - 1) * 2**30 + x.numel()
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(file.name, shared=True, size=size, dtype=x.dtype)
    return memory.as_strided(x.shape, strides, start).copy_(x)


@contextlib.contextmanager
def launches():
    """The names of the kernels that are launched, in order."""
    names = []
    runner = interpreter.GridExecutor if triton.knobs.runtime.interpret else jit.JITFunction
    method = "__call__" if triton.knobs.runtime.interpret else "run"
    launch = getattr(runner, method)

    def noted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    with mock.patch.object(runner, method, noted):
        yield names


class Work(TorchDispatchMode):
    """The torch ops that are kernels on a GPU, and the elements of the largest tensor.

    Not allocations and views, nor the storages that the interpreter copies as bytes.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "set_", "_local_scalar"))):
            self.ops.append(name)
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:
                self.largest = max(self.largest, x.numel())
        return out


SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for a device, except for `known`, which it has."""

    def __init__(self, *known):
        super().__init__()
        self.known = known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        of_known = args and any(args[0] is x for x in self.known)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if not of_known and (name in SYNCS or unsized):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)
