"""What one rank of a node reads, the others of that node map into their memory.

Rows and tokens become arrays of integers, which go into one file: its pages are there once for all
ranks of the node, and of those that a rank never touches not even that. The file has no name, so
that the system takes it back with the last process, however that ends; others open it through
/proc (those that cannot are readers themselves: `Ranks.reader`). What has been read is hashed by
then, and the hashes go with it.
"""

import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data import sources
from rankpo_fast.data.files import tensor_bytes
from rankpo_fast.paths import reason
from rankpo_fast.ranks import Ranks

Value = TypeVar("Value")
ALIGNED = 64  # bytes, as torch has it
END = 16  # bytes: where the structure begins, and how long it is


class Node:
    """The ranks of one node, of which the first reads. Made by `reading_once`."""

    def __init__(self, file: FileIO | None, path: str | None):
        self._file, self._path = file, path

    def given(self) -> Any:
        """What the rank that reads has handed over; None: this one is it, or nothing was."""
        if self._file is not None or self._path is None or os.stat(self._path).st_size == 0:
            return None
        value, digests = load(self._path)
        sources.keep_digests(digests)
        return value

    def hand(self, value: Value) -> Value:
        """Give the others a value made of plain objects, arrays and tensors on the host; returns
        it as they have it."""
        if self._file is None or self._path is None:
            return value
        told = value, sources.digests()
        try:
            save(told, self._file)
        except OSError as error:
            warnings.warn(f"rows for other ranks are kept in memory ({reason(error)})",
                          stacklevel=2)  # fmt: skip
            with open(os.memfd_create("rankpo-fast"), "r+b", buffering=0) as memory:
                save(told, memory)
                os.dup2(memory.fileno(), self._file.fileno())
        return load(self._path)[0]


@contextmanager
def reading_once(ranks: Ranks, directory: Path | None, *, wanted: bool = True) -> Iterator[Node]:
    """Around `Ranks.first_ahead`; all ranks must call it.

    Args:
        directory: for the file, which may be large; None: the system's for temporary ones.
        wanted: whether ranks share what is read at all.
    """
    if ranks.size == 1:
        yield Node(None, None)
        return
    file = _file(directory) if wanted and ranks.reads else None
    try:
        path = None if file is None else f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield Node(file, ranks.objects(path)[ranks.reader])
    finally:
        if file is not None:
            file.close()


def read_once(ranks: Ranks, directory: Path | None, make: Callable[[], Value]) -> Value:
    """What the first rank of each node makes, on all of its ranks; all must call it."""
    with reading_once(ranks, directory) as node, ranks.first_ahead():
        given: Value | None = node.given()
        return node.hand(make()) if given is None else given


def _file(directory: Path | None) -> FileIO:
    """Not buffered: what a full disk refuses must not come again when it is closed."""
    for place in [directory, None]:
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=place, buffering=0)
        except OSError:  # which check_cache says of the cache
            continue
    return open(os.memfd_create("rankpo-fast"), "r+b", buffering=0)


# --- the file: arrays one after the other, then all else, pickled, with their places ---


def save(value: Any, file: FileIO) -> None:
    """OSError where the disk refuses."""
    structure = io.BytesIO()
    _Pickler(structure, file).dump(value)
    start = file.tell()
    _write(file, structure.getbuffer())
    _write(file, np.array([start, structure.tell()], np.int64).tobytes())


def _write(file: FileIO, data: bytes | memoryview) -> None:
    """All of it: the system takes no more than 2 GB at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def load(path: str) -> Any:
    """With arrays that are the file's pages, of which a change stays this process' own; raises
    OSError."""
    pages = np.asarray(np.memmap(path, np.uint8, mode="c"))
    start, length = pages[-END:].view(np.int64).tolist()
    return _Unpickler(io.BytesIO(pages[start : start + length].tobytes()), pages).load()


class _Pickler(pickle.Pickler):
    def __init__(self, structure: IO[bytes], file: FileIO):
        super().__init__(structure, pickle.HIGHEST_PROTOCOL)
        self._file, self._places = file, dict[int, tuple[Any, Any]]()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor | np.ndarray):
            return None
        if id(value) not in self._places:  # the value goes with it, so that its id stays its own
            self._places[id(value)] = value, self._written(value)
        return self._places[id(value)][1]

    def _written(self, value: Tensor | np.ndarray) -> tuple[Any, ...]:
        if is_tensor := isinstance(value, Tensor):
            tensor = value
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(value))
        _write(self._file, bytes(-self._file.tell() % ALIGNED))
        start = self._file.tell()
        _write(self._file, tensor_bytes(tensor))
        return is_tensor, start, tensor.dtype, tuple(tensor.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, structure: IO[bytes], pages: np.ndarray):
        super().__init__(structure)
        self._pages = pages

    def persistent_load(self, place: tuple[Any, ...]) -> Tensor | np.ndarray:
        is_tensor, start, dtype, shape = place
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = torch.empty(shape, dtype=dtype)
        if size:
            tensor = torch.from_numpy(self._pages[start : start + size]).view(dtype).view(shape)
        return tensor if is_tensor else tensor.numpy()
