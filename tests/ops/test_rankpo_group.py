"""Graded groups: the definition, `rankpo_loss` as their smallest case, padding, and what torch
expects of an op."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankpo_fast import RankPOGroupLoss, rankpo_group_loss, rankpo_loss
from rankpo_fast.ops.rankpo import _rankpo, _rankpo_grads
from rankpo_fast.ops.rankpo_group import rankpo_group_definition
from rankpo_kernels.problem import RankPOSettings
from support.gates import error, gates, longest_product

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "pairs": {},
    "hinge": {"loss_type": "hinge", "gamma_beta_ratio": -0.2},
    "smoothed": {"label_smoothing": 0.1, "gamma_beta_ratio": 0.3},
    "dots": {"normalize": False},
    "plackett-luce": {"form": "plackett_luce"},
    "lambda": {"form": "lambda"},
    "lambda-hinge": {"form": "lambda", "loss_type": "hinge", "gamma_beta_ratio": 0.2},
}
forms = pytest.mark.parametrize("form", FORMS)


def draw(B, K, D, dtype, seed=0):
    """queries, passages, grades, reference: ties, padding in every second query, and where there
    are so many a query without a pair and one without any passage."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, D, generator=generator, dtype=torch.float64)
    p = q[:, None] + torch.randn(B, K, D, generator=generator, dtype=torch.float64)
    grades = torch.randint(0, 4, (B, K), generator=generator).double()
    grades[::2, K // 2 :: 2] = torch.nan
    grades[2:3], grades[3:4] = 1.0, torch.nan
    reference = torch.rand(B, K, generator=generator, dtype=torch.float64) - 0.5
    return q.to(dtype), p.to(dtype), grades, reference


def with_grads(function, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "K", "D"),
    [
        pytest.param(1, 1, 8, id="nothing-to-compare"),
        pytest.param(5, 3, 33, id="odd"),
        pytest.param(5, 8, 600, id="more-dims-than-a-block"),
        pytest.param(2, 64, 40, id="large-group"),
    ],
)
def test_loss_and_gradients_pass_the_gates(B, K, D, dtype, form, path):
    q, p, grades, reference = draw(B, K, D, dtype)
    weights = torch.linspace(0.5, 2, B, dtype=torch.float64)
    options = {"temperature": 1.0 if form != "dots" else float(D), **FORMS[form]}

    def definition(q, p):
        return (weights * rankpo_group_definition(q, p, grades, reference, **options)).sum()

    def ours(q, p):
        return rankpo_group_loss(
            q, p, grades, reference_similarities=reference, weights=weights, reduction="sum",
            **options,
        )  # fmt: skip

    exact, got = with_grads(definition, [q.double(), p.double()]), with_grads(ours, [q, p])
    loss_gate, grad_gate = gates(dtype, 1.0)
    assert abs(got[0] - exact[0]) <= loss_gate * max(weights.sum(), exact[0])
    for a, want in zip(got[1:], exact[1:], strict=True):
        assert a.dtype == dtype and error(a, want) < grad_gate
    assert not got[2][grades.isnan()].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["pairs", "plackett_luce"])
def test_two_passages_are_a_pair(form, dtype, path):
    q, p, *_ = draw(6, 2, 24, dtype)
    grades = torch.tensor([[2, 1], [0, 7], [1, 0]]).repeat(2, 1)
    ref = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    best = grades.argmax(1)
    rows, weights = torch.arange(6), torch.rand(6, generator=torch.Generator().manual_seed(0))
    options = {"beta": 1.5, "temperature": 0.3, "weights": weights}

    def of_pairs(q, p):
        margins = ref[rows, best] - ref[rows, 1 - best]
        c, r = p[rows, best], p[rows, 1 - best]
        return rankpo_loss(q, c, r, reference_margins=margins, **options)

    def of_groups(q, p):
        return rankpo_group_loss(q, p, grades, form=form, reference_similarities=ref, **options)

    loss_gate, grad_gate = gates(dtype, 0.3 / 1.5)
    exact = with_grads(of_pairs, [q.double(), p.double()])
    for of in (of_groups, of_pairs):
        loss, *grads = with_grads(of, [q, p])
        assert error(loss, exact[0]) < loss_gate
        assert max(map(error, grads, exact[1:])) < grad_gate


@forms
def test_gradcheck(form):
    q, p, grades, reference = draw(5, 4, 6, torch.float64)
    options = {"temperature": 0.5, "reference_similarities": reference, **FORMS[form]}
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, p, how=reduction: rankpo_group_loss(
                q, p, grades, weights=weights, reduction=how, **options
            ),
            [q.requires_grad_(), p.requires_grad_()],
        )


@forms
def test_padding_is_not_there(form, path):
    """Neither NaN in it nor its number is noticed."""
    q, p, grades, reference = draw(5, 6, 40, torch.float32)
    options = {"reference_similarities": reference, **FORMS[form]}
    want = with_grads(lambda q, p: rankpo_group_loss(q, p, grades, **options), [q, p])
    p[grades.isnan()] = torch.nan
    reference[grades.isnan()] = torch.nan
    got = with_grads(lambda q, p: rankpo_group_loss(q, p, grades, **options), [q, p])
    assert all(map(torch.equal, got, want))
    more = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in (p, grades, reference)]
    options["reference_similarities"] = more[2]
    loss, dq, dp = with_grads(
        lambda q, p: rankpo_group_loss(q, p, more[1], **options), [q, more[0]]
    )
    for a, b in zip((loss, dq, dp[:, :6]), want, strict=True):
        torch.testing.assert_close(a, b)
    assert not dp[:, 6:].any()


@forms
def test_without_pairs_loss_and_gradients_are_zero(form, path):
    q, p, grades, _ = draw(4, 3, 8, torch.float32)
    grades[:] = torch.tensor([[1.0], [2], [torch.nan], [0]])
    rows = rankpo_group_loss(q, p, grades, reduction="none", **FORMS[form])
    assert rows.tolist() == [0.0] * 4
    got = with_grads(lambda q, p: rankpo_group_loss(q, p, grades, **FORMS[form]), [q, p])
    assert not any(x.any() for x in got)
    empty = [x[:0] for x in (q, p)]
    got = with_grads(lambda q, p: rankpo_group_loss(q, p, grades[:0], **FORMS[form]), empty)
    assert got[0] == 0 and got[2].shape == (0, 3, 8)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dots"])
@pytest.mark.parametrize("size", [1e20, 1e-20, 0.0], ids=str)
def test_extreme_norms(size, form, path):
    q, p, grades, reference = draw(5, 3, 16, torch.float32)
    p[0, 0] *= size
    q[1] *= size
    grades[:2] = torch.arange(3)
    options = FORMS[form]
    exact = with_grads(
        lambda q, p: rankpo_group_definition(q, p, grades, reference, **options).sum(),
        [q.double(), p.double()],
    )
    got = with_grads(
        lambda q, p: rankpo_group_loss(
            q, p, grades, reference_similarities=reference, reduction="sum", **options
        ),
        [q, p],
    )
    for ours, want in zip(got[1:], exact[1:], strict=True):
        for a, b in zip(ours.view(-1, 16), want.view(-1, 16), strict=True):
            assert error(a, b) < gates(torch.float32, 0.1 / 2)[1]
    assert size or not (got[1][1].any() or got[2][0, 0].any())


@forms
@pytest.mark.parametrize("where", ["query", "passage"])
def test_nan_stays_with_its_query(where, form, path):
    q, p, grades, _ = draw(3, 4, 8, torch.float32)
    grades[:] = torch.arange(4)
    loss = lambda q, p: rankpo_group_loss(q, p, grades, reduction="sum", **FORMS[form])  # noqa: E731
    clean = with_grads(loss, [q, p])
    (q if where == "query" else p[:, 2])[1, 3] = torch.nan
    rows = rankpo_group_loss(q, p, grades, reduction="none", **FORMS[form])
    assert rows.isnan().tolist() == [False, True, False]
    for ours, want in zip(with_grads(loss, [q, p])[1:], clean[1:], strict=True):
        assert torch.equal(ours[[0, 2]], want[[0, 2]]) and ours[1].isnan().any()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 6), K=st.integers(1, 9), D=st.integers(2, 40),
    form=st.sampled_from(list(FORMS)),
    layout=st.sampled_from(["plain", "transposed", "every-second", "K-last", "expanded"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(B, K, D, form, layout, seed):
    q, p, grades, reference = draw(B, K, D, torch.float32, seed)
    strided = {
        "plain": lambda x: x,
        "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "every-second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "K-last": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
        "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
    }[layout]
    q, p, grades, reference = strided(q), strided(p), strided(grades), strided(reference)
    options = {"temperature": 1.0, **FORMS[form]}
    got = with_grads(
        lambda q, p: rankpo_group_loss(
            q, p, grades, reference_similarities=reference, reduction="sum", **options
        ),
        [q, p],
    )
    exact = [q.double(), p.double()]
    if not B:
        assert not got[0] and got[1].shape == q.shape and got[2].shape == p.shape
        return
    want = with_grads(
        lambda q, p: rankpo_group_definition(q, p, grades, reference, **options).sum(), exact
    )
    largest = 1.0 if options.get("normalize", True) else longest_product(q, p)
    gate = gates(torch.float32, 1 / (2 * largest))[1]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < gate * max(1.0, b.norm())


def test_more_passages_than_the_library_takes_go_through_torch():
    q, p, grades, reference = draw(2, 300, 8, torch.float32)
    got = rankpo_group_loss(q, p, grades, reference_similarities=reference, temperature=1.0)
    exact = rankpo_group_definition(q.double(), p.double(), grades, reference, temperature=1.0)
    assert error(got, exact.mean()) < gates(torch.float32, 1 / 2)[0]


def test_opcheck():
    q, p, grades, reference = draw(5, 4, 6, torch.float32)
    leaves = q.requires_grad_(), [p.requires_grad_()]
    for form in ({}, {"listwise": True}, {"by_ndcg": True}):
        settings = RankPOSettings(**form).text()
        arguments = (*leaves, grades.float(), reference.float(), settings)
        torch.library.opcheck(_rankpo, arguments)
        torch.library.opcheck(
            _rankpo_grads,
            (*arguments, torch.full((5,), 0.2), [True, True]),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    q, p, grades, reference = draw(5, 4, 6, torch.float32)

    def loss(q, p):
        return rankpo_group_loss(
            2 * q, p, grades, reference_similarities=reference, reduction=reduction
        ).sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, eager in zip(with_grads(step, [q, p]), with_grads(loss, [q, p]), strict=True):
        torch.testing.assert_close(got, eager)


def test_module_equals_the_function():
    q, p, grades, reference = draw(5, 4, 6, torch.float32)
    options = {"form": "plackett_luce", "beta": 1.5}
    rows = {"reference_similarities": reference, "weights": torch.rand(5)}
    want = rankpo_group_loss(q, p, grades, **rows, **options)
    assert RankPOGroupLoss(**options)(q, p, grades, **rows) == want
    with pytest.raises(ValueError, match="beta must be > 0"):
        RankPOGroupLoss(beta=-1)
    with pytest.warns(UserWarning, match="label_smoothing=0.1 has no effect") as told:
        RankPOGroupLoss(loss_type="hinge", label_smoothing=0.1)
    assert told[0].filename == __file__


BAD = {
    "form": (
        dict(form="listnet"),
        "form must be one of 'pairs', 'plackett_luce', 'lambda', got 'listnet'",
    ),
    "gamma": (dict(form="plackett_luce", gamma_beta_ratio=0.1), "gamma_beta_ratio=0.1 belongs to"),
    "smoothing": (dict(form="plackett_luce", label_smoothing=0.1), "label_smoothing=0.1 belongs"),
    "hinge": (dict(form="plackett_luce", loss_type="hinge"), "loss_type='hinge' belongs to"),
    "beta": (dict(beta=0), "beta must be > 0 and finite, got 0"),
    "grades": (dict(grades=torch.zeros(4, 2)), r"grades must be \[4, 3\] on cpu, got \[4, 2\]"),
    "grades-elsewhere": (dict(grades=torch.zeros(4, 3, device="meta")), "on meta"),
    "reference": (
        dict(reference_similarities=torch.zeros(4)),
        r"reference_similarities must be \[4, 3\] on cpu, got \[4\] on cpu",
    ),
    "flat": (dict(passages=torch.ones(4, 6)), r"\[B, D\] and \[B, K, D\], got \(4, 6\), \(4, 6\)"),
    "none": (dict(passages=torch.ones(4, 0, 6)), r"got \(4, 6\), \(4, 0, 6\)"),
    "dims": (dict(passages=torch.ones(4, 3, 5)), r"passages must be \[4, K, 6\], got \(4, 3, 5\)"),
    "device": (
        dict(passages=torch.ones(4, 3, 6, device="meta")),
        "cpu but passages are on meta",
    ),
    "integers": (
        dict(queries=torch.ones(4, 6).int()),
        "queries must be fp64, .* torch.int32",
    ),
    "no-dims": (
        dict(queries=torch.ones(4, 0), passages=torch.ones(4, 3, 0)),
        r"queries have no dims: \(4, 0\)",
    ),
    "learnt-beta": (dict(beta=torch.tensor(2.0)), "beta must be a number: as a tensor"),
    "weights": (dict(weights=torch.ones(3)), "weights have shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    tensors = {"queries": (4, 6), "passages": (4, 3, 6), "grades": (4, 3)}
    arguments = {name: torch.ones(shape) for name, shape in tensors.items()} | change
    with pytest.raises(ValueError, match=message):
        rankpo_group_loss(*[arguments.pop(name) for name in tensors], **arguments)


def test_lambda_weighs_pairs_by_the_change_in_ndcg(path):
    """By hand: padding takes no place though all are below it, of equals the first is ahead, and
    large grades do not overflow."""
    place = [1 / math.log2(1 + rank) for rank in (1, 2, 3)]
    cosines = [[-0.5, 0.9, -0.9, -0.9], [0.3, 0.3, 0.1, 0.9], [0.1, 0.2, 0.9, 0.9]]
    nan = torch.nan
    grades = torch.tensor([[1.0, nan, 0.0, nan], [0, 1, 0, nan], [1000, -5, nan, nan]])
    sines = (1 - torch.tensor(cosines) ** 2).sqrt()
    p = torch.stack([torch.tensor(cosines), sines], 2)
    q = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    got = rankpo_group_loss(q, p, grades, form="lambda", reduction="none", beta=1, temperature=1)
    cost = [math.log1p(math.exp(-advantage)) for advantage in (0.4, 0.0, 0.2, -0.1)]
    want = [
        (place[0] - place[1]) * cost[0],
        (place[0] - place[1]) * cost[1] + (place[1] - place[2]) * cost[2],
        (place[0] - place[1]) * cost[3],
    ]
    torch.testing.assert_close(got, torch.tensor(want))
