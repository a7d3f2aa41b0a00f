"""InfoNCE: gates against fp64, numbers at the edges, and no matrix of scores."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankpo_fast import info_nce_loss, info_nce_loss_and_grads
from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.problem import DIRECTIONS, PQ, QP, InfoNCEProblem
from support.gates import FLOOR, draw, error, gates, pass_the_gates, plain_torch
from support.info_nce_options import DTYPES, HARD_ALL, HARD_IN_BATCH, exact, ours, spelled_out
from support.info_nce_problems import NoMatrix

SHAPES = [
    pytest.param(1, 2, 8, id="one-query"),
    pytest.param(65, 129, 100, id="nothing-round"),
    pytest.param(32, 160, 384, id="minilm-with-four-negatives"),
    pytest.param(8, 40, 4096, id="7b-width"),
    pytest.param(40, 8, 64, id="fewer-passages-than-queries"),
]


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


def batch_of(kind: str) -> tuple[torch.Tensor, ...]:
    """Unit vectors, and upstream gradients of the rows."""
    q, p, labels = draw(40, 200, 32, torch.float32, converged=kind == "learnt")
    above_M = torch.ones(40)
    if kind == "one unlearnt":  # beside which all others are a rounding
        p[labels] = q
        p[labels[7]] = -q[7]
    if kind == "equal":
        q, labels = q[:1].repeat(40, 1), labels[:1].repeat(40)
    if kind == "weighted":
        above_M = torch.logspace(-6, 0, 40) * (-1) ** torch.arange(40)
    unit = torch.nn.functional.normalize
    return unit(q), unit(p), labels, above_M


@pytest.mark.parametrize("kind", ["fresh", "learnt", "one unlearnt", "equal", "weighted"])
@pytest.mark.parametrize("share", [2**-8, 0.1, 0.9])
@pytest.mark.parametrize("rows", [40, 7])
def test_gradient_filter_loses_no_more_than_its_bound(kind, share, rows):
    """Also of the rows that one chunk alone knows."""
    *case, above_M = batch_of(kind)
    exactly, roughly = (
        gradients_of(*case, above_M, gradient_filter=eps, workspace_bytes=4 * 200 * rows)
        for eps in (0.0, share)
    )
    loss_M, *_, d_scale = exactly
    assert torch.equal(roughly[0], loss_M) and torch.equal(roughly[3], d_scale)
    pull_M = (above_M * (1 - (-loss_M.double()).exp())).abs()
    most = 2 * share * 50 * pull_M.sum()
    lost = [(x - y).norm(dim=1).sum() for x, y in zip(exactly[1:3], roughly[1:3], strict=True)]
    assert all(x <= most * (1 + 1e-5) for x in lost)
    out_M = (roughly[1] == 0).all(1)
    of_others = gradients_of(*case, above_M * ~out_M)
    assert all(error(*pair) < 1e-5 for pair in zip(roughly[1:3], of_others[1:3], strict=True))
    of_chunks = zip(pull_M.split(rows), out_M.split(rows), strict=True)
    for pull_R, out_R in of_chunks:
        budget = share * pull_R.sum() * (1 + 1e-6)
        assert pull_R[out_R].sum() <= budget
        if not out_R.all():  # not one more would go
            assert pull_R[out_R].sum() + pull_R[~out_R].min() > budget * (1 - 1e-5)


def gradients_of(q, p, labels, above_M, **options):
    """(losses, d q, d p, d scale) at scale 50."""
    leaves = [q.clone(), p.clone(), torch.tensor(50.0)]
    q, p, scale = (x.requires_grad_() for x in leaves)
    loss_M = info_nce_loss(q, p, labels, scale=scale, normalize=False, reduction="none", **options)
    return loss_M.detach(), *torch.autograd.grad(loss_M, (q, p, scale), above_M)


def test_groups_put_the_positive_first():
    q, p, _ = draw(6, 18, 16, torch.float32, converged=False)
    assert torch.equal(info_nce_loss(q, p), info_nce_loss(q, p, torch.arange(6) * 3))


def test_reductions_agree_with_the_rows():
    q, p, labels = draw(7, 21, 16, torch.float64, converged=False)
    weights = torch.rand(7, dtype=torch.float64)
    rows = info_nce_definition(q, p, 50.0, *spelled_out(labels))
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(info_nce_loss(q, p, labels, reduction="none"), rows, **close)
    torch.testing.assert_close(info_nce_loss(q, p, labels, reduction="sum"), rows.sum(), **close)
    weighted = info_nce_loss(q, p, labels, weights=weights)
    torch.testing.assert_close(weighted, (rows * weights).sum() / weights.sum(), **close)
    assert info_nce_loss(q, p, labels, weights=torch.zeros(7)) == 0


def test_chunks_do_not_change_the_result():
    q, p, labels = draw(50, 70, 32, torch.float32, converged=False)
    truth = exact(q, p, labels, 50)
    for rows in (1, 7, 49):
        chunked = ours(q, p, labels, 50, workspace_bytes=rows * 4 * 70)
        pass_the_gates(chunked, truth, logits=50)


def test_loss_and_grads_equal_autograd_and_count_the_batch():
    q, p, labels = draw(16, 48, 32, torch.float32, converged=True)
    truth = exact(q, p, labels, 50)
    loss, grads, stats = info_nce_loss_and_grads(q, p, labels, scale=50)
    assert grads.own_negatives is None
    pass_the_gates((loss, grads.queries, grads.passages, grads.scale), truth, logits=50)
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
    relations, static = spelled_out(labels, query_ids=ids, passage_ids=ids, **options)
    static = replace(static, workspace_bytes=32 * N * 4)
    # The launcher itself: dispatch modes do not see inside a custom op.
    with NoMatrix(M * N // 4) as mode:
        scale, needs = torch.tensor(50.0), (with_gradients,) * 4
        case = InfoNCEProblem(q, p, None, scale, relations, static)
        chunked.info_nce(case, weights, needs)
    assert mode.largest <= 32 * N


def test_dispatch_mode_notices_the_matrix_of_the_definition():
    q, p, labels = draw(512, 512, 16, torch.float32, converged=False)
    with pytest.raises(AssertionError, match="512, 512"), NoMatrix(512 * 512 // 4):
        info_nce_definition(q, p, 50.0, *spelled_out(labels))


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
