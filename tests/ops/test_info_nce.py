"""InfoNCE: definition, ops, gradients, masks, options, and what torch expects of an op."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gates import FLOOR, draw, error, gates, longest_product, pass_the_gates, plain_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import NoMatrix

from rankpo_fast import info_nce_loss, info_nce_loss_and_grads
from rankpo_fast.ops import batch
from rankpo_fast.ops import info_nce as module
from rankpo_fast.ops.info_nce import _info_nce, _info_nce_grads, info_nce_definition
from rankpo_kernels import chunked
from rankpo_kernels.objective import DIRECTIONS, HARDNESS_MODES, PP, PQ, QP, QQ, Relations, Settings

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    pytest.param(1, 2, 8, id="one-query"),
    pytest.param(65, 129, 100, id="nothing-round"),
    pytest.param(32, 160, 384, id="minilm-with-four-negatives"),
    pytest.param(8, 40, 4096, id="7b-width"),
    pytest.param(40, 8, 64, id="fewer-passages-than-queries"),
]


def spelled_out(
    labels, D, *, query_ids=None, passage_ids=None, excluded=(None, None), positives=(None, None),
    own_offsets=None, curated=None, guide=(), normalize=True, label_smoothing=0.0, directions=(QP,),
    partition="joint", false_negative_margin=None, margin_type="absolute", matryoshka_dims=None,
    matryoshka_weights=None, hardness_mode=None, hardness_strength=0.0,
):  # fmt: skip
    """The definition's (relations, settings) for public options."""
    levels = []
    if matryoshka_dims is not None:
        ones = [1.0] * len(matryoshka_dims)
        levels = sorted(zip(matryoshka_dims, matryoshka_weights or ones, strict=True))
    dims, dim_weights = zip(*levels, strict=True) if levels else ((), ())
    relations = Relations(
        labels, *positives, query_ids, passage_ids, *excluded, own_offsets, curated, *guide
    )
    return relations, Settings(
        normalize=normalize, workspace_bytes=0, directions=tuple(directions),
        joint=partition == "joint", label_smoothing=label_smoothing, margin=false_negative_margin,
        relative_margin=margin_type == "relative", dims=dims, dim_weights=dim_weights,
        hardness_mode=hardness_mode, hardness_strength=hardness_strength,
    )  # fmt: skip


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
    relations, static = spelled_out(labels, q.shape[1], **options)
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


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02, 0.01])
@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "D"), SHAPES)
def test_loss_and_gradients_pass_the_gates(M, N, D, dtype, converged, temperature, path):
    q, p, labels = draw(M, N, D, dtype, converged)
    truth = exact(q, p, labels, 1 / temperature)
    loss_scale = min(2.0**110, 2.0 ** -truth[1].abs().amax().log2().round().item())
    result = ours(q, p, labels, 1 / temperature, loss_scale, workspace_bytes=8 * 16 * N)
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(result[0], truth[0]) < loss_gate
    if (
        truth[1].norm() < 1e-30
    ):  # every row is settled: exp(-90) and its gradient are below fp32's range
        assert dtype == torch.float64 or not (result[1].norm() > 1e-30)
        return
    plain = plain_torch(q, p, labels, 1 / temperature)
    for got, same_dtype, want in zip(result[1:3], plain, truth[1:3], strict=True):
        assert error(got, want) < grad_gate
        if dtype in FLOOR:
            assert error(got, want) < 1.5 * error(same_dtype, want) + FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_one_dimension_cosines_are_signs_without_gradient(dtype, path):
    q, p, labels = draw(17, 33, 1, dtype, converged=False)
    truth = exact(q, p, labels, 20)
    loss, dq, dp, _ = ours(q, p, labels, 20)
    assert error(loss, truth[0]) < gates(dtype, 0.05)[0]
    assert max(dq.abs().max(), dp.abs().max()) < 20 * torch.finfo(dtype).eps


def test_softplus_form_keeps_digits_that_cross_entropy_loses():
    q, p, labels = draw(64, 64, 256, torch.float32, converged=True)
    p[labels] = q + 0.1 * (p[labels] - q)
    truth = exact(q, p, labels, 100)
    unit = torch.nn.functional.normalize
    naive = torch.nn.functional.cross_entropy(100 * unit(q) @ unit(p).T, labels)
    assert error(naive, truth[0]) > 0.5
    assert error(ours(q, p, labels, 100)[0], truth[0]) < gates(torch.float32, 0.01)[0]


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    q, p, labels = draw(5, 7, 4, torch.float64, converged=False)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, p, s, how=reduction: info_nce_loss(
                q, p, labels, scale=s, normalize=normalize, weights=weights, reduction=how
            ),
            (q.requires_grad_(), p.requires_grad_(), scale),
        )


def masks(labels, query_ids, passage_ids, lists, N):
    """The documented meaning of ids, excluded columns and further positives, pair by pair: passage
    j has the text of a positive or exclusion of a query with the text of query i."""
    M = len(labels)
    passage_ids = range(N) if passage_ids is None else passage_ids.tolist()
    query_ids = range(M) if query_ids is None else query_ids.tolist()
    masked = torch.zeros(M, N, dtype=torch.bool)
    for i, j, k in itertools.product(range(M), range(N), range(M)):
        of_k = [int(labels[k]), *lists[k]]
        if query_ids[k] == query_ids[i] and passage_ids[j] in [passage_ids[a] for a in of_k]:
            masked[i, j] = True
    return masked


def ragged(lists):
    """(offsets, columns) of a list of columns per query."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, lists))])
    return offsets, torch.tensor(list(itertools.chain(*lists)), dtype=torch.int64)


def masked_loss(q, p, labels, scale, masked):
    """Mean loss and gradients in fp64, from a mask, with nothing of ours."""
    leaves = [q.double().requires_grad_(), p.double().requires_grad_()]
    leaves.append(torch.tensor(float(scale), dtype=torch.float64, requires_grad=True))
    s = leaves[2] * F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T
    gap = s.masked_fill(masked, -torch.inf).logsumexp(1) - s.gather(1, labels[:, None])[:, 0]
    loss = torch.logaddexp(gap, torch.zeros_like(gap)).mean()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["queries", "passages", "excluded", "all"])
def test_masks_are_those_of_the_definition(which, dtype, path):
    M, N = 16, 40
    q, p, labels = draw(M, N, 32, dtype, converged=False)
    labels[3] = labels[5]  # one passage is the positive of two queries
    generator = torch.Generator().manual_seed(1)
    query_ids = torch.randint(8, (M,), generator=generator) if which in ("queries", "all") else None
    passage_ids = (
        torch.randint(20, (N,), generator=generator) if which in ("passages", "all") else None
    )
    lists = [[] for _ in range(M)]
    if which in ("excluded", "all"):
        lists = [list(range(i % 5)) for i in range(M)]
    masked = masks(labels, query_ids, passage_ids, lists, N)
    truth = masked_loss(q, p, labels, 20, masked)
    options = {"query_ids": query_ids, "passage_ids": passage_ids, "excluded": ragged(lists)}
    result = ours(q, p, labels, 20, **options, workspace_bytes=8 * 7 * N)
    loss_gate, grad_gate = gates(dtype, 1 / 20)
    assert error(result[0], truth[0]) < loss_gate
    assert max(map(error, result[1:], truth[1:])) < grad_gate
    assert max(map(error, exact(q, p, labels, 20, **options), truth)) < 1e-12
    unmasked = exact(q, p, labels, 20)
    assert error(result[0], unmasked[0]) > 1e-3


def test_further_positives_are_no_negatives_either():
    M, N = 12, 40
    q, p, labels = draw(M, N, 16, torch.float64, converged=False)
    query_ids, passage_ids = torch.randint(6, (M,)), torch.randint(30, (N,))
    lists = [[a for a in range(i % 4) if a != labels[i]] for i in range(M)]
    masked = masks(labels, query_ids, passage_ids, lists, N)
    s = 20 * F.normalize(q, dim=1) @ F.normalize(p, dim=1).T
    lse_M = s.masked_fill(masked, -torch.inf).logsumexp(1)
    of_queries = [
        sum(F.softplus(lse_M[i] - s[i, a], threshold=1e9) for a in positives) / len(positives)
        for i, positives in enumerate([int(labels[i]), *lists[i]] for i in range(M))
    ]
    got = info_nce_loss(
        q, p, labels, scale=20, query_ids=query_ids, passage_ids=passage_ids,
        positives=ragged(lists), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(got, torch.stack(of_queries), rtol=1e-12, atol=0)


HARD_IN_BATCH = {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}
HARD_ALL = {"hardness_mode": "all_negatives", "hardness_strength": 9.0}
hard_or_not = pytest.mark.parametrize("options", [{}, HARD_ALL], ids=["plain", "hard"])


@hard_or_not
def test_a_row_with_nothing_left_has_loss_and_gradient_zero(options, path):
    q, p, labels = draw(3, 4, 8, torch.float32, converged=False)
    same = torch.zeros(4, dtype=torch.int64)
    loss, dq, dp, ds = ours(q, p, labels, 50, passage_ids=same, **options)
    assert loss == 0 and not dq.any() and not dp.any() and ds == 0
    loss, dq, dp, _ = ours(q[:1], p[:1], None, 50, **options)
    assert loss == 0 and not dq.any() and not dp.any()


def test_no_queries_give_zero_loss_and_gradients():
    loss, dq, dp, ds = ours(torch.zeros(0, 8), torch.randn(3, 8), None, 50)
    assert loss == 0 and dq.shape == (0, 8) and not dp.any() and ds == 0


def test_a_zero_vector_has_gradient_zero(path):
    q, p, labels = draw(4, 8, 16, torch.float32, converged=False)
    q[1], p[2], p[labels[3]] = 0, 0, 0
    loss, dq, dp, _ = ours(q, p, labels, 50)
    assert loss.isfinite() and dq.isfinite().all() and dp.isfinite().all()
    assert not dq[1].any() and not dp[2].any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        pytest.param(torch.float32, 1e18, id="fp32-squares-overflow"),
        pytest.param(torch.float32, 1e-25, id="fp32-squares-underflow"),
        pytest.param(torch.float16, 1e3, id="fp16-squares-overflow"),
    ],
)
def test_norms_neither_overflow_nor_underflow(dtype, size, path):
    q, p, labels = draw(8, 24, 64, torch.float64, converged=False)
    q, p = (q * size).to(dtype), (p * size).to(dtype)
    truth = exact(q, p, labels, 20)
    result = ours(q, p, labels, 20)
    loss_gate, grad_gate = gates(dtype, 0.05)
    assert error(result[0], truth[0]) < loss_gate
    if size < 1e20:  # gradients of tiny vectors are large; those of fp16 at size 1e3 are subnormal
        assert dtype == torch.float16 or error(result[1], truth[1]) < grad_gate


def test_a_positive_far_below_the_negatives_does_not_overflow(path):
    q = torch.tensor([[1.0, 0.0]])
    p = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss, dq, _, d_scale = ours(q, p, torch.tensor([0]), 100)
    assert loss == 200 and d_scale == 2 and dq.isfinite().all()


@hard_or_not
def test_nan_in_one_query_stays_in_its_row(options, path):
    q, p, labels = draw(6, 12, 16, torch.float32, converged=False)
    clean = info_nce_loss(q, p, labels, reduction="none", **options)
    q[2, 3] = torch.nan
    loss_M = info_nce_loss(q, p, labels, reduction="none", **options)
    assert loss_M[2].isnan()
    others = torch.arange(6) != 2
    assert torch.equal(loss_M[others], clean[others])


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
TENSORS = [
    "ids", "excluded", "positives", "own", "ragged_own", "margin", "relative", "curated", "guide",
    "hard", "hard_in_batch",
]  # fmt: skip


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


@pytest.mark.parametrize("name", [*TENSORS, *STATIC])
def test_each_option_is_that_of_the_definition(name, path):
    world = World()
    options = world.of([name])
    truth = assert_equals_definition(world, options, workspace_bytes=8 * 3 * 5 * 24)
    plain = exact(world.q, world.p, world.labels, 5)
    assert error(truth[0], plain[0]) > 1e-4, "the option does nothing here"
    single = World(dtype=torch.float32)
    assert_equals_definition(single, single.of([name]))
    rows = info_nce_loss(
        world.q, world.p, world.labels, scale=5, **options, reduction="none"
    )  # fmt: skip
    torch.testing.assert_close(rows.mean(), truth[0], rtol=1e-12, atol=0)


ALTERNATIVES = [
    ["ids"], ["excluded"], ["positives"], ["own", "ragged_own"], ["dot-products"], ["smoothing"],
    ["margin", "relative", "curated", "guide"],
    ["symmetric", "symmetric-joint", "rows-and-queries", "four-directions", "four-partitions"],
    ["prefixes", "one-prefix", "weighted-prefixes"], ["hard", "hard_in_batch", "hard-all"],
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(st.sampled_from(ALTERNATIVES), min_size=2, max_size=4, unique_by=id).flatmap(
        lambda groups: st.tuples(*map(st.sampled_from, groups))
    ),
    rows=st.integers(5, 20), seed=st.integers(0, 999),
)  # fmt: skip
def test_options_compose(picks, rows, seed):
    world = World(seed)
    assert_equals_definition(world, world.of(picks), workspace_bytes=8 * 3 * rows * 24)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["own", "positives", "four-directions", "smoothing"], id="directions"),
        pytest.param(["ragged_own", "ids", "guide", "prefixes", "symmetric"], id="prefixes"),
    ],
)
def test_gradcheck_with_options(names):
    world = World(M=4, N=9)
    options = world.of(names)
    own = options.pop("own_negatives")
    leaves = world.q, world.p, own, torch.tensor(3.0, dtype=torch.float64)

    def loss(q, p, own, scale):
        return info_nce_loss(q, p, world.labels, scale=scale, own_negatives=own, **options)

    torch.autograd.gradcheck(loss, [x.requires_grad_() for x in leaves], fast_mode=True)


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02, 0.01])
@pytest.mark.parametrize("mode", HARDNESS_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hardness_passes_the_gates(dtype, mode, temperature, path):
    world = World(M=33, N=70, D=100, dtype=dtype)
    options = world.hard(mode) | {"hardness_strength": 9.0}
    truth = exact(world.q, world.p, world.labels, 1 / temperature, **options)
    result = ours(world.q, world.p, world.labels, 1 / temperature, 2.0**10, **options)
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(result[0], truth[0]) < loss_gate
    assert max(map(error, result[1:3], truth[1:3])) < grad_gate
    # a difference, of sums that fp32 has rounded
    assert error(result[3], truth[3]) < (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("names", [["hard", "own"], ["hard_in_batch", "symmetric", "prefixes"]])
def test_the_scale_has_the_gradient_of_hardened_losses(names):
    """Nothing else may be checked by differences, which see what a gradient stops at."""
    world = World(M=4, N=9)
    scale, options = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), world.of(names)

    def loss(scale):
        return info_nce_loss(world.q, world.p, world.labels, scale=scale, **options)

    torch.autograd.gradcheck(loss, scale)


@pytest.mark.parametrize("shape", ["ragged_own", "own"])
def test_own_negatives_are_further_columns_of_their_query_alone(shape):
    world = World()
    options = world.of([shape])
    own = options["own_negatives"].reshape(-1, 12)
    owner = torch.arange(7).repeat_interleave(2)
    if shape == "ragged_own":
        owner = torch.repeat_interleave(options["own_offsets"].diff())
    columns = torch.cat([world.p, own])
    masked = torch.zeros(7, 24 + len(own), dtype=torch.bool)
    masked[:, 24:] = owner != torch.arange(7)[:, None]
    masked[torch.arange(7), world.labels] = True
    want = masked_loss(world.q, columns, world.labels, 5, masked)
    loss, dq, dp, d_scale, d_own = ours(world.q, world.p, world.labels, 5, **options)
    got = loss, dq, torch.cat([dp, d_own.reshape(-1, 12)]), d_scale
    assert max(map(error, got, want)) < 1e-12
    *_, stats, d_own_too = info_nce_loss_and_grads(
        world.q, world.p, world.labels, scale=5, **options
    )
    assert d_own_too.shape == options["own_negatives"].shape
    torch.testing.assert_close(d_own_too, d_own)


def test_frozen_own_negatives_and_a_query_side_alone():
    world = World()
    own = world.own()["own_negatives"]
    *_, d_own = ours(world.q, world.p, world.labels, 5, own_negatives=own)
    got = info_nce_loss(world.q, world.p, world.labels, scale=5, own_negatives=own.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(got, own)[0], d_own)
    q = world.q.requires_grad_()
    loss = info_nce_loss(q, world.p, world.labels, scale=5, own_negatives=own.detach())
    assert torch.autograd.grad(loss, q)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_pass_the_gates_in_every_dtype(dtype):
    world = World(M=33, N=70, D=100, dtype=dtype)
    options = world.of(["ids", "positives", "own", "four-directions", "smoothing"])
    truth = exact(world.q, world.p, world.labels, 50, **options)
    result = ours(world.q, world.p, world.labels, 50, 2.0**10, **options)
    loss_gate, grad_gate = gates(dtype, 0.02)
    assert error(result[0], truth[0]) < loss_gate
    for got, want in zip(result[1:], truth[1:], strict=True):
        assert error(got, want) < grad_gate


def test_symmetric_partitions_are_the_two_cross_entropies_of_clip():
    world = World(N=7)
    q, p = (F.normalize(x, dim=1) for x in (world.q, world.p))
    logits, diagonal = 5 * q @ p.T, torch.arange(7)
    want = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    got = info_nce_loss(world.q, world.p, scale=5, **STATIC["symmetric"])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("names", [[], ["symmetric"], ["margin"]], ids=str)
def test_prefixes_sum_the_losses_of_truncated_embeddings(names):
    world = World()
    options = world.of(names)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    levels = {12: 1.0, 5: 0.25, 8: 2.0}
    want = sum(
        weight * info_nce_loss(q[:, :prefix], p[:, :prefix], world.labels, scale=5, **options)
        for prefix, weight in levels.items()
    )
    got = info_nce_loss(
        q, p, world.labels, scale=5, **options,
        matryoshka_dims=list(levels), matryoshka_weights=list(levels.values()),
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


ST_NAMES = {"query_to_doc": QP, "doc_to_query": PQ, "query_to_query": QQ, "doc_to_doc": PP}
ST_GRID = [
    (("query_to_doc", *others), "joint")
    for count in range(4)
    for others in itertools.combinations(list(ST_NAMES)[1:], count)
] + [(("query_to_doc",), "per_direction"), (("query_to_doc", "doc_to_query"), "per_direction")]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(("directions", "partition"), ST_GRID, ids=str)
def test_equals_sentence_transformers(directions, partition, negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    theirs = MultipleNegativesRankingLoss(
        None, scale=5.0, directions=directions, partition_mode=partition
    )
    M, columns = 6, 1 + negatives
    world = World(M=M, N=M * columns)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    want = theirs.compute_loss_from_embeddings([q.double(), *p.double().split(M)], None)
    got = info_nce_loss(
        q, p, torch.arange(M), scale=5.0, curated=torch.arange(M).repeat(columns),
        directions=[ST_NAMES[name] for name in directions], partition=partition,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    # our own layout: groups of a query, positive first
    by_query = p.unflatten(0, (columns, M)).transpose(0, 1).flatten(0, 1)
    grouped = info_nce_loss(
        q, by_query, scale=5.0, directions=[ST_NAMES[name] for name in directions],
        partition=partition,
    )  # fmt: skip
    torch.testing.assert_close(grouped, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("mode", HARDNESS_MODES)
@pytest.mark.parametrize(("directions", "partition"), ST_GRID, ids=str)
def test_hardness_equals_that_of_sentence_transformers(directions, partition, mode, negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    options = {"scale": 20.0, "hardness_mode": mode, "hardness_strength": 9.0}
    theirs = MultipleNegativesRankingLoss(
        None, directions=directions, partition_mode=partition, **options
    )
    M, columns = 6, 1 + negatives
    world = World(M=M, N=M * columns, dtype=torch.float32)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    want = theirs.compute_loss_from_embeddings([q.double(), *p.double().split(M)], None)
    options |= {"directions": [ST_NAMES[name] for name in directions], "partition": partition}
    owner = torch.arange(M).repeat(columns)
    got = info_nce_loss(q, p, torch.arange(M), curated=owner, **options)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    pass_the_gates([got, *grads[0]], [want, *grads[1]], logits=20 + 9)
    if negatives:  # our own layout: groups of a query, positive first
        by_query = p.unflatten(0, (columns, M)).transpose(0, 1).flatten(0, 1)
        pass_the_gates([info_nce_loss(q, by_query, **options)], [want], logits=20 + 9)


@pytest.mark.parametrize("negatives", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("margin_type", ["absolute", "relative"])
def test_margin_and_guide_equal_those_of_gist(margin_type, negatives, monkeypatch):
    from sentence_transformers.sentence_transformer.losses import gist_embed

    M, columns = 8, 2 if negatives else 1
    world = World(M=M, N=M * columns)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    guide = world.normal(M, 5), world.normal(M * columns, 5)
    # Without its two models: what they would embed is given.
    theirs = gist_embed.GISTEmbedLoss.__new__(gist_embed.GISTEmbedLoss)
    torch.nn.Module.__init__(theirs)
    theirs.model, theirs.guide = [q, *p.split(M)], [guide[0], *guide[1].split(M)]
    theirs.similarity_fct, theirs.cross_entropy_loss = (
        torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    theirs.temperature, theirs.margin, theirs.margin_strategy = 0.2, 0.1, margin_type
    theirs.contrast_anchors = theirs.contrast_positives = True
    theirs.must_retokenize = theirs.gather_across_devices = False
    monkeypatch.setattr(gist_embed, "embed_columns", lambda model, features: model)
    want = theirs([], None)
    got = info_nce_loss(
        q, p, torch.arange(M), temperature=0.2, guide=guide, false_negative_margin=0.1,
        margin_type=margin_type, directions=(QP, QQ, PP),
        # their negatives may be masked, and are not compared with positives
        curated=torch.tensor([-1, -2]).repeat_interleave(M)[: len(p)],
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    unguided = info_nce_loss(q, p, torch.arange(M), temperature=0.2, directions=(QP, QQ))
    assert abs(unguided - want) > 1e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((torch.float32, torch.bfloat16), id="to-the-wider"),
        pytest.param((torch.bfloat16, torch.float16), id="to-neither"),
        pytest.param((torch.float64, torch.float16), id="to-fp32-as-the-embeddings"),
    ],
)
def test_guides_of_two_dtypes_are_taken_to_one(dtypes, backend, interpreted):
    if backend == "triton" and not interpreted:
        pytest.skip("kernels are compiled: embeddings must be on CUDA")
    world = World(dtype=torch.float32)
    options = world.of(["guide"])
    options["guide"] = [x.to(dtype) for x, dtype in zip(options["guide"], dtypes, strict=True)]
    got = info_nce_loss(world.q, world.p, world.labels, **options, backend=backend)
    options["guide"] = [x.float() for x in options["guide"]]
    assert got == info_nce_loss(world.q, world.p, world.labels, **options, backend=backend)


@pytest.mark.parametrize("directions", [(QP,), (QP, PQ)], ids=["fused", "general"])
@pytest.mark.parametrize("margin_type", ["absolute", "relative"])
def test_what_is_as_similar_as_the_positive_is_not_above_it(margin_type, directions):
    """Passages may share their text; how two equal similarities were rounded is no matter."""
    q, p, _ = draw(50, 50, 64, torch.float32, converged=False)
    guide_queries, guide_passage = torch.randn(2, 50, 384, generator=torch.manual_seed(0))
    guide = guide_queries + guide_passage[0], guide_passage[:1].repeat(50, 1)
    options = {"directions": directions, "temperature": 0.1}
    unguided = info_nce_loss(q.double(), p.double(), **options)
    loss = info_nce_loss(
        q, p, guide=guide, false_negative_margin=0.0, margin_type=margin_type, **options
    )
    pass_the_gates([loss], [unguided], logits=1 / 0.1)


def test_a_guide_of_fp64_stays_so_beside_embeddings_of_fp64():
    """It finds a passage a little above the limit, which fp32 could not tell."""
    q, p = torch.ones(1, 4), torch.zeros(3, 4, dtype=torch.float64)
    guide = torch.ones(1, 1), torch.tensor([[1.0], [1 + 1e-12], [0.0]], dtype=torch.float64)
    options = {"guide": guide, "false_negative_margin": 0.0, "normalize": False}
    loss = info_nce_loss(q, p, torch.tensor([0]), **options)
    torch.testing.assert_close(loss.item(), math.log(2), rtol=1e-12, atol=0)


def test_a_margin_spares_what_was_chosen_for_the_query():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([[1.0, 0.5], [1.0, 0.4], [0.1, 1.0], [0.9, 0.1]])
    options = {"scale": 5.0, "false_negative_margin": 0.05, "reduction": "none"}
    s = 5 * F.normalize(q, dim=1) @ F.normalize(p, dim=1).T
    # query 0: passages 1 and 3 are above the limit, passage 1 is of its own group
    grouped = info_nce_loss(q, p, **options)[0]
    torch.testing.assert_close(grouped, torch.logsumexp(s[0, :3], 0) - s[0, 0])
    bare = info_nce_loss(q, p, torch.tensor([0, 2]), **options)[0]
    torch.testing.assert_close(bare, torch.logsumexp(s[0, [0, 2]], 0) - s[0, 0])
    spared = info_nce_loss(
        q, p, torch.tensor([0, 2]), curated=torch.tensor([-1, 1, -1, 0]), **options
    )[0]
    torch.testing.assert_close(spared, torch.logsumexp(s[0, [0, 2, 3]], 0) - s[0, 0])


def test_the_guide_gets_no_gradient_and_options_no_second_derivative():
    world = World()
    options = world.of(["guide", "own"])
    guide = [x.requires_grad_() for x in options["guide"]]
    assert not info_nce_loss(world.q, world.p, world.labels, **options).requires_grad
    q = world.q.requires_grad_()
    loss = info_nce_loss(q, world.p, world.labels, **options)
    assert torch.autograd.grad(loss, guide, allow_unused=True, retain_graph=True) == (None, None)
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    if grad.requires_grad:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), q)


def test_gradient_filter_keeps_the_loss_and_bounds_the_gradient():
    q, p, labels = draw(40, 200, 32, torch.float32, converged=False)
    truth = exact(q, p, labels, 50)
    for eps in (1e-2, 0.1):
        # a row a chunk: what is left out must be small in all of them
        result = ours(q, p, labels, 50, gradient_filter=eps, workspace_bytes=4 * 200)
        assert error(result[0], truth[0]) < gates(torch.float32, 1 / 50)[0]
        assert 2e-3 * eps < error(result[1], truth[1]) < eps
        assert error(result[2], truth[2]) < eps


def test_backend_is_chosen_by_device_dtype_and_option(monkeypatch):
    def launcher(device, dtype, backend):
        q = torch.empty(1, 1, dtype=dtype, device=device)
        return module._launcher(q, Settings(True, 0, backend=backend))

    assert launcher("cpu", torch.float32, None) is chunked.info_nce
    assert launcher("meta", torch.float32, "torch") is chunked.info_nce
    monkeypatch.setattr(batch, "_is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' needs CUDA, but .* are on cpu"):
        launcher("cpu", torch.float32, "triton")
    with pytest.raises(ValueError, match="fp64"):
        launcher("cpu", torch.float64, "triton")


@pytest.mark.parametrize("names", [[], ["ids", "own"]], ids=str)
def test_triton_is_asked_for_by_name(names, interpreted):
    if not interpreted:
        pytest.skip("kernels are compiled: tests/ops/test_cuda.py runs them")
    world = World(dtype=torch.float32)
    options = world.of(names)
    assert_equals_definition(world, options, backend="triton")


def test_groups_put_the_positive_first():
    q, p, _ = draw(6, 18, 16, torch.float32, converged=False)
    assert torch.equal(info_nce_loss(q, p), info_nce_loss(q, p, torch.arange(6) * 3))


def test_reductions_agree_with_the_rows():
    q, p, labels = draw(7, 21, 16, torch.float64, converged=False)
    weights = torch.rand(7, dtype=torch.float64)
    rows = info_nce_definition(q, p, 50.0, *spelled_out(labels, 16))
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(info_nce_loss(q, p, labels, reduction="none"), rows, **close)
    torch.testing.assert_close(info_nce_loss(q, p, labels, reduction="sum"), rows.sum(), **close)
    weighted = info_nce_loss(q, p, labels, weights=weights)
    torch.testing.assert_close(weighted, (rows * weights).sum() / weights.sum(), **close)
    assert info_nce_loss(q, p, labels, weights=torch.zeros(7)) == 0


def test_upstream_gradient_scales_both_forms():
    q, p, labels = draw(7, 21, 16, torch.float64, converged=False)
    q.requires_grad_()
    (once,) = torch.autograd.grad(info_nce_loss(q, p, labels), q)
    (thrice,) = torch.autograd.grad(3 * info_nce_loss(q, p, labels), q)
    (rows,) = torch.autograd.grad(3 * info_nce_loss(q, p, labels, reduction="none").mean(), q)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rows, 3 * once, rtol=1e-10, atol=1e-15)


def test_a_kept_graph_gives_the_same_gradients_again():
    q, p, labels = draw(7, 21, 16, torch.float32, converged=False)
    q.requires_grad_(), p.requires_grad_()
    loss = 3 * info_nce_loss(q, p, labels)
    loss.backward(retain_graph=True)
    first = q.grad.clone(), p.grad.clone()
    q.grad.zero_(), p.grad.mul_(7)
    p.grad = None
    loss.backward()
    assert torch.equal(q.grad, first[0]) and torch.equal(p.grad, first[1])


def test_a_graph_not_kept_holds_one_copy_of_the_gradients():
    q, p, labels = draw(7, 21, 16, torch.float32, converged=False)
    q.requires_grad_()
    loss = info_nce_loss(q, p, labels)
    saved = loss.grad_fn.saved_tensors[0].data_ptr()
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.data_ptr() == saved


@pytest.mark.parametrize("frozen", ["queries", "passages"])
def test_either_side_may_be_frozen(frozen):
    q, p, labels = draw(7, 21, 16, torch.float32, converged=False)
    _, dq, dp, _ = exact(q, p, labels, 1 / 0.05)
    side, want = (p, dp) if frozen == "queries" else (q, dq)
    side.requires_grad_()
    (got,) = torch.autograd.grad(info_nce_loss(q, p, labels, temperature=0.05), side)
    assert error(got, want) < gates(torch.float32, 0.05)[1]


def test_chunks_do_not_change_the_result():
    q, p, labels = draw(50, 70, 32, torch.float32, converged=False)
    truth = exact(q, p, labels, 50)
    for rows in (1, 7, 49):
        chunked = ours(q, p, labels, 50, workspace_bytes=rows * 4 * 70)
        pass_the_gates(chunked, truth, logits=50)


def test_loss_and_grads_equal_autograd_and_count_the_batch():
    q, p, labels = draw(16, 48, 32, torch.float32, converged=True)
    truth = exact(q, p, labels, 50)
    loss, dq, dp, d_scale, stats = info_nce_loss_and_grads(q, p, labels, scale=50)
    pass_the_gates((loss, dq, dp, d_scale), truth, logits=50)
    unit = torch.nn.functional.normalize
    cosine = unit(q) @ unit(p).T
    positive = cosine.gather(1, labels[:, None])[:, 0]
    hardest = cosine.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(stats.positive_similarity, positive.mean())
    torch.testing.assert_close(stats.hardest_negative_similarity, hardest.mean())
    assert stats.accuracy == (positive > hardest).float().mean()
    *_, stats = info_nce_loss_and_grads(q[:0], p)
    assert torch.stack(stats).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"directions": DIRECTIONS, "label_smoothing": 0.1}, id="four-directions"),
        pytest.param({"directions": (QP, PQ), "false_negative_margin": 0.2}, id="margin"),
        pytest.param({"matryoshka_dims": (8, 16)}, id="prefixes"),
        pytest.param({"curated": torch.arange(512) // 4} | HARD_IN_BATCH, id="hardness"),
    ],
)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_score_matrix_is_never_stored(with_gradients, options, path):
    M = N = 512
    q, p, labels = draw(M, N, 16, torch.float32, converged=False)
    weights = torch.ones(M) if with_gradients else None
    ids = torch.arange(M)
    relations, static = spelled_out(labels, 16, query_ids=ids, passage_ids=ids, **options)
    static = replace(static, workspace_bytes=32 * N * 4)
    # The launcher itself: dispatch modes do not see inside a custom op.
    with NoMatrix(M * N // 4) as mode:
        scale, needs = torch.tensor(50.0), (with_gradients,) * 4
        chunked.info_nce(q, p, None, scale, relations, static, weights, needs)
    assert mode.largest <= 32 * N


def test_dispatch_mode_notices_the_matrix_of_the_definition():
    q, p, labels = draw(512, 512, 16, torch.float32, converged=False)
    with pytest.raises(AssertionError, match="512, 512"), NoMatrix(512 * 512 // 4):
        info_nce_definition(q, p, 50.0, *spelled_out(labels, 16))


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(0, 9), extra=st.integers(0, 9), D=st.integers(2, 33), rows=st.integers(1, 9),
    layout=st.sampled_from(["plain", "transposed", "every-second", "expanded"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(M, extra, D, rows, layout, seed):
    N = M + extra
    q, p, labels = draw(M, N, D, torch.float32, converged=False, seed=seed)
    strided = {
        "plain": lambda x: x,
        "transposed": lambda x: x.T.contiguous().T,
        "every-second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
    }[layout]
    q, p = strided(q), strided(p)
    if M == 0:
        assert info_nce_loss(q, p, labels) == 0
        return
    truth = exact(q, p, labels, 10)
    result = ours(q, p, labels, 10, workspace_bytes=4 * rows * max(N, 1))
    loss_gate, grad_gate = gates(torch.float32, 1 / 10)
    assert error(result[0], truth[0]) < loss_gate
    for got, want in zip(result[1:3], truth[1:3], strict=True):
        assert (got.double() - want).norm() < grad_gate * max(1.0, want.norm())


def test_labels_ids_lists_and_weights_may_have_gaps(path):
    world = World(dtype=torch.float32)
    options = world.ids() | world.excluded() | world.curated()
    options["weights"] = torch.linspace(0.5, 2, world.M)

    def apart(x):
        return torch.stack([x, x.flip(0)], 1)[:, 0] if isinstance(x, torch.Tensor) else x

    gapped = {name: apart(value) for name, value in options.items()}
    gapped["excluded"] = tuple(map(apart, options["excluded"]))
    want = ours(world.q, world.p, world.labels, 5, **options)
    got = ours(world.q, world.p, apart(world.labels), 5, **gapped)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("gradient_filter", [0.0, 0.1])
def test_gradients_are_odd_in_upstream_ones(gradient_filter):
    """Weights are >= 0, but what comes from above need not be."""
    q, p, labels = draw(7, 60, 16, torch.float32, converged=False)
    q.requires_grad_(), p.requires_grad_()
    loss_M = info_nce_loss(q, p, labels, reduction="none", gradient_filter=gradient_filter)
    above_M = torch.linspace(-1, 2, 7)
    dq, dp = torch.autograd.grad(loss_M, (q, p), above_M, retain_graph=True)
    opposite = torch.autograd.grad(loss_M, (q, p), -above_M)
    assert torch.equal(dq, -opposite[0]) and torch.equal(dp, -opposite[1])
    left_out = (dp == 0).all(1).sum()
    assert left_out > 30 if gradient_filter else left_out == 0


OPCHECKS = {
    "plain": {},
    "ids": {
        "query_ids": torch.arange(6), "passage_ids": torch.arange(12),
        "excluded": (torch.arange(7), torch.zeros(6, dtype=torch.int64)),
    },
    "hardness": {"curated": torch.arange(12) // 2} | HARD_IN_BATCH,
    # Every tensor is given, so the list of relations has no None: torch then wants other gradients.
    "everything": {
        "query_ids": torch.arange(6), "passage_ids": torch.arange(12),
        "excluded": (torch.arange(7), torch.arange(6)),
        "positives": (torch.arange(7), torch.arange(6)),
        "own_offsets": torch.arange(7) * 2, "curated": torch.arange(12) // 2,
        "guide": (torch.randn(6, 3), torch.randn(12, 3)), "false_negative_margin": 0.5,
        "directions": DIRECTIONS, "label_smoothing": 0.1, "matryoshka_dims": (4, 8),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    q, p, _ = draw(6, 12, 8, torch.float32, converged=False)
    scale, weights, own = torch.tensor(20.0), torch.full((6,), 1 / 6), torch.randn(12, 8)
    q, p, scale, own = (t.requires_grad_() for t in (q, p, scale, own))
    own = own if case == "everything" else None
    relations, static = spelled_out(torch.arange(6) + 6, 8, **OPCHECKS[case])
    assert (None in [None if x is None else 0 for x in relations]) == (case != "everything")
    text = replace(static, workspace_bytes=1 << 20).text()
    arguments = (q, p, own, scale, list(relations), text)
    torch.library.opcheck(_info_nce, arguments)
    # the gradient outputs are not differentiable by design, so the autograd test does not apply to
    # them
    torch.library.opcheck(
        _info_nce_grads,
        (*arguments, weights, [True, True, own is not None, True]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    q, p, labels = draw(6, 12, 8, torch.float32, converged=False)
    q.requires_grad_()

    def step(q, p, labels):
        return info_nce_loss(2 * q, p, labels, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(step(q, p, labels), q)
    (got,) = torch.autograd.grad(compiled(q, p, labels), q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph_with_options(reduction):
    world = World(seed=3)
    q, p, own = (x.clone().requires_grad_() for x in (world.q, world.p, world.normal(21, 12)))
    options = world.ids() | world.guide() | {"own_offsets": torch.arange(8) * 3}
    static = {
        "directions": [QP, PQ], "matryoshka_dims": [12, 6], "matryoshka_weights": [1, 0.5],
        "label_smoothing": 0.1, "partition": "per_direction", "reduction": reduction,
        **HARD_IN_BATCH,
    }  # fmt: skip

    def step(q, p, own, labels, options):
        return info_nce_loss(2 * q, p, labels, own_negatives=own, **options, **static).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(step(q, p, own, world.labels, options), (q, p, own))
    got = torch.autograd.grad(compiled(q, p, own, world.labels, options), (q, p, own))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("names", [[], ["four-directions", "prefixes"]], ids=str)
def test_autocast_leaves_the_scores_in_fp32(names):
    q, p, labels = draw(16, 48, 32, torch.float32, converged=False)
    options = World().of(names)
    want = ours(q, p, labels, 50, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(q, p, labels, 50, **options)
    assert max(map(error, got, want)) == 0


def test_second_derivative_is_a_clear_error():
    q, p, labels = draw(4, 8, 8, torch.float64, converged=False)
    q.requires_grad_()
    for reduction in ("mean", "none"):
        loss = info_nce_loss(q, p, labels, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.sum(), q)


BAD = {
    "temperature": (dict(temperature=0), "temperature must be > 0 and finite, got 0"),
    "negative": (dict(temperature=-1.0), "temperature must be > 0 and finite, got -1.0"),
    "both": (dict(temperature=0.1, scale=10), "temperature or scale, not both"),
    "scale": (dict(scale=torch.ones(2)), "scale must be one number"),
    "scale-integer": (
        dict(scale=torch.tensor(20)),
        "scale must be floating point, got a tensor of torch.int64",
    ),
    "scale-elsewhere": (
        dict(scale=torch.ones((), device="meta")),
        "scale must be on the CPU or with the queries on cpu, got meta",
    ),
    "labels-shape": (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels must be int64 \[4\]"),
    "labels-dtype": (dict(labels=torch.zeros(4)), "labels must be int64"),
    "labels-range": (dict(labels=torch.tensor([0, 1, 2, 9])), r"lie in \[0, 9\] but there are 8"),
    "ids": (
        dict(passage_ids=torch.zeros(4, dtype=torch.int64)),
        r"passage_ids must be int64 \[8\]",
    ),
    "weights": (dict(weights=torch.ones(3)), "weights have shape"),
    "negative-weights": (dict(weights=-torch.ones(4)), "weights must be >= 0, got -1.0"),
    "infinite": (dict(temperature=1e-320), "temperature must be > 0 and finite"),
    "tensor": (dict(temperature=torch.tensor(0.1)), "a tensor goes in as scale"),
    "columns": (
        dict(excluded=(torch.arange(5), torch.tensor([0, 1, 8, 2]))),
        r"excluded columns lie in \[0, 8\] but there are 8 passages",
    ),
    "negative-columns": (
        dict(excluded=(torch.arange(5), torch.tensor([0, 1, -5, 2]))),
        r"excluded columns lie in \[-5, 2\]",
    ),
    "offsets": (
        dict(excluded=(torch.arange(5), torch.tensor([0, 1]))),
        r"excluded offsets must rise from 0 to the 2 columns, got 0 \.\.\. 4",
    ),
    "falling-offsets": (
        dict(excluded=(torch.tensor([0, 2, 1, 2, 2]), torch.tensor([0, 1]))),
        "excluded offsets must rise",
    ),
    "reduction": (dict(reduction="median"), "reduction must be"),
    "workspace": (dict(workspace_bytes=8), "too small for one row of 8 passages"),
    "workspace-fraction": (dict(workspace_bytes=1e6), "must be an integer, got 1000000.0"),
    "dims": (dict(passages=torch.ones(8, 5)), "queries have D=6 but passages have D=5"),
    "groups": (dict(passages=torch.ones(7, 6)), "7 passages do not divide by 4 queries"),
    "integers": (
        dict(queries=torch.ones(4, 6).int()),
        "queries must be fp64, fp32, bf16 or fp16, got torch.int32",
    ),
    "fp8": (
        dict(passages=torch.ones(8, 6, dtype=torch.float8_e4m3fn)),
        "passages must be fp64, fp32, bf16 or fp16, got torch.float8_e4m3fn",
    ),
    "no-dims": (
        dict(queries=torch.ones(4, 0), passages=torch.ones(8, 0)),
        r"queries have no dims: \(4, 0\)",
    ),
    "rank": (dict(queries=torch.ones(6)), r"\[M, D\]"),
    "directions-unknown": (
        dict(directions=(QP, "query_to_doc")),
        r"directions must be distinct and of query_to_passage, .*, got .*query_to_doc",
    ),
    "directions-empty": (dict(directions=()), r"directions must be distinct .* got \(\)"),
    "directions-twice": (dict(directions=(QP, QP)), "directions must be distinct"),
    "partition": (dict(partition="mean"), "partition must be one of 'joint', 'per_direction', got"),
    "margin-type": (dict(margin_type="linear"), "margin_type must be one of .* got 'linear'"),
    "margin": (dict(false_negative_margin=-0.1), "false_negative_margin must be >= 0 .* got -0.1"),
    "guide-alone": (dict(guide=(torch.ones(4, 2), torch.ones(8, 2))), "guide decides about the"),
    "guide-rows": (
        dict(guide=(torch.ones(4, 2), torch.ones(4, 2)), false_negative_margin=0.1),
        r"guide must be \[4, G\] and \[8, G\], got \(4, 2\) and \(4, 2\)",
    ),
    "guide-dims": (
        dict(guide=(torch.ones(4, 2), torch.ones(8, 3)), false_negative_margin=0.1),
        "guide queries have G=2 but guide passages have G=3",
    ),
    "guide-integers": (
        dict(guide=(torch.ones(4, 2).int(), torch.ones(8, 2)), false_negative_margin=0.1),
        "guide queries must be fp64, fp32, bf16 or fp16, got torch.int32",
    ),
    "smoothing": (dict(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
    "filter": (dict(gradient_filter=-1e-3), "gradient_filter must be >= 0 and finite, got -0.001"),
    "filter-smoothing": (
        dict(gradient_filter=1e-3, label_smoothing=0.1),
        "gradient_filter goes with",
    ),
    "hardness": (dict(hardness_mode="hard"), "hardness_mode must be one of None, 'in_batch_neg"),
    "hardness-alone": (
        dict(hardness_mode="all_negatives"),
        "a hardness_strength > 0 go together, got 'all_negatives' and 0.0",
    ),
    "strength-alone": (dict(hardness_strength=9.0), "go together, got None and 9.0"),
    "strength-negative": (
        HARD_ALL | dict(hardness_strength=-1.0),
        "hardness_strength must be >= 0 and finite, got -1.0",
    ),
    "hardness-without-rows": (
        HARD_ALL | dict(directions=(PQ, PP)),
        "hardness_mode is of query_to_passage, which is not among",
    ),
    "hardness-of-nothing": (
        HARD_ALL | dict(hardness_mode="hard_negatives", labels=torch.arange(4)),
        "'hard_negatives' finds none: give curated, own_negatives",
    ),
    "hardness-of-groups-of-one": (
        HARD_ALL | dict(hardness_mode="hard_negatives", passages=torch.ones(4, 6)),
        "'hard_negatives' finds none: .* more than one passage per query",
    ),
    "filter-hardness": (HARD_ALL | dict(gradient_filter=1e-3), "gradient_filter goes with"),
    "prefix-long": (dict(matryoshka_dims=(3, 7)), r"of 1 to D=6, got \(3, 7\)"),
    "prefix-zero": (dict(matryoshka_dims=(0, 3)), "matryoshka_dims must be distinct and of 1"),
    "prefix-twice": (dict(matryoshka_dims=(3, 3)), "matryoshka_dims must be distinct"),
    "prefix-none": (dict(matryoshka_dims=()), "matryoshka_dims must be distinct"),
    "prefix-weights": (
        dict(matryoshka_dims=(3, 6), matryoshka_weights=(1.0,)),
        "one for each of the 2 matryoshka_dims, got 1",
    ),
    "weights-alone": (dict(matryoshka_weights=(1.0,)), "without matryoshka_dims"),
    "negative-prefix-weight": (
        dict(matryoshka_dims=(3,), matryoshka_weights=(-1.0,)),
        "matryoshka_weights must be >= 0",
    ),
    "own-offsets-missing": (
        dict(own_negatives=torch.ones(3, 6)),
        r"own_negatives \[H, D\]=\(3, 6\) need own_offsets \[5\]",
    ),
    "own-offsets-alone": (dict(own_offsets=torch.arange(5)), "without own_negatives"),
    "own-offsets-twice": (
        dict(own_negatives=torch.ones(4, 2, 6), own_offsets=torch.arange(5)),
        r"not to \[M, K, D\]=\(4, 2, 6\)",
    ),
    "own-offsets-range": (
        dict(own_negatives=torch.ones(3, 6), own_offsets=torch.arange(5)),
        r"own_offsets must rise from 0 to the 3 own_negatives, got 0 \.\.\. 4",
    ),
    "own-offsets-start": (
        dict(own_negatives=torch.ones(4, 6), own_offsets=torch.tensor([1, 1, 2, 3, 4])),
        r"own_offsets must rise from 0 to the 4 own_negatives, got 1 \.\.\. 4",
    ),
    "own-dims": (
        dict(own_negatives=torch.ones(4, 2, 5)),
        r"own_negatives must be \[4, K, 6\] or \[H, 6\], got \(4, 2, 5\)",
    ),
    "own-unused": (
        dict(own_negatives=torch.ones(4, 2, 6), directions=(PQ,)),
        "own_negatives belong to query_to_passage, which is not among",
    ),
    "positives-label": (
        dict(positives=(torch.arange(5), torch.tensor([1, 2, 4, 5]))),
        "without the label: query 1 has passage 2 twice",
    ),
    "positives-twice": (
        dict(positives=(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1, 1]))),
        "query 2 has passage 1 twice",
    ),
    "positives-range": (
        dict(positives=(torch.arange(5), torch.tensor([1, 3, 5, 8]))),
        r"positives columns lie in \[1, 8\] but there are 8 passages",
    ),
    "curated": (
        dict(curated=torch.full((8,), 4)),
        r"curated lie in \[4, 4\] but there are 4 queries",
    ),
    "curated-below": (
        dict(curated=torch.full((8,), -3)),
        r"curated lie in \[-3, -3\] but there are 4 queries",
    ),
    "curated-shape": (dict(curated=torch.zeros(4).long()), r"curated must be int64 \[8\]"),
    "backend": (dict(backend="cuda"), "backend must be one of None, 'torch', 'triton', got 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {"queries": torch.ones(4, 6), "passages": torch.ones(8, 6)} | change
    with pytest.raises(ValueError, match=message):
        info_nce_loss(arguments.pop("queries"), arguments.pop("passages"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels_M": torch.tensor([0, 3, 8])}, "not all columns < 8", id="labels"),
        pytest.param({"excluded_columns": torch.tensor([-1])}, "not all columns", id="excluded"),
        pytest.param({"own_offsets": torch.tensor([1, 1, 2, 3])}, "do not start at 0", id="own"),
        pytest.param(
            {"positive_offsets": torch.tensor([0, 1, 1, 1]), "positive_columns": torch.tensor([0])},
            "positives repeat, or hold the label",
            id="positives",
        ),
    ],
)
def test_what_a_device_asserts(change, message):
    """On the CPU the same assertion raises at once."""
    batch._assert_in_range(Relations(torch.arange(3)), True, 8)
    with pytest.raises(RuntimeError, match=message):
        batch._assert_in_range(Relations(**{"labels_M": torch.arange(3)} | change), True, 8)
