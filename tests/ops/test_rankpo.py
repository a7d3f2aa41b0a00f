"""RankPO: the authors' definition, gradients, the native kernel, and what torch expects of an
op."""

import pytest
import torch
import torch.nn.functional as F
from gates import error, gates
from hypothesis import given, settings
from hypothesis import strategies as st

from rankpo_fast import rankpo_loss
from rankpo_fast.ops.common import unit_rows
from rankpo_fast.ops.rankpo import (
    _pair_similarities,
    margin_loss,
    pair_similarities,
    pair_similarities_definition,
)

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
    ours = margin_loss(
        chosen - rejected, reference_margins=ref, beta=2.0, temperature=0.1,
        gamma_beta_ratio=gamma, label_smoothing=smoothing, loss_type=kind,
    )  # fmt: skip
    theirs = authors_loss(
        chosen.double(), rejected.double(), None if ref is None else ref.double(),
        2.0, 0.1, gamma, smoothing, kind,
    )  # fmt: skip
    # fp32 scores of up to 1 are rounded at 6e-8 and multiplied by beta / temperature = 20
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=5e-6)
    exact = margin_loss(
        (chosen.double() - rejected.double()),
        reference_margins=None if ref is None else ref.double(), beta=2.0, temperature=0.1,
        gamma_beta_ratio=gamma, label_smoothing=smoothing, loss_type=kind,
    )  # fmt: skip
    torch.testing.assert_close(exact, theirs, rtol=1e-12, atol=1e-12)


def test_sft_is_the_cross_entropy_of_the_two_scores():
    q, c, r = draw(16, 32, torch.float64)
    scores = torch.stack(pair_similarities(q, c, r), 1) / 0.1
    want = F.cross_entropy(scores, torch.zeros(16, dtype=torch.int64))
    got = rankpo_loss(q, c, r, sft_weight=1.0, rankpo_weight=0.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    both = rankpo_loss(q, c, r, sft_weight=0.5, rankpo_weight=2.0)
    torch.testing.assert_close(both, 0.5 * want + 2 * rankpo_loss(q, c, r))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_similarities_and_gradients_pass_the_gates(B, D, dtype, normalize, path):
    tensors = draw(B, D, dtype)
    upstream = torch.randn(2, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def ours(q, c, r):
        return (torch.stack(pair_similarities(q, c, r, normalize)) * upstream).sum()

    def definition(q, c, r):
        return (pair_similarities_definition(q, c, r, normalize) * upstream).sum()

    exact = with_grads(definition, [x.double() for x in tensors])
    got = with_grads(ours, tensors)
    loss_gate, grad_gate = gates(dtype, 1.0)
    assert abs(got[0] - exact[0]) < loss_gate * upstream.abs().sum() * (1 if normalize else D)
    for ours_grad, want in zip(got[1:], exact[1:], strict=True):
        if normalize and D == 1:  # cosines are signs: no gradient
            assert ours_grad.abs().max() < 4 * torch.finfo(dtype).eps * upstream.abs().max() / 0.1
        else:
            assert error(ours_grad, want) < grad_gate


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


@pytest.mark.parametrize("size", [1e25, 1e-25, 0.0], ids=["overflow", "underflow", "zero"])
def test_extreme_norms(size, path):
    q, c, r = draw(4, 16, torch.float32)
    q[0] *= size
    c[1] *= size
    got = with_grads(lambda *x: rankpo_loss(*x), (q, c, r))
    assert all(x.isfinite().all() for x in got)
    want = torch.stack([(unit_rows(q.double()) * unit_rows(x.double())).sum(1) for x in (c, r)])
    torch.testing.assert_close(
        torch.stack(pair_similarities(q, c, r)).double(), want, rtol=0, atol=1e-6
    )
    if size == 0:
        assert not got[1][0].any() and not got[2][1].any()


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
        lambda *x: margin_loss(pair_similarities_definition(*x).diff(dim=0)[0].neg()).sum(),
        [x.double() for x in (q, c, r)],
    )
    for ours, want in zip(got, exact, strict=True):
        assert (ours.double() - want).norm() < 2e-5 * max(1.0, want.norm())


def test_threads_do_not_change_a_bit():
    tensors = draw(2501, 1200, torch.float32)  # enough work for three threads
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_grads(lambda *x: rankpo_loss(*x), tensors))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_opcheck():
    tensors = [x.requires_grad_() for x in draw(6, 8, torch.float32)]
    torch.library.opcheck(_pair_similarities, (*tensors, True))


def test_compiles_as_one_graph():
    tensors = draw(6, 8, torch.float32)
    step = torch.compile(lambda *x: rankpo_loss(*x), fullgraph=True, backend="aot_eager")
    want = with_grads(lambda *x: rankpo_loss(*x), tensors)
    for got, eager in zip(with_grads(step, tensors), want, strict=True):
        torch.testing.assert_close(got, eager)


def test_autocast_leaves_the_similarities_in_fp32():
    tensors = draw(6, 32, torch.float32)
    want = with_grads(lambda *x: rankpo_loss(*x), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_grads(lambda *x: rankpo_loss(*x), tensors)
    assert all(map(torch.equal, got, want))


def test_hinge_with_label_smoothing_warns_and_names_both():
    with pytest.warns(UserWarning, match=r"label_smoothing=0.1 .* loss_type='hinge'"):
        rankpo_loss(*draw(2, 4, torch.float32), loss_type="hinge", label_smoothing=0.1)


BAD = {
    "beta": (dict(beta=0.0), "beta must be > 0 and finite, got 0.0"),
    "temperature": (dict(temperature=-1), "temperature must be > 0 and finite, got -1"),
    "smoothing": (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    "type": (dict(loss_type="ipo"), "loss_type must be 'sigmoid' or 'hinge', got 'ipo'"),
    "weights": (dict(sft_weight=0.0, rankpo_weight=0.0), "not both 0"),
    "reference": (dict(reference_margins=torch.zeros(3)), r"reference_margins must be \[4\]"),
    "rows": (dict(weights=torch.zeros(3)), "weights have shape"),
    "shapes": (dict(chosen=torch.ones(4, 5)), r"\(4, 6\), \(4, 5\), \(4, 6\)"),
    "integers": (
        {k: torch.ones(4, 6).int() for k in ("queries", "chosen", "rejected")},
        "floating",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {k: torch.ones(4, 6) for k in ("queries", "chosen", "rejected")} | change
    tensors = [arguments.pop(k) for k in ("queries", "chosen", "rejected")]
    with pytest.raises(ValueError, match=message):
        rankpo_loss(*tensors, **arguments)
