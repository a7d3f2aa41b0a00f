"""InfoNCE: each mask and each option, alone and with others, is that of the definition."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rankpo_fast import info_nce_loss, info_nce_loss_and_grads
from rankpo_kernels.problem import HARDNESS_MODES, PQ, QP
from support.gates import draw, error, gates, pass_the_gates
from support.info_nce_options import (
    DTYPES,
    STATIC,
    World,
    assert_equals_definition,
    exact,
    ours,
    ragged,
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


TENSORS = [
    "ids", "excluded", "positives", "own", "ragged_own", "margin", "relative", "curated", "guide",
    "hard", "hard_in_batch",
]  # fmt: skip


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
    _, grads, _ = info_nce_loss_and_grads(world.q, world.p, world.labels, scale=5, **options)
    d_own_too = grads.own_negatives
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
