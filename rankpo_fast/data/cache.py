"""What need not be computed twice: tensors in files named by a sha256 of all they follow from.

A cache saves time and decides nothing: where it cannot be read or written the run goes on without.
Its checksums find damage, and whoever can write there can make them right: so what another user
owns is not taken, and what is taken has to be possible.
"""

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankpo_fast.config import ComputeConfig
from rankpo_fast.data.files import save_tensors, tensor_bytes, whole_file
from rankpo_fast.paths import check_writable, reason

FORMAT = 2  # of the files and their checksums: those of another are neither read nor written over
Tensors = dict[str, Tensor]


def cached(
    directory: str | Path | None,
    kind: str,
    find_key: Callable[[], str],
    make: Callable[[], Tensors],
    fits: Callable[[Tensors], bool] = lambda _: True,
) -> Tensors:
    """The tensors of `make()`, on the CPU: kept in `directory`, if any, and found again there.

    A damaged file is made anew, with a warning; of a directory that cannot be used one warning
    tells, once in a process.

    Args:
        kind: begins the names of its files.
        find_key: gives a hexadecimal sha256 of all that the tensors follow from.
        fits: whether tensors that were kept can be those of `make()`: shapes, and values in range.
    """
    if directory is None:
        return make()
    try:
        key = find_key()  # which may need room on the disk itself
        path = Path(directory) / f"{kind}-v{FORMAT}-{key[:32]}.safetensors"
        tensors = _read(path, key, fits)
    except OSError as error:
        _say_once(str(directory), reason(error))
        return make()
    if tensors is None:
        tensors = make()
        try:
            with whole_file(path) as temporary:
                save_tensors(tensors, temporary, {"sha256": _content_hash(key, tensors)})
        except OSError as error:
            _say_once(str(directory), reason(error))
    return tensors


def check_cache(compute: ComputeConfig) -> None:
    """Say at the start where --cache_dir cannot be written; InputError where it is a file."""
    directory = compute.cache_path
    if directory is None:
        if not compute.no_cache:
            _say_once(compute.cache_dir, "there is no such home directory")
        return
    nearest = next(place for place in (directory, *directory.parents) if os.path.lexists(place))
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        _say_once(str(directory), f"no permission to write in {nearest}")
    else:
        check_writable("--cache_dir", directory, directory=True)


def _read(path: Path, key: str, fits: Callable[[Tensors], bool]) -> Tensors | None:
    """The tensors kept at `path`; None if there are none, or with a warning if they are damaged.
    Raises OSError, of what is no file of this user's too."""
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):
            raise OSError(f"{path.name} is no file")
        if there.st_uid not in (os.geteuid(), 0):
            raise OSError(f"{path.name} is another user's")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get("sha256")
        if checksum != _content_hash(key, tensors):
            damage = "its checksum does not match"
        elif not fits(tensors):
            damage = "it holds what cannot have been computed"
        else:
            return tensors
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        damage = str(error)  # LookupError and so on: a kind of numbers that torch does not have
    warnings.warn(f"{path}: damaged cache file, making it anew ({damage})", stacklevel=3)
    return None


_said: set[str] = set()  # directories, in this process


def _say_once(directory: str, why: str) -> None:
    if directory not in _said:
        _said.add(directory)
        warnings.warn(
            f"--cache_dir {directory} cannot be used ({why}): nothing is kept for the next run; "
            f"give another directory, or --no_cache",
            stacklevel=3,
        )


def _content_hash(key: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
