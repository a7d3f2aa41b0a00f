"""Model names -> directories on this disk that are safe to load from."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from rankpo_fast.config.model import COMMIT
from rankpo_fast.errors import InputError
from rankpo_fast.paths import model_files

MODEL_FLAG = "--model_name_or_path"
SMALL_FILES = ["*.json", "*.txt", "*.model", "README.md"]
WEIGHT_FILES = [f"{place}{name}.safetensors"
                for place in ("", "*/") for name in ("model*", "adapter_model")]  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
MOST_LAYERS = 2_000  # the deepest models have some hundred
MOST_PER_NUMBER, SMALL = 16, 10**7  # packed weights have up to 16 to a number; parameters
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHER_FORMATS = ["onnx/*", "openvino/*"]


def find_directory(name: str, flag: str, *, weights: bool) -> Path:
    """The directory `name`, or the local copy of the hub repository of that name.

    Args:
        name: directory or hub name, with @COMMIT or without.
        flag: command-line flag it was given by, for messages.
        weights: whether to fetch the weights too, which are safetensors or nothing.

    Raises:
        InputError: neither is there, or the name is that of a file.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        _check_ordinary(Path(path), flag)
        return Path(path)
    if os.path.exists(path):
        raise InputError(f"{flag} {name}: is a file, but a directory is needed")
    if path.startswith(("/", ".")) or path.count("/") > 1:  # which no hub name has
        raise InputError(f"{flag} {name}: no such directory")
    from huggingface_hub import snapshot_download

    with blaming(f"{flag} {name}: no such directory, and the Hugging Face hub did not give it"):
        repository, commit = hub_name(name)
        assert repository is not None  # which a directory is
        copy = snapshot_download(
            repository,
            revision=commit,
            allow_patterns=SMALL_FILES + (WEIGHT_FILES if weights else []),
            ignore_patterns=OTHER_FORMATS,
        )
    return Path(copy)


def hub_name(name: str) -> tuple[str | None, str | None]:
    """Repository and commit; None for what is not given, as either of a directory."""
    if os.path.isdir(os.path.expanduser(name)):
        return None, None
    repository, at, commit = name.rpartition("@")
    return (repository, commit) if at and COMMIT.fullmatch(commit) else (name, None)


def _check_ordinary(directory: Path, flag: str) -> None:
    """InputError for a pipe or a device among a model's files: reading it may never end."""
    for file in model_files(directory):
        path = directory / file
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{flag} {path}: is no ordinary file")


def check_config(folder: Path, flag: str) -> None:
    """Raise InputError unless there is a config.json, of a model that can be built in a moment."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{flag} {folder}: no config.json there, so this is no model directory")
    with blaming(f"{flag} {path}"):
        content = json.loads(path.read_bytes())
    parts = [content, *content.values()] if isinstance(content, dict) else []
    for part in (part for part in parts if isinstance(part, dict)):
        for name, value in part.items():
            if name in LAYERS and isinstance(value, int) and value > MOST_LAYERS:
                raise InputError(f"{flag} {path}: {name} is {value:,}, and no model has more than "
                                 f"{MOST_LAYERS:,} layers")  # fmt: skip


def check_size(files: list[Path], parameters: int, flag: str) -> None:
    """InputError where a config asks for far more parameters than `files` hold numbers, which
    would be made before anybody compares shapes."""
    there = 0
    for path in files:
        with blaming(f"{flag} {path}"), safe_open(path, "pt") as file:
            slices = (file.get_slice(name) for name in file.keys())  # noqa: SIM118 - no mapping
            there += sum(prod(part.get_shape()) for part in slices)
    if parameters > MOST_PER_NUMBER * there + SMALL:
        raise InputError(f"{flag} {files[0].parent}: config.json asks for {parameters:,} "
                         f"parameters, but the weights there are {there:,}")  # fmt: skip


def check_whole(files: list[Path], flag: str) -> None:
    """InputError where a file is not as long as its header says: to read what is mapped and is no
    longer there ends a process without a word."""
    for path in files:
        with blaming(f"{flag} {path}"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            actual, most = os.fstat(file.fileno()).st_size, 0
            if length > actual - 8:
                raise ValueError("is cut off in its header")
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name != "__metadata__":
                    most = max(most, tensor["data_offsets"][1])
            if actual != 8 + length + most:
                raise ValueError(
                    f"has {actual:,} bytes, but its header is for {8 + length + most:,}: cut off, "
                    f"or still being written"
                )


def check_no_code(path: Path, kind: str, flag: str) -> None:
    """InputError if the JSON file maps the class `kind` of transformers to code beside it.

    That may compute anything, such as attention to both sides in a model whose type is a decoder's;
    transformers, which is not to run it, would take its own class in silence.
    """
    if not path.is_file():
        return
    with blaming(f"{flag} {path}"):
        content = json.loads(path.read_bytes())
    classes = content.get("auto_map") if isinstance(content, dict) else None
    if isinstance(classes, dict):
        classes = classes.get(kind)
    both = classes if isinstance(classes, list) else [classes]  # a slow and a fast tokenizer
    names = [str(name) for name in both if name]
    if names:
        raise InputError(
            f"{flag} {path}: auto_map names the model's own class {' or '.join(names)} "
            f"for {kind}, and code of model directories is never run: take a copy without auto_map "
            f"if transformers' class of that type computes the same, else another model; code of a "
            f"model on the hub runs with --trust_remote_code --revision COMMIT"
        )


def has_weights(folder: Path) -> bool:
    """Whether a whole model's weights are there, as safetensors."""
    return any(folder.glob("model.safetensors*"))


def check_weights(folder: Path, flag: str) -> list[Path]:
    """The files of the weights; InputError unless they are safetensors, complete, and inside the
    folder.

    transformers opens whatever path an index names, `../` included.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise InputError(
            f"{flag} {folder}: neither model.safetensors nor {index.name} there "
            f"(other formats can run code and are not read; a training begins with random weights "
            f"by --from_scratch)"
        )
    with blaming(f"{flag} {index}"):
        content = json.loads(index.read_bytes())
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{flag} {index}: weight_map must name the file of each tensor")
    shards = sorted(set(files.values()))
    for shard in shards:
        if not shard.endswith(".safetensors"):  # which others would unpickle
            raise InputError(f"{flag} {index}: the shard {shard!r} is no .safetensors file")
        if Path(shard).name != shard:
            raise InputError(f"{flag} {index}: the shard {shard!r} lies outside the directory")
        if not (folder / shard).is_file():
            raise InputError(f"{flag} {index}: the shard {shard!r} is missing")
    return [folder / shard for shard in shards]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder of an adapter has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def weights_dtype(files: list[Path]) -> torch.dtype:
    """That of most weights in `files`, fp32 where it is none of fp32, bf16 and fp16."""
    counts = dict.fromkeys(DTYPES, 0)
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + prod(part.get_shape())
    return DTYPES.get(max(counts, key=counts.__getitem__), torch.float32)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn what libraries raise over unusable files into an InputError `what: reason`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = (OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
                 ImportError, RecursionError, SafetensorError, StrictDataclassError)  # fmt: skip
        # The tokenizers library raises Exception itself, whatever is wrong with its file.
        if type(error) is not Exception and not isinstance(error, known):
            raise
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
