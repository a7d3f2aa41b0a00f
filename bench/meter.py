"""What a call would launch on a GPU, told without one: the call runs on tensors that hold nothing
(meta, or fake for the CPU's form), Triton's and the native library's launches are noted instead.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Self
from unittest import mock

import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from rankpo_kernels.chunked import native

FACTORS = {"mm": 0, "addmm": 1, "addmm_": 1}  # where a product has its left factor


class Launch(NamedTuple):
    """Of a kernel or a torch op."""

    name: str
    flops: int
    bytes: int


class Meter(TorchDispatchMode):
    """Counts what would run on the GPU: names, flops and bytes of launches, the peak of memory."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.held = self.peak = 0
        self.storages = {x.untyped_storage()._cdata for x in inputs}
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        patch = lambda *of: self.patches.enter_context(mock.patch.object(*of))  # noqa: E731
        patch(KernelInterface, "__getitem__", lambda kernel, grid: self._launcher(kernel))
        patch(native, "usable", lambda *tensors: True)
        for name in ("info_nce_rows", "inverse_norms", "tangent_"):
            patch(
                native, name,
                lambda *args, name=name, **more: self._launched(name, 0, (args, more)),
            )  # fmt: skip
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def _launched(self, name: str, flops: int, taken: Any, again: int = 0) -> None:
        self.launches.append(Launch(name, flops, again + _bytes(taken)))

    def _launcher(self, kernel: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            name, of = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            taken, flops, again = of, 0, 0
            if name == "pairs_kernel":  # writes one element a row
                taken = of | {"stored": of["stored"]._replace(exponentials=None)}
            elif name == "finished_kernel":
                sides = [side for side in (of["first"], of["second"]) if side.R]
                flops = sum(2 * side.R * side.N * of["D"] for side in sides)
            elif name == "rest_kernel":
                # what tells that no row is left, as a rule
                taken = of["row_slopes"] if of["rest_R"] is None else of["rest_R"]
            elif "GROUP" in of:  # a score kernel
                second = "REFERENCE_DIMS" if "REFERENCE_DIMS" in of else "GUIDE_DIMS"
                D = of["D"] if "D" in of else of["DIMS"][-1]
                flops = 2 * of["R"] * of["N"] * (D + sum(of.get(second, ())))
                walks = triton.cdiv(of["R"], of["BLOCK_M"] * of["GROUP"])
                again = (walks - 1) * of["b"].x.nbytes
            self._launched(name, flops, taken, again)

        return launch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        for x in _tensors(out):
            self._hold(x)
        if _tensors(out) and not (
            func.is_view or name.startswith(("empty", "new_empty", "detach"))
        ):
            product = FACTORS.get(name)
            flops = 0 if product is None else 2 * out.numel() * args[product].shape[-1]
            self._launched(name, flops, (args, out))
        return out

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) not in self.storages:
            self.storages.add(key)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.held -= size


def _tensors(tree: Any) -> list[Tensor]:
    """Those that stand for memory; a real tensor is a number on the host."""
    leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
    return [x for x in leaves if x.is_meta or isinstance(x, FakeTensor)]


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in _tensors(tree))
