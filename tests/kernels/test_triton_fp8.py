"""Scores in fp8: the error is that of e4m3, and gradients are those of the scores as they are."""

import math
from dataclasses import replace

import pytest
import torch

from rankpo_kernels.problem import PQ, QP, InfoNCEProblem
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.inputs import in_range_of_fp8
from support.gates import draw, error
from support.info_nce_problems import exact
from support.launcher import ALL, DEVICE, ROOMY, SMALL, launches, on_device

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("interpreted", "nothing_is_zero_by_luck"),
    pytest.mark.skipif(DEVICE == "cuda" and not GPU, reason="a GPU without fp8"),
]
ONE = replace(ROOMY, precision="fp8")
BOTH = replace(ONE, directions=(QP, PQ), partition="per_direction")
FORMS = {
    "exact": (ONE, {"stored": False}),
    "stored": (ONE, {"stored": True}),
    "both": (BOTH, {"kept": False}),
    "kept": (BOTH, {"kept": True}),
}
# Of e4m3: 3 digits after the first, so elements are off by 2^-4 of themselves at most, and by
# 2^-4 / sqrt(3) x 0.72 in the mean square over what a number can be. Of both sides, D of them.
ROUNDING = math.sqrt(2) * 2**-4 / math.sqrt(3) * 0.72


def run(q, p, relations, settings, scale, **how):
    problem = InfoNCEProblem(
        *map(on_device, (q, p)), None, torch.tensor(scale), on_device(relations), settings
    )
    weights = on_device(torch.full((len(q),), 1 / len(q)))
    tiles = replace(SMALL, BLOCK_K=32)
    result = info_nce(problem, weights, ALL, tiles=tiles, **how)
    return result._make(x if x is None else x.cpu() for x in result)


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("form", FORMS)
def test_errors_are_those_of_fp8(form, temperature, converged):
    """A logit is off by S sigma, sigma = rounding / sqrt(D): so is, relatively, a loss at most, and
    a gradient twice; and both have what bf16 rounds. Three sigma of Frobenius norms over rows."""
    M, N, D = 40, 48, 256
    settings, how = FORMS[form]
    q, p, labels = draw(M, N, D, torch.bfloat16, converged)
    weights = torch.full((M,), 1 / M)
    truth = exact(q, p, None, Relations(labels), settings, weights, scale=1 / temperature)
    result = run(q, p, Relations(labels), settings, 1 / temperature, **how)
    sigma = ROUNDING / math.sqrt(D) / temperature
    assert 0.01 * sigma < error(result.loss_M, truth[0]) < 3 * sigma
    pairs = zip((result.dq_MD, result.dp_ND), truth[1], strict=False)
    assert max(error(*pair) for pair in pairs) < 8e-3 + 6 * sigma


def test_gradients_are_those_of_the_rounded_scores():
    """Nothing else is in fp8: with embeddings that e4m3 holds, there is no error of it."""
    q, p, labels = draw(33, 40, 64, torch.float32, converged=False)
    q, p = (x.to(torch.float8_e4m3fn).to(torch.bfloat16) for x in (q, p))
    weights = torch.full((33,), 1 / 33)
    truth = exact(q, p, None, Relations(labels), ONE, weights, scale=20.0)
    result = run(q, p, Relations(labels), ONE, 20.0, stored=False)
    assert error(result.loss_M, truth[0]) < 1e-5
    assert error(result.dq_MD, truth[1][0]) < 8e-3 and error(result.dp_ND, truth[1][1]) < 8e-3


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e4, 1e30])
def test_rows_of_any_size_are_brought_into_range(size):
    q, p, labels = draw(17, 24, 32, torch.bfloat16, converged=False)
    usual = run(q, p, Relations(labels), ONE, 20.0, stored=False)
    power = 2.0 ** round(math.log2(size))
    q[::2], p[1::3] = q[::2] * power, p[1::3] / power
    scaled = run(q, p, Relations(labels), ONE, 20.0, stored=False)
    assert torch.equal(scaled.loss_M, usual.loss_M)
    assert torch.equal(scaled.dq_MD[::2], usual.dq_MD[::2] / power)
    assert torch.equal(scaled.dp_ND[1::3], usual.dp_ND[1::3] * power)


def test_powers_of_two_and_zeros():
    x = torch.tensor([[3.0, -200.0], [0.0, 0.0], [1e-30, 0.0]], dtype=torch.bfloat16)
    scaled, factor = in_range_of_fp8(x)
    assert torch.equal(scaled.float(), x.float() * factor.float()[:, None])
    assert scaled[0].abs().max() == 200 and not scaled[1].any() and 128 <= scaled[2, 0] < 256


def test_few_launches_are_not_taken():
    q, p, labels = draw(16, 32, 32, torch.bfloat16, converged=False)
    with launches() as names:
        run(q, p, Relations(labels), ONE, 20.0, few=True)
    assert "finished_kernel" not in names
