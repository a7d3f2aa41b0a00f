"""Tensors that lie in parts on several ranks, in files: torch.distributed.checkpoint, each rank its
own parts, as safetensors (whose header says where a part belongs), no pickle.

They are read back into however many parts there are then, or whole; and so is a file of whole ones.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from rankpo_fast.data.files import flush_to_disk, open_to_umask, sha256_of
from rankpo_fast.ranks import Ranks


def in_parts(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def save_parts(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> dict[str, str]:
    """Write them into `folder`, which is there, and flush them to disk; all ranks must call it.

    Returns:
        the sha256 of each file, by its name in the folder, of all ranks.

    Raises:
        OSError: the disk of any rank refuses; on all.
        RankLost: another rank is gone.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with ranks.talking():
            dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.hosts)
    except CheckpointException as error:
        raise OSError(f"{folder}: {_first(error)}") from error
    own = sorted(folder.glob("*.safetensors"))[ranks.rank :: ranks.size]
    refused: str | None = None
    digests: dict[str, str] = {}
    try:
        if ranks.first:
            open_to_umask(folder)
        for path in own:
            flush_to_disk(path)
        digests = {path.name: sha256_of(path) for path in own}
    except OSError as error:
        refused = str(error)
    told = ranks.objects((refused, digests))
    for refused, _ in told:
        if refused is not None:
            raise OSError(refused)
    return {name: digest for _, of_rank in told for name, digest in of_rank.items()}


def shapes_of_parts(folder: Path) -> dict[str, Tensor]:
    """Tensors without memory, of the shapes that lie in a folder's files; raises OSError."""
    there = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(found.size, device="meta")
        for name, found in there.items()
        if isinstance(found, TensorStorageMetadata)
    }


def load_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors, whole or in parts, with what a folder's files have by their names, of the same
    shapes; all ranks must call it.

    Raises:
        OSError: a file cannot be read; on all.
    """
    values = {name: tensor.detach() for name, tensor in tensors.items()}
    reader = HuggingFaceStorageReader(str(folder))
    alone = ranks.size == 1
    try:
        dcp.load(values, storage_reader=reader, process_group=ranks.hosts, no_dist=alone)
    except CheckpointException as error:
        raise OSError(f"{folder}: {_first(error)}") from error


def _first(error: CheckpointException) -> object:
    """What went wrong on the first rank where something did."""
    return next((failure[0] for failure in error.failures.values()), error)
