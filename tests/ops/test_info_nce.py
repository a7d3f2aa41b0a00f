"""InfoNCE: definition, ops, gradients, masks, and what torch expects of an op."""

import itertools

import pytest
import torch
from gates import draw, error, gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast import info_nce_loss, info_nce_loss_and_grads
from rankpo_fast.ops.info_nce import _info_nce, _info_nce_grads, info_nce_definition
from rankpo_kernels import chunked

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    pytest.param(1, 2, 8, id="one-query"),
    pytest.param(65, 129, 100, id="nothing-round"),
    pytest.param(32, 160, 384, id="minilm-with-four-negatives"),
    pytest.param(8, 40, 4096, id="7b-width"),
    pytest.param(40, 8, 64, id="fewer-passages-than-queries"),
]


def exact(q, p, labels, scale, excluded=None, normalize=True, weights=None):
    """Loss and gradients in fp64 by autograd through the definition."""
    leaves = [q.double().requires_grad_(), p.double().requires_grad_()]
    scale = torch.tensor(float(scale), dtype=torch.float64, requires_grad=True)
    loss_M = info_nce_definition(*leaves, labels, scale, excluded, normalize)
    loss = loss_M.mean() if weights is None else (loss_M * weights).sum() / weights.sum()
    return loss.detach(), *torch.autograd.grad(loss, (*leaves, scale))


def ours(q, p, labels, scale, loss_scale=1.0, **options):
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    scale = torch.tensor(float(scale), dtype=torch.float64, requires_grad=True)
    loss = info_nce_loss(*leaves, labels, scale=scale, **options)
    # A loss scale, as mixed precision has it, keeps the gradients of a converged batch above fp16's
    # smallest number.
    grads = torch.autograd.grad(loss, (*leaves, scale), torch.tensor(loss_scale, dtype=loss.dtype))
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
        assert error(got, want) < 1.5 * error(same_dtype, want) + FLOOR[dtype]


# What one rounding more or less can do: below it, a comparison with plain torch compares luck.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def plain_torch(q, p, labels, scale):
    """Gradients by what one would write without us: cross entropy of the scores, in the inputs'
    dtype."""
    leaves = [q.clone().requires_grad_(), p.clone().requires_grad_()]
    unit = torch.nn.functional.normalize
    loss = torch.nn.functional.cross_entropy(scale * unit(leaves[0]) @ unit(leaves[1]).T, labels)
    return torch.autograd.grad(loss, leaves)


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
    q, p, labels = draw(5, 9, 6, torch.float64, converged=False)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, p, s, how=reduction: info_nce_loss(
                q, p, labels, scale=s, normalize=normalize, weights=weights, reduction=how
            ),
            (q.requires_grad_(), p.requires_grad_(), scale),
        )


def masks(labels, query_ids, passage_ids, extra, N):
    """The documented meaning of ids and excluded columns, pair by pair."""
    excluded = torch.zeros(len(labels), N, dtype=torch.bool)
    for i, j in itertools.product(range(len(labels)), range(N)):
        same_text = passage_ids is not None and passage_ids[j] == passage_ids[labels[i]]
        equal_query = query_ids is not None and any(
            query_ids[k] == query_ids[i] and labels[k] == j for k in range(len(labels))
        )
        excluded[i, j] = bool(same_text or equal_query or j in extra[i])
    return excluded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["queries", "passages", "excluded", "all"])
def test_masks_are_those_of_the_definition(which, dtype, path):
    M, N = 24, 60
    q, p, labels = draw(M, N, 32, dtype, converged=False)
    labels[3] = labels[5]  # one passage is the positive of two queries
    generator = torch.Generator().manual_seed(1)
    query_ids = torch.randint(8, (M,), generator=generator) if which in ("queries", "all") else None
    passage_ids = (
        torch.randint(20, (N,), generator=generator) if which in ("passages", "all") else None
    )
    extra = [[] for _ in range(M)]
    if which in ("excluded", "all"):
        extra = [list(range(i % 5)) for i in range(M)]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, extra))])
    columns = torch.tensor(list(itertools.chain(*extra)), dtype=torch.int64)
    truth = exact(q, p, labels, 20, masks(labels, query_ids, passage_ids, extra, N))
    result = ours(
        q, p, labels, 20, query_ids=query_ids, passage_ids=passage_ids,
        excluded=(offsets, columns), workspace_bytes=8 * 7 * N,
    )  # fmt: skip
    assert max(map(error, result, truth)) < 2e-6
    unmasked = exact(q, p, labels, 20)
    assert error(result[0], unmasked[0]) > 1e-3


def test_a_row_with_nothing_left_has_loss_and_gradient_zero(path):
    q, p, labels = draw(3, 4, 8, torch.float32, converged=False)
    same = torch.zeros(4, dtype=torch.int64)
    loss, dq, dp, ds = ours(q, p, labels, 50, passage_ids=same)
    assert loss == 0 and not dq.any() and not dp.any() and ds == 0
    loss, dq, dp, _ = ours(q[:1], p[:1], None, 50)
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


def test_nan_in_one_query_stays_in_its_row(path):
    q, p, labels = draw(6, 12, 16, torch.float32, converged=False)
    clean = info_nce_loss(q, p, labels, reduction="none")
    q[2, 3] = torch.nan
    loss_M = info_nce_loss(q, p, labels, reduction="none")
    assert loss_M[2].isnan()
    others = torch.arange(6) != 2
    assert torch.equal(loss_M[others], clean[others])


def test_groups_put_the_positive_first():
    q, p, _ = draw(6, 18, 16, torch.float32, converged=False)
    assert torch.equal(info_nce_loss(q, p), info_nce_loss(q, p, torch.arange(6) * 3))


def test_reductions_agree_with_the_rows():
    q, p, labels = draw(7, 21, 16, torch.float64, converged=False)
    weights = torch.rand(7, dtype=torch.float64)
    rows = info_nce_definition(q, p, labels, 50.0)
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
    _, dq, dp, _ = ours(q, p, labels, 50)
    side, want = (p, dp) if frozen == "queries" else (q, dq)
    side.requires_grad_()
    (got,) = torch.autograd.grad(info_nce_loss(q, p, labels), side)
    torch.testing.assert_close(got, want.float())


def test_chunks_do_not_change_the_result():
    q, p, labels = draw(50, 70, 32, torch.float32, converged=False)
    whole = ours(q, p, labels, 50)
    for rows in (1, 7, 49):
        chunked = ours(q, p, labels, 50, workspace_bytes=rows * 4 * 70)
        assert max(map(error, chunked, whole)) < 1e-6


def test_loss_and_grads_equal_autograd_and_count_the_batch():
    q, p, labels = draw(16, 48, 32, torch.float32, converged=True)
    want = ours(q, p, labels, 50)
    loss, dq, dp, d_scale, stats = info_nce_loss_and_grads(q, p, labels, scale=50)
    assert max(map(error, (loss, dq, dp, d_scale), want)) < 1e-6
    unit = torch.nn.functional.normalize
    cosine = unit(q) @ unit(p).T
    positive = cosine.gather(1, labels[:, None])[:, 0]
    hardest = cosine.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(stats.positive_similarity, positive.mean())
    torch.testing.assert_close(stats.hardest_negative_similarity, hardest.mean())
    assert stats.accuracy == (positive > hardest).float().mean()


class NoMatrix(TorchDispatchMode):
    """Fails on any tensor with as many elements as the score matrix."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() < self.limit, f"{func} made {list(tensor.shape)}"
        return out


@pytest.mark.parametrize("with_gradients", [False, True])
def test_score_matrix_is_never_stored(with_gradients, path):
    M = N = 512
    q, p, labels = draw(M, N, 16, torch.float32, converged=False)
    ids, weights = torch.arange(M), torch.ones(M) if with_gradients else None
    # The launcher itself: dispatch modes do not see inside a custom op.
    with NoMatrix(M * N // 4) as mode:
        chunked.info_nce(
            q, p, labels, torch.tensor(50.0), ids, ids, None, None, weights, (with_gradients,) * 3,
            normalize=True, workspace_bytes=32 * N * 4,
        )  # fmt: skip
    assert mode.largest == 32 * N


def test_dispatch_mode_notices_the_matrix_of_the_definition():
    q, p, labels = draw(512, 512, 16, torch.float32, converged=False)
    with pytest.raises(AssertionError, match="512, 512"), NoMatrix(512 * 512 // 4):
        info_nce_definition(q, p, labels, 50.0)


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
    assert error(result[0], truth[0]) < 1e-5
    for got, want in zip(result[1:3], truth[1:3], strict=True):
        assert (got.double() - want).norm() < 1e-5 * max(1.0, want.norm())


def test_opcheck():
    q, p, labels = draw(6, 12, 8, torch.float32, converged=False)
    scale, weights = torch.tensor(20.0), torch.full((6,), 1 / 6)
    q, p, scale = (t.requires_grad_() for t in (q, p, scale))
    ids = (torch.arange(6), torch.arange(12), torch.arange(7), torch.zeros(6, dtype=torch.int64))
    torch.library.opcheck(_info_nce, (q, p, labels, scale, *ids, True, 1 << 20))
    # the gradient outputs are not differentiable by design, so the autograd test does not apply to
    # them
    torch.library.opcheck(
        _info_nce_grads,
        (q, p, labels, scale, *ids, True, 1 << 20, weights, [True, True, True]),
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


def test_autocast_leaves_the_scores_in_fp32():
    q, p, labels = draw(16, 48, 32, torch.float32, converged=False)
    want = ours(q, p, labels, 50)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(q, p, labels, 50)
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
    "dims": (dict(passages=torch.ones(8, 5)), "queries have D=6 but passages have D=5"),
    "groups": (dict(passages=torch.ones(7, 6)), "7 passages do not divide by 4 queries"),
    "integers": (dict(queries=torch.ones(4, 6).int()), "floating point"),
    "rank": (dict(queries=torch.ones(6)), r"\[M, D\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {"queries": torch.ones(4, 6), "passages": torch.ones(8, 6)} | change
    with pytest.raises(ValueError, match=message):
        info_nce_loss(arguments.pop("queries"), arguments.pop("passages"), **arguments)
