"""What tests have the ranks of a gloo group do; every function runs on each of them."""

import functools

import torch
import torch.distributed as dist
from torch import nn

from bench.ranks import Account
from rankpo_fast import (
    InfoNCELoss,
    in_batch_rankpo_loss,
    in_batch_rankpo_loss_and_grads,
    info_nce_loss,
    info_nce_loss_and_grads,
    siglip_loss,
)
from rankpo_kernels.relations import Relations
from support import in_batch_problems
from support.gates import draw, error, gates
from support.info_nce_problems import GRID, problem

SCALE = 7.0  # of InfoNCE's cosines

# (M, N) of each rank, a world takes them from the front
SIZES = {
    "even": [(5, 9)] * 4,
    "uneven": [(5, 9), (8, 13), (0, 4), (1, 1)],
    "empty": [(7, 11), (0, 0), (3, 3), (0, 0)],
    "one": [(7, 11), (0, 0), (0, 0), (0, 0)],
}


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
            relations["curated_N"] = torch.where(owner_N < 0, owner_N, owner_N + row)
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


def in_fp64(case: tuple) -> tuple:
    """The same rows, of which one process computes the truth."""
    *rows, relations = case
    guides = {
        name: x.double()
        for name in ("guide_queries", "guide_passages")
        if (x := getattr(relations, name)) is not None
    }
    return *(x if x is None else x.double() for x in rows), relations._replace(**guides)


def public(relations: Relations, settings: dict) -> dict:
    """The options of `info_nce_loss` for what launchers take."""
    r, options = relations, dict(settings)
    pairs = {
        "excluded": (r.excluded_offsets, r.excluded_columns),
        "positives": (r.positive_offsets, r.positive_columns),
        "guide": (r.guide_queries, r.guide_passages),
    }
    options |= {name: pair for name, pair in pairs.items() if pair[0] is not None}
    return options | {
        "labels": r.labels_M, "query_ids": r.query_ids_M, "passage_ids": r.passage_ids_N,
        "own_offsets": r.own_offsets, "curated": r.curated_N,
    }  # fmt: skip


def losses(case, weights, upstream, **options):
    """(loss, gradients of q, p, scale and own negatives) by autograd."""
    q, p, own, relations = case
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    if own is not None:
        leaves.append(own.clone().requires_grad_())
        options["own_negatives"] = leaves[-1]
    options = public(relations, {}) | options
    loss = info_nce_loss(*leaves[:2], scale=leaves[2], weights=weights, **options)
    grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    return [loss.detach(), *grads]


def pair_problems(name, sizes: str, size: int, dtype) -> list[tuple]:
    """(q, p, None, relations) of every rank; the reference is the guide."""
    cases = []
    for rank, (M, N) in enumerate(SIZES[sizes][:size]):
        _, q, p, options = in_batch_problems.problem(name, dtype, M, N, 8, seed=rank)
        cases.append((q, p, None, in_batch_problems.relations_of(options)))
    return cases


def pair_options(name, relations: Relations) -> dict:
    """The options of a loss of pairs but for its weights, for what `pair_problems` gives."""
    loss, _, settings = in_batch_problems.GRID[name]
    r, options = relations, dict(settings)
    if loss == "rankpo":
        sides = {"reference_queries": r.guide_queries, "reference_passages": r.guide_passages}
        options |= {"temperature": in_batch_problems.TEMPERATURE} | sides
    if r.excluded_offsets is not None:
        options["excluded"] = (r.excluded_offsets, r.excluded_columns)
    ids = {"query_ids": r.query_ids_M, "passage_ids": r.passage_ids_N}
    return options | {"labels": r.labels_M} | ids


def pair_gates(name, sizes: str, size: int, dtype) -> tuple[float, float]:
    """(loss, gradient) bounds of what `pair_problems` gives."""
    q, p, _, relations = joined(pair_problems(name, sizes, size, dtype))
    options = pair_options(name, relations)
    return gates(
        dtype, 1 / in_batch_problems.largest_logit(in_batch_problems.GRID[name][0], q, p, options)
    )


def pair_losses(name, case, weights, upstream, **options):
    """(loss, gradients of q, p and of SigLIP's scale and bias) by autograd."""
    q, p, _, relations = case
    loss = in_batch_problems.GRID[name][0]
    leaves = in_batch_problems._leaves(loss, q, p)
    loss = in_batch_problems.call(
        loss, leaves, pair_options(name, relations) | options | {"weights": weights}
    )
    grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    return [loss.detach(), *grads]


def compare(name, sizes, dtype, reduction, group=None, **more):
    """`against_one` of InfoNCE."""
    group = group or dist.group.WORLD
    names, settings = GRID[name]
    settings = {k: v for k, v in public(Relations(None), settings).items() if v is not None}
    of_options = functools.partial(losses, **settings)
    cases = problems(names, sizes, group.size(), dtype)
    return against_one(of_options, cases, reduction, group, **more)


def compare_pairs(name, sizes, dtype, reduction, **more):
    """`against_one` of a loss of pairs."""
    group = dist.group.WORLD
    cases = pair_problems(name, sizes, group.size(), dtype)
    return against_one(functools.partial(pair_losses, name), cases, reduction, group, **more)


def against_one(losses, cases, reduction, group, autocast=False, **more):
    """Relative errors of a rank's (loss, gradients of q, p, numbers, own) against its part of one
    process's in fp64; loss and numbers are compared as DDP takes them, over the ranks."""
    size, rank, none = group.size(), group.rank(), reduction == "none"
    ends = [
        torch.tensor([0, *(0 if x is None else len(x) for x in of_ranks)]).cumsum(0).tolist()
        for of_ranks in list(zip(*cases, strict=True))[:3]
    ]
    own_M, own_N, own_H = (slice(end[rank], end[rank + 1]) for end in ends)
    generator = torch.Generator().manual_seed(9)
    weights, upstream = (torch.rand(ends[0][-1], generator=generator) for _ in range(2))
    if not none:
        upstream = torch.tensor(0.7)
    want = losses(in_fp64(joined(cases)), weights, upstream, reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = losses(
            cases[rank], weights[own_M], upstream[own_M] if none else upstream,
            reduction=reduction, process_group=group, **more,
        )  # fmt: skip
    share = size if reduction == "mean" else 1  # DDP takes the mean of gradients
    rows = iter([own_M] * none + [own_M, own_N, own_H])
    errors = []
    for ours, exact in zip(got, want, strict=True):
        if exact.dim():
            exact = exact[next(rows)] * share
        else:
            ours = ours / share
            dist.all_reduce(ours, group=group)
        errors.append(error(ours, exact))
    return errors


def compare_without_autograd(name, exchange, sizes="uneven"):
    """`info_nce_loss_and_grads` against autograd, on the same ranks; its statistics are of the own
    queries."""
    group = dist.group.WORLD
    names, settings = GRID[name]
    case = problems(names, sizes, group.size(), torch.float64)[group.rank()]
    options = {"process_group": group, "exchange": exchange, "reduction": "sum"}
    options |= {k: v for k, v in public(case[3], settings).items() if v is not None}
    want = losses(case, None, torch.tensor(1.0), **options)
    q, p, own, relations = case
    options |= {} if own is None else {"own_negatives": own}
    loss, (dq, dp, d_own, d_scale), stats = info_nce_loss_and_grads(q, p, scale=SCALE, **options)
    grads = [dq, dp, d_scale, *([] if own is None else [d_own])]
    D = settings.get("matryoshka_dims", q.shape[1:])[-1]
    positive = nn.functional.cosine_similarity(q[:, :D], p[relations.labels_M, :D]).mean()
    if len(q):
        assert error(stats.positive_similarity, positive) < 1e-12
    return [error(a, b) for a, b in zip([loss, *grads], want, strict=True)]


def compare_pairs_without_autograd(name):
    """`in_batch_rankpo_loss_and_grads` against autograd, on the same ranks."""
    group = dist.group.WORLD
    case = pair_problems(name, "uneven", group.size(), torch.float64)[group.rank()]
    options = {"process_group": group, "reduction": "sum"}
    want = pair_losses(name, case, None, torch.tensor(1.0), **options)
    q, p, _, relations = case
    options |= pair_options(name, relations)
    loss, grads, stats = in_batch_rankpo_loss_and_grads(q, p, **options)
    got = loss, *grads
    if len(q):
        positive = nn.functional.cosine_similarity(q, p[relations.labels_M]).mean()
        assert error(stats.positive_similarity, positive) < 1e-12
    return [error(a, b) for a, b in zip(got, want, strict=True)]


class Trained(nn.Module):
    """An encoder and the loss, as a trainer would hand them to DDP."""

    def __init__(self, loss, **options):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encoder = nn.Linear(6, 8)
        self.loss = loss(**options)
        self.double()

    def forward(self, queries, passages):
        return self.loss(self.encoder(queries), self.encoder(passages))


LEARNT_TEMPERATURE = functools.partial(InfoNCELoss, 0.1, learn_temperature=True)


def compare_ddp(loss=LEARNT_TEMPERATURE, **options):
    """Errors of the parameters' gradients as DDP leaves them, against one process's."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    q, p, _ = draw(3 * size, 6 * size, 6, torch.float64, converged=False)
    one, ours = Trained(loss), Trained(loss, process_group=group, **options)
    if "directions" in options:
        one = Trained(loss, directions=options["directions"])
    one(q, p).backward()
    ours = nn.parallel.DistributedDataParallel(ours)
    ours(q.chunk(size)[rank], p.chunk(size)[rank]).backward()
    pairs = zip(ours.parameters(), one.parameters(), strict=True)
    return [error(a.grad, b.grad) for a, b in pairs]


def talk_alone():
    """(worst error, collectives) in a group of this rank alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    with Account() as account:
        errors = compare("everything-joint", "even", torch.float64, "mean", group)
    return max(errors), account.messages


def compare_halves(name, **more):
    """`compare` in two groups at once, of every second rank."""
    size = dist.get_world_size()
    groups = [dist.new_group(list(range(first, size, 2))) for first in range(2)]
    group = groups[dist.get_rank() % 2]
    return compare(name, "uneven", torch.float64, "mean", group, **more)


def compare_compiled(loss=info_nce_loss, **options):
    """Differences of gradients between a compiled step and the same as it is."""
    q, p, _ = draw(4, 8, 8, torch.float32, converged=False, seed=dist.get_rank())
    leaves = q.requires_grad_(), p.requires_grad_()

    def step(q, p):
        return loss(2 * q, 2 * p, process_group=dist.group.WORLD, **options)

    compiled = torch.compile(step, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
    return [error(a, b) for a, b in zip(got, want, strict=True)]


BAD = {  # what rank 1 does unlike the others
    "D": (dict(queries=torch.ones(3, 5), passages=torch.ones(6, 5)), r"D must be .* ranks \[1\]"),
    "dtype": (dict(queries=torch.ones(3, 4).double()), "dtype must be the same on all ranks"),
    "temperature": (dict(temperature=0.1), "temperature must be the same on all ranks"),
    "options": (dict(label_smoothing=0.1), "label_smoothing must be the same on all ranks"),
    "ids": (dict(query_ids=torch.arange(3)), "whether query_ids are given must be the same"),
    "frozen": (dict(passages=torch.ones(6, 4)), "requires_grad of queries and passages must be"),
    "labels": (dict(labels=torch.arange(3) + 4), r"lie in \[4, 6\]|refused on ranks \[1\]"),
    "groups": (dict(passages=torch.ones(7, 4)), r"7 passages do not|refused on ranks \[1\]"),
    "smoothing": (dict(label_smoothing=3), r"label_smoothing must lie|refused on ranks \[1\]"),
    "directions": (dict(directions=None), r"not iterable|refused on ranks \[1\]"),
    "reduction": (dict(reduction="none"), "reduction must be the same on all ranks"),
    "no-tensors": (dict(labels="none"), r"no attribute|refused on ranks \[1\]"),
}


REFERENCE = {"reference_queries": torch.ones(3, 2), "reference_passages": torch.ones(6, 2)}
BAD_PAIRS = {  # the same, and what all ranks have
    "beta": (dict(beta=1.5), "beta must be the same on all ranks", {}),
    "hinge": (dict(loss_type="hinge"), "loss_type must be the same on all ranks", {}),
    "negative-beta": (dict(beta=-1), r"beta must be > 0 .* got -1|refused on ranks \[1\]", {}),
    "reduction": (
        dict(reduction="sums"), r"one of .* got 'sums'|refused on ranks \[1\]", {"bias": -9.0},
    ),
    "reference": (REFERENCE, "the guide or reference must be the same on all ranks", {}),
    "half-a-reference": (
        dict(reference_passages=None), r"reference_passages are missing|refused on ranks \[1\]",
        REFERENCE,
    ),
    "labels": (dict(labels=torch.arange(3) + 4), r"lie in \[4, 6\]|refused on ranks \[1\]", {}),
    "scale": (dict(scale=9.0), "scale must be the same on all ranks", {"bias": -9.0}),
    "bias": (
        dict(bias=torch.tensor(-9.0)), "bias must be the same .* has ('a tensor'|-9.0)",
        {"bias": -9.0},
    ),
    "bias-shape": (dict(bias=torch.ones(2)), r"one number|refused on ranks \[1\]", {"bias": -9.0}),
}  # fmt: skip


def err(name, loss=info_nce_loss):
    arguments = {"queries": torch.ones(3, 4), "passages": torch.ones(6, 4, requires_grad=True)}
    if dist.get_rank() == 1:
        arguments |= BAD[name][0]
    loss(**arguments, process_group=dist.group.WORLD)


def err_of_pairs(name):
    wrong, _, arguments = BAD_PAIRS[name]
    loss = siglip_loss if "bias" in arguments else in_batch_rankpo_loss
    if dist.get_rank() == 1:
        arguments = arguments | wrong
    loss(torch.ones(3, 4), torch.ones(6, 4), **arguments, process_group=dist.group.WORLD)


def take(loss=info_nce_loss, **options):
    q, p = torch.ones(3, 4), torch.ones(6, 4)
    loss(q, p, process_group=dist.group.WORLD, **options)
