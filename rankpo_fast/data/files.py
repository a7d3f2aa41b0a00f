"""Files, and directories, that are whole or not there: a temporary one beside them, fsync, rename.

A temporary name carries host and process, so that what a killed process left is known and goes.
Tensors too: what safetensors raises over a full disk or a broken file becomes an OSError here.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends without an error.

    Missing parent directories are made. After an error `path` is as it was and the temporary
    file is gone; that of a process which was killed goes with the next one written in that
    directory. OSError (no space, no permission) passes through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = temporary_name(path)
    try:
        with named(path):
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
    sweep(path.parent)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        with named(path):
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                flush_to_disk(entry)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_to_disk(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as of writing to one that is open, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


# --- names of what is on its way in, or out ---

_TEMPORARY = re.compile(r"\..*\.rankpo-([0-9a-f]{4})-([0-9a-f]{1,8})-[0-9a-f]{4}\.tmp", re.DOTALL)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes, and that tells whose it is."""
    return path.with_name(
        f".{path.name}.rankpo-{_host()}-{os.getpid():x}-{secrets.token_hex(2)}.tmp"
    )


def is_temporary(name: str) -> bool:
    """Whether a name is one of those."""
    return bool(_TEMPORARY.fullmatch(name))


def sweep(directory: Path) -> None:
    """Remove what processes of this host that are gone left in `directory` under such names."""
    names = []
    with suppress(PermissionError), os.scandir(directory) as entries:  # of one that is not listed
        names = [match for entry in entries if (match := _TEMPORARY.fullmatch(entry.name))]
    for match in names:
        host, process = match.groups()
        if host == _host() and not _lives(int(process, 16)):
            with suppress(OSError):  # of another user's, say
                remove(directory / match[0])


def discard(path: Path) -> None:
    """`remove`, after a rename: killed in between, nothing half deleted stands under the name."""
    trash = temporary_name(path)
    path.rename(trash)
    remove(trash)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it; of a link the link alone. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    """Of the processes that one number can name: a container counts its own."""
    counted = "/proc/self/ns/pid"
    namespace = os.readlink(counted) if os.path.lexists(counted) else ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:4]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# --- bytes and tensors ---


def open_to_umask(folder: Path) -> None:
    """Give the safetensors files in `folder` the mode that the umask gives new files: the library
    lets nobody but their owner read them."""
    probe = temporary_name(folder / "mode")
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


Stamp = tuple[int, int, int] | None  # size, time and inode; None: there is no such file


def stamp_of(path: Path) -> Stamp:
    """Which another has once a file is written to, or another one takes its name."""
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino
    return None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise as OSError, naming `path`, what safetensors and tokenizers raise inside over a disk or
    a file: the second have no exception but Exception itself."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, SafetensorError):
            raise
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; OSError where the disk refuses.

    The library begins it under a name of its own, which nobody would know that a kill left: in a
    folder that `sweep` knows.
    """
    from safetensors.torch import save_file

    folder = temporary_name(path)
    folder.mkdir()
    try:
        with disk_errors(path):
            save_file(tensors, folder / path.name, metadata)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """Read a safetensors file; OSError where there is none, or it is not whole.

    Nothing of it stays mapped: a deleted file would keep its room on the disk.
    """
    from safetensors import safe_open

    with disk_errors(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """All bytes of a tensor of any dtype and device, for a hash."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel() == 0:  # of numpy's its stride is 0, which torch views as no other dtype
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def hash_tensors(digest: "hashlib._Hash", tensors: "Iterable[tuple[str, Tensor]]") -> None:
    """Add their names, types, shapes and values, one after the other."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
