"""Processes that are the ranks of a gloo group, and what tests have them do.

They start once for a group of tests, since each imports torch, and take one function after the
other. What a function returns or raises comes back from every rank; none may hang.
"""

import contextlib
import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from gates import error
from problems import GRID, problem

from rankpo_fast import info_nce_loss
from rankpo_kernels.objective import Relations

SECONDS = 60  # that any answer may take
# (M, N) of each rank, a world takes them from the front
SIZES = {
    "even": [(5, 9)] * 4,
    "uneven": [(5, 9), (8, 13), (0, 4), (1, 1)],
    "empty": [(7, 11), (0, 0), (3, 3), (0, 0)],
}


@contextlib.contextmanager
def processes(size: int, directory):
    """A function that has all ranks call one, and returns their answers: a value or an exception
    each."""
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    ranks = [
        context.Process(target=_serve, args=(rank, size, directory / "meet", there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()

    def ask(function, *arguments, **options):
        for here, _ in pipes:
            here.send((function, arguments, options))
        answers, end = [], time.monotonic() + SECONDS
        for rank, (here, _) in enumerate(pipes):
            if not here.poll(max(0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {size} gives no answer to {function.__name__}")
            answers.append(here.recv())
        return answers

    ask.size = size
    try:
        yield ask
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _serve(rank: int, size: int, meet, pipe) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{meet}", timedelta(seconds=SECONDS / 2), rank=rank, world_size=size
    )
    while True:
        function, arguments, options = pipe.recv()
        try:
            answer = function(*arguments, **options)
        except Exception as failure:
            failure.add_note(traceback.format_exc())  # it would not come through the pipe
            answer = failure
        pipe.send(answer)


def problems(names, sizes: str, size: int, dtype) -> list[tuple]:
    """(q, p, own, relations) of every rank."""
    return [
        problem(*names, M=M, N=N, dtype=dtype, seed=rank)
        for rank, (M, N) in enumerate(SIZES[sizes][:size])
    ]


def joined(cases: list[tuple]) -> tuple:
    """The problem of one process that has all rows, in rank order."""
    q, p, own = (None if x[0] is None else torch.cat(x) for x in list(zip(*cases, strict=True))[:3])
    parts, row, column = [], 0, 0
    for of_rank in cases:
        relations = of_rank[3]._asdict()
        for name in ("labels_M", "positive_columns", "excluded_columns"):
            if relations[name] is not None:
                relations[name] = relations[name] + column
        if (owner_N := relations["curated_N"]) is not None:
            relations["curated_N"] = torch.where(owner_N < 0, -1, owner_N + row)
        parts.append(relations)
        row, column = row + len(of_rank[0]), column + len(of_rank[1])
    whole = {}
    for name in Relations._fields:
        of_ranks = [part[name] for part in parts]
        if of_ranks[0] is None:
            continue
        if name.endswith("offsets"):
            counts = torch.cat([x.diff() for x in of_ranks])
            whole[name] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        else:
            whole[name] = torch.cat(of_ranks)
    return q, p, own, Relations(**whole)


def public(relations: Relations, settings: dict) -> dict:
    """The options of `info_nce_loss` for what launchers take."""
    r, options = relations, dict(settings)
    pairs = {
        "excluded": (r.excluded_offsets, r.excluded_columns),
        "positives": (r.positive_offsets, r.positive_columns),
        "guide": (r.guide_queries, r.guide_passages),
    }
    options |= {name: pair for name, pair in pairs.items() if pair[0] is not None}
    names = {"margin": "false_negative_margin", "dims": "matryoshka_dims"}
    names |= {"dim_weights": "matryoshka_weights"}
    options = {names.get(name, name): value for name, value in options.items()}
    if "joint" in options:
        options["partition"] = "joint" if options.pop("joint") else "per_direction"
    if options.pop("relative_margin", False):
        options["margin_type"] = "relative"
    return options | {
        "labels": r.labels_M, "query_ids": r.query_ids_M, "passage_ids": r.passage_ids_N,
        "own_offsets": r.own_offsets, "curated": r.curated_N,
    }  # fmt: skip


def losses(case, weights, upstream, **options):
    """(loss, gradients of q, p, scale and own negatives) by autograd."""
    q, p, own, relations = case
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    leaves.append(torch.tensor(7.0, dtype=torch.float64, requires_grad=True))
    if own is not None:
        leaves.append(own.clone().requires_grad_())
        options["own_negatives"] = leaves[-1]
    options = public(relations, {}) | options
    loss = info_nce_loss(*leaves[:2], scale=leaves[2], weights=weights, **options)
    grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    return [loss.detach(), *grads]


def compare(name, sizes, dtype, reduction, group=None, **more):
    """Relative errors of a rank's (loss, gradients) against its part of one process's; of loss and
    scale, which are single numbers, the mean or sum over ranks is compared."""
    group = group or dist.group.WORLD
    size, rank = group.size(), group.rank()
    names, settings = GRID[name]
    cases = problems(names, sizes, size, dtype)
    counts = [[len(x) for x in of_ranks if x is not None] for of_ranks in zip(*cases, strict=True)]
    of_M, of_N, of_H = (torch.tensor(c or [0] * size) for c in counts[:3])
    generator = torch.Generator().manual_seed(9)
    weights, upstream = (torch.rand(int(of_M.sum()), generator=generator) for _ in range(2))
    own_M = slice(int(of_M[:rank].sum()), int(of_M[: rank + 1].sum()))
    single = torch.tensor(0.7)
    settings = public(Relations(None), settings)
    settings = {k: v for k, v in settings.items() if v is not None} | {"reduction": reduction}
    none = reduction == "none"
    want = losses(joined(cases), weights, upstream if none else single, **settings)
    got = losses(
        cases[rank], weights[own_M], upstream[own_M] if none else single, **settings, **more,
        process_group=group,
    )  # fmt: skip
    if none:
        want[0] = want[0][own_M]
    else:
        dist.all_reduce(got[0], group=group)
        got[0] /= size if reduction == "mean" else 1
    dist.all_reduce(got[3], group=group)
    # of a mean, DDP takes the mean of the gradients
    share = size if reduction == "mean" else 1
    got[3] = got[3] / share
    own = [slice(int(c[:rank].sum()), int(c[: rank + 1].sum())) for c in (of_M, of_N, of_H)]
    want[1], want[2] = want[1][own[0]] * share, want[2][own[1]] * share
    if len(want) > 4:
        want[4] = want[4][own[2]] * share
    return [error(a, b) for a, b in zip(got, want, strict=True)]
