"""What Triton's CPU interpreter gets wrong or does not look at, for tests of kernels without a GPU.

    exact_bf16()              tl.dot on bf16 and casts to it, exact
    shadow_memory(*tensors)   fails on addresses outside the tensors, and on races of programs
    grid_order(seed)          runs the programs of each grid in another order

All are context managers over `triton.runtime.interpreter`, of Triton 3.6 and 3.9 alike. Where
kernels are compiled they change nothing.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

BUILDER = interpreter.InterpreterBuilder
LAST_FIRST = -1  # a seed for `grid_order`


class OutOfBounds(AssertionError):
    """An address outside every tensor."""


class Race(AssertionError):
    """A result that depends on which program, or which lane, comes first."""


# bf16: the interpreter keeps it as uint16, multiplies these as integers and truncates casts.


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values, np.float32, order="C")
    bits = values.view(np.uint32)
    half = 0x7FFF + (bits >> 16 & 1)  # one more where the bit that is kept is odd
    rounded = (bits + half >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


@contextlib.contextmanager
def exact_bf16() -> Iterator[None]:
    """bf16 as tensor cores have it: exact products, sums in fp32, casts to the nearest even.

    Elementwise arithmetic in bf16 raises TypeError: the interpreter gets it wrong, and our kernels
    compute in fp32.
    """
    plain_dot, plain_cast = BUILDER.create_dot, BUILDER.cast_impl

    def create_dot(self, a, b, *rest):
        return plain_dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self, source, target):
        source = _widened(source)
        if target.scalar != tl.bfloat16:
            # a comparison's data are bool, though its handle keeps the dtype of what it compared
            same = source.dtype == target.scalar and source.data.dtype != bool
            return source if same else plain_cast(self, source, target)
        if source.dtype.scalar != tl.float32:
            source = plain_cast(self, source, tl.float32)
        return interpreter.TensorHandle(fp32_to_bf16(source.data), tl.bfloat16)

    def not_in_bf16(operation: Callable) -> Callable:
        def checked(self, first, *rest):
            if _is_bf16(first):
                raise TypeError("arithmetic in bf16: cast to fp32 after the load")
            return operation(self, first, *rest)

        return checked

    with mock.patch.multiple(
        BUILDER,
        create_dot=create_dot,
        cast_impl=cast_impl,
        unary_op=not_in_bf16(BUILDER.unary_op),
        binary_op=not_in_bf16(BUILDER.binary_op),
    ):
        yield


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle(bf16_to_fp32(handle.data), tl.float32)


class _Storage:
    """Who touched what in one storage. A unit is the smallest element of the tensors in it.

    Maps hold the number of a program for each unit, `several` for more than one of this launch and
    less than `first` for none: see `_Shadow.begin`.
    """

    def __init__(self, tensors: list[Tensor]):
        self.start = tensors[0].untyped_storage().data_ptr()
        self.stop = self.start + tensors[0].untyped_storage().nbytes()
        self.unit = min(t.element_size() for t in tensors)
        units = (self.stop - self.start) // self.unit
        self.inside = np.zeros(units + 1, bool)  # the last is where stray accesses are sent
        for t in tensors:
            self._open(t)
        self.readers, self.writers, self.atomics = (np.full(units, -1, np.int32) for _ in range(3))
        self.lane = np.empty(units, np.int32)

    def _open(self, t: Tensor) -> None:
        """Mark the elements of a view, and not the gaps between them."""
        width = t.element_size() // self.unit
        first = t.storage_offset() * width
        np.lib.stride_tricks.as_strided(
            self.inside[first:],
            (*t.shape, width),
            (*(stride * width for stride in t.stride()), 1),
        )[...] = True

    def units(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Indices into the maps; the last of `inside` for what is past the end, or does not start
        and end with a unit."""
        stray = self.inside.size - 1
        index, rest = np.divmod(addresses.astype(np.int64, copy=False) - self.start, self.unit)
        index[rest != 0] = stray
        if width % self.unit:
            index[:] = stray
        if width > self.unit:
            index = (index[:, None] + np.arange(width // self.unit)).ravel()
        return np.minimum(index, stray)


class _Shadow:
    """Checks each access of a launch against those of its other programs."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.given = tensors
        self.storages = _storages(tensors)
        self.first = self.several = -1

    def begin(self, name: str, grid: tuple[int, int, int]) -> None:
        """Number the programs of a launch on from the last one: launches follow one another, so
        what has a lower number is no race, and nothing needs clearing."""
        self.name, self.grid = name, grid
        self.first = self.several + 1
        self.several = self.first + math.prod(grid)

    @property
    def program(self) -> int:
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = self.grid
        return self.first + (x * ny + y) * nz + z

    def load(self, storage: _Storage, index: np.ndarray) -> None:
        self._alone("load", index, [storage.writers, storage.atomics])
        self._enter(storage.readers, index)

    def store(self, storage: _Storage, index: np.ndarray) -> None:
        lanes = np.arange(index.size, dtype=np.int32)
        storage.lane[index] = lanes
        if (met := storage.lane[index] != lanes).any():
            self._race("two lanes of one store meet", index[met])
        self._alone("store", index, [storage.readers, storage.writers, storage.atomics])
        storage.writers[index] = self.program

    def atomic(self, storage: _Storage, index: np.ndarray) -> None:
        self._alone("atomic", index, [storage.readers, storage.writers])
        self._enter(storage.atomics, index)

    def locate(self, kind: str, addresses: np.ndarray, width: int) -> tuple[_Storage, np.ndarray]:
        """The storage of all addresses of one access, and which of its units they are."""
        low = int(addresses.min())
        for storage in self.storages:
            if storage.start <= low < storage.stop:
                break
        else:
            raise OutOfBounds(f"{kind} at an address of no tensor, {self._where()}")
        # Past the end of it is outside, even where the block reaches another tensor.
        index = storage.units(addresses, width)
        if wrong := (~storage.inside[index]).sum():
            raise OutOfBounds(
                f"{kind} of {addresses.size} elements, {wrong} of them outside, {self._where()}"
            )
        return storage, index

    def _alone(self, kind: str, index: np.ndarray, others: list[np.ndarray]) -> None:
        me = self.program
        for other in others:
            seen = other[index]
            if (clash := (seen >= self.first) & (seen != me)).any():
                self._race(f"{kind} of what another program touches", index[clash])

    def _enter(self, visitors: np.ndarray, index: np.ndarray) -> None:
        seen, me = visitors[index], self.program
        visitors[index] = np.where((seen < self.first) | (seen == me), me, self.several)

    def _race(self, what: str, index: np.ndarray) -> None:
        raise Race(f"{what}, {index.size} times, first at offset {index[0]}, {self._where()}")

    def _where(self) -> str:
        return f"in program {interpreter.interpreter_builder.grid_idx} of {self.name}"


def _storages(tensors) -> list[_Storage]:
    groups: dict[int, list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            groups.setdefault(t.untyped_storage().data_ptr(), []).append(t)
    return [_Storage(group) for group in groups.values()]


def _tensors_of(arguments) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _tensors_of(argument)
        elif isinstance(base := getattr(argument, "base", argument), Tensor):  # or a descriptor
            yield base


@contextlib.contextmanager
def shadow_memory(*tensors: Tensor) -> Iterator[None]:
    """Fail where a kernel leaves the tensors, or where its result depends on luck.

    Raises OutOfBounds for an address that is no element of a tensor (gaps of a strided view are
    outside too), Race where a program touches what another one writes, unless both use atomics,
    and where lanes of one store meet. Without tensors, those are the arguments of each launch.
    An order that programs agree on by flags or locks in memory counts as a race all the same.
    """
    shadow = _Shadow(tensors)
    executor = interpreter.GridExecutor
    launch, set_grid_dim = executor.__call__, BUILDER.set_grid_dim

    def launched(self, *args, **kwargs):
        shadow.name = self.fn.__name__
        if not shadow.given:
            shadow.storages = _storages(_tensors_of([*args, *kwargs.values()]))
        try:
            return launch(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, OutOfBounds | Race):
                raise cause from None
            raise

    def sized(self, *grid):
        set_grid_dim(self, *grid)
        shadow.begin(shadow.name, grid)

    accesses = {
        name: _checked(getattr(BUILDER, name), shadow, *places) for name, places in ACCESSES.items()
    }
    with (
        mock.patch.object(executor, "__call__", launched),
        mock.patch.multiple(BUILDER, set_grid_dim=sized, **accesses),
    ):
        yield


# Every access to memory goes through one of these: kind, place of the pointers, of the mask.
ACCESSES = {
    "create_masked_load": ("load", 0, 1),
    "create_masked_store": ("store", 0, 2),
    "create_atomic_rmw": ("atomic", 1, 3),
    "create_atomic_cas": ("atomic", 0, None),
}


def _checked(access: Callable, shadow: _Shadow, kind: str, pointers: int, mask: int | None):
    check = getattr(shadow, kind)

    def checked(self, *args, **kwargs):
        handle = args[pointers]
        live = np.True_ if mask is None else args[mask].data
        addresses, live = np.broadcast_arrays(handle.data, live)
        if (addresses := addresses[live]).size:
            width = max(1, handle.get_element_ty().primitive_bitwidth // 8)
            check(*shadow.locate(kind, addresses, width))
        return access(self, *args, **kwargs)

    return checked


@contextlib.contextmanager
def grid_order(seed: int) -> Iterator[None]:
    """Run the programs of each launch in an order drawn from `seed`, never in the usual one;
    LAST_FIRST turns it round."""
    set_grid_dim, set_grid_idx = BUILDER.set_grid_dim, BUILDER.set_grid_idx
    order: list[int] = []

    def sized(self, *grid):
        set_grid_dim(self, *grid)
        order[:] = _permutation(math.prod(grid), seed)

    def placed(self, x, y, z):
        _, ny, nz = self.grid_dim
        rest, z = divmod(order[(x * ny + y) * nz + z], nz)
        set_grid_idx(self, *divmod(rest, ny), z)

    with mock.patch.multiple(BUILDER, set_grid_dim=sized, set_grid_idx=placed):
        yield


def _permutation(n: int, seed: int) -> list[int]:
    usual = list(range(n))
    if seed == LAST_FIRST:
        return usual[::-1]
    order, generator = usual.copy(), random.Random(seed)
    while n > 1 and order == usual:
        generator.shuffle(order)
    return order
