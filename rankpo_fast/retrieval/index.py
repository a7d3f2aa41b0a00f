"""Vectors of a corpus in a file, fp16, read by memory mapping: what is held does not grow with it.

The file is named by the model and the tokens, so that the next search with both finds it. It is
written a portion at a time and appears whole. n texts, D dims.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rankpo_fast.data.files import tensor_bytes, whole_file
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import ALONE, Ranks

TEXTS = 1 << 16  # encoded at a time: 100 MB of vectors of 384 dims in fp32


def indexed(
    encoder: Encoder,
    table: TokenTable,
    directory: Path,
    *,
    max_tokens: int | None = None,
    progress: str | None = None,
    texts: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Tensor:
    """Vectors [n, D] fp16 of a file in `directory`, which is made unless it is there; read only.

    The other arguments are those of `encode_texts`. All ranks encode, the first has the vectors.
    """
    path = directory / f"{encoder.digest()}-{_digest(table)}.npy"
    there = ranks.objects(path.is_file())[0]
    if there and ranks.first:
        warnings.warn(f"--index_dir: vectors are those in {path}", stacklevel=2)
    if not there:
        if ranks.first:
            with whole_file(path) as temporary:
                shape = (len(table), encoder.dim)
                file = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                for start, vectors in _portions(encoder, table, max_tokens, progress, texts, ranks):
                    file[start : start + len(vectors)] = vectors.numpy()
                file.flush()
                del file
        else:
            for _ in _portions(encoder, table, max_tokens, progress, texts, ranks):
                pass
    if not ranks.first:
        return torch.empty(0, encoder.dim, dtype=torch.float16)
    with warnings.catch_warnings():  # torch says that it could write to what it must not: we do not
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def _portions(
    encoder: Encoder, table: TokenTable, max_tokens: int | None, progress: str | None,
    texts: Sequence[str], ranks: Ranks,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Where each begins, and its vectors."""
    for start in range(0, len(table), TEXTS):
        part = table.part(start, min(start + TEXTS, len(table)))
        label = None if progress is None else f"{progress} from {start:,} of {len(table):,}"
        yield start, encode_texts(
            encoder, part, max_tokens=max_tokens, progress=label,
            texts=texts[start : start + TEXTS], ranks=ranks,
        )  # fmt: skip


def _digest(table: TokenTable) -> str:
    digest = hashlib.sha256(tensor_bytes(table.ids))
    digest.update(tensor_bytes(table.offsets))
    return digest.hexdigest()[:16]
