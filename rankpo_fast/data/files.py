"""Files, and directories, that are whole or not there: a temporary one beside them, fsync, rename.

Tensors too: what safetensors raises over a full disk or a broken file becomes an OSError here.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory to fill, which becomes `path` when the block ends without an
    error; until then nothing is there, but an empty directory may be.

    Missing parents are made. OSError passes through.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            flush_to_disk(entry)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_to_disk(path.parent)


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


def stream_tensors(
    layout: "Mapping[str, tuple[str, Sequence[int]]]",
    blocks: "Callable[[str], Iterable[Tensor]]",
    path: Path,
) -> None:
    """Write a safetensors file tensor by tensor, holding no more than one block of one.

    Eight bytes say how long the JSON is that follows, which says where each tensor begins and ends
    behind it. As the library does, those of wider dtypes go first, which keeps all aligned.

    Args:
        layout: dtype, as safetensors writes it ("BF16"), and shape of each tensor.
        blocks: the elements of the tensor of that name in order, in parts of any shape.
    """
    from math import prod

    width = {name: _bytes_of(kind) for name, (kind, _) in layout.items()}
    order = sorted(layout, key=lambda name: (-width[name], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        kind, shape = layout[name]
        start, end = end, end + width[name] * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in blocks(name):
                file.write(tensor_bytes(block))
        assert file.tell() == 8 + len(text) + end, "blocks are not of the tensors of the layout"


def _bytes_of(kind: str) -> int:
    bits = re.search(r"\d+", kind)  # BOOL has none, and a byte
    return int(bits[0]) // 8 if bits else 1


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file; OSError where there is none, or it is not whole."""
    from safetensors.torch import load_file

    with disk_errors(path):
        return load_file(path)


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """All bytes of a tensor of any dtype and device, for a hash."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
