"""Texts -> unit vectors for search, without gradients. n texts, D dims, S of a micro-batch."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from rankpo_fast import signals
from rankpo_fast.data.packing import one_token, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import NotFiniteVectors, out_of_memory
from rankpo_fast.model.check import broken_weights
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.progress import progress as shown
from rankpo_fast.ranks import ALONE, Ranks, deal

ROWS = 16384  # of vectors that travel at once
ASKED_EVERY = 8  # micro-batches, after which several ranks ask each other for signals


@torch.no_grad()
def encode_texts(
    encoder: Encoder,
    table: TokenTable,
    *,
    max_tokens: int | None = None,
    progress: str | None = None,
    texts: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Tensor:
    """Vectors [n, D] fp32 of length 1, on the CPU, in the table's order; warns of zeros.

    Ranks share out the micro-batches that one process would have, so that the vectors are the same.
    The first gets them all, the others keep those that they made.

    Args:
        max_tokens: tokens, padding included, that go through the encoder at once; None: what suits
            the device.
        progress: label of what is said of it on stderr; None for nothing.
        texts: those of the table, which an error names.

    Raises:
        InputError: a text alone has more than max_tokens tokens.
        NotFiniteVectors: a vector, or its length, is NaN or inf; on all ranks.
        Interrupted: a signal to stop came to any rank, between two micro-batches; on all ranks.
    """
    shares = _shares(encoder.plan(table.lengths, max_tokens), table.lengths, ranks.size)
    text_ids = [_joined(share) for share in shares]
    own = text_ids[ranks.rank]
    rows = own if ranks.first else torch.arange(len(own))
    vectors = torch.empty(len(table) if ranks.first else len(own), encoder.dim, dtype=torch.float32)
    norms, place = [torch.empty(0, device=encoder.device)], 0  # of vectors made, on the device
    passes = ranks.in_step() if ranks.lockstep else nullcontext()
    with _evaluating(encoder), passes, shown(progress, len(own), "text") as advance:
        for number in range(max(map(len, shares))):
            if ranks.size == 1 or number % ASKED_EVERY == 0:
                _end_if_asked(ranks)
            if number >= len(shares[ranks.rank]):
                if ranks.lockstep:  # others wait for as many passes
                    encoder(one_token(table))
                continue
            batch = shares[ranks.rank][number]
            made = _encode(encoder, table, batch, ranks)
            norms.append(made.norm(dim=1))  # before it is divided by: inf would leave zeros
            vectors[rows[place : place + len(batch)]] = F.normalize(made, dim=1).cpu()
            place += len(batch)
            advance(len(batch))
    _check(encoder, own, torch.cat(norms).cpu(), len(table), texts, ranks)
    for rank, ids in enumerate(text_ids[1:], 1):
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            if ranks.rank == rank:
                ranks.send_to_first(vectors[part])
            elif ranks.first:
                vectors[ids[part]] = ranks.received(rank, (len(ids[part]), encoder.dim))
    return vectors


@contextmanager
def _evaluating(encoder: Encoder) -> Iterator[None]:
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)


def _end_if_asked(ranks: Ranks) -> None:
    [came] = ranks.highest([signals.requested()])
    if came:
        raise signals.Interrupted(came)


def _encode(encoder: Encoder, table: TokenTable, text_ids: Tensor, ranks: Ranks) -> Tensor:
    """Vectors [S, D] of a micro-batch, not normalised; in two halves where memory does not suffice
    for it and no rank waits for one pass."""
    try:
        return encoder(pack(table, text_ids))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(text_ids) == 1 or ranks.lockstep:
            raise
    torch.cuda.empty_cache()  # of blocks cut for the larger one
    return torch.cat([_encode(encoder, table, half, ranks) for half in text_ids.tensor_split(2)])


def _shares(batches: list[Tensor], lengths: Tensor, ranks: int) -> list[list[Tensor]]:
    """The micro-batches of each rank, dealt by their tokens."""
    tokens = torch.tensor([int(lengths[batch].sum()) for batch in batches])
    return [[batches[i] for i in sorted(hand.tolist())] for hand in deal(tokens, ranks)]


def _joined(batches: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *batches])


def _check(
    encoder: Encoder, text_ids: Tensor, norms: Tensor, total: int, texts: Sequence[str],
    ranks: Ranks,
) -> None:  # fmt: skip
    """NotFiniteVectors on all ranks where one has made such; a warning of zeros."""
    bad, zeros = text_ids[~norms.isfinite()].tolist(), int((norms == 0).sum())
    reports = ranks.objects((bad, zeros))
    bad = sorted(text for of_rank, _ in reports for text in of_rank)
    if bad:
        raise NotFiniteVectors(
            len(bad), total, [texts[i] for i in bad if texts], broken_weights(encoder)
        )
    if zeros := sum(of_rank for _, of_rank in reports):
        warnings.warn(
            f"{zeros:,} of {total:,} texts have a vector of zeros: its cosine with all is 0",
            stacklevel=3,
        )
