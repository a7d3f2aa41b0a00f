"""Files that are either whole or not there: temporary file beside them, fsync, rename.

Tensors too: what safetensors raises over a full disk or a broken file becomes an OSError here.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends without an error.

    Missing parent directories are made. After an error `path` is as it was and the temporary
    file is gone. OSError (no space, no permission) passes through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # as the umask wants it: see open_to_umask
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_to_disk(path.parent)  # the rename itself must reach the disk too


def open_to_umask(folder: Path) -> None:
    """Give the safetensors files in `folder` the mode that the umask gives new files: the library
    lets nobody but their owner read them."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex digits; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise as OSError, naming `path`, what safetensors raises inside over a disk or a file."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; OSError where the disk refuses."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file(tensors, path, metadata)


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file; OSError where there is none, or it is not whole."""
    from safetensors.torch import load_file

    with disk_errors(path):
        return load_file(path)


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """All bytes of a tensor of any dtype and device, for a hash."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
