"""Whether a path can be written to, asked before hours of work instead of after them."""

import os
from pathlib import Path

from rankpo_fast.errors import InputError

TEMPORARY = len(".") + len(".01234567.tmp")  # bytes that `whole_file` adds to a name


def check_writable(flag: str, path: str | Path, *, directory: bool = False) -> None:
    """InputError naming `flag` unless a file, or a directory, can be written there; makes nothing.

    Missing parent directories are fine: they will be made.
    """
    path = Path(path)
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise InputError(f"{flag} {str(path)!r} cannot be written: {_reason(error)}") from None
    if path.is_symlink() and not path.exists():
        raise InputError(f"{flag} {path} is a symbolic link to nothing")
    if directory and path.exists() and not path.is_dir():
        raise InputError(f"{flag} {path} is a file; a directory is to be written")
    if not directory and path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no ordinary file"
        raise InputError(f"{flag} {path} is {kind}; a file is to be written")
    first = path if directory else path.parent
    nearest = next(place for place in (first, *first.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise InputError(f"{flag} {path} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path} cannot be written: no permission to write in {nearest}")
    longest = max(len(os.fsencode(part)) for part in (*path.parts, "."))
    limit = os.pathconf(nearest, "PC_NAME_MAX") - (0 if directory else TEMPORARY)
    if longest > limit:
        raise InputError(f"{flag} {path} cannot be written: a name of more than {limit} bytes")


def lies_in(path: str | Path, directory: str | Path) -> bool:
    """Whether `path` is `directory`, or inside it, once links are followed."""
    return Path(path).resolve().is_relative_to(Path(directory).resolve())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
