"""A disk of a few kilobytes: a tmpfs that a process of its own mounts, in namespaces of its own."""

import ctypes
import functools
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
NEW_NAMESPACES = 0x10000000 | 0x00020000  # of users and of mounts
REMOUNT, PRIVATE = 32, 1 << 14 | 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def on_small_disk(place: Path, kibibytes: int, call: Callable[[], T]) -> T:
    """The result of `call`, in a fork of this process in which an empty disk of that size is at
    `place`; it is gone afterwards. Raises OSError where the system allows no such thing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _separate()
            _mount(place, kibibytes)
            result: object = (True, call())
        except OSError as error:
            result = (False, error)
        except BaseException:
            result = (False, AssertionError(traceback.format_exc()))
        with open(write, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    done, given = pickle.loads(content)
    if not done:
        raise given
    return given


def resize(place: Path, kibibytes: int) -> None:
    """Of the disk at `place`, in `call`."""
    _mount(place, kibibytes, REMOUNT)


@functools.cache
def can_mount() -> bool:
    """Whether this system lets a process have a disk of its own."""
    with tempfile.TemporaryDirectory() as place:
        try:
            return on_small_disk(Path(place), 64, lambda: True)
        except OSError:
            return False


def _separate() -> None:
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(NEW_NAMESPACES))
    for name, content in (
        ("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")
    ):  # fmt: skip
        Path(f"/proc/self/{name}").write_text(content)
    _check(_libc.mount(b"none", b"/", None, PRIVATE, None))


def _mount(place: Path, kibibytes: int, flags: int = 0) -> None:
    options = f"size={kibibytes}k".encode()
    _check(_libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
