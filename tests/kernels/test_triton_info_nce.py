"""InfoNCE's Triton launcher: losses and gradients are those of the dense definition.

Without a GPU the kernels run in Triton's interpreter, where a program costs tens of milliseconds:
tiles are small, so that few elements take several of them and several chunks.
"""

from dataclasses import replace

import pytest
import torch

from rankpo_kernels.problem import PQ, QP, QQ
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton import info_nce as module
from support.gates import FLOOR, draw, error, gates, plain_torch
from support.info_nce_problems import GRID, M, N, exact, label_and_hardest, problem
from support.launcher import (
    DEVICE,
    LOW,
    PIPELINES,
    ROOMY,
    SMALL,
    TIGHT,
    assert_equals_definition,
    gradients,
    launch,
    launches,
    named,
    option_case,
    rows_fit,
    uneven,
)  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("interpreted", "nothing_is_zero_by_luck"),
]
pipelines = pytest.mark.parametrize("pipeline", PIPELINES)
FEW = ["not-cosine", "margin", "guide", "smoothing", "passage-to-query", "both-ways"]
FEW += ["both-ways-apart", "hard-in-batch", "hard-both-ways"]  # options that few launches serve


@pytest.mark.parametrize(
    ("M", "N", "D", "tiles", "rows", "temperatures"),
    [
        pytest.param(17, 33, 100, SMALL, 99, (0.1, 0.05, 0.02, 0.01), id="one-past-a-tile"),
        pytest.param(33, 65, 64, SMALL, 16, (0.02,), id="three-chunks"),
        pytest.param(16, 32, 384, replace(SMALL, BLOCK_K=64), 99, (0.02,), id="minilm-in-one-tile"),
        pytest.param(65, 129, 64, None, 99, (0.01,), id="shipped-tiles"),
    ],
)
@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pipelines
def test_loss_and_gradients_pass_the_gates(M, N, D, tiles, rows, temperatures, converged, pipeline):
    dtype, how = PIPELINES[pipeline]
    q, p, labels = draw(M, N, D, dtype, converged)
    settings = replace(ROOMY, workspace_bytes=rows_fit(rows, N, dtype))
    for temperature in temperatures:
        case = (q, p, None, Relations(labels), settings)
        mean = torch.full((M,), 1 / M)
        truth = exact(*case, mean, scale=1 / temperature)
        # A loss scale, as mixed precision has it, keeps gradients above fp32's smallest number.
        factor = min(2.0**110, 2.0 ** -truth[1][0].abs().amax().log2().round().item())
        result = launch(
            *case, mean * factor, scale=1 / temperature, tiles=tiles, **how
        )  # fmt: skip
        loss_gate, grad_gate = gates(dtype, temperature)
        if pipeline in ("bf16", "bf16-few-launches"):
            grad_gate = 5e-3  # the rest is for what is stored
        assert error(result.loss_M, truth[0]) < loss_gate
        assert (
            error(result.d_scale / factor, truth[1][2]) < 2 * gates(torch.float32, temperature)[1]
        )
        plain = plain_torch(q, p, labels, 1 / temperature)
        for got, same_dtype, want in zip(result[3:5], plain, truth[1][:2], strict=True):
            off = error(got.double() / factor, want)
            assert off < grad_gate
            assert off < 1.5 * error(same_dtype, want) + FLOOR[dtype]


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02, 0.01])
@pipelines
def test_hardness_passes_the_gates(pipeline, temperature):
    dtype, how = PIPELINES[pipeline]
    hardness = {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}
    case = *problem("curated", M=17, N=33, dtype=dtype), replace(ROOMY, **hardness)
    loss_gate, grad_gate = gates(dtype, temperature)
    bounds = loss_gate, grad_gate, 2 * gates(torch.float32, temperature)[1]
    assert_equals_definition(case, bounds, scale=1 / temperature, **how)


@pipelines
def test_in_one_dimension_cosines_are_signs_without_gradient(pipeline):
    dtype, how = PIPELINES[pipeline]
    q, p, labels = draw(17, 33, 1, dtype, converged=False)
    case = (q, p, None, Relations(labels), ROOMY)
    truth = exact(*case, torch.ones(17), scale=20.0)
    result = launch(*case, torch.ones(17) / 17, scale=20.0, **how)
    assert error(result.loss_M, truth[0]) < gates(dtype, 0.05)[0]
    assert max(x.abs().max() for x in result[3:5]) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", GRID)
def test_options_in_fp32(name):
    assert_equals_definition(named(name), TIGHT)


@pytest.mark.long
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "name",
    ["not-cosine", "excluded", "margin", "guide", "own", "everything-joint", "hard-in-batch"],
)
def test_options_in_low_precision(name, dtype):
    """Those of one softmax are stored in bf16."""
    assert_equals_definition(named(name, dtype), LOW[dtype], stored=dtype == torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        pytest.param("excluded", SMALL, id="no-tile-full"),
        pytest.param("passage-to-query", SMALL, id="columns-of-chunks"),
        pytest.param("everything-joint", replace(SMALL, BLOCK_M=32, BLOCK_N=64), id="everything"),
    ],
)
def test_chunks_smaller_than_a_tile(name, tiles):
    """7 rows of gradients; the statistics take more."""
    assert_equals_definition(named(name, rows=7), TIGHT, tiles=tiles)


@pytest.mark.long
@pytest.mark.parametrize("name", FEW)
def test_options_in_few_launches(name):
    """What it cannot do falls back, and is no case of FEW."""
    with launches() as names:
        assert_equals_definition(named(name, rows=99), TIGHT, few=True)
    assert names[-1] == "finished_kernel"


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "both-ways"])
def test_more_parts_of_a_row_than_are_loaded_at_once(name):
    """18 tiles of columns."""
    _, options = GRID[name]
    case = problem(M=5, N=16 * 17 + 3, D=8)
    settings = replace(ROOMY, **options)
    assert_equals_definition((*case, settings), TIGHT, tiles=replace(SMALL, BLOCK_N=16))


@pytest.mark.long
@pytest.mark.parametrize("few", [False, True])
def test_columns_have_more_pairs_than_are_listed_at_once(few):
    """300 queries whose labels are 3 passages."""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, 4, generator=generator) for n in (300, 3))
    settings = replace(ROOMY, directions=(QP, PQ))
    case = (q, p, None, Relations(torch.arange(300) * 7 % 3), settings)
    tiles = replace(SMALL, BLOCK_M=128, BLOCK_N=16)
    assert_equals_definition(case, TIGHT, tiles=tiles, few=few, scale=5.0)


@pytest.mark.parametrize("few", [False, True])
def test_one_weight_of_all_rows_is_a_number(few):
    case = named("excluded", rows=99)
    of_rows = launch(*case, torch.full((M,), 0.25), scale=20.0, few=few)
    of_all = launch(*case, torch.tensor(0.25), scale=20.0, few=few)
    assert max(map(error, gradients(of_all), gradients(of_rows))) < 1e-6
    assert (of_all.total is not None) == few
    if few:
        assert error(of_all.total, 0.25 * of_rows.loss_M.sum()) < 1e-6


def test_the_scale_may_be_a_number_or_lie_on_the_device(monkeypatch):
    case = named("excluded")
    results = []
    for number in (module.as_number, lambda x: module.Scale(torch.nan, x)):
        monkeypatch.setattr(module, "as_number", number)
        results.append(launch(*case, uneven(M), scale=20.0))
    assert max(map(error, *map(gradients, results))) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    ("pipeline", "names"),
    [("fp32", ["ids"]), ("bf16-stored", ["ids"]), ("fp32", ["ids", "own", "positives"])],
    ids=["exact", "stored", "general"],
)
@pytest.mark.parametrize("hardness", ["", "in_batch_negatives", "hard_negatives"])
def test_similarities_of_the_label_and_of_the_hardest_negative_are_told(pipeline, names, hardness):
    dtype, how = PIPELINES[pipeline]
    case, settings = problem(*names, "curated", dtype=dtype), ROOMY
    if hardness:
        settings = replace(ROOMY, hardness_mode=hardness, hardness_strength=9.0)
    positive_M, hardest_M = label_and_hardest(*case)
    result = launch(*case, settings, uneven(M), scale=20.0, **how)
    assert error(result.hardest_M, hardest_M) < 1e-6
    assert error(result.positive_M, positive_M) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    ("pipeline", "name"),
    [("fp32", "margin"), ("bf16-stored", "margin"), ("fp32", "everything-one-way")],
    ids=["exact", "stored", "general"],
)
def test_integers_and_weights_may_have_gaps(pipeline, name):
    dtype, how = PIPELINES[pipeline]
    q, p, own, relations, settings = named(name, dtype)

    def apart(x):  # what lies between would do as well, but for the result
        return None if x is None else torch.stack([x, x.flip(0)], 1).to(DEVICE)[:, 0]

    runs = [
        launch(q, p, own, related, settings, weights, scale=20.0, **how)
        for related, weights in [
            (relations, uneven(M)), (Relations(*map(apart, relations)), apart(uneven(M))),
        ]
    ]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True) if pair[0] is not None)


# Extremes


@pipelines
@pytest.mark.parametrize("name", ["plain", "everything-joint"])
@pytest.mark.parametrize(("M", "N"), [(0, 3), (0, 0), (1, 1)])
def test_without_negatives_losses_and_gradients_are_zero(M, N, name, pipeline):
    dtype, how = PIPELINES[pipeline]
    options = {} if name == "plain" else {"directions": (QP, QQ), "matryoshka_dims": (4, 8)}
    options |= {"matryoshka_weights": (1.0, 1.0)} if options else {}
    q, p, _ = draw(M, N, 8, dtype, converged=False)
    case = (q, p, None, Relations(torch.arange(M)), replace(ROOMY, **options))
    result = launch(*case, torch.ones(M), scale=20.0, **how)
    assert not result.loss_M.any() and not any(x.any() for x in gradients(result))
    assert result.dq_MD.shape == q.shape and result.dp_ND.shape == p.shape
    assert (result.hardest_M == -torch.inf).all()


@pipelines
def test_a_row_with_everything_masked_has_loss_and_gradient_zero(pipeline):
    dtype, how = PIPELINES[pipeline]
    q, p, _, relations = problem("excluded", dtype=dtype)
    lengths = torch.zeros(M, dtype=torch.int64)
    lengths[3] = N
    relations = relations._replace(
        excluded_offsets=torch.cat([lengths[:1], lengths.cumsum(0)]),
        excluded_columns=torch.arange(N),
    )
    bounds = LOW.get(dtype, TIGHT)
    result = assert_equals_definition((q, p, None, relations, ROOMY), bounds, **how)
    assert result.loss_M[3] == 0 and not result.dq_MD[3].any()
    assert result.hardest_M[3] == -torch.inf


@pipelines
def test_a_zero_vector_has_gradient_zero(pipeline):
    dtype, how = PIPELINES[pipeline]
    case = problem(dtype=dtype)
    q, p, _, relations = case
    q[1], p[2], p[relations.labels_M[3]] = 0, 0, 0
    weights = torch.ones(M)
    bounds = LOW.get(dtype, TIGHT)
    result = assert_equals_definition((*case, ROOMY), bounds, **how, weights=weights)
    assert not result.dq_MD[1].any() and not result.dp_ND[2].any()


def test_with_own_negatives_and_prefixes_a_zero_vector_has_gradient_zero():
    q, p, own, relations, settings = named("everything-one-way")
    q[2], p[2], own[1] = 0, 0, 0
    result = launch(q, p, own, relations, settings, torch.ones(M), scale=20.0)
    assert all(x.isfinite().all() for x in (result.loss_M, *gradients(result)))
    assert not result.dq_MD[2].any() and not result.dp_ND[2].any() and not result.d_own_HD[1].any()


@pytest.mark.parametrize("name", GRID)
def test_what_a_card_is_asked_can_be_drawn(name):
    """`tests/ops/test_cuda.py` runs it, where there is one."""
    q, p, *_, settings = option_case(name, torch.float32)
    assert len(q) == 150 and settings.workspace_bytes < 150 * len(p) * 4 * 2
