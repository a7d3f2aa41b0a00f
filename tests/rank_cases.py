"""What tests have the ranks of a gloo group do; every function runs on each of them."""

import torch
import torch.distributed as dist
from gates import draw, error
from problems import GRID, problem
from torch import nn

from bench.ranks import Account
from rankpo_fast import InfoNCELoss, info_nce_loss, info_nce_loss_and_grads
from rankpo_kernels.objective import Relations

# (M, N) of each rank, a world takes them from the front
SIZES = {
    "even": [(5, 9)] * 4,
    "uneven": [(5, 9), (8, 13), (0, 4), (1, 1)],
    "empty": [(7, 11), (0, 0), (3, 3), (0, 0)],
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


def compare(name, sizes, dtype, reduction, group=None, autocast=False, **more):
    """Relative errors of a rank's (loss, gradients of q, p, scale, own) against its part of one
    process's; loss and scale, single numbers, are compared as DDP takes them, over the ranks."""
    group = group or dist.group.WORLD
    size, rank, none = group.size(), group.rank(), reduction == "none"
    names, settings = GRID[name]
    cases = problems(names, sizes, size, dtype)
    ends = [
        torch.tensor([0, *(0 if x is None else len(x) for x in of_ranks)]).cumsum(0).tolist()
        for of_ranks in list(zip(*cases, strict=True))[:3]
    ]
    own_M, own_N, own_H = (slice(end[rank], end[rank + 1]) for end in ends)
    generator = torch.Generator().manual_seed(9)
    weights, upstream = (torch.rand(ends[0][-1], generator=generator) for _ in range(2))
    settings = {k: v for k, v in public(Relations(None), settings).items() if v is not None}
    settings |= {"reduction": reduction}
    if not none:
        upstream = torch.tensor(0.7)
    loss, *want = losses(joined(cases), weights, upstream, **settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own_loss, *got = losses(
            cases[rank], weights[own_M], upstream[own_M] if none else upstream, **settings, **more,
            process_group=group,
        )  # fmt: skip
    share = size if reduction == "mean" else 1  # DDP takes the mean of gradients
    if none:
        loss = loss[own_M]
    else:
        dist.all_reduce(own_loss, group=group)
        own_loss /= share
    got[2] = got[2] / share
    dist.all_reduce(got[2], group=group)
    want = [want[0][own_M] * share, want[1][own_N] * share, want[2], *want[3:]]
    want[3:] = [x[own_H] * share for x in want[3:]]
    return [error(a, b) for a, b in zip([own_loss, *got], [loss, *want], strict=True)]


def compare_without_autograd(name, exchange):
    """`info_nce_loss_and_grads` against autograd, on the same ranks; its statistics are of the own
    queries."""
    group = dist.group.WORLD
    names, settings = GRID[name]
    case = problems(names, "uneven", group.size(), torch.float64)[group.rank()]
    options = {"process_group": group, "exchange": exchange, "reduction": "sum"}
    options |= {k: v for k, v in public(case[3], settings).items() if v is not None}
    want = losses(case, None, torch.tensor(1.0), **options)
    q, p, own, relations = case
    options |= {} if own is None else {"own_negatives": own}
    loss, *grads, stats = info_nce_loss_and_grads(q, p, scale=7.0, **options)[:5]
    grads += [] if own is None else [info_nce_loss_and_grads(q, p, scale=7.0, **options)[5]]
    D = settings.get("dims", q.shape[1:])[-1]
    positive = nn.functional.cosine_similarity(q[:, :D], p[relations.labels_M, :D]).mean()
    if len(q):
        assert error(stats.positive_similarity, positive) < 1e-12
    return [error(a, b) for a, b in zip([loss, *grads], want, strict=True)]


class Trained(nn.Module):
    """An encoder and the loss, as a trainer would hand them to DDP."""

    def __init__(self, **options):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encoder = nn.Linear(6, 8)
        self.loss = InfoNCELoss(0.1, learn_temperature=True, **options)
        self.double()

    def forward(self, queries, passages):
        return self.loss(self.encoder(queries), self.encoder(passages))


def compare_ddp(**options):
    """Errors of the parameters' gradients as DDP leaves them, against one process's."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    q, p, _ = draw(3 * size, 6 * size, 6, torch.float64, converged=False)
    one, ours = Trained(), Trained(process_group=group, **options)
    if "directions" in options:
        one = Trained(directions=options["directions"])
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


def compare_compiled(**options):
    """Differences of gradients between a compiled step and the same as it is."""
    q, p, _ = draw(4, 8, 8, torch.float32, converged=False, seed=dist.get_rank())
    leaves = q.requires_grad_(), p.requires_grad_()

    def step(q, p):
        return info_nce_loss(2 * q, 2 * p, process_group=dist.group.WORLD, **options)

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
    "no-tensors": (dict(labels="none"), r"no attribute|refused on ranks \[1\]"),
}


def err(name):
    arguments = {"queries": torch.ones(3, 4), "passages": torch.ones(6, 4, requires_grad=True)}
    if dist.get_rank() == 1:
        arguments |= BAD[name][0]
    info_nce_loss(**arguments, process_group=dist.group.WORLD)


def take(**options):
    q, p = torch.ones(3, 4), torch.ones(6, 4)
    info_nce_loss(q, p, process_group=dist.group.WORLD, **options)
