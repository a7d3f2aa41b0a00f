"""RankPO: the authors' definition, gradients, the native kernel, and what torch expects of an
op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast import rankpo_loss, rankpo_loss_and_grads
from rankpo_fast.ops.common import unit_rows
from rankpo_fast.ops.rankpo import (
    _rankpo,
    _rankpo_grads,
    margin_loss,
    pair_similarities,
    pair_similarities_definition,
)
from rankpo_kernels.problem import RankPOSettings
from support.gates import error, gates

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    pytest.param(1, 1, id="one-pair-one-dimension"),
    pytest.param(33, 100, id="nothing-round"),
    pytest.param(16, 384, id="minilm"),
    pytest.param(4, 4096, id="7b-width"),
]


def draw(B, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, c, r = torch.randn(3, B, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q, q + 0.5 * c, q + 0.5 * r)]


def with_grads(function, tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def definition(q, c, r, weights=None, normalize=True, **options):
    chosen, rejected = pair_similarities_definition(q, c, r, normalize)
    loss_B = margin_loss(chosen - rejected, **options)
    return loss_B.mean() if weights is None else (weights * loss_B).sum()


def pair_dots(q, c, r):
    """Dot products, as the op has them."""
    settings = RankPOSettings(normalize=False).text()
    return _rankpo(q, [c, r], None, None, settings)[1].unbind(1)


def authors_loss(chosen, rejected, reference, beta, temperature, gamma, smoothing, kind):
    """The loss of similarities as the authors' trainer computes it, a step a line."""
    advantages = chosen - rejected
    if reference is not None:
        advantages = advantages - reference
    logits = advantages / temperature - gamma
    if kind == "hinge":
        return torch.relu(1 - beta * logits)
    return -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing


@pytest.mark.parametrize("reference", [False, True], ids=["reference-free", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.filterwarnings("ignore:label_smoothing")
def test_equals_the_authors_definition_on_random_and_extreme_scores(
    kind, gamma, smoothing, reference
):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 2 * torch.rand(2, 4096, generator=generator) - 1
    chosen[:4], rejected[:4] = torch.tensor([1.0, -1, 1, 0]), torch.tensor([-1.0, 1, 1, 0])
    ref = 2 * torch.rand(4096, generator=generator) - 1 if reference else None
    options = dict(
        beta=2.0, temperature=0.1, gamma_beta_ratio=gamma, label_smoothing=smoothing, loss_type=kind
    )
    exact = [None if x is None else x.double() for x in (chosen, rejected, ref)]
    theirs = authors_loss(*exact, *options.values())
    # fp32 scores of up to 1 are rounded at 6e-8 and multiplied by beta / temperature = 20
    for (c, r, margins), rtol, atol in (
        ((chosen, rejected, ref), 1e-6, 5e-6), (exact, 1e-12, 1e-12)
    ):  # fmt: skip
        q, c, r = torch.ones_like(c)[:, None], c[:, None], r[:, None]  # in one dimension
        ours = rankpo_loss(
            q, c, r, reference_margins=margins, normalize=False, reduction="none", **options
        )
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)
        defined = margin_loss((c - r)[:, 0], reference_margins=margins, **options)
        torch.testing.assert_close(defined.double(), theirs, rtol=rtol, atol=atol)


def test_sft_is_the_cross_entropy_of_the_two_scores():
    q, c, r = draw(16, 32, torch.float64)
    scores = pair_similarities(q, c, r).T / 0.1
    want = F.cross_entropy(scores, torch.zeros(16, dtype=torch.int64))
    got = rankpo_loss(q, c, r, sft_weight=1.0, rankpo_weight=0.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    both = rankpo_loss(q, c, r, sft_weight=0.5, rankpo_weight=2.0)
    torch.testing.assert_close(both, 0.5 * want + 2 * rankpo_loss(q, c, r))


LOGITS = 2.0 / 0.1  # the largest: beta / temperature, where they are not given
OPTIONS = {
    "plain": {},
    "reference": {"gamma_beta_ratio": 0.3, "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.7, "gamma_beta_ratio": -0.2},
    "sft": {"sft_weight": 0.7, "rankpo_weight": 0.4},
    "dots": {"normalize": False},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_loss_and_gradients_pass_the_gates(B, D, dtype, name, path):
    options = OPTIONS[name]
    temperature = 1.0 if options.get("normalize", True) else float(D)  # dots grow
    options = {"temperature": temperature, **options}
    tensors = draw(B, D, dtype)
    if name == "reference":
        options["reference_margins"] = torch.linspace(-0.5, 0.5, B, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, B, dtype=torch.float64)
    exact = with_grads(
        lambda *x: definition(*x, weights=weights, **options), [x.double() for x in tensors]
    )
    got = with_grads(
        lambda *x: rankpo_loss(*x, weights=weights, reduction="sum", **options), tensors
    )
    loss_gate, grad_gate = gates(dtype, 1.0)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(got[0] - exact[0]) < loss_gate * max(weights.sum(), exact[0])
    for ours, want in zip(got[1:], exact[1:], strict=True):
        assert ours.dtype == dtype
        if D == 1 and options.get("normalize", True):  # cosines are signs: no gradient
            assert ours.abs().max() < 8 * torch.finfo(dtype).eps * weights.max()
        else:
            assert error(ours, want) < grad_gate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_pairs", [1, 3], ids=["mean", "rows"])
def test_upstream_gradients_count(dtype, of_pairs, path):
    """One for all, where fp16 must not have lost what a loss scale brings back; and one a row, some
    of them negative."""
    tensors = draw(3, 40, dtype)
    upstream = torch.tensor([2.0**20, -(2.0**19), 0.0][:of_pairs], dtype=torch.float64)
    sized = 1e-6 if of_pairs == 1 else 2.0**-20  # gradients of fp16 that are no fp16 on their way

    def scaled(q, c, r):
        loss = rankpo_loss(q, c, r, reduction="mean" if of_pairs == 1 else "none")
        return (sized * loss * upstream).sum()

    exact = with_grads(
        lambda *x: (
            (sized * definition(*x) * upstream).sum()
            if of_pairs == 1
            else definition(*x, weights=sized * upstream)
        ),
        [x.double() for x in tensors],
    )
    got = with_grads(scaled, tensors)
    for ours, want in zip(got[1:], exact[1:], strict=True):
        assert error(ours, want) < gates(dtype, 0.1)[1]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 1)], ids=str)
def test_each_gradient_is_the_same_without_the_others(needs, path):
    tensors = draw(5, 24, torch.float32)
    exact = with_grads(lambda *x: definition(*x), [x.double() for x in tensors])
    for reduction in ("mean", "none"):
        leaves = [
            x.clone().requires_grad_(bool(need)) for x, need in zip(tensors, needs, strict=True)
        ]
        rankpo_loss(*leaves, reduction=reduction).mean().backward()
        for leaf, want in zip(leaves, exact[1:], strict=True):
            assert (leaf.grad is None) != leaf.requires_grad
            if leaf.requires_grad:
                assert error(leaf.grad, want) < gates(torch.float32, 1 / LOGITS)[1]


def test_a_kept_graph_gives_the_same_gradients_again():
    leaves = [x.requires_grad_() for x in draw(5, 24, torch.float32)]
    for factor in (1.0, 3.0):
        loss = factor * rankpo_loss(*leaves)
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [x.clone() for x in once]
        for x in once:
            x.zero_()
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves), kept))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_gradcheck(kind):
    tensors = [x.requires_grad_() for x in draw(4, 5, torch.float64)]
    reference = torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, c, r, how=reduction: rankpo_loss(
                q, c, r, reference_margins=reference, weights=weights, loss_type=kind,
                temperature=0.5, sft_weight=0.3, reduction=how,
            ),
            tensors,
        )  # fmt: skip


def test_weights_are_relative_in_the_mean():
    tensors = draw(6, 8, torch.float32)
    rows = rankpo_loss(*tensors, reduction="none")
    weights = torch.tensor([0.9, 0.6, 0.0, 0.7, 1.0, 0.5])
    want = (rows * weights).sum() / weights.sum()
    torch.testing.assert_close(rankpo_loss(*tensors, weights=weights), want)
    torch.testing.assert_close(rankpo_loss(*tensors, weights=10 * weights), want)


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e25, 1e-25, 0.0], ids=str)
def test_extreme_norms(size, path):
    q, c, r = draw(4, 16, torch.float32)
    q[0] *= size
    c[1] *= size
    got = with_grads(lambda *x: rankpo_loss(*x, reduction="sum"), (q, c, r))
    exact = with_grads(
        lambda *x: definition(*x, weights=torch.ones(4)), [x.double() for x in (q, c, r)]
    )
    for ours, want in zip(got[1:], exact[1:], strict=True):
        for row, want_row in zip(ours, want, strict=True):  # rows are of sizes of their own
            assert error(row, want_row) < gates(torch.float32, 1 / LOGITS)[1]
    want = torch.stack([(unit_rows(q.double()) * unit_rows(x.double())).sum(1) for x in (c, r)])
    assert (pair_similarities(q, c, r) - want).abs().max() < 8 * 2**-24  # a cosine's roundings
    if size == 0:
        assert not got[1][0].any() and not got[2][1].any()


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "chosen", "rejected"])
def test_nan_stays_in_its_row(where, kind, path):
    tensors = draw(3, 8, torch.float32)
    clean = with_grads(lambda *x: rankpo_loss(*x, reduction="sum", loss_type=kind), tensors)
    tensors[where][1, 2] = torch.nan
    rows = rankpo_loss(*tensors, reduction="none", loss_type=kind)
    assert rows.isnan().tolist() == [False, True, False]
    got = with_grads(lambda *x: rankpo_loss(*x, reduction="sum", loss_type=kind), tensors)
    for ours, want in zip(got[1:], clean[1:], strict=True):
        assert torch.equal(ours[[0, 2]], want[[0, 2]])
    assert got[1 + where][1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", ["infinity", "nan", "largest", "smallest"])
def test_every_number_of_a_dtype_is_read(bits, dtype, path):
    value = {
        "infinity": torch.inf, "nan": torch.nan, "largest": torch.finfo(dtype).max,
        "smallest": torch.finfo(dtype).smallest_normal / 2 if dtype != torch.bfloat16 else 1e-38,
    }[bits]  # fmt: skip
    q, c, r = torch.ones(3, 1, 1, dtype=dtype)
    c[0] = value
    chosen, _ = pair_dots(q, c, r)
    assert torch.equal(chosen.isnan(), c[0].isnan()) and (c[0].isnan() or chosen == c[0].double())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_pairs_the_loss_is_zero(reduction, path):
    tensors = [torch.ones(0, 8, requires_grad=True) for _ in range(3)]
    loss = rankpo_loss(*tensors, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
    loss.sum().backward()
    assert all(x.grad.shape == (0, 8) for x in tensors)
    *_, stats = rankpo_loss_and_grads(*[x.detach() for x in tensors])
    assert torch.stack(stats).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_and_stats_without_autograd(dtype, path):
    tensors = draw(33, 24, dtype)
    options = {"temperature": 0.5, "beta": 1.5, "gamma_beta_ratio": 0.4}
    reference = torch.linspace(-1, 1, 33)
    weights = torch.linspace(0, 1, 33)
    rows = {"reference_margins": reference, "weights": weights}
    want = with_grads(lambda *x: rankpo_loss(*x, **rows, **options), tensors)
    loss, grads, stats = rankpo_loss_and_grads(*tensors, **rows, **options)
    got = loss, *grads
    assert all(map(torch.equal, got, want)) and got[1].dtype == dtype
    chosen, rejected = pair_similarities_definition(*[x.double() for x in tensors])
    over = chosen - rejected - reference
    means = ((over > 0).double().mean(), over.mean(), chosen.mean(), rejected.mean())
    off = (torch.stack(stats) - torch.stack(means)).abs().max()
    assert off < 2 * 8 * 2**-24  # those of two cosines
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum'"):
        rankpo_loss_and_grads(*tensors, reduction="none")


def test_torchs_default_dtype_does_not_matter():
    tensors = draw(33, 100, torch.float32)
    want = with_grads(lambda *x: rankpo_loss(*x), tensors)
    torch.set_default_dtype(torch.float64)
    try:
        got = with_grads(lambda *x: rankpo_loss(*x), tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, want))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(0, 40), D=st.integers(2, 70),
    layout=st.sampled_from(["plain", "transposed", "every-second", "rows-apart", "expanded"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(B, D, layout, seed):
    strided = {
        "plain": lambda x: x,
        "transposed": lambda x: x.T.contiguous().T,
        "every-second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "rows-apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
    }[layout]
    q, c, r = map(strided, draw(B, D, torch.float32, seed))
    got = with_grads(lambda *x: rankpo_loss(*x, reduction="sum"), (q, c, r))
    exact = with_grads(
        lambda *x: definition(*x, weights=torch.ones(B)), [x.double() for x in (q, c, r)]
    )
    gate = gates(torch.float32, 1 / LOGITS)[1]
    for ours, want in zip(got, exact, strict=True):
        assert (ours.double() - want).norm() < gate * max(1.0, want.norm())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    tensors = draw(2501, 1200, torch.float32)  # enough work for three threads, and past the caches
    tensors = [x.to(dtype) for x in tensors]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_grads(lambda *x: rankpo_loss(*x, reduction="sum"), tensors))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    few = with_grads(lambda *x: rankpo_loss(*x, reduction="sum"), [x[:9] for x in tensors])
    assert all(torch.equal(a, b[:9]) for a, b in zip(few[1:], results[0][1:], strict=True))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [] if func.is_view else torch.utils._pytree.tree_leaves(out)
        for x in made:
            self.bytes = max(self.bytes, x.nbytes if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_makes_no_copies_in_fp32(dtype):
    tensors = [x.requires_grad_() for x in draw(64, 512, dtype)]
    with Largest() as largest:
        rankpo_loss(*tensors)
    as_they_leave = 4 if dtype == torch.float16 else 2
    assert largest.bytes <= 64 * 512 * as_they_leave
    with Largest() as largest, torch.no_grad():
        rankpo_loss(*tensors)
    assert largest.bytes <= 64 * 2 * 4


@pytest.mark.parametrize("reference", [None, torch.zeros(6, 1)], ids=["free", "reference"])
def test_opcheck(reference):
    q, *passages = [x.requires_grad_() for x in draw(6, 8, torch.float32)]
    settings = RankPOSettings(sft_weight=0.5).text()
    arguments = (q, passages, None, reference, settings)
    torch.library.opcheck(_rankpo, arguments)
    # gradients are not differentiable by design, so the autograd test does not apply to them
    torch.library.opcheck(
        _rankpo_grads,
        (*arguments, torch.full((6,), 1 / 6), [True, True, False]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(reduction, dynamic):
    tensors, reference = draw(6, 8, torch.float32), torch.linspace(-1, 1, 6)

    def loss(q, c, r):
        return rankpo_loss(2 * q, c, r, reference_margins=reference, reduction=reduction).sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, eager in zip(with_grads(step, tensors), with_grads(loss, tensors), strict=True):
        torch.testing.assert_close(got, eager)


def test_second_derivative_is_a_clear_error():
    q, c, r = draw(4, 8, torch.float64)
    q.requires_grad_()
    for reduction in ("mean", "none"):
        loss = rankpo_loss(q, c, r, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.sum(), q)


def test_autocast_leaves_the_similarities_in_fp32():
    tensors = draw(6, 32, torch.float32)
    want = with_grads(lambda *x: rankpo_loss(*x), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_grads(lambda *x: rankpo_loss(*x), tensors)
    assert all(map(torch.equal, got, want))


def test_hinge_with_label_smoothing_warns_and_names_both():
    with pytest.warns(UserWarning, match=r"label_smoothing=0.1 .* loss_type='hinge'") as told:
        rankpo_loss(*draw(2, 4, torch.float32), loss_type="hinge", label_smoothing=0.1)
    assert told[0].filename == __file__


BAD = {
    "beta": (dict(beta=0.0), "beta must be > 0 and finite, got 0.0"),
    "temperature": (dict(temperature=-1), "temperature must be > 0 and finite, got -1"),
    "smoothing": (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    "type": (dict(loss_type="ipo"), "loss_type must be 'sigmoid' or 'hinge', got 'ipo'"),
    "weights": (dict(sft_weight=0.0, rankpo_weight=0.0), "not both 0"),
    "reference": (dict(reference_margins=torch.zeros(3)), r"reference_margins must be \[4\]"),
    "elsewhere": (
        dict(reference_margins=torch.zeros(4, device="meta")),
        r"must be \[4\] on cpu, got \[4\] on meta",
    ),
    "device": (
        dict(chosen=torch.ones(4, 6, device="meta")),
        "on cpu but chosen are on meta",
    ),
    "infinite": (dict(beta=float("inf")), "beta must be > 0 and finite, got inf"),
    "gamma": (dict(gamma_beta_ratio=float("nan")), "gamma_beta_ratio must be finite"),
    "reduction": (dict(reduction="median"), "reduction must be 'mean', 'sum' or 'none'"),
    "negative": (dict(weights=-torch.ones(4)), "weights must be >= 0, got -1.0"),
    "rows": (dict(weights=torch.zeros(3)), "weights have shape"),
    "shapes": (dict(chosen=torch.ones(4, 5)), r"\(4, 6\), \(4, 5\), \(4, 6\)"),
    "integers": (
        {k: torch.ones(4, 6).int() for k in ("queries", "chosen", "rejected")},
        "queries must be fp64, fp32, bf16 or fp16, got torch.int32",
    ),
    "float8": (dict(rejected=torch.ones(4, 6).to(torch.float8_e4m3fn)), "rejected must be fp64"),
    "no-dims": (
        {k: torch.ones(4, 0) for k in ("queries", "chosen", "rejected")},
        r"queries have no dims: \(4, 0\)",
    ),
    **{
        f"learnt-{name}": ({name: torch.nn.Parameter(torch.tensor(0.4))}, f"{name} must be a numb")
        for name in ("beta", "temperature", "gamma_beta_ratio", "sft_weight")
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {k: torch.ones(4, 6) for k in ("queries", "chosen", "rejected")} | change
    tensors = [arguments.pop(k) for k in ("queries", "chosen", "rejected")]
    with pytest.raises(ValueError, match=message):
        rankpo_loss(*tensors, **arguments)
