"""The divergence from a reference's ranking of a batch: its definition, gradients and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast.ops.in_batch_kl import (
    BUFFERS,
    in_batch_kl_definition,
    in_batch_kl_loss_and_grads,
)

T = 0.05


def draw(M, N, D, G, dtype=torch.float64):
    """queries, passages, and both by a reference that agrees to some extent."""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (M, N))
    turn = torch.randn(D, G, generator=generator, dtype=torch.float64)
    noise = [torch.randn(n, G, generator=generator, dtype=torch.float64) for n in (M, N)]
    reference = [x @ turn + y for x, y in zip((q, p), noise, strict=True)]
    return [x.to(dtype) for x in (q, p, *reference)]


def exact(tensors, weights=None):
    """The weighted mean of the definition and its gradients, in fp64."""
    q, p, *reference = (x.double() for x in tensors)
    q.requires_grad_(), p.requires_grad_()
    loss_M = in_batch_kl_definition(q, p, *reference, T)
    weights = torch.ones_like(loss_M) if weights is None else weights
    loss = (loss_M * weights).sum() / weights.sum()
    return loss.detach(), *torch.autograd.grad(loss, (q, p))


@pytest.mark.parametrize(
    ("M", "N", "workspace"),
    [
        pytest.param(1, 1, None, id="nothing-to-rank"),
        pytest.param(7, 13, BUFFERS * 13 * 8 * 2, id="two-rows-a-chunk"),
        pytest.param(5, 9, None, id="one-chunk"),
    ],
)
def test_it_is_its_definition(M, N, workspace):
    tensors, weights = draw(M, N, 6, 4), torch.rand(M, dtype=torch.float64)
    got = in_batch_kl_loss_and_grads(
        *tensors, temperature=T, weights=weights, workspace_bytes=workspace
    )
    want, dq, dp = exact(tensors, weights)
    torch.testing.assert_close(got.loss, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.grads.queries, dq, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.grads.passages, dp, atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_finite_differences():
    q, p, *reference = draw(3, 5, 4, 3)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, p):
            loss, ctx.grads, _ = in_batch_kl_loss_and_grads(q, p, *reference, temperature=T)
            return loss

        @staticmethod
        def backward(ctx, upstream):
            return tuple(upstream * grad for grad in ctx.grads)

    assert torch.autograd.gradcheck(Loss.apply, (q.requires_grad_(), p.requires_grad_()))


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float32, 5e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_rounded_inputs_lose_no_more_than_they_must(dtype, bound):
    tensors = draw(33, 70, 48, 16, dtype)
    got, want = in_batch_kl_loss_and_grads(*tensors, temperature=T), exact(tensors)
    for ours, right in zip((got.loss, *got.grads), want, strict=True):
        assert (ours.double() - right).norm() <= bound * right.norm()
    assert got.grads.queries.dtype == dtype


def test_a_model_that_is_its_reference_has_no_loss_and_no_gradient():
    q, p, *_ = draw(6, 11, 8, 8)
    loss, grads, stats = in_batch_kl_loss_and_grads(q, p, 3 * q, 2 * p, temperature=T)
    assert loss < 1e-14 and max(grad.abs().max() for grad in grads) < 1e-13
    assert stats.top1_kept == 1


def test_its_gradient_leads_back_to_the_reference():
    q, p, *reference = draw(8, 12, 6, 6)
    losses = []
    for _ in range(60):
        loss, grads, stats = in_batch_kl_loss_and_grads(q, p, *reference, temperature=T)
        q, p = q - 0.5 * grads.queries, p - 0.5 * grads.passages
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert stats.top1_kept > 0.8


def test_no_tensor_is_larger_than_a_chunk():
    M, N = 60, 80

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
            return made

    with Watch() as watch:
        in_batch_kl_loss_and_grads(
            *draw(M, N, 4, 3), temperature=T, workspace_bytes=BUFFERS * N * 8 * 9
        )
    assert N * 4 <= watch.largest <= 9 * N


@pytest.mark.parametrize("M", [0, 3], ids=["no-rows", "no-weight"])
def test_of_nothing_the_loss_is_0(M):
    got = in_batch_kl_loss_and_grads(
        *draw(M, 4, 5, 5), temperature=T, weights=torch.zeros(M, dtype=torch.float64)
    )
    assert got.loss == 0 and not got.grads.passages.any() and got.grads.queries.shape == (M, 5)


def test_a_zero_vector_has_no_gradient():
    q, p, *reference = draw(3, 4, 5, 5)
    q[1], p[2] = 0, 0
    _, grads, _ = in_batch_kl_loss_and_grads(q, p, *reference, temperature=T)
    assert not grads.queries[1].any() and not grads.passages[2].any()
    assert grads.queries.isfinite().all() and grads.queries[0].any()


def test_what_does_not_fit_is_named():
    q, p, r, t = draw(3, 4, 5, 5)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        in_batch_kl_loss_and_grads(q, p, r, t, temperature=0)
    with pytest.raises(ValueError, match=r"reference must be \[3, G\] and \[4, G\]"):
        in_batch_kl_loss_and_grads(q, p, t, t, temperature=T)
