"""What do sentence-transformers' in-batch losses cost beside the same losses with our kernels?

Given the embeddings of B queries and of 1 + 7 documents each, loss and gradients of all of them:
all that a trainer does with a batch besides running its model. The cached losses' part is the one
between their two passes over the texts, in chunks of `mini_batch_size` queries as theirs has it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.cases.info_nce import DTYPE, GATE, PLAIN, gemms
from bench.measure import Case, noting, relative_error

DOCUMENTS = 8  # a query: one positive, seven negatives
MINI_BATCH = 32  # theirs by default
# (B, D); on a card up to where one of them no longer fits.
SHAPES = {"cpu": [(4096, 384)], "cuda": [(4096, 384), (16384, 384), (65536, 384), (262144, 384)]}
QUICK = [(512, 384)]
FOR_ERRORS = 512  # queries: fp64 is slow
THEIRS, OURS = "sentence-transformers", "rankpo-fast"


def draw(B: int, D: int, device: str) -> list[Tensor]:
    """Columns [B, D]: queries, positives about as similar as the hardest negatives, negatives."""
    columns = [torch.randn(B, D, device=device) for _ in range(1 + DOCUMENTS)]
    columns[1] += 0.1 * columns[0]
    return [column.to(DTYPE[device]).requires_grad_() for column in columns]


def contenders(columns: list[Tensor]) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """(loss, gradients) of each loss, by name."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from rankpo_fast.integrations import sentence_transformers as ours

    model = nn.Sequential(nn.Identity())  # the losses are given embeddings
    batches = [
        [x.detach().requires_grad_() for x in column.split(MINI_BATCH)] for column in columns
    ]

    def plain(loss: nn.Module) -> Callable:
        def run():
            total = loss.compute_loss_from_embeddings(columns, None)
            return total.detach(), *torch.autograd.grad(total, columns)

        return run

    def cached(loss: nn.Module) -> Callable:
        def run():
            total = loss.calculate_loss(batches, with_backward=True)
            leaves = [x for column in batches for x in column]
            grads = [x.grad for x in leaves]
            for x in leaves:
                x.grad = None
            return total, *grads

        return run

    return {
        OURS: plain(ours.MultipleNegativesRankingLoss(model)),
        f"{OURS}, cached": cached(ours.CachedMultipleNegativesRankingLoss(model)),
        THEIRS: plain(theirs.MultipleNegativesRankingLoss(model)),
        f"{THEIRS}, cached": cached(theirs.CachedMultipleNegativesRankingLoss(model)),
    }


def errors(D: int, device: str) -> dict[str, float]:
    """Of each contender against ours in fp64."""
    columns = draw(FOR_ERRORS, D, device)
    exact_columns = [column.detach().double().requires_grad_() for column in columns]
    exact = {name: run() for name, run in contenders(exact_columns).items()}
    found, notes = {}, {}
    for name, run in contenders(columns).items():
        with noting(name, notes):
            found[name] = relative_error(run(), exact[name.replace(THEIRS, OURS)])
    return dict.fromkeys(notes, math.nan) | found


def cases(device: str, quick: bool) -> Iterator[Case]:
    if find_spec("sentence_transformers") is None:
        print("sentence-transformers is not installed: its losses are left out\n")
        return
    for B, D in QUICK if quick else SHAPES[device]:
        error = errors(D, device)
        columns = draw(B, D, device)
        runs = contenders(columns)
        queries, passages = columns[0], torch.cat([x.detach() for x in columns[1:]])
        yield Case(
            name=f"{THEIRS} {B}x(1+{DOCUMENTS - 1})x{D}",
            question=__doc__.splitlines()[0],
            shape={"B": B, "N": B * DOCUMENTS, "D": D},
            device=device,
            contenders={PLAIN.floor: gemms(PLAIN, queries, passages)} | runs,
            floor=PLAIN.floor,
            keep_bytes=sum(column.nbytes for column in columns),
            errors=error,
            gate=GATE[device],
            peers=frozenset(name for name in runs if name.startswith(THEIRS)),
        )
