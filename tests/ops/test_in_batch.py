"""In-batch RankPO and SigLIP: definitions, every option on every path, and what torch expects of an
op."""

from dataclasses import replace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from rankpo_fast import (
    in_batch_rankpo_loss,
    in_batch_rankpo_loss_and_grads,
    rankpo_loss,
    siglip_loss,
)
from rankpo_fast.ops import in_batch as module
from rankpo_fast.ops.checks import known_definition
from rankpo_fast.ops.in_batch import _in_batch, _in_batch_grads
from rankpo_fast.ops.options import InBatchRankPOCall, SigLIPCall
from rankpo_kernels.chunked import chunks, native
from rankpo_kernels.problem import InBatchSettings, compute_dtype
from rankpo_kernels.relations import Relations, count_others, known
from support.gates import FLOOR, draw, error, gates
from support.in_batch_problems import (
    DEVICE,
    GRID,
    M,
    N,
    call,
    exact,
    largest_logit,
    of_definition,
    ours,
    problem,
    relations_of,
)
from support.info_nce_problems import NoMatrix, lists

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOSSES = ("rankpo", "siglip")
ROWS = {"workspace_bytes": 2 * 16 * 4 * N}  # of a chunk: 16 with a reference in fp32


@pytest.fixture
def triton(interpreted, monkeypatch):
    """Options that choose triton; its tiles are small."""
    from rankpo_kernels.triton import in_batch
    from support.launcher import SMALL

    monkeypatch.setattr(in_batch, "pair_tiles", lambda *of: SMALL)
    return {"backend": "triton"}


@pytest.fixture(params=["native", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
def options(request, monkeypatch):
    """What takes this holds on every path: options that choose it."""
    if request.param == "triton":
        return request.getfixturevalue("triton")
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    return {}


def gates_of(case):
    """(loss, gradient) bounds."""
    return gates(case[1].dtype, 1 / largest_logit(*case))


def agree(case, **more):
    """Loss and gradients are those of the definition; returns them."""
    loss, q, p, options = case
    truth, (loss_gate, grad_gate) = exact(*case), gates_of(case)
    result = ours(loss, q, p, options | more)
    for i, (got, want) in enumerate(zip(result, truth, strict=True)):
        gate = grad_gate if i else loss_gate
        assert (got.double() - want).norm() < gate * max(1.0, want.norm())
    return truth


# What is computed


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("reference", [False, True], ids=["reference-free", "reference"])
def test_rankpo_is_the_pairwise_loss_of_the_positive_against_every_other_passage(reference, kind):
    _, q, p, options = problem("reference", M=7, N=12)
    rq, rp = options.pop("reference_queries"), options.pop("reference_passages")
    labels = options.pop("labels")
    options |= {"loss_type": kind, "gamma_beta_ratio": 0.4, "sft_weight": 0.3, "beta": 1.5}
    i, j = (torch.arange(12) != labels[:, None]).nonzero(as_tuple=True)
    margins = None
    if reference:
        r = F.normalize(rq, dim=1) @ F.normalize(rp, dim=1).T
        margins = r[i, labels[i]] - r[i, j]
    pairs = rankpo_loss(
        q[i], p[labels[i]], p[j], reference_margins=margins, **options, reduction="none"
    )
    references = {"reference_queries": rq, "reference_passages": rp} if reference else {}
    got = in_batch_rankpo_loss(q, p, labels, **references, **options, reduction="none")
    torch.testing.assert_close(got, pairs.view(7, 11).mean(1), rtol=1e-12, atol=0)


def test_siglip_is_the_sum_of_log_sigmoids():
    """Algorithm 1 of the paper, on its square batch."""
    q, p, _ = draw(9, 9, 12, torch.float64, converged=False)
    z = 2 * torch.eye(9, dtype=torch.float64) - 1
    s = F.normalize(q, dim=1) @ F.normalize(p, dim=1).T
    want = -F.logsigmoid(z * (10 * s - 10)).sum() / 9
    torch.testing.assert_close(siglip_loss(q, p), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRID)
def test_each_option_is_that_of_the_definition(name, dtype, options):
    if options and dtype == torch.float64:
        pytest.skip("triton computes in fp32")
    case = problem(name, dtype)
    truth = agree(case, **options, **ROWS)
    if name != case[0]:
        plain = exact(*problem(case[0], dtype))
        assert error(truth[0], plain[0]) > 1e-3, "the option does nothing here"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "everything-hinge", "siglip-everything"])
def test_options_in_low_precision(name, dtype, options):
    loss, q, p, given = problem(name, dtype)
    truth = exact(loss, q, p, given)
    result = ours(loss, q, p, given | options | ROWS, 2.0**10)
    loss_gate, grad_gate = gates_of((loss, q, p, given))
    assert error(result[0], truth[0]) < loss_gate
    assert max(map(error, result[1:3], truth[1:3])) < grad_gate


SHAPES = [
    pytest.param(1, 2, 8, id="one-query"),
    pytest.param(65, 129, 100, id="nothing-round"),
    pytest.param(8, 40, 4096, id="7b-width"),
    pytest.param(40, 8, 64, id="fewer-passages-than-queries"),
]


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02, 0.01])
@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("M", "N", "D"), SHAPES)
def test_loss_and_gradients_pass_the_gates(M, N, D, loss, dtype, converged, temperature, path):
    """`temperature` is that of x = similarity / temperature + ..."""
    _, q, p, options = problem(loss, dtype, M, N, D, converged)
    if loss == "rankpo":
        options["temperature"] = 2 * temperature  # beta is 2
    numbers = {"scale": 1 / temperature, "bias": -0.5 / temperature}
    pass_the_gates(loss, q, p, options | {"workspace_bytes": 8 * 16 * N}, temperature, numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize(
    ("loss", "temperature", "sizes"),
    [
        pytest.param("rankpo", 0.1, (17, 33, 100), id="one-past-a-tile"),
        pytest.param("rankpo", 0.02, (33, 65, 64), id="three-chunks"),
        pytest.param("siglip", 0.05, (16, 32, 384), id="minilm-in-one-tile"),
    ],
)
def test_triton_passes_the_gates(loss, temperature, sizes, converged, dtype, triton):
    _, q, p, options = problem(loss, dtype, *sizes, converged)
    if loss == "rankpo":
        options["temperature"] = 2 * temperature
    numbers = {"scale": 1 / temperature, "bias": -0.5 / temperature}
    options |= triton | {"workspace_bytes": 16 * sizes[1] * 5}
    pass_the_gates(loss, q, p, options, temperature, numbers)


def pass_the_gates(loss, q, p, options, temperature, numbers):
    truth = exact(loss, q, p, options, **numbers)
    # A loss scale, as mixed precision has it, keeps gradients above fp16's smallest number.
    loss_scale = min(2.0**110, 2.0 ** -truth[1].abs().amax().log2().round().item())
    result = ours(loss, q, p, options, loss_scale, **numbers)
    loss_gate, grad_gate = gates(q.dtype, temperature)
    if truth[1].norm() < 1e-25:  # every pair is settled: what is left leaves fp32's range
        assert result[0] < 1e-25 and result[1].norm() < 1e-25
        return
    assert error(result[0], truth[0]) < loss_gate
    # A settled batch has the gradients of a few pairs, and so their luck in rounding x, which is
    # made of two similarities.
    luck = 2 * torch.finfo(compute_dtype(q.dtype)).eps / temperature
    leaves = [x.clone().requires_grad_() for x in (q, p)]
    plain = torch.autograd.grad(of_definition(loss, *leaves, options, **numbers).mean(), leaves)
    for got, same_dtype, want in zip(result[1:3], plain, truth[1:3], strict=True):
        assert error(got, want) < grad_gate
        if q.dtype in FLOOR:
            bound = 1.5 * error(same_dtype, want) + FLOOR[q.dtype] + luck
            assert error(got, want) < bound
    for got, want in zip(result[3:], truth[3:], strict=True):
        # sums with two signs
        assert abs(got - want) < 2 * loss_gate * max(abs(want), truth[0])


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    M=st.integers(0, 9), N=st.integers(1, 9), texts=st.integers(1, 9), named=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pairs_are_counted_without_a_mask(M, N, texts, named, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = lambda *size: torch.randint(texts, size, generator=generator) - 4  # noqa: E731
    ids = (integers(M), integers(N)) if named else (None, None)
    excluded = lists([i % 4 % (N + 1) for i in range(M)], N, generator) if M else (None, None)
    labels = torch.randint(N, (M,), generator=generator)
    relations = Relations(labels, None, None, *ids, *excluded)
    want = (~known_definition(relations, N)).sum(1)
    assert torch.equal(count_others(known(relations, N)), want)


# Extremes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("M", "N"), [(0, 3), (0, 0), (1, 1)], ids=str)
def test_without_pairs_rankpo_is_zero_and_siglip_has_its_positive(M, N, loss, options):
    _, q, p, given = problem(loss, torch.float32, M, N)
    result = ours(loss, q, p, given | options)
    if loss == "siglip" and M:
        assert error(result[0], exact(loss, q, p, given)[0]) < gates_of((loss, q, p, given))[0]
        return
    assert not any(x.any() for x in result) and result[2].shape == p.shape


def test_without_queries_the_stats_are_zero():
    *_, stats = in_batch_rankpo_loss_and_grads(torch.ones(0, 4), torch.ones(3, 4))
    assert torch.stack(stats).tolist() == [0.0] * 4


def test_a_query_with_every_passage_masked_has_loss_and_gradient_zero(options):
    _, q, p, given = problem("everything", torch.float32, M=3, N=5)
    given |= {"passage_ids": torch.zeros(5, dtype=torch.int64), "weights": None}
    result = ours("rankpo", q, p, given | options)
    assert not any(x.any() for x in result)


@pytest.mark.parametrize("name", ["everything", "siglip"])
def test_a_zero_vector_has_gradient_zero(name, options):
    loss, q, p, given = problem(name, torch.float32)
    q[2], p[2], p[given["labels"][3]] = 0, 0, 0
    _, dq, dp, *_ = result = ours(loss, q, p, given | options)
    assert all(x.isfinite().all() for x in result) and not dq[2].any() and not dp[2].any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        pytest.param(torch.float32, 1e16, id="fp32-squares-overflow"),
        pytest.param(torch.float32, 3e-20, id="fp32-squares-underflow"),
        pytest.param(torch.float16, 1e3, id="fp16-squares-overflow"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_norms_neither_overflow_nor_underflow(loss, dtype, size, options):
    _, q, p, given = problem(loss)
    q, p = (q * size).to(dtype), (p * size).to(dtype)
    truth, result = exact(loss, q, p, given), ours(loss, q, p, given | options, size)
    loss_gate, grad_gate = gates_of((loss, q, p, given))
    assert error(result[0], truth[0]) < loss_gate
    assert max(map(error, result[1:3], truth[1:3])) < grad_gate


@pytest.mark.parametrize("loss", LOSSES)
def test_a_positive_far_below_the_others_does_not_overflow(loss, options):
    q, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    given = {"labels": torch.tensor([0])} | options
    if loss == "rankpo":
        given["temperature"] = 0.01
    value, dq, *_ = ours(loss, q, p, given, scale=400.0, bias=0.0)
    assert value == (400 if loss == "rankpo" else 800) and dq.isfinite().all()


@pytest.mark.parametrize("name", ["everything", "hinge", "siglip"])
def test_nan_in_one_query_stays_in_its_row(name, options):
    loss, q, p, given = problem(name, torch.float32)
    given = given | options | {"reduction": "none", "weights": None}
    clean, loss_M = [], []
    for rows in (clean, loss_M):
        leaves = [q.to(DEVICE) if options else q, p.to(DEVICE) if options else p, 8.0, -3.0]
        rows.append(call(loss, leaves, given))
        q = q.clone()
        q[2, 3] = torch.nan
    others = torch.arange(M) != 2
    assert loss_M[0][2].isnan() and torch.equal(loss_M[0][others], clean[0][others])


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["everything", "sft", "siglip-everything"])
def test_gradcheck(name, reduction):
    loss, q, p, given = problem(name, M=5, N=7, D=4)
    leaves = [q, p] + [torch.tensor(x, dtype=torch.float64) for x in (3.0, -1.0)]
    leaves = leaves if loss == "siglip" else leaves[:2]
    given |= {"reduction": reduction}
    torch.autograd.gradcheck(
        lambda *leaves: call(loss, leaves, given), [x.requires_grad_() for x in leaves]
    )


@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
def test_reductions_agree_with_the_rows(name):
    loss, q, p, given = problem(name)
    leaves = q, p, 8.0, -3.0
    weights_M = given["weights"].double()
    rows_M = of_definition(loss, q, p, given) * weights_M
    close = {"rtol": 1e-12, "atol": 0}
    for reduction, want in [
        ("none", rows_M), ("sum", rows_M.sum()), ("mean", rows_M.sum() / weights_M.sum()),
    ]:  # fmt: skip
        got = call(loss, leaves, given | {"reduction": reduction})
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
def test_upstream_gradients_of_rows_and_of_the_mean(name, options):
    dtype = torch.float32 if options else torch.float64
    loss, q, p, given = problem(name, dtype)
    truth, gate = exact(loss, q, p, given), gates_of((loss, q, p, given))[1]
    mean = ours(loss, q, p, given | options, 3.0)  # divided by it again
    leaves = [x.clone().to(DEVICE if options else "cpu").requires_grad_() for x in (q, p)]
    value = call(loss, [*leaves, 8.0, -3.0], given | options | {"reduction": "none"})
    upstream_M = torch.full_like(value, -1 / given["weights"].double().sum())
    of_rows = torch.autograd.grad(value, leaves, upstream_M)
    for got, of_mean, want in zip(of_rows, mean[1:3], truth[1:3], strict=True):
        assert error(-got, want) < gate and error(of_mean, want) < gate


@pytest.mark.parametrize("name", ["everything", "siglip"])
def test_each_gradient_is_the_same_without_the_others(name, options):
    loss, q, p, given = problem(name, torch.float32)
    whole, gate = exact(loss, q, p, given)[1:], gates_of((loss, q, p, given))[1]
    leaves = [q, p] + [torch.tensor(x, dtype=torch.float64) for x in (8.0, -3.0)][: len(whole) - 2]
    leaves = [x.to(DEVICE) if options else x for x in leaves]
    for place, want in enumerate(whole):
        leaf = leaves[place].requires_grad_()
        (got,) = torch.autograd.grad(call(loss, leaves, given | options), leaf)
        assert error(got, want) < gate
        leaf.requires_grad_(False)


def test_a_kept_graph_gives_the_same_gradients_again():
    loss, q, p, given = problem("everything", torch.float32)
    leaves = q.requires_grad_(), p.requires_grad_()
    value = 3 * call(loss, leaves, given)
    first, again = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_the_reference_gets_no_gradient_and_nothing_a_second_derivative():
    loss, q, p, given = problem("everything")
    reference = given["reference_queries"].requires_grad_()
    assert not call(loss, (q, p), given).requires_grad
    for reduction in ("mean", "none"):
        value = call(loss, (q.requires_grad_(), p), given | {"reduction": reduction}).sum()
        assert torch.autograd.grad(value, reference, retain_graph=True, allow_unused=True) == (
            None,
        )
        (grad,) = torch.autograd.grad(value, q, create_graph=True)
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.sum(), q)


def test_loss_and_grads_equal_autograd_and_count_the_pairs(options):
    loss, q, p, given = problem("everything", torch.float32)
    truth, (loss_gate, grad_gate) = exact(loss, q, p, given), gates_of((loss, q, p, given))
    on_device = [x.to(DEVICE) if options else x for x in (q, p)]
    loss, grads, stats = in_batch_rankpo_loss_and_grads(*on_device, **given, **options)
    got = loss, *grads
    errors = [error(x.cpu(), y) for x, y in zip(got, truth, strict=True)]
    assert errors[0] < loss_gate and max(errors[1:]) < grad_gate
    open_MN = ~known_definition(relations_of(given), N)
    s, r = (
        F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T
        for a, b in ((q, p), (given["reference_queries"], given["reference_passages"]))
    )
    labels_M1 = given["labels"][:, None]
    margin_MN = (s.gather(1, labels_M1) - s) - (r.gather(1, labels_M1) - r)
    margin = (margin_MN / given["temperature"] - given["gamma_beta_ratio"])[open_MN]
    hardest_M = s.masked_fill(~open_MN, -torch.inf).amax(1)
    want = (
        (margin > 0).float().mean(), margin.mean(), s.gather(1, labels_M1).mean(),
        hardest_M[open_MN.any(1)].mean(),
    )  # fmt: skip
    assert max(map(error, (x.cpu() for x in stats), want)) < loss_gate
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum'"):
        in_batch_rankpo_loss_and_grads(q, p, given["labels"], reduction="none")
    with pytest.raises(TypeError, match="curated"):
        in_batch_rankpo_loss_and_grads(q, p, curated=given["labels"])


# What is never done


def arguments_of(name, *, needs=(True,) * 4, **options):
    """What the ops hand to `_launch`, which dispatch modes can look into."""
    loss, q, p, given = problem(name, torch.float32, **options)
    if loss == "rankpo":
        checked = module.check_in_batch_rankpo(InBatchRankPOCall(q, p, **given))
        needs = (*needs[:2], False, False)
    else:
        checked = module.check_siglip(SigLIPCall(q, p, scale=8.0, bias=-3.0, **given))
    (*leaves, relations, settings), weights = checked
    return (*leaves, list(relations), settings.text(), weights, needs)


@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
def test_score_matrix_is_never_stored(name, path, monkeypatch):
    monkeypatch.setitem(chunks.SLAB, "cpu", 4096)
    size, rows = 512, 32
    *rest, settings, weights, needs = arguments_of(name, M=size, N=size, D=8)
    settings = replace(InBatchSettings.parse(settings), workspace_bytes=2 * rows * size * 4)
    with NoMatrix(size * size // 4) as mode:
        module._launch(*rest, settings.text(), weights, needs)
    assert mode.largest <= 2 * rows * size
    with pytest.raises(AssertionError, match="512, 512"), NoMatrix(size * size // 4):
        of_definition(*problem(name, M=size, N=size, D=8))


def test_threads_do_not_change_a_bit():
    rows, columns = 501, 2200  # enough work for three threads, and not the same for each
    scores, reference = torch.randn(2, rows, columns)
    ones, labels = torch.ones(columns), torch.randint(columns, (rows,))
    settings = InBatchSettings(sft_weight=0.5, sft_scale=3.0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads, outputs = scores.clone(), [torch.empty(rows) for _ in range(7)]
        native.in_batch_rows(
            grads, ones, labels, None, (reference, ones), ones[:rows], outputs, 20.0, 0.1, settings
        )
        results.append([grads, *outputs])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# What torch expects


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    M=st.integers(1, 9), N=st.integers(1, 12), D=st.integers(2, 33), rows=st.integers(2, 9),
    name=st.sampled_from(["everything", "everything-hinge", "siglip-everything"]),
    layout=st.sampled_from(["plain", "transposed", "every-second", "expanded"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(M, N, D, rows, name, layout, seed):
    loss, q, p, given = problem(name, torch.float32, M, N, D, seed=seed)
    strided = {
        "plain": lambda x: x,
        "transposed": lambda x: x.T.contiguous().T,
        "every-second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda x: x[:1].expand_as(x),
    }[layout]
    given = {key: strided(x) if "reference" in key else x for key, x in given.items()}
    agree((loss, strided(q), strided(p), given), workspace_bytes=2 * 4 * rows * N)


@pytest.mark.parametrize("name", ["rankpo", "everything", "siglip-everything"])
def test_opcheck(name):
    *leaves, relations, settings, weights, needs = arguments_of(name, M=6, N=12, D=8)
    leaves = [x.requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
    torch.library.opcheck(_in_batch, (*leaves, relations, settings))
    # the gradient outputs are not differentiable by design
    torch.library.opcheck(
        _in_batch_grads,
        (*leaves, relations, settings, weights, list(needs)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.long
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(name, reduction, dynamic):
    loss, q, p, given = problem(name, torch.float32)
    leaves = [q, p] + [torch.tensor(x) for x in (8.0, -3.0)]
    leaves = [x.requires_grad_() for x in (leaves if loss == "siglip" else leaves[:2])]

    def step(*leaves):
        return call(loss, (2 * leaves[0], *leaves[1:]), given | {"reduction": reduction}).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = torch.autograd.grad(step(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), want)


@pytest.mark.parametrize("name", ["everything", "siglip"])
def test_autocast_leaves_the_scores_in_fp32(name):
    case = problem(name, torch.float32)
    want = ours(*case)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, ours(*case), want))


BAD = {
    "beta": (dict(beta=0.0), "beta must be > 0 and finite, got 0.0"),
    "temperature": (dict(temperature=-1), "temperature must be > 0 and finite, got -1"),
    "smoothing": (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    "fp8": (dict(precision="fp8"), "precision='fp8' is of info_nce_loss alone"),
    "type": (dict(loss_type="ipo"), "loss_type must be 'sigmoid' or 'hinge', got 'ipo'"),
    "parts": (dict(sft_weight=0.0, rankpo_weight=0.0), "not both 0"),
    "reduction": (dict(reduction="median"), "reduction must be one of"),
    "backend": (dict(backend="cuda"), "backend must be one of None, 'torch', 'triton', got 'cuda'"),
    "labels": (dict(labels=torch.tensor([0, 1, 2, 9])), r"lie in \[0, 9\] but there are 8"),
    "ids": (dict(passage_ids=torch.zeros(4).long()), r"passage_ids must be int64 \[8\]"),
    "columns": (
        dict(excluded=(torch.arange(5), torch.tensor([0, 1, 8, 2]))),
        r"excluded columns lie in \[0, 8\] but there are 8 passages",
    ),
    "weights": (dict(weights=-torch.ones(4)), "weights must be >= 0, got -1.0"),
    "workspace": (dict(workspace_bytes=8), "too small for one row of 8 passages"),
    "dims": (dict(passages=torch.ones(8, 5)), "queries have D=6 but passages have D=5"),
    "groups": (dict(passages=torch.ones(7, 6)), "7 passages do not divide by 4 queries"),
    "reference-alone": (
        dict(reference_queries=torch.ones(4, 2)),
        "needs both its embeddings: reference_passages are missing",
    ),
    "reference-rows": (
        dict(reference_queries=torch.ones(4, 2), reference_passages=torch.ones(4, 2)),
        r"reference must be \[4, G\] and \[8, G\], got \(4, 2\) and \(4, 2\)",
    ),
    "reference-dims": (
        dict(reference_queries=torch.ones(4, 2), reference_passages=torch.ones(8, 3)),
        "reference queries have G=2 but reference passages have G=3",
    ),
    "scale": (dict(scale=0.0), "scale must be > 0 and finite, got 0.0"),
    "bias": (dict(bias=float("nan")), "bias must be finite, got nan"),
    "bias-shape": (dict(bias=torch.ones(2)), "bias must be one number"),
    "bias-dtype": (dict(bias=torch.tensor(-9)), "bias must be floating point, .* torch.int64"),
    "bias-device": (
        dict(bias=torch.ones((), device="meta")),
        "bias must be on the CPU or with the queries on cpu, got meta",
    ),
    "learnt-beta": (dict(beta=torch.tensor(2.0)), "beta must be a number: as a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {"queries": torch.ones(4, 6), "passages": torch.ones(8, 6)} | change
    loss = siglip_loss if {"scale", "bias"} & change.keys() else in_batch_rankpo_loss
    with pytest.raises(ValueError, match=message):
        loss(arguments.pop("queries"), arguments.pop("passages"), **arguments)


def test_hinge_with_label_smoothing_warns_and_names_both():
    with pytest.warns(UserWarning, match=r"label_smoothing=0.1 .* loss_type='hinge'") as caught:
        in_batch_rankpo_loss(*torch.ones(2, 3, 4), loss_type="hinge", label_smoothing=0.1)
    assert caught[0].filename == __file__
