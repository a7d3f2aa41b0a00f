"""InfoNCE's Triton launcher at its edges: norms, gaps and numbers at the ends of a dtype, NaN, how
often it launches and waits, what it stores, and each address in another order of programs.

As beside it (`test_triton_info_nce.py`), in the interpreter where there is no GPU; there they take
minutes.
"""

import itertools
from dataclasses import replace

import hypothesis
import pytest
import torch
import triton
from hypothesis import strategies as st

from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.objective import by_pull
from rankpo_kernels.problem import PP, PQ, QP, QQ, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton import info_nce_general
from rankpo_kernels.triton.info_nce import info_nce
from support.gates import draw, error, gates
from support.info_nce_problems import EVERYTHING, GRID, LAYOUTS, D, M, N, exact, problem
from support.interpreter import LAST_FIRST, grid_order, shadow_memory
from support.launcher import (
    ALL,
    DEVICE,
    LOW,
    PIPELINES,
    ROOMY,
    SMALL,
    NoSync,
    Work,
    gradients,
    launch,
    launches,
    named,
    on_device,
    rows_fit,
    spread,
    uneven,
)  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("interpreted", "nothing_is_zero_by_luck"),
    pytest.mark.long,
]
pipelines = pytest.mark.parametrize("pipeline", PIPELINES)
interpreted_alone = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="looks into the interpreter"
)


@pytest.mark.parametrize(
    "signs", [(1, 1), (-1, -1), (1, -1)], ids=["large", "small", "squares-out-of-range"]
)
@pipelines
def test_norms_neither_overflow_nor_underflow(pipeline, signs):
    dtype, how = PIPELINES[pipeline]
    size = 1e20 if sum(signs) == 0 and dtype != torch.float16 else 1e4  # squares beyond the dtype
    q, p, labels = draw(17, 33, 40, torch.float64, converged=False)
    q, p = (x / x.norm(dim=1, keepdim=True) for x in (q, p))
    q[::2] *= size ** signs[0]
    p *= size ** signs[1]
    case = (q.to(dtype), p.to(dtype), None, Relations(labels), ROOMY)
    truth = exact(*case, uneven(17), scale=20.0)
    result = launch(*case, uneven(17), scale=20.0, **how)
    loss_gate, grad_gate = gates(dtype, 0.05)
    assert error(result.loss_M, truth[0]) < loss_gate
    for rows in (slice(0, None, 2), slice(1, None, 2)):  # sizes apart
        assert error(result.dq_MD[rows], truth[1][0][rows]) < grad_gate
    assert error(result.dp_ND, truth[1][1]) < grad_gate


def far_apart(dtype: torch.dtype):
    """Gaps of almost 2 / temperature beside ordinary and negative ones, and a zero vector."""
    q, p, labels = draw(M, N, D, dtype, converged=False)
    free = [j for j in range(N) if j not in labels.tolist()]
    for i, away, near in [(2, labels[2], free[0]), (17, labels[17], free[1])]:
        p[away] -= 3 * q[i]
        p[near] += 3 * q[i]
    p[labels[18]] += 3 * q[18]
    p[free[2]] = 0
    return q, p, None, Relations(labels), ROOMY


@pytest.mark.parametrize("temperature", [0.02, 0.01])
@pipelines
def test_rows_too_far_apart_to_be_stored_stand_beside_others(pipeline, temperature):
    """A zero vector must not turn what overflows into NaN."""
    dtype, how = PIPELINES[pipeline]
    case = far_apart(dtype)
    truth = exact(*case, uneven(M), scale=1 / temperature)
    assert (truth[0] > 50).any() and (truth[0] < 1).any()
    result = launch(*case, uneven(M), scale=1 / temperature, **how)
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(result.loss_M, truth[0]) < loss_gate
    assert error(result.dp_ND, truth[1][1]) < grad_gate
    assert max(map(error, result.dq_MD, truth[1][0])) < 2 * grad_gate  # each row by itself


def test_own_negatives_too_far_above_the_passages_stand_beside_them():
    """By 100 and more: relative to the passages' top their exponentials would overflow."""
    q, p, labels = draw(M, N, D, torch.float32, converged=False)
    base = 3 * q[0]
    q, p, own = q + base, p - base, q.roll(1, 0) + base
    relations = Relations(labels, own_offsets=torch.arange(M + 1))
    case = (q, p, own, relations, ROOMY)
    truth = exact(*case, uneven(M), scale=100.0)
    assert (truth[0] > 100).all()
    result = launch(*case, uneven(M), scale=100.0)
    loss_gate, grad_gate = gates(torch.float32, 0.01)
    assert error(result.loss_M, truth[0]) < loss_gate
    for got, want in zip(result[3:6], truth[1][:3], strict=True):
        assert error(got, want) < grad_gate


def test_stored_rows_keep_their_digits_beside_weights_of_a_large_batch():
    """At a gap of 50 a row's factor, e^-80, times 2^-14 is next to nothing in bf16."""
    q, p, labels = draw(M, N, D, torch.bfloat16, converged=False)
    p[labels] -= q
    case, weights = (q, p, None, Relations(labels), ROOMY), torch.full((M,), 2.0**-14)
    truth = exact(*case, weights, scale=40.0)
    assert ((truth[0] > 35) & (truth[0] < 50)).sum() > 5
    result = launch(*case, weights, scale=40.0, stored=True)
    for got, want in zip(result[3:5], truth[1][:2], strict=True):
        assert max(map(error, got, want)) < 8e-3  # each row by itself


def test_stored_rows_of_huge_norm_keep_their_gradient():
    """A factor of e^-60 times an inverse norm of 1e-20 is no fp32 number."""
    q, p, labels = draw(M, N, D, torch.bfloat16, converged=False)
    p[labels] -= q
    case, weights = (q * 1e20, p, None, Relations(labels), ROOMY), torch.full((M,), 2.0**-14)
    truth = exact(*case, weights, scale=25.0)
    assert ((truth[0] > 28) & (truth[0] < 35)).any()
    result = launch(*case, weights, scale=25.0, stored=True)
    for got, want in zip(result[3:5], truth[1][:2], strict=True):
        assert max(map(error, got * 1e20, want * 1e20)) < 8e-3  # each row by itself


@pipelines
def test_passages_may_all_be_zero(pipeline):
    """There is no largest inverse norm then."""
    dtype, how = PIPELINES[pipeline]
    q, p, labels = draw(M, N, D, dtype, converged=False)
    case = (q, torch.zeros_like(p), None, Relations(labels), ROOMY)
    result = launch(*case, uneven(M), scale=20.0, **how)
    assert error(result.loss_M, torch.full((M,), N).log()) < 1e-6
    assert not any(x.any() for x in gradients(result))


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["ordinary", "far-apart"])
@pipelines
def test_gradients_are_odd_in_the_weights(pipeline, temperature):
    """Weights hold upstream gradients, which are negative where a loss is subtracted."""
    dtype, how = PIPELINES[pipeline]
    one, other = (
        gradients(launch(*far_apart(dtype), w, scale=1 / temperature, **how))
        for w in (uneven(M), -uneven(M))
    )
    assert all(error(x, -y) < 1e-4 for x, y in zip(one, other, strict=True))


@pipelines
def test_a_loss_below_the_smallest_number_is_zero_with_gradient_zero(pipeline):
    """At a gap of -400 its exponential is no fp32 any more."""
    dtype, how = PIPELINES[pipeline]
    q = p = torch.eye(17, 24, dtype=dtype)
    case = (q, p, None, Relations(torch.arange(17)), ROOMY)
    result = launch(*case, torch.ones(17), scale=400.0, **how)
    assert not result.loss_M.any() and not any(x.any() for x in gradients(result))


@pytest.mark.parametrize(
    "name", ["plain", "stored", "few", "filter", "everything-one-way", "symmetric", "hard-chosen"]
)
@pytest.mark.parametrize("where", ["query", "passage"])
def test_nan_is_where_the_definition_has_it(where, name):
    how = {name: True} if name in ("stored", "few") else {}
    dtype = torch.bfloat16 if how else torch.float32
    *case, settings = named(name if name in GRID else "excluded", dtype)
    weights = torch.ones(M)
    if name == "filter":  # takes all that it may
        settings = replace(settings, gradient_filter=0.99)
        weights = 1.0 * (torch.arange(M) == 2)
    q, p, own, relations = case
    (q if where == "query" else p)[2, 3] = torch.nan
    leaves = [x.double().requires_grad_() for x in (q, p)]
    own_HD = None if own is None else own.double()
    loss_M = info_nce_definition(*leaves, 20.0, relations, settings, own_HD)
    grads = torch.autograd.grad((loss_M * weights).sum(), leaves)
    assert loss_M.isnan().any()
    result = launch(*case, settings, weights, scale=20.0, **how)
    for got, want in zip((result.loss_M, *result[3:5]), (loss_M, *grads), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


# What is not asked for is not done


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("fp32", "plain"), ("bf16-stored", "plain"), ("bf16-few-launches", "plain"),
        ("fp16", "plain"), ("fp32", "everything-parts"),
    ],
)  # fmt: skip
def test_each_gradient_is_the_same_without_the_others(pipeline, name):
    dtype, how = PIPELINES[pipeline]
    names, options = GRID[name]
    case = *problem(*names, M=3, N=9, dtype=dtype), replace(ROOMY, **options)

    def run(needs, weights):
        return launch(*case, weights, scale=20.0, needs=needs, **how)

    whole = run(ALL, uneven(3))
    for needs in itertools.product([False, True], repeat=4):
        if (needs[2] and case[2] is None) or (name != "plain" and sum(needs) > 1):
            continue  # not there, or a wait of seconds
        some = run(needs, uneven(3))
        assert max(map(error, some[:3], whole[:3])) < 1e-6
        for need, got, want in zip(needs, some[3:7], whole[3:7], strict=True):
            assert (got is None) == (want is None or not need)
            assert got is None or error(got, want) < 1e-6
    forward = run((False,) * 4, None)
    assert forward[3:] == (None,) * 5 and max(map(error, forward[:3], whole[:3])) < 1e-6


@pytest.mark.parametrize(
    ("pipeline", "name", "with_gradients", "kernels", "others"),
    [
        ("fp32", "plain", True, "prepare statistics pairs gradients finish", "mm mm sum"),
        ("bf16-stored", "plain", True, "prepare statistics pairs rest finish",
         "amax clamp mm mm sum"),  # the largest inverse norm of a passage is their unit
        ("bf16-few-launches", "plain", True, "prepare statistics pairs gradients finished", ""),
        ("bf16-few-launches", "both-ways-apart", True,
         "prepare statistics pairs columns gradients finished", ""),
        ("bf16", "both-ways-apart", True, "prepare statistics pairs columns gradients finish",
         "zero_ zero_ mm mm sum"),
        ("fp32", "plain", False, "prepare statistics pairs", ""),
        ("bf16-few-launches", "plain", False, "prepare statistics pairs", ""),
    ],
)  # fmt: skip
def test_launches_in_one_chunk(pipeline, name, with_gradients, kernels, others):
    """All that a GPU is given to do: at most five where few are wanted, six where symmetric."""
    dtype, how = PIPELINES[pipeline]
    case = named(name, dtype, rows=99)
    weights = torch.tensor(1 / M) if with_gradients else None
    with launches() as names, Work() as work:
        launch(*case, weights, scale=20.0, **how, needs=(with_gradients,) * 4)
    assert [name.removeprefix("_") for name in names] == [
        f"{name}_kernel" for name in kernels.split()
    ]
    ops = [op.replace("addmm_", "mm").replace("addmm", "mm") for op in work.ops if "copy" not in op]
    assert sorted(ops) == sorted(others.split())


@pytest.mark.parametrize("name", [*PIPELINES, "filter", "everything-guided"])
def test_the_host_does_not_wait(name):
    dtype, how = PIPELINES.get(name, PIPELINES["fp32"])
    *case, settings = named("everything-guided" if name not in PIPELINES else "ids", dtype)
    if name == "filter":
        *case, settings = named("ids")
        settings = replace(settings, gradient_filter=0.1)
    q, p, own, relations = (on_device(x) for x in case)
    weights, scale = on_device(uneven(M)), torch.tensor(20.0)
    run = lambda: info_nce(  # noqa: E731
        InfoNCEProblem(q, p, own, scale, relations, settings), weights, ALL, tiles=SMALL, **how
    )
    with NoSync(scale):
        run()
    if DEVICE == "cuda":  # compiled by now
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["fp32", "bf16-stored", "everything", "filter"])
def test_score_matrix_is_never_stored(name):
    dtype, how = PIPELINES.get(name, PIPELINES["fp32"])
    rows, queries, size = 16, 64, 128
    options = {"everything": EVERYTHING, "filter": {"gradient_filter": 0.1}}.get(name, {})
    names = ["ids", "excluded", "curated"]
    if name == "everything":
        names += ["own", "positives", "guide"]
    case = problem(*names, M=queries, N=size, D=4, dtype=dtype)
    settings = replace(ROOMY, workspace_bytes=rows * (size + 32) * 4, **options)
    tiles = replace(SMALL, BLOCK_M=32, BLOCK_N=64)
    with Work() as work:
        launch(*case, settings, torch.ones(queries), scale=9.0, **how, tiles=tiles)
    assert rows * size <= work.largest <= 2 * rows * size < queries * size


@pytest.mark.parametrize("name", ["plain", "everything-joint"])
def test_workspace_of_less_than_a_row_is_refused(name):
    *case, settings = named(name)
    with pytest.raises(ValueError, match=r"workspace_bytes=99 is too small for one row of \d+"):
        launch(*case, replace(settings, workspace_bytes=99), uneven(M), scale=20.0)


@pytest.mark.parametrize(
    ("pipeline", "share"),
    [("fp32", 2**-8), ("fp32", 0.999), ("bf16", 0.3), ("bf16-stored", 0.3), ("fp16", 0.3)],
)
def test_filter_leaves_out_the_rows_that_pull_least_and_nothing_else(pipeline, share):
    """Three chunks, each with what it leaves out: little, half and nearly all. Weights may be those
    of a loss that is subtracted."""
    dtype, how = PIPELINES[pipeline]
    M, N, D, rows = 43, 70, 24, 16  # as many as one tile, as the last chunk has not; odd tails
    q, p, labels = draw(M, N, D, dtype, converged=False)
    p[labels[::2]] = q[::2]  # half are learnt
    relations, weights = Relations(labels), uneven(M) * (-1) ** torch.arange(M)
    settings = InfoNCESettings(
        workspace_bytes=rows_fit(rows, N, dtype, SMALL), gradient_filter=share
    )
    case = (q, p, None, relations)
    whole = launch(*case, replace(settings, gradient_filter=0.0), weights, scale=20.0, **how)
    rough = launch(*case, settings, weights, scale=20.0, **how)
    assert torch.equal(rough.loss_M, whole.loss_M) and torch.equal(rough.d_scale, whole.d_scale)
    out_M = torch.zeros(M, dtype=torch.bool)
    for start in range(0, M, rows):
        part = slice(start, start + rows)
        rows_R, count = by_pull(rough.loss_M[part].cpu(), weights[part], share)
        out_M[start + rows_R[count:]] = True
    assert torch.equal((rough.dq_MD == 0).all(1).cpu(), out_M | (weights == 0))
    others = launch(*case, replace(settings, gradient_filter=0.0), weights * ~out_M, scale=20.0)
    bound = LOW.get(dtype, (0, 2e-6))[1]
    assert error(rough.dq_MD, others.dq_MD) < bound and error(rough.dp_ND, others.dp_ND) < bound


# Memory and order

FORMS = {
    "plain": ("fp32", "excluded", {}),
    "guided": ("fp32", "guide", {}),
    "stored": ("bf16-stored", "margin", {}),
    "few-launches": ("bf16-few-launches", "both-ways", {"workspace_bytes": 1 << 20}),
    "filter": ("fp32", "ids", {"gradient_filter": 0.3}),
    "everything": ("fp32", "everything-guided", {}),
    "hardness": ("fp32", "hard-in-batch", {}),
    "short-prefix": (
        "fp32",
        "everything-one-way",
        {"matryoshka_dims": (9,), "matryoshka_weights": (1.0,)},
    ),
}


def run_form(name: str) -> list[torch.Tensor]:
    pipeline, case, options = FORMS[name]
    dtype, how = PIPELINES[pipeline]
    *case, settings = named(case, dtype)
    settings = replace(settings, **options)
    result = launch(*case, settings, uneven(M), scale=20.0, **how)
    return [x for x in result if x is not None]


@interpreted_alone
@pytest.mark.parametrize("form", FORMS)
def test_no_address_lies_outside_and_no_program_races(form):
    with shadow_memory():
        run_form(form)


@interpreted_alone
def test_gradients_of_prefixes_may_lie_beyond_32_bits(monkeypatch):
    """Three of them, 2^30 elements from one to the next."""
    *case, settings = named("everything-one-way", torch.bfloat16)
    settings = replace(settings, matryoshka_dims=(9, 20, 24), matryoshka_weights=(1.0, 0.3, 0.5))
    usual = launch(*case, settings, uneven(M), scale=20.0)

    def far(function):
        def launched(*args, **options):
            (at,) = (i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.dim() == 3)
            function(*args[:at], out := spread(args[at], 0), *args[at + 1 :], **options)
            args[at].copy_(out)

        return launched

    for name in ("launch_gradients", "_scatter_pairs"):
        monkeypatch.setattr(info_nce_general, name, far(getattr(info_nce_general, name)))
    apart = launch(*case, settings, uneven(M), scale=20.0)
    assert all(map(torch.equal, gradients(apart), gradients(usual)))


@interpreted_alone
@pytest.mark.parametrize(
    ("name", "stored", "options"),
    [
        pytest.param("plain", False, {"gradient_filter": 0.1}, id="filter"),
        pytest.param("plain", True, {}, id="stored"),
        pytest.param("own", False, {}, id="own"),
    ],
)
def test_dims_of_embeddings_may_lie_beyond_32_bits(name, stored, options):
    """Three of them, 2^30 elements from one to the next: many rows, transposed."""
    q, p, own, relations = problem(*GRID[name][0], D=3, dtype=torch.bfloat16)
    near, far = (
        launch(
            *embeddings, relations, replace(ROOMY, **options), uneven(M), scale=20.0, stored=stored
        )
        for embeddings in [(q, p, own), [x if x is None else spread(x, 1) for x in (q, p, own)]]
    )
    assert all(torch.equal(*pair) for pair in zip(near, far, strict=True) if pair[0] is not None)


@interpreted_alone
@pytest.mark.parametrize("form", ["plain", "stored", "few-launches", "filter", "everything"])
def test_the_order_of_programs_changes_no_bit(form):
    usual = run_form(form)
    for seed in (LAST_FIRST, 1):
        with grid_order(seed):
            assert all(map(torch.equal, run_form(form), usual))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 19), st.integers(6, 37), st.integers(3, 33)),
    names=st.sets(st.sampled_from(["ids", "excluded", "positives", "own"]), max_size=3),
    directions=st.sampled_from([(QP,), (QP,), (PQ,), (QP, PQ), (QQ, PP)]),
    smoothing=st.sampled_from([0.0, 0.1]), prefixes=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)), rows=st.integers(3, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(sizes, names, directions, smoothing, prefixes, layout, rows, seed):
    M, N, D = sizes
    names -= {"own"} if QP not in directions else set()
    q, p, own, relations = problem(*names, M=M, N=N, D=D, seed=seed)
    q, p = LAYOUTS[layout](q), LAYOUTS[layout](p)
    own = own if own is None or not len(own) else LAYOUTS[layout](own)
    dims = {}
    if prefixes:
        dims = {"matryoshka_dims": (D // 2, D - 1), "matryoshka_weights": (0.5, 1.0)}
    settings = InfoNCESettings(
        workspace_bytes=rows * N * 24, directions=directions, label_smoothing=smoothing, **dims
    )
    case = (q, p, own, relations, settings)
    truth = exact(*case, uneven(M), scale=10.0)
    result = launch(*case, uneven(M), scale=10.0)
    wanted = (truth[0], *truth[1])
    size = max(1.0, *(want.norm() for want in wanted))  # what cancels in one is as large as others
    for got, want in zip((result[0], *gradients(result)), wanted, strict=True):
        assert (got.double() - want).norm() < 2e-5 * size
