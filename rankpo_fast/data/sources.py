"""What a source of data names or holds -> its lines, or the rows of its table.

rows.jsonl, .jsonl.gz, .jsonl.zst   known by their first bytes, whatever they are called
-, or a pipe, as of <(...)          standard input, or what is no regular file: read once and kept
rows.parquet                        read with the extra "data"
owner/name[:config][:split]         a data set of the hub, likewise; its split is train unless named
Rows                                rows that are in memory already
"""

import functools
import gzip
import hashlib
import json
import os
import re
import select
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from rankpo_fast.data.files import sha256_of
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.errors import InputError

STANDARD_INPUT = "-"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin, and no line of JSON
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+){0,2}")
FILE_NAME = re.compile(r".*\.(jsonl?|gz|zst|parquet|csv|tsv|txt)", re.IGNORECASE)
ZSTD_WINDOW = 31  # log2 of the bytes looked back on: the most there is, what zstd --long=31 writes
ROWS_AT_ONCE = 1000  # of a table
PATIENCE = 0.5  # seconds for somebody to open a pipe at its other end
LONGEST_LINE = 2**25  # bytes; no row is near it, but a file without line ends is one line


def place(path: Path | Source) -> str:
    """What messages call it."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def is_table(path: Path | Source) -> bool:
    """Whether it holds rows rather than lines: a parquet file, a data set of the hub, or Rows."""
    if isinstance(path, Rows):
        return True
    name = str(path)
    hub = HUB_NAME.fullmatch(name) and not FILE_NAME.fullmatch(name) and not os.path.lexists(name)
    return _is_parquet(path) or bool(hub)


def _is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


# --- lines ---


def byte_lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a file, unpacked. InputError if it cannot be read, or is damaged."""
    try:
        name = _kept(str(path)).name if _is_stream(path) else path
        file = open(name, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{place(path)}: cannot be read: {error.strerror}") from None
    with file:
        unpacked, damage = _unpacked(file, place(path))
        content = None if _read_whole is None else hashlib.sha256()
        try:
            for number, line in enumerate(iter(partial(unpacked.readline, LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise InputError(f"{place(path)}:{number}: a line of more than "
                                     f"{LONGEST_LINE >> 20} MiB: every row stands on a line of its "
                                     f"own (jq -c '.[]' writes them so)")  # fmt: skip
                if content is not None:
                    content.update(line)
                yield line
        except damage as error:
            raise InputError(f"{place(path)}: a damaged compressed file: {error}") from None
    if content is not None:
        _keep(path, content.hexdigest())


def _unpacked(
    file: BufferedReader, name: str
) -> tuple[IO[bytes] | gzip.GzipFile, tuple[type[Exception], ...]]:
    """What to read, and what reading it raises where it is damaged or cut off."""
    first = file.peek(len(ZSTD))
    if first.startswith(GZIP):
        return gzip.open(file), (EOFError, gzip.BadGzipFile, zlib.error)
    if first.startswith(ZSTD):
        zstd = _zstd(name)
        options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW}
        return zstd.open(file, options=options), (EOFError, zstd.ZstdError)
    return file, ()


def _zstd(name: str) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise InputError(
            f"{name}: a zstd file needs backports.zstd (pip install 'rankpo-fast[data]'); "
            f"zstd -d unpacks it"
        ) from None
    return zstd


def _is_stream(path: str | Path) -> bool:
    """Whether reading it uses it up: standard input, a pipe, a device."""
    if str(path) == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a name that no file can have: with a NUL byte, say
        raise InputError(f"{str(path)!r}: cannot be read: {error}") from None
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@functools.cache
def _kept(path: str) -> "tempfile._TemporaryFileWrapper[bytes]":
    """All of a stream in a file that goes with the process, since data is read more than once."""
    name = f"{path} (standard input)" if path == STANDARD_INPUT else f"{path} (no regular file)"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{name} cannot be read by several processes: give the name of a file")
    if path == STANDARD_INPUT and sys.stdin is None:
        raise InputError(f"{name} is closed: give the name of a file")
    kept = tempfile.NamedTemporaryFile()  # noqa: SIM115 - deleted when the process ends
    if path == STANDARD_INPUT:
        shutil.copyfileobj(sys.stdin.buffer, kept)
    else:
        _copy_stream(path, kept)
    kept.flush()
    return kept


def _copy_stream(path: str, kept: IO[bytes]) -> None:
    """From a pipe that somebody writes into, or a terminal; InputError for what may have no end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stream:
        pipe = stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
        if not pipe and not stream.isatty() and os.path.realpath(path) != os.devnull:
            raise InputError(f"{path}: is a device, which may have no end: give a file or a pipe")
        watched = select.poll()
        watched.register(stream, select.POLLIN)
        if pipe and not watched.poll(1000 * PATIENCE):
            first = stream.read(1)  # None: there is a writer, that has written nothing yet
            if first == b"":
                raise InputError(f"{path}: is a pipe that nobody writes into")
            kept.write(first or b"")
        os.set_blocking(stream.fileno(), True)
        shutil.copyfileobj(stream, kept)


# --- tables ---


def table_rows(path: Path | Source) -> Iterator[tuple[str, Any]]:
    """Yield ("path:row", row); rows of a file count from 1, and a column without a value there is
    None."""
    number, content = 0, None if _read_whole is None else hashlib.sha256()
    for number, (where, row) in enumerate(_rows(path), 1):
        if content is not None:
            content.update(json.dumps(row, default=str).encode() + b"\n")
        yield where or f"{path}:row {number}", row
    if number == 0:
        raise InputError(f"{path}: has no rows")
    if content is not None and not isinstance(path, Rows):
        _keep(path, content.hexdigest())


def _rows(path: Path | Source) -> Iterator[tuple[str | None, Any]]:
    """Rows, and where they are if they know."""
    if isinstance(path, Rows):
        yield from path
        return
    for columns in _parquet(path) if _is_parquet(path) else _hub(str(path)):
        for values in zip(*columns.values(), strict=True):
            yield None, dict(zip(columns, values, strict=True))


def _parquet(path: str | Path) -> Iterator[dict[str, list]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(_needs_datasets(path)) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield batch.to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _hub(name: str) -> Iterator[dict[str, list]]:
    try:
        import datasets
    except ImportError:
        raise InputError(_needs_datasets(name)) from None
    repository, *parts = name.split(":")
    split = parts.pop() if parts else "train"
    try:
        table = datasets.load_dataset(repository, *parts, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name}: no such file, and as a data set of the hub, owner/name[:config][:split], it "
            f"cannot be read: {error}"
        ) from None
    yield from table.iter(ROWS_AT_ONCE)


def _needs_datasets(path: str | Path) -> str:
    return (
        f"{path}: parquet files and data sets of the hub need the package datasets "
        f"(pip install 'rankpo-fast[data]'); a file of JSON lines needs nothing"
    )


# --- what it holds ---


_read_whole: dict[str, str] | None = None  # inside `digests_kept`: digests by path


@contextmanager
def digests_kept() -> Iterator[None]:
    """Inside, what is read is hashed while it is, and `digest` is of what was read: of a file that
    another has taken the place of since, too. InputError where two readings differ."""
    global _read_whole
    before, _read_whole = _read_whole, {}
    try:
        yield
    finally:
        _read_whole = before


def _keep(path: Path | Source, content: str) -> None:
    assert _read_whole is not None
    if _read_whole.setdefault(os.path.abspath(str(path)), content) != content:
        raise InputError(f"{place(path)}: has changed since it was first read: give a file that "
                         f"stays as it is")  # fmt: skip


def digests() -> dict[str, str]:
    """Those that are kept."""
    return dict(_read_whole or {})


def keep_digests(found: dict[str, str]) -> None:
    """Keep digests of what another process of this node has read."""
    if _read_whole is not None:
        _read_whole.update(found)


def digest_of_bytes(path: Path) -> str:
    """sha256 of a file as it lies there; OSError. Inside `digests_kept` it is read once."""
    if _read_whole is None:
        return sha256_of(path)
    name = f"bytes of {path.absolute()}"
    if name not in _read_whole:
        _read_whole[name] = sha256_of(path)
    return _read_whole[name]


def digest(path: Path | Source) -> str:
    """sha256 of the content, unpacked: the same wherever it lies and however it is compressed."""
    known = None if isinstance(path, Rows) else os.path.abspath(str(path))
    if _read_whole is not None and known in _read_whole:
        return _read_whole[known]
    content = hashlib.sha256()
    if isinstance(path, Rows) or is_table(path):
        for _, row in table_rows(path):
            content.update(json.dumps(row, default=str).encode() + b"\n")
    else:
        for line in byte_lines(path):
            content.update(line)
    return content.hexdigest()
