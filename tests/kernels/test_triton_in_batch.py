"""The Triton launcher of pair losses: memory, order, launches, and what it does not do.

That losses and gradients are those of the definition is held by `tests/ops/test_in_batch.py`, where
triton is one of the paths.
"""

from dataclasses import replace

import hypothesis
import pytest
import torch
import triton
from hypothesis import strategies as st

from rankpo_kernels.chunked import in_batch as chunks
from rankpo_kernels.problem import KINDS, InBatchProblem, InBatchSettings
from rankpo_kernels.relations import Relations, known
from rankpo_kernels.triton import in_batch
from rankpo_kernels.triton.blocks import padded
from support.gates import error
from support.in_batch_problems import D, M, N, exact, ours, problem, relations_of
from support.info_nce_problems import LAYOUTS
from support.interpreter import LAST_FIRST, grid_order, shadow_memory
from support.launcher import SMALL, NoSync, Work, launches, on_device

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("interpreted")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
interpreted_alone = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="looks into the interpreter"
)
PLAIN = InBatchSettings(normalize=True, workspace_bytes=1 << 20)
EVERYTHING = replace(PLAIN, label_smoothing=0.1, sft_weight=0.4, sft_scale=4.0)


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck():
    """Memory that nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(name, settings, dtype=torch.float32, rows=16, **sizes):
    """Arguments of the launchers, with chunks of so many rows."""
    loss, q, p, options = problem(name, dtype, **sizes)
    relations = relations_of(options)
    relations = relations.with_guide(lambda x: x.to(dtype))
    tiles_n = triton.cdiv(len(p), SMALL.BLOCK_N)
    settings = replace(
        settings, kind="siglip" if loss == "siglip" else settings.kind,
        workspace_bytes=rows * (24 * tiles_n + padded(len(p)) * dtype.itemsize),
    )  # fmt: skip
    keys = known(relations, len(p)) if relations.query_ids_M is not None else None
    weights = torch.linspace(-0.5, 2, len(q))  # upstream gradients may be negative
    numbers = torch.tensor(8.0), torch.tensor(-3.0 if loss == "siglip" else 0.6)
    needs = (True, True, *[loss == "siglip"] * 2)
    return q, p, *numbers, relations, keys, settings, weights, needs


def launch(case, tiles=SMALL):
    q, p, scale, bias, relations, keys, settings, weights, needs = case
    keys = None if keys is None else type(keys)(*map(on_device, keys))
    q, p, relations, weights = map(on_device, (q, p, relations, weights))
    numbers = on_device(scale), on_device(bias)  # as those that are learnt
    on_gpu = InBatchProblem(q, p, *numbers, relations, settings)
    result = in_batch.in_batch(on_gpu, keys, weights, needs, tiles=tiles)
    return [x.cpu() for x in result if x is not None]


FORMS = {
    "rankpo": ("rankpo", PLAIN, torch.float32),
    "everything": ("everything", EVERYTHING, torch.float32),
    "hinge-bf16": ("everything", replace(EVERYTHING, kind="hinge"), torch.bfloat16),
    "siglip-fp16": ("siglip-everything", PLAIN, torch.float16),
    "dots-fp16": ("ids", replace(PLAIN, normalize=False), torch.float16),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.mark.long
@pytest.mark.parametrize(
    ("rows", "parts", "tiles", "sizes"),
    [
        pytest.param(7, 1, SMALL, (M, N, D), id="small-chunks-and-parts-one-by-one"),
        pytest.param(99, 32, None, (65, 129, 72), id="shipped-tiles"),
    ],
)
@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
@dtypes
def test_results_are_those_of_the_chunks_of_torch(
    name, rows, parts, tiles, sizes, dtype, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(in_batch, "BLOCK_P", parts)
    sizes = dict(zip("MND", sizes, strict=True))
    case = case_of(name, EVERYTHING if name == "everything" else PLAIN, dtype, rows, **sizes)
    of_gradients = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    bounds = [2e-6] * 5 + [of_gradients] * 2 + [5e-6] * 2
    for x, want, bound in zip(launch(case, tiles), by_torch(case), bounds, strict=False):
        assert error(x, want) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_without_a_label_or_an_end_are_summed_too(kind):
    """The last two of four tiles of 32 columns: nobody looks there for what is closed."""
    case = case_of("rankpo", replace(PLAIN, kind=kind), M=16, N=128, D=24)
    case = (*case[:4], Relations(torch.arange(16)), None, *case[6:])
    for x, want in zip(launch(case, SMALL), by_torch(case), strict=False):
        assert error(x, want) < 5e-6


def by_torch(case):
    """The same in fp64 on the CPU, whose own tests are those of the definition."""
    q, p, scale, bias, relations, keys, settings, weights, needs = case
    relations = relations.with_guide(torch.Tensor.double)
    settings = replace(settings, workspace_bytes=1 << 20)
    exact = InBatchProblem(q.double(), p.double(), scale, bias, relations, settings)
    result = chunks.in_batch(exact, keys, weights, needs)
    return [x for x in result if x is not None]


@pytest.mark.long
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 19), st.integers(1, 37), st.integers(3, 33)),
    name=st.sampled_from(["everything", "everything-hinge", "siglip-everything"]),
    layout=st.sampled_from(list(LAYOUTS)), rows=st.integers(1, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(sizes, name, layout, rows, seed):
    loss = "hinge" if name == "everything-hinge" else "sigmoid"
    sizes = dict(zip("MND", sizes, strict=True), seed=seed)
    q, p, *rest = case_of(name, replace(PLAIN, kind=loss), rows=rows, **sizes)
    case = (LAYOUTS[layout](q), LAYOUTS[layout](p), *rest)
    # Equal rows cancel in a gradient: its rounding is that of its terms, N slopes and the label's
    # of a scale times weights, over the length of a row.
    shortest = min(x.norm(dim=1).min() for x in case[:2])
    terms = 8 * 2 * sizes["N"] * 2 / shortest
    for got, want in zip(launch(case), by_torch(case), strict=True):
        got, want = (x.double().nan_to_num(neginf=-2) for x in (got, want))  # hardest of no pair
        assert (got - want).norm() < max(2e-5 * max(1.0, want.norm()), 8 * 2**-24 * terms)


@pytest.mark.parametrize("loss", ["rankpo", "siglip"])
def test_small_gradients_of_fp16_are_not_lost(loss):
    """Slopes of e^-20 and less, which fp16 has not, in rows beside which others are large."""
    _, q, p, options = problem(loss, torch.float16, M=17, N=33, D=400)
    labels = options["labels"]
    p[labels[:9]] = q[:9] + 0.25 * p[labels[:9]]  # settled
    given = options | {"backend": "triton", "reduction": "sum"}
    given |= {"weights": torch.where(torch.arange(17) < 9, 1e6, 1e-6)}
    if loss == "rankpo":
        given["temperature"] = 0.08
    numbers = {"scale": 60.0, "bias": -30.0}
    truth = exact(loss, q, p, given, **numbers)
    loss_scale = 2.0 ** -truth[1].abs().amax().log2().round().item()  # for what comes out in fp16
    result = ours(loss, q, p, given, loss_scale, **numbers)
    assert truth[1][:9].norm() > 0.1 * truth[1].norm()
    assert max(map(error, result[1:3], truth[1:3])) < 2e-3


@pytest.mark.long
@interpreted_alone
@forms
def test_no_address_lies_outside_and_no_program_races(form):
    case = case_of(*FORMS[form])
    with shadow_memory():
        launch(case)


@pytest.mark.long
@interpreted_alone
@pytest.mark.parametrize("form", ["everything", "siglip-fp16"])
def test_the_order_of_programs_changes_no_bit(form):
    usual = launch(case_of(*FORMS[form]))
    for seed in (LAST_FIRST, 1):
        with grid_order(seed):
            assert all(map(torch.equal, launch(case_of(*FORMS[form])), usual))


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "needs", "kernels", "products"),
    [
        (torch.float32, True, "prepare tiles settle finish", 2),
        (torch.bfloat16, True, "prepare tiles settle finish", 2),
        (torch.float16, True, "prepare tiles settle tiles settle finish", 2),
        (torch.float16, False, "prepare tiles settle", 0),
    ],
    ids=["fp32", "bf16", "fp16", "forward"],
)
def test_launches_of_one_chunk(dtype, needs, kernels, products):
    *case, _ = case_of("rankpo", PLAIN, dtype, rows=99)
    with launches() as names, Work() as work:
        launch((*case, (needs, needs, False, False)))
    assert names == [f"{name}_kernel" for name in kernels.split()]
    assert sum("mm" in op for op in work.ops) == products
    if dtype != torch.float16:
        assert [op for op in work.ops if "mm" not in op and "copy" not in op] == []


@pytest.mark.long
@forms
def test_the_host_does_not_wait(form):
    case = case_of(*FORMS[form])
    with NoSync(*case[2:4]):  # scale and bias, which the host has
        launch(case)


@pytest.mark.long
@dtypes
def test_score_matrix_is_never_stored(dtype):
    rows, queries, size = 16, 64, 128
    case = case_of("everything", EVERYTHING, dtype, rows, M=queries, N=size, D=4)
    with Work() as work:
        launch(case, replace(SMALL, BLOCK_M=32, BLOCK_N=64))
    assert rows * size <= work.largest <= 2 * rows * size < queries * size


def test_workspace_of_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"workspace_bytes=0 is too small for one row of \d+"):
        launch(case_of("rankpo", PLAIN, rows=0))
