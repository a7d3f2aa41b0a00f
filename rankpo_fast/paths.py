"""Whether a path can be written to, asked before hours of work instead of after them.

What is read must not be written over: a path is known by where links lead, and a file by its inode.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import temporary_name
from rankpo_fast.data.memory import Source
from rankpo_fast.errors import InputError, NotFiniteVectors

# Settings whose values are files or directories that are read; those of models may be hub names.
MODELS = (
    "model_name_or_path", "tokenizer_name", "reference_model_name_or_path",
    "guide_model_name_or_path", "base_model_name_or_path", "reranker", "compare",
)  # fmt: skip
DATA = (
    "train_data", "replay_data", "graded_data", "teacher_data", "query_data", "corpus_data",
    "mining_corpus",
    "preference_data", "clicks_data", "input", "config", "queries", "items", "pairs", "prompt",
    "judges", "batch_in", "report_on",
)  # fmt: skip
RUNS = ("run_files",)  # which hold no texts
# What in a model's directory decides its vectors; others keep figures and notes there.
MODEL_FILES = (
    "*config*.json", "modules.json", "rankpo_fast.json", "*.safetensors",
    "*.safetensors.index.json", "token*.json", "vocab.*", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
TEMPORARY = len(temporary_name(Path("_")).name) + 8  # bytes that it adds to a name, at most


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
        raise InputError(f"{flag} {str(path)!r} cannot be written: {reason(error)}") from None
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


def check_output(flag: str, path: str | Path, *configs: Any) -> None:
    """`check_writable`, and InputError where that would write over what the settings read."""
    check_writable(flag, path)
    for read_by, name in inputs(*configs):
        if any(same_file(path, file) for file in files_read(read_by, name)):
            raise InputError(f"{flag} {path} is also read ({read_by} {name}): choose another name")
        inside = Path(name).is_dir() and lies_in(path, name)
        if inside and read_by not in map(_flag, MODELS):
            raise InputError(f"{flag} {path} is also read, as part of {read_by} {name}: choose "
                             f"another name")  # fmt: skip


def check_new_directory(flag: str, path: str | Path, *configs: Any) -> None:
    """`check_writable` of a directory, and InputError where it holds something, or lies in one that
    the settings read."""
    check_writable(flag, path, directory=True)
    if Path(path).exists() and any(Path(path).iterdir()):
        raise InputError(f"{flag} {path} is not empty: choose another")
    for read_by, name in inputs(*configs):
        if lies_in(path, os.path.expanduser(name)):
            raise InputError(f"{flag} {path} lies in {read_by} {name}: choose another")


def inputs(*configs: Any) -> Iterator[tuple[str, str]]:
    """Flag and value of each path, or name on the Hub, that is read."""
    return ((flag, read) for flag, read in all_inputs(*configs) if isinstance(read, str))


def all_inputs(*configs: Any) -> Iterator[tuple[str, Source]]:
    """Rows in memory too."""
    for config in configs:
        for name in (*MODELS, *DATA, *RUNS):
            value = getattr(config, name, None)
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    yield _flag(name), each


@contextmanager
def texts_located(*configs: Any) -> Iterator[None]:
    """Inside, texts whose vectors are not finite are named with their places in the data."""
    try:
        yield
    except NotFiniteVectors as error:
        raise error.located(_data(*configs)) from None


def _data(*configs: Any) -> Iterator[Path | Source]:
    """The rows, and the files of rows, that settings read; those of directories too."""
    from rankpo_fast.data.retrieval import text_files

    for flag, source in all_inputs(*configs):
        if flag not in map(_flag, (*MODELS, *RUNS)):
            is_directory = isinstance(source, str) and Path(source).is_dir()
            yield from text_files(Path(str(source))) if is_directory else [source]


def files_read(flag: str, name: str) -> list[Path]:
    """`name` itself, and of a directory the files in it that are read."""
    path = Path(os.path.expanduser(name))
    if flag in map(_flag, MODELS):
        places = [path, *_bases(path)]
        return [*places, *(place / file for place in places for file in model_files(place))]
    return [path, *path.glob("*"), *path.glob("*/*")]


def _bases(directory: Path) -> Iterator[Path]:
    """The directories of the models that an adapter there is for."""
    for file in (*directory.glob("adapter_config.json"), *directory.glob("*/adapter_config.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            yield Path(json.loads(file.read_bytes())["base_model_name_or_path"])


def model_files(directory: Path) -> list[Path]:
    """The files that make a model, its modules' in their folders, relative to `directory`."""
    found = {
        file.relative_to(directory)
        for pattern in MODEL_FILES
        for place in (pattern, f"*/{pattern}")
        for file in directory.glob(place)
    }
    return sorted(file for file in found if file.parts[0] not in ("onnx", "openvino"))


def same_file(path: str | Path, other: str | Path) -> bool:
    """Whether both are one file, by whatever names or links."""
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return Path(path).resolve() == Path(other).resolve()
    except ValueError:  # a name that no file can have: with a NUL byte, say
        return False


def lies_in(path: str | Path, directory: str | Path) -> bool:
    """Whether `path` is `directory`, or inside it, once links are followed."""
    return Path(path).resolve().is_relative_to(Path(directory).resolve())


def reason(error: Exception) -> str:
    """What the system says, without the path that a message names itself."""
    return getattr(error, "strerror", None) or str(error)


def _flag(name: str) -> str:
    return f"--{name}"
