"""InfoNCE by the options of its public function: what they may be given, and two answers to them,
by the definition in fp64 and by ours."""

import itertools

import torch

from rankpo_fast import info_nce_loss
from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.problem import DIRECTIONS, PP, PQ, QP, QQ, InfoNCESettings
from rankpo_kernels.relations import Relations
from support.gates import draw, gates, longest_product

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HARD_IN_BATCH = {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}
HARD_ALL = {"hardness_mode": "all_negatives", "hardness_strength": 9.0}


def spelled_out(
    labels, *, query_ids=None, passage_ids=None, excluded=(None, None), positives=(None, None),
    own_offsets=None, curated=None, guide=(), **options,
):  # fmt: skip
    """The definition's (relations, settings) for public options."""
    relations = Relations(
        labels, *positives, query_ids, passage_ids, *excluded, own_offsets, curated, *guide
    )
    return relations, InfoNCESettings(**options)


def exact(q, p, labels, scale, weights=None, own_negatives=None, **options):
    """Loss and gradients (q, p, scale, own) in fp64 by autograd through the definition."""
    own, leaves = own_negatives, [q.double().requires_grad_(), p.double().requires_grad_()]
    leaves.append(torch.tensor(float(scale), dtype=torch.float64, requires_grad=True))
    if own is not None:
        if own.dim() == 3:
            options["own_offsets"] = torch.arange(len(q) + 1) * own.shape[1]
        own = own.double().requires_grad_()
        leaves.append(own)
        own = own.flatten(0, -2)
    q, p, scale = leaves[:3]
    relations, static = spelled_out(labels, **options)
    loss_M = info_nce_definition(q, p, scale, relations, static, own)
    loss = loss_M.mean() if weights is None else (loss_M * weights).sum() / weights.sum()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def ours(q, p, labels, scale, loss_scale=1.0, own_negatives=None, **options):
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    leaves.append(torch.tensor(float(scale), dtype=torch.float64, requires_grad=True))
    if own_negatives is not None:
        leaves.append(own_negatives.clone().requires_grad_())
        options["own_negatives"] = leaves[-1]
    loss = info_nce_loss(*leaves[:2], labels, scale=leaves[2], **options)
    # A loss scale, as mixed precision has it, keeps the gradients of a converged batch above fp16's
    # smallest number.
    grads = torch.autograd.grad(loss, leaves, torch.tensor(loss_scale, dtype=loss.dtype))
    return loss.detach(), *(grad.double() / loss_scale for grad in grads)


def ragged(lists):
    """(offsets, columns) of a list of columns per query."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, lists))])
    return offsets, torch.tensor(list(itertools.chain(*lists)), dtype=torch.int64)


class World:
    """A batch and what each option may be given for it."""

    def __init__(self, seed=0, M=7, N=24, D=12, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        self.M, self.N, self.dtype = M, N, dtype
        self.q, self.p, self.labels = draw(M, N, D, dtype, converged=False, seed=seed)
        self.D = D

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, low, stop, *shape):
        return torch.randint(low, stop, shape, generator=self.generator)

    def columns(self, most, but_labels=False):
        lists = []
        for i in range(self.M):
            order = torch.randperm(self.N, generator=self.generator).tolist()
            lists.append([a for a in order if not (but_labels and a == self.labels[i])][: i % most])
        return ragged(lists)

    def ids(self):
        return {
            "query_ids": self.integers(0, 5, self.M),
            "passage_ids": self.integers(0, 15, self.N),
        }

    def excluded(self):
        return {"excluded": self.columns(4)}

    def positives(self):
        return {"positives": self.columns(3, but_labels=True)}

    def own(self):
        return {"own_negatives": self.normal(self.M, 2, self.D)}

    def ragged_own(self):
        offsets = torch.tensor([0, *itertools.accumulate(i % 3 for i in range(self.M))])
        return {"own_negatives": self.normal(offsets[-1], self.D), "own_offsets": offsets}

    def margin(self):
        return {"false_negative_margin": 0.1}

    def relative(self):
        return {"false_negative_margin": 0.3, "margin_type": "relative"}

    def curated(self):
        return {"false_negative_margin": 0.1, "curated": self.integers(-1, self.M, self.N)}

    def guide(self):
        return {
            "guide": (self.normal(self.M, 5), self.normal(self.N, 5)),
            "false_negative_margin": 0.2, "curated": self.integers(-1, self.M, self.N),
        }  # fmt: skip

    def hard(self, mode="hard_negatives"):
        return {
            "hardness_mode": mode, "hardness_strength": 2.1,
            "curated": self.integers(-2, self.M, self.N),
        }  # fmt: skip

    def hard_in_batch(self):
        return self.hard("in_batch_negatives")

    def of(self, names):
        options = {}
        for name in names:
            options |= STATIC[name] if name in STATIC else getattr(self, name)()
        return options


STATIC = {
    "dot-products": {"normalize": False},
    "smoothing": {"label_smoothing": 0.2},
    "columns": {"directions": (PQ,)},
    "queries": {"directions": (QQ,)},
    "passages": {"directions": (PP,)},
    "symmetric": {"directions": (QP, PQ), "partition": "per_direction"},
    "symmetric-joint": {"directions": (PQ, QP)},
    "rows-and-queries": {"directions": (QP, QQ)},
    "four-directions": {"directions": DIRECTIONS},
    "four-partitions": {"directions": DIRECTIONS, "partition": "per_direction"},
    "prefixes": {"matryoshka_dims": (12, 5, 8)},
    "one-prefix": {"matryoshka_dims": (7,)},
    "hard-all": HARD_ALL,
    "weighted-prefixes": {"matryoshka_dims": (8, 3), "matryoshka_weights": (0.5, 2.0)},
}


def assert_equals_definition(world, options, **more):
    scale = 5
    arguments = (world.q, world.p, world.labels, scale)
    truth = exact(*arguments, **options)
    result = ours(*arguments, **options, **more)
    rows = [torch.cat([world.q, world.p, options.get("own_negatives", world.q).flatten(0, -2)])] * 2
    largest = 1.0 if options.get("normalize", True) else longest_product(*rows)
    loss_gate, grad_gate = gates(
        world.dtype, 1 / largest / (scale + options.get("hardness_strength", 0.0))
    )
    for name, got, want in zip(("loss", "q", "p", "scale", "own"), result, truth, strict=False):
        # directions without passages or queries leave their gradients at 0
        worst = (got - want).norm() / max(want.norm(), 1.0)
        gate = loss_gate if name == "loss" else grad_gate
        assert worst < gate, f"{name} is off by {worst:.1e}"
    return truth
