"""Problems for every option of InfoNCE: small, ragged, by name; and what their answers are."""

import itertools
import math
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast.ops.checks import known_definition
from rankpo_fast.ops.common import unit_rows
from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.problem import DIRECTIONS, PP, PQ, QP, QQ
from rankpo_kernels.relations import APART, Relations

M, N, D = 19, 37, 24  # two small tiles of rows, two of columns, none full

MARGIN_AND_PREFIXES = {
    "false_negative_margin": 0.4, "matryoshka_dims": (9, 20), "matryoshka_weights": (1.0, 0.3),
}  # fmt: skip

# name: (relations, settings)
GRID = {
    "plain": ((), {}),
    "not-cosine": ((), {"normalize": False}),
    "ids": (("ids",), {}),
    "excluded": (("ids", "excluded"), {}),
    "margin": (("curated",), {"false_negative_margin": 0.3}),
    "relative-margin": (
        ("curated", "ids"), {"false_negative_margin": 0.6, "margin_type": "relative"},
    ),
    "guide": (("guide", "curated", "excluded"), {"false_negative_margin": 0.4}),
    "smoothing": (("ids",), {"label_smoothing": 0.1}),
    "positives": (("positives", "ids"), {}),
    "own": (("own",), {}),
    "dims": ((), {"matryoshka_dims": (5, 16, 24), "matryoshka_weights": (0.5, 1.0, 2.0)}),
    "one-short-prefix": (("ids",), {"matryoshka_dims": (11,), "matryoshka_weights": (1.5,)}),
    "passage-to-query": (("ids",), {"directions": (PQ,)}),
    "query-to-query": (("positives",), {"directions": (QQ,)}),
    "passage-to-passage": (("positives", "curated", "apart"), {"directions": (PP,)}),
    "both-ways": (("excluded",), {"directions": (QP, PQ), "label_smoothing": 0.1}),
    "both-ways-apart": ((), {"directions": (QP, PQ), "partition": "per_direction"}),
    "symmetric": (("ids", "positives"), {"directions": (QP, PQ), "partition": "per_direction"}),
    "hard-in-batch": (
        ("curated", "ids"), {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    ),
    "hard-chosen": (
        ("curated", "own"), {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    ),
    "hard-both-ways": (
        ("ids",),
        {"hardness_mode": "all_negatives", "hardness_strength": 9.0, "directions": (QP, PQ)},
    ),
    "hard-everything": (
        ("ids", "excluded", "positives", "own", "curated", "apart"),
        {
            "hardness_mode": "hard_negatives", "hardness_strength": 5.0, "directions": DIRECTIONS,
            "label_smoothing": 0.2, **MARGIN_AND_PREFIXES,
        },
    ),
    "everything-one-way": (
        ("ids", "excluded", "positives", "own", "curated"),
        {"label_smoothing": 0.2, **MARGIN_AND_PREFIXES},
    ),
} | {
    f"everything-{how}": (
        ("ids", "excluded", "positives", "own", "curated", *more),
        {
            "directions": DIRECTIONS, "partition": "joint" if joint else "per_direction",
            "label_smoothing": 0.2, "normalize": how != "dots", **MARGIN_AND_PREFIXES,
            "margin_type": "relative" if how == "parts" else "absolute",
        },
    )
    for how, joint, more in [
        ("joint", True, ()), ("parts", False, ()), ("guided", True, ["guide"]), ("dots", True, ()),
    ]
}  # fmt: skip

EVERYTHING = dict(
    directions=DIRECTIONS,
    false_negative_margin=0.4,
    label_smoothing=0.1,
    matryoshka_dims=(2, 4),
    matryoshka_weights=(1.0, 2.0),
)


# Ways to lie in memory
LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every-second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows-apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


def lists(lengths, high, generator):
    """(offsets, columns) with rows of these lengths, without repetition in a row."""
    rows = [torch.randperm(high, generator=generator)[:length] for length in lengths]
    rows.append(torch.empty(0, dtype=torch.int64))  # there may be no row
    return torch.tensor([0, *itertools.accumulate(lengths)]), torch.cat(rows)


def problem(*names, M=M, N=N, D=D, dtype=torch.float32, seed=0):
    """(q, p, own, relations) with the relations that are named."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows, dims=D):
        return torch.randn(rows, dims, generator=generator, dtype=torch.float64).to(dtype)

    def integers(high, count):
        return torch.randint(max(high, 1), (count,), generator=generator)

    q, p, own, labels = normal(M), normal(N), None, integers(N, M)
    p[labels] += q
    fields = {"labels_M": labels}
    if "positives" in names:
        offsets, columns = lists([i % 3 for i in range(M)], N - 1, generator)
        columns += columns >= labels[torch.repeat_interleave(offsets.diff())]  # not the label
        fields |= {"positive_offsets": offsets, "positive_columns": columns}
    if "excluded" in names:
        offsets, columns = lists([i % 5 for i in range(M)], N, generator)
        fields |= {"excluded_offsets": offsets, "excluded_columns": columns}
    if "ids" in names:
        fields |= {
            "query_ids_M": integers(12, M) * 10**12,
            "passage_ids_N": integers(25, N) * 10**12,
        }
    if "own" in names:
        lengths = torch.arange(M) * 7 % 4  # none, or several
        lengths[-1:] = 0
        own = normal(int(lengths.sum()))
        fields["own_offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if "curated" in names:
        fields["curated_N"] = integers(M + 1, N) - 1
        if "apart" in names:
            fields["curated_N"][::3] = APART
    if "guide" in names:
        fields |= {"guide_queries": normal(M, 7), "guide_passages": normal(N, 7)}
    return q, p, own, Relations(**fields)


def exact(q, p, own, relations, settings, weights, *, scale) -> tuple[torch.Tensor, list]:
    """(loss_M, gradients of sum_i w_i loss_i) by autograd through the definition in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, p, own) if x is not None]
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    relations = relations.with_guide(torch.Tensor.double)

    def loss(settings):
        return info_nce_definition(*leaves[:2], scale, relations, settings, *leaves[2:])

    loss_M = loss(settings)
    margin = settings.false_negative_margin
    if margin is not None:  # nothing lies so near a limit that rounding decides
        for nudge in (-1e-5, 1e-5):
            nudged = replace(settings, false_negative_margin=margin + nudge)
            assert torch.equal(loss_M, loss(nudged))
    grads = torch.autograd.grad((loss_M * weights.double()).sum(), [*leaves, scale])
    return loss_M.detach(), list(grads)


def label_and_hardest(q, p, own, relations) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] similarities of the label and of the hardest negative, in fp64."""
    sims = unit_rows(q.double()) @ unit_rows(p.double()).T
    hardest_M = sims.masked_fill(known_definition(relations, len(p)), -torch.inf).amax(1)
    if own is not None:
        owner_H = torch.repeat_interleave(relations.own_offsets.diff())
        own_sims = (unit_rows(q.double())[owner_H] * unit_rows(own.double())).sum(1)
        hardest_M = hardest_M.scatter_reduce(0, owner_H, own_sims, "amax")
    return sims.gather(1, relations.labels_M[:, None])[:, 0], hardest_M


class NoMatrix(TorchDispatchMode):
    """Fails on any tensor with as many elements as the score matrix; knows the largest one."""

    def __init__(self, limit: float = math.inf):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() < self.limit, f"{func} made {list(tensor.shape)}"
        return out
