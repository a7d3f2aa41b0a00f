"""What one rank of a node reads, the others of that node map into their memory.

Rows and tokens become arrays of integers, which go into one file: its pages are there once for all
ranks of the node, and of those that a rank never touches not even that. The file has no name, so
that the system takes it back with the last process, however that ends; others open it through
/proc. Where they cannot, each rank reads for itself.
"""

import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.files import tensor_bytes
from rankpo_fast.paths import reason
from rankpo_fast.ranks import Ranks

Value = TypeVar("Value")
ALIGNED = 64  # bytes, as torch has it
END = 16  # bytes: where the structure begins, and how long it is


class Node:
    """The ranks of one node, of which the first reads. Made by `reading_once`."""

    def __init__(self, file: IO[bytes] | None, path: str | None):
        self._file, self._path = file, path

    def given(self) -> Any:
        """What the rank that reads has handed over; None: this rank must read for itself."""
        if self._file is not None or self._path is None:
            return None
        try:
            return load(self._path) if os.stat(self._path).st_size > 0 else None
        except OSError as error:
            warnings.warn(f"{self._path}: {reason(error)}: a rank reads rows for itself that "
                          f"another has read, and holds them once more", stacklevel=2)  # fmt: skip
            return None

    def hand(self, value: Value) -> Value:
        """Give the others a value made of plain objects, arrays and tensors on the host; returns
        it as they have it."""
        if self._file is None or self._path is None:
            return value
        try:
            save(value, self._file)
            return load(self._path)
        except OSError as error:
            self._file.truncate(0)
            warnings.warn(f"rows cannot be handed to other ranks ({reason(error)}): each reads for "
                          f"itself", stacklevel=2)  # fmt: skip
            return value


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


def _file(directory: Path | None) -> IO[bytes] | None:
    for place in [directory, None]:
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=place)
        except OSError:  # which check_cache says of the cache
            continue
    return None


# --- the file: arrays one after the other, then all else, pickled, with their places ---


def save(value: Any, file: IO[bytes]) -> None:
    """OSError where the disk refuses."""
    structure = io.BytesIO()
    _Pickler(structure, file).dump(value)
    start = file.tell()
    file.write(structure.getbuffer())
    file.write(np.array([start, structure.tell()], np.int64).tobytes())
    file.flush()


def load(path: str) -> Any:
    """With arrays that are the file's pages, of which a change stays this process' own; raises
    OSError."""
    pages = np.asarray(np.memmap(path, np.uint8, mode="c"))
    start, length = pages[-END:].view(np.int64).tolist()
    return _Unpickler(io.BytesIO(pages[start : start + length].tobytes()), pages).load()


class _Pickler(pickle.Pickler):
    def __init__(self, structure: IO[bytes], file: IO[bytes]):
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
        self._file.write(bytes(-self._file.tell() % ALIGNED))
        start = self._file.tell()
        if tensor.numel():
            self._file.write(tensor_bytes(tensor))
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
