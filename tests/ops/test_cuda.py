"""The losses on a GPU against fp64 on the CPU; skipped where there is no GPU."""

import pytest
import torch
from gates import draw, error, gates

from rankpo_fast import info_nce_loss, rankpo_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(function, tensors, loss_scale):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    upstream = torch.tensor(loss_scale, dtype=loss.dtype, device=loss.device)
    return loss.detach(), *(
        g.double() / loss_scale for g in torch.autograd.grad(loss, leaves, upstream)
    )


def check(function, tensors, dtype, temperature):
    """`function` on the GPU passes the gates against itself in fp64 on the CPU, whose own gates
    hold."""
    exact = gradients(function, [x.double() for x in tensors], 1.0)
    loss_scale = min(2.0**110, 2.0 ** -exact[1].abs().amax().log2().round().item())
    got = [x.cpu() for x in gradients(function, [x.cuda() for x in tensors], loss_scale)]
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(got[0], exact[0]) < loss_gate
    assert max(error(a, b) for a, b in zip(got[1:], exact[1:], strict=True)) < grad_gate


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "D"),
    [
        pytest.param(65, 129, 100, id="nothing-round"),
        pytest.param(128, 640, 384, id="minilm-with-four-negatives"),
    ],
)
def test_info_nce_passes_the_gates_on_the_gpu(M, N, D, dtype, temperature, converged):
    q, p, labels = draw(M, N, D, dtype, converged)
    ids = torch.arange(N) // 2

    def loss(q, p):
        return info_nce_loss(
            q, p, labels.to(q.device), temperature=temperature, passage_ids=ids.to(q.device),
            workspace_bytes=50 * 8 * N,
        )  # fmt: skip

    check(loss, (q, p), dtype, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), [(33, 100), pytest.param(64, 384, id="minilm")])
def test_rankpo_passes_the_gates_on_the_gpu(B, D, dtype):
    q, c, _ = draw(B, B, D, dtype, converged=True)
    r = c.flip(0).contiguous()
    check(lambda *x: rankpo_loss(*x, temperature=1.0), (q, c, r), dtype, 1.0)
