"""The persistent kernels for Hopper: losses and gradients are those of the dense definition. In the
interpreter descriptors are plain addresses and specialised warps a plain loop; what it cannot see,
the order of copies and products, is read from the machine code by `make aot`."""

from dataclasses import replace

import pytest
import torch
import triton

from rankpo_kernels.problem import DIRECTIONS, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton import streamed, tiles
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.tiles import STREAMED, Tiles
from support.gates import FLOOR, draw, error, gates, plain_torch
from support.info_nce_problems import exact
from support.interpreter import LAST_FIRST, grid_order, shadow_memory
from support.launcher import (
    ALL,
    DEVICE,
    ROOMY,
    SMALL,
    gradients,
    launches,
    on_device,
    rows_fit,
    uneven,
)  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("interpreted", "nothing_is_zero_by_luck", "three_programs"),
]
TILES = Tiles(16, 64, 16, num_warps=4, num_stages=1, GROUP=2) if DEVICE == "cpu" else STREAMED
SYMMETRIC = {"directions": DIRECTIONS[:2], "partition": "per_direction"}
STATISTICS, GRADIENTS = "streamed_statistics_kernel", "streamed_gradients_kernel"
FORMS = {
    "stored": ({}, True, {STATISTICS}),
    "exact": ({}, False, {STATISTICS, GRADIENTS}),
    "both-directions": (SYMMETRIC, False, {GRADIENTS}),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def three_programs(monkeypatch):
    """Each walks over several tiles, in the interpreter too."""
    monkeypatch.setattr(streamed, "multiprocessors", lambda device: 3)


def run(q, p, labels, weights, form, *, scale=20.0, rows=99, needs=ALL):
    options, stored, _ = FORMS[form]
    settings = replace(ROOMY, workspace_bytes=rows_fit(rows, len(p), q.dtype), **options)
    q, p, relations, weights = map(on_device, (q, p, Relations(labels), weights))
    problem = InfoNCEProblem(q, p, None, torch.tensor(scale), relations, settings)
    result = info_nce(
        problem, weights, needs, tiles=SMALL, streamed=TILES, stored=stored, few=False
    )
    return result._make(x if x is None else x.cpu() for x in result)


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize(
    ("M", "N", "D", "rows"),
    [
        pytest.param(17, 64, 24, 99, id="whole-columns-and-a-block-of-dims-past-the-end"),
        pytest.param(33, 70, 64, 16, id="columns-end-within-a-tile-in-three-chunks"),
        pytest.param(17, 128, 24, 99, id="two-tiles-of-columns"),
    ],
)
@forms
def test_loss_and_gradients_pass_the_gates(form, M, N, D, rows, temperature, converged):
    q, p, labels = draw(M, N, D, torch.bfloat16, converged)
    mean = torch.full((M,), 1 / M)
    settings = replace(ROOMY, **FORMS[form][0])
    truth = exact(q, p, None, Relations(labels), settings, mean, scale=1 / temperature)
    factor = min(2.0**110, 2.0 ** -truth[1][0].abs().amax().log2().round().item())
    result = run(q, p, labels, mean * factor, form, scale=1 / temperature, rows=rows)
    loss_gate, grad_gate = gates(torch.bfloat16, temperature)
    assert error(result.loss_M, truth[0]) < loss_gate
    of_scale = error(result.d_scale / factor, truth[1][2])
    assert of_scale < 2 * gates(torch.float32, temperature)[1]
    grads = [x.double() / factor for x in (result.dq_MD, result.dp_ND)]
    assert max(map(error, grads, truth[1][:2])) < grad_gate
    if form == "both-directions":
        return
    for got, same_dtype, want in zip(
        grads, plain_torch(q, p, labels, 1 / temperature), truth[1][:2], strict=True
    ):
        assert error(got, want) < 1.5 * error(same_dtype, want) + FLOOR[torch.bfloat16]


@forms
def test_kernels_are_those_of_the_form(form):
    q, p, labels = draw(33, 64, 24, torch.bfloat16, False)
    with launches() as kernels:
        run(q, p, labels, uneven(33), form)
    assert {name for name in kernels if name.startswith("streamed")} == FORMS[form][2]
    with launches() as kernels:
        run(q, p[:63], labels, uneven(33), form)  # columns that end within a tile have no slopes
    wanted = FORMS[form][2] if form != "both-directions" else set()
    assert {name for name in kernels if name.startswith("streamed")} == wanted


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
@forms
def test_no_address_lies_outside_and_the_order_of_programs_changes_no_bit(form):
    batch = *draw(33, 64, 40, torch.bfloat16, True), uneven(33)
    with shadow_memory():
        usual = run(*batch, form)
    with grid_order(LAST_FIRST):
        assert all(map(torch.equal, gradients(run(*batch, form)), gradients(usual)))


@pytest.mark.parametrize("signs", ["negative", "of-both-signs"])
@forms
def test_weights_may_be_negative(form, signs):
    """They hold upstream gradients, and the slopes of both directions are taken as logarithms."""
    M, N, D = 33, 128, 24
    q, p, labels = draw(M, N, D, torch.bfloat16, False)
    weights = -uneven(M)
    if signs == "of-both-signs":
        weights[::3] *= -1
    settings = replace(ROOMY, **FORMS[form][0])
    truth = exact(q, p, None, Relations(labels), settings, weights, scale=20.0)
    result = run(q, p, labels, weights, form, rows=16)
    pairs = zip((result.dq_MD, result.dp_ND), truth[1], strict=False)
    assert max(error(*pair) for pair in pairs) < gates(torch.bfloat16, 0.05)[1]


def test_a_zero_vector_has_no_gradient():
    q, p, labels = draw(17, 64, 24, torch.bfloat16, False)
    q[3], p[5] = 0, 0
    result = run(q, p, labels, uneven(17), "exact")
    assert not result.dq_MD[3].any() and not result.dp_ND[5].any()
    assert all(x.isfinite().all() for x in gradients(result))


def test_own_negatives_are_summed_beside_them():
    M, N, D = 17, 70, 24
    q, p, labels = draw(M, N, D, torch.bfloat16, False)
    own = torch.randn(2 * M, D).to(torch.bfloat16)
    relations = Relations(labels, own_offsets=2 * torch.arange(M + 1))
    truth = exact(q, p, own, relations, ROOMY, uneven(M), scale=20.0)
    tensors = map(on_device, (q, p, own, relations, uneven(M)))
    q, p, own, relations, weights = tensors
    problem = InfoNCEProblem(q, p, own, torch.tensor(20.0), relations, ROOMY)
    with launches() as kernels:
        result = info_nce(problem, weights, ALL, tiles=SMALL, streamed=TILES, few=False)
    assert {STATISTICS, GRADIENTS} <= set(kernels)
    assert error(result.loss_M.cpu(), truth[0]) < gates(torch.bfloat16, 0.05)[0]
    pairs = zip(gradients(result), truth[1], strict=True)
    assert max(error(got.cpu(), want) for got, want in pairs) < 5e-3


def test_rows_that_memory_cannot_hand_over_by_descriptor_are_refused():
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert streamed.streams(x, x[1:], x[:, :32])
    misaligned = torch.zeros(8, 60, dtype=torch.bfloat16)
    for other in (misaligned, x[:, 1:], x.T, x[:, ::2], x.float(), x[:1].expand(8, -1)):
        assert not streamed.streams(x, other)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {}),
        ({}, SYMMETRIC),
        ({}, {"directions": DIRECTIONS}),
        ({"query_ids_M": torch.arange(4)}, {}),
        ({}, {"label_smoothing": 0.1}),
        ({}, {"false_negative_margin": 0.1}),
        ({}, {"matryoshka_dims": (512, 1024)}),
    ],
    ids=[
        "plain",
        "symmetric",
        "four-directions",
        "ids",
        "smoothing",
        "margin",
        "matryoshka",
    ],
)
def test_table_takes_them_for_what_they_can_do_on_hopper_alone(monkeypatch, changed, options):
    relations = Relations(torch.arange(4), **changed)
    settings = InfoNCESettings(workspace_bytes=1 << 20, **options)
    plain = not changed and options in ({}, SYMMETRIC)

    def chosen(arch, dtype=torch.bfloat16, D=1024):
        monkeypatch.setattr(tiles, "_architecture", lambda: arch)
        return tiles.streamed_tiles(dtype, D, relations, settings)

    assert chosen(90) == (STREAMED if plain else None)
    assert chosen(80) is None and chosen(100) is None
    assert chosen(90, D=384) is None and chosen(90, dtype=torch.float16) is None


def test_a_callers_allocator_stays():
    mine = lambda size, alignment, stream: None  # noqa: E731
    triton.set_allocator(mine)
    try:
        run(*draw(17, 64, 24, torch.bfloat16, False), uneven(17), "exact")
        assert triton.runtime._allocation._allocator.get() is mine
    finally:
        triton.set_allocator(triton.runtime._allocation.NullAllocator())
