"""Standard output and error on a disk that may be full: results that are lost are a failure, lines
for the user are none."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, TextIO


class _Forgiving(io.TextIOBase):
    """Writes to a stream what it takes, and drops the rest: a run of days is not to end over a line
    of its log."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return self._stream.encoding


@contextmanager
def log_may_be_lost() -> Iterator[None]:
    """Inside, writing to standard error raises nothing."""
    if sys.stderr is None:  # closed before Python began
        yield
        return
    stream = sys.stderr
    with redirect_stderr(_Forgiving(stream)):
        yield
    _give_up(stream)


@contextmanager
def results_written() -> Iterator[None]:
    """At the end, OSError where standard output does not take what was printed inside."""
    try:
        yield
    except SystemExit:  # after --help
        _write_out()
        raise
    except BaseException:
        if sys.stdout is not None:
            _give_up(sys.stdout)
        raise
    _write_out()


def _write_out() -> None:
    if sys.stdout is None:  # closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        raise OSError(error.errno, os.strerror(error.errno or 0), "standard output") from None


def _give_up(stream: TextIO) -> None:
    """Close a stream that cannot be written: Python would try once more when it ends, and exit with
    a status of its own."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            stream.close()
