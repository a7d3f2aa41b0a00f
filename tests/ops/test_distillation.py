"""MarginMSE and KL of similarities against a teacher's scores: their definitions, padding, and what
torch expects of a loss."""

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast import DistillKLLoss, MarginMSELoss, distill_kl_loss, margin_mse_loss
from rankpo_fast.ops.distillation import distill_kl_definition, margin_mse_definition
from support.gates import error, gates

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOSSES = {
    "all-margins": (margin_mse_loss, margin_mse_definition, {}),
    "first-margins": (margin_mse_loss, margin_mse_definition, {"pairs": "first"}),
    "kl": (distill_kl_loss, distill_kl_definition, {}),
}
losses = pytest.mark.parametrize("name", LOSSES)
TEMPERATURES = {"temperature": 0.5, "teacher_temperature": 4.0}


def draw(B, K, D, dtype=torch.float64, seed=0):
    """queries, passages and scores: padding in every second query, and where there are so many a
    query with one passage and one with none."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, D, generator=generator, dtype=torch.float64)
    p = q[:, None] + torch.randn(B, K, D, generator=generator, dtype=torch.float64)
    scores = 3 * torch.randn(B, K, generator=generator, dtype=torch.float64)
    scores[::2, : K // 2 : 2] = torch.nan
    scores[2:3, 1:], scores[3:4] = torch.nan, torch.nan
    return q.to(dtype), p.to(dtype), scores


def exact(name, q, p, scores, normalize=True):
    """Losses [B] of the definition, in fp64."""
    _, definition, options = LOSSES[name]
    q, p = q.double(), p.double()
    q = q[:, None].expand_as(p)
    s = F.cosine_similarity(q, p, dim=2, eps=1e-30) if normalize else (q * p).sum(2)
    scaled = s / TEMPERATURES["temperature"], scores / TEMPERATURES["teacher_temperature"]
    return definition(*scaled, **options)


def ours(name, q, p, scores, **more):
    loss, _, options = LOSSES[name]
    return loss(q, p, scores, **TEMPERATURES, **options, **more)


def with_grads(function, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize(
    ("B", "K", "D"),
    [pytest.param(1, 1, 8, id="nothing-to-compare"), pytest.param(5, 6, 33, id="odd")],
)
def test_loss_and_gradients_pass_the_gates(B, K, D, normalize, dtype, name):
    q, p, scores = draw(B, K, D, dtype)
    weights = torch.linspace(0.5, 2, B, dtype=torch.float64)
    want = with_grads(lambda q, p: weights @ exact(name, q, p, scores, normalize), [q, p])
    got = with_grads(
        lambda q, p: ours(
            name, q, p, scores, weights=weights, reduction="sum", normalize=normalize
        ),
        [q, p],
    )
    largest = 1.0 if normalize else 4.0 * D  # of a dot product
    loss_gate, grad_gate = gates(dtype, TEMPERATURES["temperature"] / largest)
    assert abs(got[0] - want[0]) <= loss_gate * max(weights.sum(), want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == dtype and error(a, b) < grad_gate
    assert not got[2][scores.isnan()].any()


@losses
def test_gradcheck(name):
    q, p, scores = draw(5, 4, 6)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda q, p, how=reduction: ours(name, q, p, scores, weights=weights, reduction=how),
            [q.requires_grad_(), p.requires_grad_()],
        )


@losses
def test_a_student_that_agrees_has_no_loss(name):
    """Scores may be shifted: margins and softmax do not see it."""
    q, p, _ = draw(4, 5, 16)
    s = F.cosine_similarity(q[:, None].expand_as(p), p, dim=2)
    scores = TEMPERATURES["teacher_temperature"] * (s / TEMPERATURES["temperature"] + 7)
    loss, *grads = with_grads(lambda q, p: ours(name, q, p, scores), [q, p])
    assert loss < 1e-24 and max(x.abs().max() for x in grads) < 1e-12


@losses
def test_padding_is_not_there(name):
    """Neither NaN in it nor its number is noticed; ranks without a row take part."""
    q, p, scores = draw(5, 6, 8)
    want = with_grads(lambda q, p: ours(name, q, p, scores), [q, p])
    p[scores.isnan()] = torch.nan
    more = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in (p, scores)]
    loss, dq, dp = with_grads(lambda q, p: ours(name, q, p, more[1]), [q, more[0]])
    for a, b in zip((loss, dq, dp[:, :6]), want, strict=True):
        torch.testing.assert_close(a, b)
    assert not dp[:, 6:].any()
    loss, *grads = with_grads(lambda q, p: ours(name, q, p, scores[:0]), [q[:0], p[:0]])
    assert loss == 0 and [len(x) for x in grads] == [0, 0]


@losses
@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0], ids=str)
def test_extreme_norms(size, name):
    q, p, scores = (x.float() for x in draw(5, 6, 8))
    want = with_grads(lambda q, p: ours(name, q, p, scores), [q, p])
    q[0] *= size
    p[1, 2] *= size
    got = with_grads(lambda q, p: ours(name, q, p, scores), [q, p])
    if size:
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1][0] * size, want[1][0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(got[2][1, 2] * size, want[2][1, 2], rtol=1e-4, atol=1e-7)
    else:
        assert got[0].isfinite() and not got[1][0].any() and not got[2][1, 2].any()


@losses
def test_nan_stays_with_its_query(name):
    q, p, _ = draw(3, 4, 8)
    p[1, 2, 3] = torch.nan
    scores = torch.arange(12.0).view(3, 4)
    rows = ours(name, q, p, scores, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


@losses
def test_compiles_as_one_graph(name):
    q, p, scores = draw(5, 4, 6, torch.float32)
    step = torch.compile(lambda q, p: ours(name, q, p, scores), fullgraph=True, backend="aot_eager")
    eager = with_grads(lambda q, p: ours(name, q, p, scores), [q, p])
    for a, b in zip(with_grads(step, [q, p]), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_modules_equal_the_functions():
    q, p, scores = draw(5, 4, 6)
    weights = torch.rand(5)
    for module, loss, options in (
        (MarginMSELoss, margin_mse_loss, {"pairs": "first", "temperature": 0.1}),
        (DistillKLLoss, distill_kl_loss, {"teacher_temperature": 2.0}),
    ):
        want = loss(q, p, scores, weights=weights, **options)
        assert module(**options)(q, p, scores, weights=weights) == want
        with pytest.raises(TypeError, match=f"{loss.__name__} has no option beta"):
            module(beta=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be > 0 and finite, got 0"),
        ({"teacher_temperature": torch.ones(())}, "teacher_temperature must be a number"),
        ({"pairs": "best"}, "pairs must be one of 'all', 'first', got 'best'"),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none'"),
        ({"scores": torch.ones(4, 2)}, r"scores must be \[4, 3\] on cpu, got \[4, 2\] on cpu"),
        ({"passages": torch.ones(4, 6)}, r"\[B, D\] and \[B, K, D\], got \(4, 6\), \(4, 6\)"),
        ({"passages": torch.ones(4, 3, 5)}, r"passages must be \[4, K, 6\], got \(4, 3, 5\)"),
        ({"queries": torch.ones(4, 6).int()}, "queries must be fp64, .* torch.int32"),
        ({"weights": torch.ones(3)}, "weights have shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    shapes = {"queries": (4, 6), "passages": (4, 3, 6), "scores": (4, 3)}
    arguments = {name: torch.ones(shape) for name, shape in shapes.items()} | change
    with pytest.raises(ValueError, match=message):
        margin_mse_loss(*[arguments.pop(name) for name in shapes], **arguments)
