"""Both directions from exponentials that are kept: losses and gradients are those of the dense
definition, and what does not fit beside the positives is computed again."""

from dataclasses import replace

import pytest
import torch

from rankpo_kernels.problem import DIRECTIONS, PQ, QP, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.tiles import against_keeping
from support.gates import FLOOR, draw, error, gates
from support.info_nce_problems import exact
from support.interpreter import LAST_FIRST, grid_order, shadow_memory
from support.launcher import ALL, DEVICE, ROOMY, SMALL, gradients, launches, on_device, uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("interpreted", "nothing_is_zero_by_luck"),
]
BOTH = replace(ROOMY, directions=(QP, PQ), partition="per_direction")
KEPT = {"prepare_kernel", "statistics_kernel", "pairs_kernel", "columns_kernel", "turn_kernel",
        "rest_kernel", "finish_kernel"}  # fmt: skip


def run(q, p, relations, weights, settings=BOTH, *, own=None, scale=20.0, needs=ALL, kept=True):
    tensors = map(on_device, (q, p, own, relations, weights))
    q, p, own, relations, weights = tensors
    problem = InfoNCEProblem(q, p, own, torch.tensor(scale), relations, settings)
    result = info_nce(problem, weights, needs, tiles=SMALL, few=False, kept=kept)
    return result._make(x if x is None else x.cpu() for x in result)


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.01])
@pytest.mark.parametrize(
    ("M", "N", "D", "partition", "normalize"),
    [
        pytest.param(33, 70, 64, "per_direction", True, id="ends-within-tiles"),
        pytest.param(40, 24, 24, "joint", True, id="several-queries-a-passage"),
        pytest.param(17, 32, 24, "joint", False, id="dots"),
    ],
)
def test_loss_and_gradients_pass_the_gates(M, N, D, partition, normalize, temperature, converged):
    q, p, labels = draw(M, N, D, torch.bfloat16, converged)
    if not normalize:
        q, p = (torch.nn.functional.normalize(x.float(), dim=1).to(x.dtype) for x in (q, p))
    settings = replace(BOTH, partition=partition, normalize=normalize)
    mean, scale = torch.full((M,), 1 / M), 1 / temperature
    truth = exact(q, p, None, Relations(labels), settings, mean, scale=scale)
    factor = min(2.0**110, 2.0 ** -truth[1][0].abs().amax().log2().round().item())
    result = run(q, p, Relations(labels), mean * factor, settings, scale=scale)
    loss_gate, _ = gates(torch.bfloat16, temperature)
    assert error(result.loss_M, truth[0]) < loss_gate
    assert error(result.d_scale / factor, truth[1][2]) < 2 * gates(torch.float32, temperature)[1]
    grads = [x.double() / factor for x in (result.dq_MD, result.dp_ND)]
    assert max(map(error, grads, truth[1][:2])) < 8e-3  # of what is stored in bf16


@pytest.mark.parametrize("signs", ["negative", "of-both-signs"])
def test_weights_may_be_negative(signs):
    q, p, labels = draw(33, 64, 24, torch.bfloat16, False)
    weights = -uneven(33)
    if signs == "of-both-signs":
        weights[::3] *= -1
    truth = exact(q, p, None, Relations(labels), BOTH, weights, scale=20.0)
    result = run(q, p, Relations(labels), weights)
    pairs = zip((result.dq_MD, result.dp_ND), truth[1], strict=False)
    assert max(error(*pair) for pair in pairs) < 8e-3


def circle(*degrees):
    """Unit vectors in the first two dims of 16."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    plane = torch.stack([angle.cos(), angle.sin()], 1)
    return torch.nn.functional.pad(plane, (0, 14)).to(torch.bfloat16)


# at a scale of 100: (queries, passages), of which the last pair is
FAR = {
    "a-row-above-its-positive": (circle(0, 5, 10, 30), circle(0, 5, 10, -60)),
    "a-column-below-every-positive": (circle(0, 5, 10, 260), circle(0, 5, 10, 120)),
}


@pytest.mark.parametrize("case", FAR)
def test_what_does_not_fit_beside_the_positives_is_computed_again(case):
    q, p = FAR[case]
    relations, weights = Relations(torch.arange(4)), torch.ones(4)
    truth = exact(q, p, None, relations, BOTH, weights, scale=100.0)
    result = run(q, p, relations, weights, scale=100.0)
    for got, want in zip((result.dq_MD, result.dp_ND), truth[1], strict=False):
        assert error(got[-1], want[-1]) < 8e-3 and error(got, want) < 8e-3


def test_own_negatives_are_summed_beside_them():
    q, p, labels = draw(17, 70, 24, torch.bfloat16, False)
    own = torch.randn(34, 24).to(torch.bfloat16)
    relations = Relations(labels, own_offsets=2 * torch.arange(18))
    truth = exact(q, p, own, relations, BOTH, uneven(17), scale=20.0)
    result = run(q, p, relations, uneven(17), own=own)
    pairs = zip(gradients(result), truth[1], strict=True)
    assert max(error(got, want) for got, want in pairs) < 8e-3


def test_kernels_are_those_of_the_form():
    q, p, labels = draw(33, 64, 24, torch.bfloat16, False)
    case = q, p, Relations(labels), uneven(33)
    with launches() as names:
        run(*case)
    assert set(names) == KEPT
    parts = 12 * (33 * 64 // SMALL.BLOCK_N + 64 * -(-33 // SMALL.BLOCK_M))
    needed = 33 * 64 * 2 + parts  # bytes of the workspace
    with launches() as names:
        run(*case, replace(BOTH, workspace_bytes=needed))
    assert set(names) == KEPT
    with pytest.raises(ValueError, match=f"{needed - 1} of the {needed} that 33 x 64 take"):
        run(*case, replace(BOTH, workspace_bytes=needed - 1))
    with launches() as names:
        run(*case, needs=(False, False, False, True))  # which no product is needed for
    assert "turn_kernel" not in names


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_no_address_lies_outside_and_the_order_of_programs_changes_no_bit():
    q, p, labels = draw(33, 70, 40, torch.bfloat16, True)
    case = q, p, Relations(labels), uneven(33)
    with shadow_memory():
        usual = run(*case)
    with grid_order(LAST_FIRST):
        assert all(map(torch.equal, gradients(run(*case)), gradients(usual)))


def test_zero_vectors_and_nan():
    q, p, labels = draw(17, 64, 24, torch.bfloat16, False)
    q[3], p[5] = 0, 0
    result = run(q, p, Relations(labels), uneven(17))
    assert not result.dq_MD[3].any() and not result.dp_ND[5].any()
    assert all(x.isfinite().all() for x in gradients(result))
    q[7, 0] = torch.nan
    result = run(q, p, Relations(labels), uneven(17))
    assert result.dq_MD[7].isnan().all() and result.loss_M.isnan().any()


def test_error_is_that_of_bf16_alone():
    """Besides the scores' own, of two roundings of what is stored."""
    q, p, labels = draw(33, 64, 24, torch.bfloat16, False)
    truth = exact(q, p, None, Relations(labels), BOTH, uneven(33), scale=20.0)[1]
    kept, twice = (run(q, p, Relations(labels), uneven(33), kept=kept) for kept in (True, False))
    for name, want in zip(("dq_MD", "dp_ND"), truth, strict=False):
        ours, exact_form = (error(getattr(x, name), want) for x in (kept, twice))
        assert ours < 2 * exact_form + FLOOR[torch.bfloat16]


@pytest.mark.parametrize(
    ("changed", "options", "takes"),
    [
        ({}, {}, True),
        ({}, {"partition": "joint"}, True),
        ({"own_offsets": torch.zeros(5, dtype=torch.int64)}, {}, True),
        ({"query_ids_M": torch.arange(4)}, {}, False),
        ({}, {"directions": (QP,)}, False),
        ({}, {"directions": DIRECTIONS}, False),
        ({}, {"label_smoothing": 0.1}, False),
        ({}, {"false_negative_margin": 0.1}, False),
        ({}, {"hardness_mode": "all_negatives", "hardness_strength": 1.0}, False),
        ({}, {"matryoshka_dims": (512, 1024)}, False),
    ],
)
def test_table_takes_it_for_what_it_can_do(changed, options, takes):
    relations = Relations(torch.arange(4), **changed)
    settings = InfoNCESettings(
        **{"workspace_bytes": 1 << 20, "directions": (QP, PQ), "partition": "per_direction"}
        | options
    )
    assert (against_keeping(torch.bfloat16, 1024, relations, settings) == "") == takes
    assert against_keeping(torch.bfloat16, 384, relations, settings)
    assert against_keeping(torch.float16, 1024, relations, settings)
