"""InfoNCE: what torch expects of an op, from autograd to compilation, and bad arguments."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast import info_nce_loss
from rankpo_fast.ops import checks
from rankpo_fast.ops import info_nce as module
from rankpo_fast.ops.info_nce import _info_nce, _info_nce_grads
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.problem import DIRECTIONS, PP, PQ, QP, QQ, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from support.gates import draw, error, gates
from support.info_nce_options import (
    HARD_ALL,
    HARD_IN_BATCH,
    World,
    assert_equals_definition,
    exact,
    ours,
    spelled_out,
)


def test_backend_is_chosen_by_device_dtype_and_option(monkeypatch):
    def launcher(device, dtype, backend):
        q = torch.empty(1, 1, dtype=dtype, device=device)
        settings = InfoNCESettings(workspace_bytes=0, backend=backend)
        return module.launcher_of(InfoNCEProblem(q, q, None, q, Relations(q), settings))

    assert launcher("cpu", torch.float32, None) is chunked.info_nce
    assert launcher("meta", torch.float32, "torch") is chunked.info_nce
    monkeypatch.setattr(checks, "_is_interpreted", lambda: False)
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


def test_upstream_gradient_scales_both_forms():
    q, p, labels = draw(7, 21, 16, torch.float64, converged=False)
    q.requires_grad_()
    (once,) = torch.autograd.grad(info_nce_loss(q, p, labels), q)
    (thrice,) = torch.autograd.grad(3 * info_nce_loss(q, p, labels), q)
    (rows,) = torch.autograd.grad(3 * info_nce_loss(q, p, labels, reduction="none").mean(), q)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rows, 3 * once, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("gradient_filter", [0.0, 0.1])
def test_gradients_are_odd_in_upstream_ones(gradient_filter):
    """Weights are >= 0, but what comes from above need not be."""
    q, p, labels = draw(7, 60, 16, torch.float32, converged=False)
    q.requires_grad_(), p.requires_grad_()
    loss_M = info_nce_loss(q, p, labels, reduction="none", gradient_filter=gradient_filter)
    above_M = torch.linspace(-1, 2.1, 7)
    dq, dp = torch.autograd.grad(loss_M, (q, p), above_M, retain_graph=True)
    opposite = torch.autograd.grad(loss_M, (q, p), -above_M)
    assert torch.equal(dq, -opposite[0]) and torch.equal(dp, -opposite[1])
    left_out = (dq == 0).all(1).sum()
    assert 0 < left_out < 7 if gradient_filter else left_out == 0


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


def test_second_derivative_is_a_clear_error():
    q, p, labels = draw(4, 8, 8, torch.float64, converged=False)
    q.requires_grad_()
    for reduction in ("mean", "none"):
        loss = info_nce_loss(q, p, labels, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss + grad.sum(), q)


@pytest.mark.parametrize(
    ("precision", "dtype", "capability", "said"),
    [
        ("fp8", torch.bfloat16, (8, 0), "needs a GPU of compute capability 8.9 .* one's is 8.0"),
        (
            "fp8",
            torch.float32,
            (9, 0),
            "is of embeddings of torch.bfloat16, but these are torch.fl",
        ),
        ("tf32x3", torch.bfloat16, (9, 0), "is of embeddings of torch.float32, but these are"),
        ("fp8", torch.bfloat16, (8, 9), None),
        ("tf32x3", torch.float32, (8, 0), None),
    ],
)
def test_precision_is_refused_where_there_is_none(
    monkeypatch, precision, dtype, capability, said
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    embeddings = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    options = InfoNCESettings(precision=precision)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        checks.check_precision(options, embeddings)


class Watch(TorchDispatchMode):
    """The ops that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", ["mode", "subclass"])
def test_who_watches_sees_the_op_and_nobody_else_does(watched):
    q, p, labels = draw(7, 21, 16, torch.float32, converged=False)
    leaf = q.clone().requires_grad_()
    loss = info_nce_loss(leaf, p, labels)
    want = torch.autograd.grad(loss, leaf)
    assert "WithGrads" in type(loss.grad_fn).__name__
    leaf = q.clone().as_subclass(Named if watched == "subclass" else torch.Tensor).requires_grad_()
    with (watch := Watch()) if watched == "mode" else contextlib.nullcontext():
        seen = info_nce_loss(leaf, p, labels)
    assert "WithGrads" not in type(seen.grad_fn).__name__
    assert watched != "mode" or "rankpo_fast::info_nce_grads" in watch.names
    assert torch.equal(seen, loss) and torch.equal(*torch.autograd.grad(seen, leaf), *want)


class Named(torch.Tensor):
    """A subclass, as a user's may be."""


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
    relations, static = spelled_out(torch.arange(6) + 6, **OPCHECKS[case])
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
    "filter": (dict(gradient_filter=-1e-3), r"gradient_filter must lie in \[0, 1\), got -0.001"),
    "precision": (
        dict(precision="tf32"),
        "precision must be one of 'exact', 'tf32x3', 'fp8', got 'tf32'",
    ),
    "fp8-of-dots": (dict(precision="fp8", normalize=False), "precision='fp8' goes with cosines of"),
    "fp8-of-prefixes": (dict(precision="fp8", matryoshka_dims=(3,)), "without matryoshka_dims or"),
    "fp8-of-queries": (dict(precision="fp8", directions=(QP, QQ)), "goes with cosines of query_to"),
    "precision-of-torch": (
        dict(precision="tf32x3", backend="torch"),
        "precision='tf32x3' is of backend 'triton', but on .* 'torch' is taken",
    ),
    "filter-of-all": (dict(gradient_filter=1.0), r"gradient_filter must lie in \[0, 1\), got 1.0"),
    "filter-below-the-dtype": (
        dict(gradient_filter=1e-9),
        "must be 0, or at least 6e-08, which torch.float32 can tell, got 1e-09",
    ),
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
    checks.assert_values(Relations(torch.arange(3)), True, 8)
    with pytest.raises(RuntimeError, match=message):
        checks.assert_values(Relations(**{"labels_M": torch.arange(3)} | change), True, 8)
