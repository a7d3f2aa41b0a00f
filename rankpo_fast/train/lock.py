"""One run at a time in a directory: a lock that a dead process does not keep.

The kernel frees a lock on an open file (flock) with its process, that of another host too where a
network file system has locks. Where it has none, or keeps them to each host, the file's age tells:
a thread renews it, and who finds it renewed knows that the other run lives. Hosts' clocks differ,
so an age is counted against a file made just now on the same file system.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankpo_fast.errors import InputError

LOCK = ".rankpo-fast.lock"
BEAT = 10.0  # seconds between two renewals
PATIENCE = 60.0  # seconds without any, after which the holder is dead
SETTLING = 2.0  # seconds in which two that find the file free, without locks, have both written it
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def held(directory: Path, flag: str) -> Iterator[None]:
    """Hold `directory`, which is made if need be; what was made and is empty goes again.

    Raises:
        InputError: another run holds it, or the file system refuses the file; the message names
            `flag`, and host and process or the reason.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    try:
        try:
            file = _take(path, f"{flag} {directory}")
        except OSError as error:
            raise InputError(f"{flag} {directory}: {error.strerror}") from error
        done = threading.Event()
        thread = threading.Thread(target=_renew, args=(file, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if _is_at(file, path):
                path.unlink()
            file.close()
    finally:
        for folder in made:
            with suppress(OSError):  # which is not empty
                folder.rmdir()


class _File:
    """An open file that no other program and no fork of this one inherits: it would hold on."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._open = True
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        if self._open:
            os.close(self.number)
            self._open = False


def _take(path: Path, what: str) -> _File:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    while True:
        file, locked = _File(path), None
        try:
            locked = _lock(file)
            other = None if locked is None else _holder(file)
            # On this host a lock that is free says it all.
            free = other is None or (locked and other["host"] == me["host"])
            if locked is None or not (free or _dies(path, what, other)):
                raise InputError(_refusal(what, _holder(file)))
            if _is_at(file, path):  # else its holder has gone just now, and the file with it
                os.ftruncate(file.number, 0)
                os.pwrite(file.number, json.dumps(me).encode(), 0)
                os.fsync(file.number)
                if not locked:
                    time.sleep(SETTLING)
                    if (winner := _holder(file)) != me:
                        raise InputError(_refusal(what, winner))
                return file
        except BaseException as error:
            if locked and isinstance(error, OSError) and _is_at(file, path):
                path.unlink()
            file.close()
            raise
        file.close()


def _lock(file: _File) -> bool | None:
    """True: locked; None: another process has it; False: this file system has no locks."""
    try:
        fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _dies(path: Path, what: str, other: dict[str, Any] | None) -> bool:
    """Whether the file is not renewed before it is PATIENCE old."""
    first = _renewed(path)
    fresh = path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
    fresh.touch()
    left = PATIENCE - (fresh.stat().st_mtime - (first or 0.0))
    fresh.unlink()
    if left > 0:
        warnings.warn(
            f"{what} was in use by {_name(other)} a moment ago: waiting up to {left:.0f} s for a "
            f"sign of life",
            stacklevel=2,
        )
    end = time.monotonic() + left
    while (now := _renewed(path)) == first and time.monotonic() < end:
        time.sleep(BEAT / 10)
    return now is None or now == first


def _renewed(path: Path) -> float | None:
    """When, in seconds; opened anew, since network file systems remember what they told last."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _renew(file: _File, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):  # of a network that comes back
            os.utime(file.number)


def _holder(file: _File) -> dict[str, Any] | None:
    """What the file says; None where it says nothing yet."""
    content = os.pread(file.number, 4096, 0)
    try:
        return {"host": "?", "pid": "?", **json.loads(content)} if content else None
    except (ValueError, TypeError, RecursionError):
        return {"host": "?", "pid": "?"}


def _is_at(file: _File, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.number), path.stat())
    return False


def _name(holder: dict[str, Any] | None) -> str:
    holder = holder or {"pid": "?", "host": "?"}
    return f"process {holder['pid']} on {holder['host']}"


def _refusal(what: str, holder: dict[str, Any] | None) -> str:
    return f"{what} is in use by {_name(holder)}: choose another, or wait until that run has ended"
