"""fp32 as three products of tf32: the gates of fp32 hold with the rounding of tensor cores, which
the interpreter has not, and is given here."""

import contextlib
from dataclasses import replace

import pytest
import torch
import triton

from rankpo_kernels.problem import PQ, QP, InfoNCEProblem
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.tiles import SPLIT
from support import in_batch_problems
from support.gates import draw, error, gates, pass_the_gates
from support.info_nce_problems import exact
from support.launcher import ALL, ROOMY, launches, on_device
from support.tensor_cores import tensor_cores

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("interpreted")]
SETTINGS = replace(ROOMY, precision="tf32x3")
BOTH = replace(SETTINGS, directions=(QP, PQ), partition="per_direction")
# Tiles of 64 that are whole and that are not; two blocks of 32 dims, each of which a large part of
# the product falls into, and 32 blocks, whose last has 8.
SHAPES = {"few-dims": (70, 64, 64), "many-dims": (33, 40, 1000)}


def cores(extra_bits: int = 1) -> contextlib.AbstractContextManager:
    """An A100's; where kernels are compiled, the GPU's own."""
    simulated = triton.knobs.runtime.interpret
    return tensor_cores(extra_bits) if simulated else contextlib.nullcontext()


def errors(settings, shape, temperature, converged, tiles=None):
    """(of the loss, largest of gradients, of the scale's)."""
    M, N, D = SHAPES[shape]
    q, p, labels = draw(M, N, D, torch.float32, converged)
    weights, relations = torch.full((M,), 1 / M), Relations(labels)
    truth = exact(q, p, None, relations, settings, weights, scale=1 / temperature)
    problem = InfoNCEProblem(
        *map(on_device, (q, p)), None, torch.tensor(1 / temperature), on_device(relations), settings
    )
    factor = min(2.0**110, 2.0 ** -truth[1][0].abs().amax().log2().round().item())
    with cores():
        result = info_nce(problem, on_device(weights * factor), ALL, tiles=tiles)
    grads = [x.cpu().double() / factor for x in (result.dq_MD, result.dp_ND, result.d_scale)]
    found = [result.loss_M.cpu(), *grads]
    loss, *grads, of_scale = map(error, found, (truth[0], *truth[1]))
    return loss, max(grads), of_scale


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("settings", [SETTINGS, BOTH], ids=["one-direction", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_products_of_tf32_pass_the_gates_of_fp32(shape, settings, temperature, converged):
    loss, grads, of_scale = errors(settings, shape, temperature, converged)
    loss_gate, grad_gate = gates(torch.float32, temperature)
    assert loss < loss_gate and grads < grad_gate and of_scale < grad_gate


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="not of a GPU")
def test_one_product_of_tf32_does_not():
    """So the rounding is there."""
    loss, grads, _ = errors(SETTINGS, "few-dims", 0.01, False, replace(SPLIT, PRECISION="tf32"))
    loss_gate, grad_gate = gates(torch.float32, 0.01)
    assert loss > 2 * loss_gate and grads > 5 * grad_gate


@pytest.mark.parametrize("name", ["rankpo", "sft", "reference", "siglip"])
def test_losses_over_pairs_pass_too(name):
    loss, q, p, options = case = in_batch_problems.problem(name, torch.float32, 70, 64, 64)
    truth = in_batch_problems.exact(*case)
    with cores():
        found = in_batch_problems.ours(
            loss, q, p, options | {"backend": "triton", "precision": "tf32x3"}
        )
    pass_the_gates(found, truth, in_batch_problems.largest_logit(*case))


def test_what_is_left_out_by_the_filter_is_so_here():
    q, p, labels = draw(70, 64, 24, torch.float32, converged=False)
    settings = replace(SETTINGS, gradient_filter=0.3)
    problem = lambda settings: InfoNCEProblem(  # noqa: E731
        *map(on_device, (q, p)), None, torch.tensor(20.0), on_device(Relations(labels)), settings
    )
    weights = on_device(torch.full((70,), 1 / 70))
    split, ieee = (
        info_nce(problem(replace(settings, precision=precision)), weights, ALL)
        for precision in ("tf32x3", "exact")
    )
    zeros = [(x.dq_MD == 0).all(1) for x in (split, ieee)]
    assert zeros[0].any() and torch.equal(*zeros)
    assert error(split.dp_ND.cpu(), ieee.dp_ND.cpu()) < 1e-5


def test_products_are_ours_and_not_cublas():
    q, p, labels = draw(20, 64, 24, torch.float32, converged=False)
    problem = InfoNCEProblem(
        *map(on_device, (q, p)), None, torch.tensor(20.0), on_device(Relations(labels)), SETTINGS
    )
    with launches() as names:
        info_nce(problem, on_device(torch.full((20,), 1 / 20)), ALL)
    assert names.count("rows_kernel") == 2
